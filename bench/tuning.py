"""Tiles, warps and stages of the kernels as subjects of a contest, beside those chosen now.

python -m bench.tuning      compiles them all for the GPU that is here, on all cores but six
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from bench import subjects
from bench.cases import Case, cases
from bench.kernel_call import STRATEGIES, KernelCall, choose_plan
from bench.measure import GraphedCall
from bench.subjects import Entry, Problem, Unavailable, Wrong
from gpn_triton.kernels import offline, tiles
from gpn_triton.kernels.tiles import Tile

# share of spikes by which two tiles may differ: sums in another order move a spike at its
# threshold, and what follows parts
FLIPS = 0.002


def swept(case: Case, way: str) -> dict[str, tuple[str, Tile | None]]:
    """The subjects of a case by name: strategy and tile; None: the tiles chosen now.

    Args:
        way: forward or backward, whose tile it is.
    """
    block = tiles.block(case.N)
    # likelier ones first
    persistent = [
        Tile(rows, block, block, warps, stages)
        for rows, warps, stages in itertools.product((16, 32, 64), (8, 4, 16), (3, 2, 1))
    ]
    shapes = [
        (32, 32, 4), (64, 32, 8), (64, 32, 4), (16, 32, 4), (64, 64, 8), (32, 64, 4),
        (128, 32, 8), (128, 64, 8),
    ]  # fmt: skip
    loops = (64, 3), (64, 2), (32, 4), (32, 3)
    stepwise = [
        Tile(rows, columns, depth, warps, stages, chained)
        for (rows, columns, warps), (depth, stages) in itertools.product(shapes, loops)
        # one sum or three is a question where a program has enough rows to keep either busy
        for chained in (False, True)[: 1 + (way == "backward" and rows >= 64)]
    ]
    both = dict(zip(STRATEGIES, (persistent, stepwise), strict=True))
    better = "persistent" if case.N <= tiles.PERSISTENT_N else "stepwise"
    tiny = case.name == "tiny"
    found: dict[str, tuple[str, Tile | None]] = {}
    for strategy in STRATEGIES if tiny else (better,):
        found[f"gpn-{strategy}"] = strategy, None
        for tile in both[strategy][: 1 if tiny else None]:
            sizes = f"{tile.BLOCK_B}x{tile.BLOCK_N}x{tile.BLOCK_K}"
            name = f"{sizes}-warps{tile.num_warps}-stages{tile.num_stages}"
            found[name + "-chained" * tile.chained] = strategy, tile
    return found


def subjects_of(case: Case, benchmark: str) -> dict[str, tuple[str, Tile | None]]:
    """What is swept of a case in the benchmark of that name, which ends in the way."""
    return swept(case, benchmark.rpartition("_")[2])


def entries(case: Case, device: torch.device, way: str) -> Callable[[str], Entry]:
    """A function that prepares a subject of a case, and of a way, by name.

    The chosen tiles are checked against float64, the others against the chosen ones.
    """
    problem = functools.cache(lambda: Problem(case, device))
    backward = way == "backward"
    chosen = functools.cache(lambda s: subjects.prepare(problem(), f"gpn-{s}", backward))

    def prepare(subject: str) -> Entry:
        strategy, tile = swept(case, way)[subject]
        usual = chosen(strategy)
        if tile is None:
            return usual
        call = KernelCall(problem(), strategy, backward, {way: tile})
        runs = GraphedCall(call, device) if device.type == "cuda" else call
        return replace(usual, call=runs, check=functools.partial(same, runs, usual.call))

    return prepare


def same(call: Any, chosen: Any) -> dict[str, Any]:
    """Raise Wrong if a call computes something else than the chosen tiles do."""
    for one in (call, chosen):
        one()
    flips = (call.out != chosen.out).float().mean().item()
    if flips > FLIPS:
        raise Wrong(f"{flips:.2%} of the spikes differ from the chosen tile's")
    expected = chosen.gradients()
    for leaf, got in call.gradients().items():
        error = torch.linalg.norm((got - expected[leaf]).float())
        error = (error / torch.linalg.norm(expected[leaf].float())).item()
        # flipped spikes move gradients by some hundredths; a wrong tile is off by far more
        if not error < 0.2:
            raise Wrong(f"the gradient of {leaf} is off by {error:.2g} of the chosen tile's")
    return {"flips": flips}


def compile_ahead() -> None:
    """Fill Triton's cache with what recurrence and tuning launch in bfloat16, while tests run."""
    major, minor = torch.cuda.get_device_capability()
    plans, device = {}, torch.device("cuda")
    wanted = [(case, s, {}) for case in cases("recurrence", "full") for s in STRATEGIES]
    wanted += [
        (case, strategy, {way: tile} if tile else {})
        for case in cases("tuning", "full")
        for way in ("forward", "backward")
        for strategy, tile in swept(case, way).values()
    ]
    for case, strategy, swept_tiles in wanted:
        sizes = case.T, case.B, case.N
        with contextlib.suppress(Unavailable):
            plan = choose_plan(sizes, torch.bfloat16, device, strategy, swept_tiles)
            if case.dtype == "bfloat16":
                plans.setdefault((case.N, strategy, plan.forward, plan.backward), plan)
    # forking after CUDA has started is not allowed
    context = multiprocessing.get_context("spawn")
    compiled = functools.partial(offline.compile_layer, capability=10 * major + minor)
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 6), context) as pool:
        jobs = [pool.submit(compiled, key[0], torch.bfloat16, plan=p) for key, p in plans.items()]
        # a tile that does not compile is named when its turn comes to run
        broken = sum(job.exception() is not None for job in jobs)
    print(f"compiled ahead: {len(jobs)} layers, {broken} do not compile", flush=True)


if __name__ == "__main__":
    compile_ahead()
