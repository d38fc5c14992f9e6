"""Tiles, warps and stages of the kernels as subjects of a contest, beside those chosen now."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from bench import subjects
from bench.cases import Case
from bench.kernel_call import STRATEGIES, KernelCall, choose_plan
from bench.measure import GraphedCall
from bench.subjects import Entry, Problem, Unavailable, Wrong
from gpn_triton.kernels import offline, tiles
from gpn_triton.kernels.tiles import Tile

# share of spikes by which two tiles may differ: sums in another order move a spike at its
# threshold, and what follows parts
FLIPS = 0.002


def swept(shapes: Iterable[tuple[int, int]], tiny: bool) -> Iterator[tuple[int, int, str, dict]]:
    """N, B, strategy and its tiles by name, likelier ones first; one tile where all is tiny."""
    for N, B in shapes:
        block = tiles.block(N)
        persistent = [
            Tile(rows, block, block, warps, stages)
            for rows in (16, 32, 64)
            for warps in (8, 4, 16)
            for stages in (3, 2, 1)
        ]
        stepwise = [
            Tile(rows, columns, depth, warps, stages)
            for rows, columns, warps in (
                (32, 32, 4), (64, 32, 8), (64, 32, 4), (16, 32, 4), (64, 64, 8), (32, 64, 4),
                (128, 32, 8), (128, 64, 8),
            )
            for depth, stages in ((64, 3), (64, 2), (32, 4), (32, 3))
        ]  # fmt: skip
        both = dict(zip(STRATEGIES, (persistent, stepwise), strict=True))
        better = "persistent" if N <= tiles.PERSISTENT_N else "stepwise"
        for strategy in STRATEGIES if tiny else (better,):
            yield N, B, strategy, {name(tile): tile for tile in both[strategy][: tiny or None]}


def name(tile: Tile) -> str:
    """A tile as a subject: rows x neurons x depth, warps, stages."""
    sizes = f"{tile.BLOCK_B}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    return f"{sizes} warps {tile.num_warps} stages {tile.num_stages}"


def entries(
    case: Case, device: torch.device, strategy: str, swept_tiles: dict[str, Tile], backward: bool
) -> Callable[[str], Entry]:
    """A function that prepares a tile by name, or gpn-STRATEGY: the tiles chosen now.

    The chosen ones are checked against float64, the others against the chosen ones.
    """
    graphed = device.type == "cuda"
    problem = functools.cache(lambda: Problem(case, device))

    @functools.cache
    def chosen() -> Entry:
        subject = f"gpn-{strategy}" + ("-graph" if graphed else "")
        return subjects.prepare(problem(), subject, backward)

    def prepare(subject: str) -> Entry:
        if subject not in swept_tiles:
            return chosen()
        tile = swept_tiles[subject]
        plan = choose_plan(*problem().x.shape, problem().dtype, device, strategy)
        plan = replace(plan, forward=tile, backward=tile)
        call = KernelCall(problem(), strategy, backward, plan)
        runs = GraphedCall(call, device) if graphed else call
        return replace(chosen(), call=runs, check=functools.partial(same, runs, chosen().call))

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


def compile_ahead(
    T: int, shapes: list, sweep: Iterable, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill Triton's cache with what the shapes and the sweep launch, on all cores but six."""
    major, minor = torch.cuda.get_device_capability() if device.type == "cuda" else (9, 0)
    wanted = [(N, B, strategy, {"": None}) for N, B in shapes for strategy in STRATEGIES]
    plans = {}
    for N, B, strategy, swept_tiles in (*wanted, *sweep):
        try:
            plan = choose_plan(T, B, N, dtype, device, strategy)
        except Unavailable:
            continue
        for tile in swept_tiles.values():
            one = replace(plan, forward=tile, backward=tile) if tile else plan
            plans.setdefault((N, strategy, one.forward, one.backward), one)
    # forking after CUDA has started is not allowed
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 6), context) as pool:
        jobs = [
            pool.submit(offline.compile_layer, key[0], dtype, 10 * major + minor, plan=plan)
            for key, plan in plans.items()
        ]
        # a tile that does not compile is named when its turn comes to run
        broken = sum(job.exception() is not None for job in jobs)
    print(f"compiled ahead: {len(jobs)} layers, {broken} do not compile", flush=True)
