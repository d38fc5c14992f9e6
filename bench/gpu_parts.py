"""The parts of bench.gpu: each yields its jobs, a name and a function that returns a figure's row."""

from __future__ import annotations

import functools
import gc
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import kernel_call, networks, subjects
from bench.cases import SHD, SSC, Case
from bench.kernel_call import STRATEGIES, KernelCall
from bench.measure import GraphedCall, Times, time_call, timed
from bench.subjects import Problem, Unavailable, Wrong
from gpn_triton import cost
from gpn_triton import device as machine
from gpn_triton.data.feed import Feed
from gpn_triton.graphs import WARM_RUNS
from gpn_triton.kernels import offline, tiles
from gpn_triton.kernels.tiles import Tile

ROOT = Path(__file__).resolve().parent.parent
# N, B in the order of what they decide
SHAPES = (
    (128, 256), (512, 256), (256, 256), (64, 256), (128, 2048), (512, 2048),
    (128, 32), (512, 32), (256, 2048), (256, 32), (64, 2048), (64, 32),
)  # fmt: skip
SWEPT = SHAPES[:6]
ROUNDS = 15
# share of spikes by which two tiles may differ: sums in another order move a spike at its
# threshold, and what follows parts
FLIPS = 0.002
Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


@dataclass(frozen=True)
class Setting:
    """Where a part runs (tiny: a dry run), until when, and the folder for records."""

    device: torch.device
    tiny: bool
    deadline: float
    out: Path

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def T(self) -> int:
        return 3 if self.tiny else 100

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((16, 3),) if self.tiny else SHAPES

    @property
    def dtype(self) -> str:
        return "float32" if self.tiny else "bfloat16"

    def problem(self, N: int, B: int, **options: Any) -> Problem:
        """The numbers of one layer of N neurons at a batch of B."""
        options = {"dtype": self.dtype, "full": (self.T, B, (N,)), **options}
        case = Case(f"N{N}-B{B}", "recurrence", self.T, B, (N,), N, **options)
        return Problem(case, self.device)


def ceilings(device: torch.device) -> machine.Ceilings:
    """What the device can do; a CPU's, in a dry run, from small matrices."""
    return machine.ceilings(device, 128 if device.type == "cpu" else None)


def microseconds(call: Callable[[], object], problem: Problem) -> Row:
    """What a call takes a time step: median_us, low_us, high_us."""
    times = time_call(call, problem.device, ROUNDS)
    return {k.replace("_ms", "_us"): 1e3 * ms / problem.case.T for k, ms in times.items()}


def step_job(problem: Problem, subject: str, backward: bool, graphed: bool = False) -> Job:
    """Microseconds a time step of a subject of bench.subjects, on a GPU in a graph if asked for."""
    case, device = problem.case, problem.device
    mode = "forward+backward" if backward else "forward"

    def job() -> Row:
        row: Row = dict(N=case.N, B=case.B, T=case.T, subject=subject, dtype=case.dtype, mode=mode)
        suffix = "-graph" if graphed and device.type == "cuda" else ""
        entry = subjects.prepare(problem, subject + suffix, backward)
        row |= entry.check() | microseconds(entry.call, problem)
        row["floor_us"] = 1e6 * cost.floor_seconds(entry.count, ceilings(device)) / case.T
        row["peak_mib"] = getattr(entry.call, "peak_bytes", 0) / 2**20 or None
        return row

    return f"{case.name} {case.dtype} {subject} {mode}", job


def steps(setting: Setting) -> Iterator[Job]:
    """Microseconds a time step: each strategy beside LSTM twins in float16, bfloat16, float32."""
    for N, B in setting.shapes:
        problem = setting.problem(N, B)
        names = ["gpn-" + s for s in STRATEGIES if s == "stepwise" or N <= tiles.PERSISTENT_N]
        twins = [f"lstm-{d}" for d in ("float16", "bfloat16", "float32") if d != setting.dtype]
        for subject in (*names, "lstm", *twins):
            for backward in (True, False):
                yield step_job(problem, subject, backward, graphed=True)
    for N, B in setting.shapes[:3]:
        problem = setting.problem(N, B, dtype="float32")
        for backward in (True, False):
            yield step_job(problem, "gpn-stepwise", backward, graphed=True)


def plain(setting: Setting) -> Iterator[Job]:
    """The layer in plain torch: hoisted product in a graph, loops, the compiled step."""
    for k, (N, B) in enumerate(setting.shapes[:2]):
        # compiling takes tens of seconds: once
        problem = setting.problem(N, B, compiled=k == 0)
        for subject in ("hoisted-graph", "authors-graph", "hoisted", "authors", "loop"):
            yield step_job(problem, subject, True)
        if k == 0:
            yield step_job(problem, "hoisted-compiled-step", True)


def swept(setting: Setting) -> Iterator[tuple[int, int, str, Tile]]:
    """N, B, strategy, tile of the sweep, likelier ones first."""
    if setting.tiny:
        yield from ((16, 3, strategy, Tile(16, 16, 16, 4, 2)) for strategy in STRATEGIES)
        return
    for N, B in SWEPT:
        if N <= tiles.PERSISTENT_N:
            for rows in (16, 32, 64):
                for warps in (8, 4, 16):
                    for stages in (3, 2, 1):
                        block = tiles.block(N)
                        yield N, B, "persistent", Tile(rows, block, block, warps, stages)
            continue
        for rows, columns, warps in (
            (32, 32, 4), (64, 32, 8), (64, 32, 4), (16, 32, 4), (64, 64, 8), (32, 64, 4),
            (128, 32, 8), (128, 64, 8),
        ):  # fmt: skip
            for depth, stages in ((64, 3), (64, 2), (32, 4), (32, 3)):
                yield N, B, "stepwise", Tile(rows, columns, depth, warps, stages)


def tuning(setting: Setting) -> Iterator[Job]:
    """Tiles, warps and stages of each strategy, forward and backward by themselves."""
    problem, results = None, {}
    for N, B, strategy, tile in swept(setting):
        if problem is None or (problem.case.N, problem.case.B) != (N, B):
            problem, results = setting.problem(N, B), {}
        job = functools.partial(tuning_row, problem, strategy, tile, results)
        yield f"{problem.case.name} {strategy} {tile}", job


def tuning_row(problem: Problem, strategy: str, tile: Tile, results: dict) -> Row:
    """Forward and backward with one tile.

    Args:
        results: what the chosen tile computes, by strategy; filled by the first call.
    Raises:
        Wrong: this tile computes something else.
    """
    case, device = problem.case, problem.device
    usual = KernelCall(problem, strategy, backward=True)
    if strategy not in results:
        saved = usual.forward()
        results[strategy] = saved[0], usual.backward(saved)
    plan = replace(usual.plan, forward=tile, backward=tile)
    call = KernelCall(problem, strategy, backward=True, plan=plan)
    saved = call.forward()
    flips = (saved[0] != results[strategy][0]).float().mean().item()
    if flips > FLIPS:
        raise Wrong(f"{flips:.2%} of the spikes differ from the chosen tile's")
    for got, expected in zip(call.backward(saved), results[strategy][1], strict=True):
        error = (torch.linalg.norm((got - expected).float()) / torch.linalg.norm(expected)).item()
        # flipped spikes move gradients by some hundredths; a wrong tile is off by far more
        if not error < 0.2:
            raise Wrong(f"a gradient is off by {error:.2g} of the chosen tile's")
    row: Row = dict(N=case.N, B=case.B, T=case.T, strategy=strategy, dtype=case.dtype, **vars(tile))
    row |= dict(chosen=[tile == usual.plan.forward, tile == usual.plan.backward], flips=flips)
    passes = {"forward": call.forward, "backward": functools.partial(call.backward, saved)}
    for name, one in passes.items():
        # in a graph, so that the host's pace does not show
        runs = GraphedCall(one, device) if device.type == "cuda" else one
        row |= {f"{name}_{key}": value for key, value in microseconds(runs, problem).items()}
    return row


def epochs(setting: Setting) -> Iterator[Job]:
    """Training on sets of SHD's and SSC's size: seconds an epoch, samples/s, memory, floor."""
    hidden = (512, 256, 128)
    table = [
        ("shd", 8156, 100, 256, (128,), SHD),
        ("ssc", 75466, 50, 256, hidden, SSC),
        ("ssc", 75466, 100, 2048, hidden, SSC),
        ("ssc", 75466, 100, 256, hidden, SSC),
        ("ssc", 75466, 50, 2048, hidden, SSC),
    ]
    if setting.tiny:
        table = [("shd", 9, 3, 4, (8,), SHD)]
    kept: dict[int, Feed] = {}
    for subject in ("gpn", "gpn-no-graph", "lstm", "loop"):
        for name, samples, T, B, hidden, sizes in table if subject == "gpn" else table[:2]:
            case = Case(f"{name}-T{T}-B{B}", "epoch", T, B, hidden, dtype=setting.dtype, **sizes)
            job = functools.partial(epoch_row, setting, case, subject, samples, kept)
            yield f"{case.name} {subject}", job


def epoch_row(setting: Setting, case: Case, subject: str, samples: int, kept: dict) -> Row:
    """An epoch, or as many of its whole batches as fit 10 s (the loop: 20 s), from events on the
    device, by the engine of the training command.

    kept: the last data set, by its number of samples.
    """
    device, cuda = setting.device, setting.device.type == "cuda"
    # the last row's network, with its graphs
    gc.collect()
    if samples not in kept:
        kept.clear()
        kept[samples] = networks.make_feed(case, samples, device)
    training = networks.Training(case, subject, kept[samples], device)
    seen = networks.check(training.engine, case, device)
    steps = samples // case.B
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def seconds(count: int) -> float:
        """Of so many steps, the device idle before and after."""
        times = Times()
        timed(functools.partial(training.run, count), device, times)
        return times.wall[0]

    # the runs as they are, and the capture; a replay allocates nothing
    seconds(min(WARM_RUNS + 1, steps))
    peak = torch.cuda.max_memory_allocated() if cuda else None
    count = max(1, min(steps, int((20 if subject == "loop" else 10) / seconds(1))))
    epoch = seconds(count) * samples / (count * case.B)
    floor = cost.floor_seconds(training.work * samples, ceilings(device))
    return dict(
        T=case.T, B=case.B, hidden=list(case.hidden), subject=subject, dtype=case.dtype,
        samples=samples, steps_timed=count, steps=-(-samples // case.B), seconds_an_epoch=epoch,
        samples_per_second=samples / epoch, floor_seconds=floor, fraction_of_floor=floor / epoch,
        captured=training.engine.graphs.enabled, peak_mib=cuda and peak / 2**20 or None, **seen,
    )  # fmt: skip


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """A process's status, or None if it had to be stopped, with all that it started."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        # the group: pytest has workers
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """Start a command in a group of its own, at the root of the repository."""
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)


def run_pytest(setting: Setting, workers: int, *arguments: str) -> Row:
    """Run tests and count their outcomes; the output goes to pytest.log in setting.out.

    Args:
        workers: processes, where pytest-xdist is installed: compiling takes most of the time.
        arguments: of pytest.
    Raises:
        RuntimeError: a test failed, or time ran out; with the end of the log.
    """
    seconds = setting.left
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--durations=5", *arguments]
    if importlib.util.find_spec("xdist") and workers > 1:
        command += ["-n", str(workers)]
    with (setting.out / "pytest.log").open("ab+") as log:
        begin = log.tell()
        status = wait(start(command, stdout=log, stderr=subprocess.STDOUT), seconds)
        log.seek(begin)
        output = log.read().decode(errors="replace")
    lines = [line for line in output.splitlines() if not line.startswith("SKIPPED")]
    if status != 0:
        how = f"stopped after {seconds:.0f} s" if status is None else f"pytest ended with {status}"
        raise RuntimeError("\n".join([how, *lines[-60:]]))
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])
    return {outcome: int(number) for number, outcome in found}


def tests(setting: Setting) -> Iterator[Job]:
    """The tests marked gpu, then the one of them that takes half the memory."""
    # without a GPU, the tiny cases of the same tests
    marked = [] if setting.tiny else ["-m", "gpu"]
    files = ["tests/test_kernels_gpu.py", "tests/test_engine_gpu.py"]
    for name, which, workers in (("gpu", "not 2_to_the_31", 6), ("gpu-large", "2_to_the_31", 1)):
        arguments = [*files, *marked, "-k", which]
        yield name, functools.partial(run_pytest, setting, workers, *arguments)


def more_tests(setting: Setting) -> Iterator[Job]:
    """The kernel tests that the interpreter runs elsewhere, on the GPU."""
    arguments = ["tests/test_kernels_interpreted.py"]
    if setting.tiny:
        arguments += ["-k", "stepwise_equals and 1-1-1"]
    yield "kernels", functools.partial(run_pytest, setting, 6, *arguments)


def benchmarks(setting: Setting) -> Iterator[Job]:
    """All of bench/, a file at a time, each with a record for `python -m bench.report`."""
    sizes = ["--size", "tiny", "--rounds", "1", "--case-seconds", "0"] if setting.tiny else []
    for kind in ("train_step", "recurrence", "epoch", "layer", "long_sequence", "binning"):
        name = f"bench_{kind}"
        record = f"--benchmark-json={setting.out / name}.json"
        arguments = [f"bench/{name}.py", "--benchmark-only", record, *sizes]
        yield kind, functools.partial(run_pytest, setting, 1, *arguments)


# name -> what to do, and the most seconds it may take of a budget of 460
PARTS: dict[str, tuple[Callable[[Setting], Iterator[Job]], float]] = {
    "tests": (tests, 160),
    "steps": (steps, 110),
    "epochs": (epochs, 110),
    "tuning": (tuning, 60),
    "plain": (plain, 60),
    "more-tests": (more_tests, 120),
    "benchmarks": (benchmarks, 3600),
}


def compile_ahead(setting: Setting) -> None:
    """Fill Triton's cache with what steps and tuning launch, on all cores, needing no GPU."""
    cuda = setting.device.type == "cuda"
    major, minor = torch.cuda.get_device_capability() if cuda else (9, 0)
    dtype, plans = getattr(torch, setting.dtype), {}
    chosen = [(N, B, strategy, None) for N, B in setting.shapes for strategy in STRATEGIES]
    for N, B, strategy, tile in (*chosen, *swept(setting)):
        try:
            plan = kernel_call.choose_plan(setting.T, B, N, dtype, setting.device, strategy)
        except Unavailable:
            continue
        plan = replace(plan, forward=tile, backward=tile) if tile else plan
        plans.setdefault((N, strategy, plan.forward, plan.backward), plan)
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
