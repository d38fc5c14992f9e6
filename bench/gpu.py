"""Everything that needs a GPU, in one command that installs nothing: tests first, then figures.

python -m bench.gpu                            on a machine with a GPU, at most 8 minutes
python -m bench.gpu --parts steps,epochs       some parts
python -m bench.gpu --show FILE.json           the tables of a record, without a GPU
python -m bench.gpu --dry-run --out DIR        the same code at tiny sizes on a CPU

Parts run in the order of PARTS, the most valuable first, each in a process of its own: one that
hangs or breaks the device leaves the others alone. What does not fit the budget is named, not run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench import measure, networks, subjects
from bench.cases import SHD, SSC, Case
from bench.measure import Call, GraphedCall, Times, timed
from bench.subjects import Problem, Unavailable, Wrong
from gpn_triton import cost, gpn, ops
from gpn_triton import device as machine
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.feed import Feed
from gpn_triton.data.synthetic import synthetic_splits
from gpn_triton.graphs import WARM_RUNS
from gpn_triton.kernels import offline, tiles
from gpn_triton.kernels.recurrence_backward import recurrence_backward
from gpn_triton.kernels.recurrence_forward import recurrence_forward
from gpn_triton.kernels.tiles import Plan, Tile
from gpn_triton.model import NEURONS
from gpn_triton.provenance import provenance
from gpn_triton.reference import GATES
from gpn_triton.run_folder import write_json

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 460.0
# N, B in the order of what they decide
SHAPES = (
    (128, 256), (512, 256), (256, 256), (64, 256), (128, 2048), (512, 2048),
    (128, 32), (512, 32), (256, 2048), (256, 32), (64, 2048), (64, 32),
)  # fmt: skip
STRATEGIES = ("persistent", "stepwise")
# a timed stretch lasts at least so long, so that starting it does not show
STRETCH_SECONDS = 2e-3
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


def time_call(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Median and quartiles of a call in ms, by device events around several calls on a GPU."""
    cuda, warm = device.type == "cuda", Times()
    for _ in range(2):
        timed(call, device, warm)
    repeats = max(1, int(STRETCH_SECONDS / warm.device[-1])) if cuda else 1

    def stretch() -> None:
        for _ in range(repeats):
            call()

    times = Times()
    for _ in range(ROUNDS if cuda else 2):
        timed(stretch, device, times)
    return measure.summary([s / repeats for s in (times.device if cuda else times.wall)])


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, so that the host's pace does not show; on a CPU the call itself."""
    if device.type == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def per_step(times: dict[str, float], T: int) -> Row:
    """Milliseconds of a call as microseconds a time step: median_us, low_us, high_us."""
    return {key.replace("_ms", "_us"): 1e3 * value / T for key, value in times.items()}


@functools.cache
def ceilings(device: torch.device) -> machine.Ceilings:
    """What the device can do; a CPU's, in a dry run, from small matrices."""
    return machine.ceilings(device, 128 if device.type == "cpu" else None)


def as_strategy(plan: Plan, strategy: str, dtype: torch.dtype) -> Plan:
    """The plan, or a stepwise one for a layer that would be persistent.

    Raises:
        Unavailable: the layer cannot be persistent.
    """
    if plan.strategy == strategy:
        return plan
    if strategy == "persistent":
        raise Unavailable(f"not persistent: {plan.reason}")
    tile = Tile(32, 32, 64 if tiles.is_half(dtype) else 16, 4, 3)
    return replace(plan, strategy=strategy, forward=tile, backward=tile)


@contextmanager
def planned(strategy: str) -> Iterator[None]:
    """Within the block the operator takes the given strategy."""
    chosen = ops._plan
    ops._plan = lambda x, *rest: as_strategy(chosen(x, *rest), strategy, x.dtype)
    try:
        yield
    finally:
        ops._plan = chosen


def layer_problem(setting: Setting, N: int, B: int, **options: Any) -> Problem:
    """The numbers of one layer of N neurons at a batch of B."""
    options = {"dtype": setting.dtype, "full": (setting.T, B, (N,)), **options}
    return Problem(Case(f"N{N}-B{B}", "recurrence", setting.T, B, (N,), N, **options),
                   setting.device)  # fmt: skip


def ours(problem: Problem, backward: bool) -> Call:
    """A layer through the public operator, on the Triton kernels."""
    leaves = problem.leaves()
    half = None if problem.dtype == torch.float32 else problem.dtype

    def forward() -> Tensor:
        weights = [leaves[name] for name in ("weight_x", "weight_v", "bias")]
        return gpn(leaves["x"], *weights, problem.v_reset, backend="triton")[0]

    return Call(forward, leaves, problem.cotangent if backward else None, half)


def step_job(problem: Problem, subject: str, backward: bool) -> Job:
    """One figure: gpn-STRATEGY on the kernels, or a subject of bench.subjects."""
    case, device = problem.case, problem.device
    mode = "forward+backward" if backward else "forward"

    def job() -> Row:
        row: Row = dict(N=case.N, B=case.B, T=case.T, subject=subject, dtype=case.dtype, mode=mode)
        strategy = subject.removeprefix("gpn-")
        if strategy in STRATEGIES:
            call = ours(problem, backward)
            with planned(strategy):
                call = GraphedCall(call) if device.type == "cuda" else call
                row |= subjects._check(problem, call, "gpn", None)
            count = cost.layer(
                NEURONS["gpn"].work, case.N, None, backward, False, problem.x.element_size()
            )
            count = count * (case.T * case.B)
        else:
            entry = subjects.prepare(problem, subject, backward)
            entry.check()
            call, count = entry.call, entry.count
            if device.type == "cuda" and subject.startswith("lstm"):
                call = GraphedCall(call)
        row |= per_step(time_call(call, device), case.T)
        row["floor_us"] = 1e6 * cost.floor_seconds(count, ceilings(device)) / case.T
        row["peak_mib"] = getattr(call, "peak_bytes", 0) / 2**20 or None
        return row

    return f"{case.name} {case.dtype} {subject} {mode}", job


def steps(setting: Setting) -> Iterator[Job]:
    """Microseconds a time step: each strategy beside LSTM twins in float16, bfloat16, float32."""
    for N, B in setting.shapes:
        problem = layer_problem(setting, N, B)
        names = ["gpn-" + s for s in STRATEGIES if s == "stepwise" or N <= tiles.PERSISTENT_N]
        twins = [f"lstm-{d}" for d in ("float16", "bfloat16", "float32") if d != setting.dtype]
        for subject in (*names, "lstm", *twins):
            for backward in (True, False):
                yield step_job(problem, subject, backward)
    for N, B in setting.shapes[:3]:
        problem = layer_problem(setting, N, B, dtype="float32")
        for backward in (True, False):
            yield step_job(problem, "gpn-stepwise", backward)


def plain(setting: Setting) -> Iterator[Job]:
    """The layer in plain torch: hoisted product in a graph, loops, the compiled step."""
    for k, (N, B) in enumerate(setting.shapes[:2]):
        # compiling takes tens of seconds: once
        problem = layer_problem(setting, N, B, compiled=k == 0)
        for subject in ("hoisted-graph", "authors-graph", "hoisted", "authors", "loop"):
            yield step_job(problem, subject, True)
        if k == 0:
            yield step_job(problem, "hoisted-compiled-step", True)


def swept(setting: Setting) -> Iterator[tuple[int, int, str, Tile]]:
    """N, B, strategy, tile of the sweep, likelier ones first."""
    if setting.tiny:
        yield from ((16, 3, strategy, Tile(16, 16, 16, 4, 2)) for strategy in STRATEGIES)
        return
    for N, B in ((128, 256), (512, 256), (256, 256), (64, 256), (128, 2048), (512, 2048)):
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
            problem, results = layer_problem(setting, N, B), {}
        job = functools.partial(tuning_row, problem, strategy, tile, results)
        yield f"{problem.case.name} {strategy} {tile}", job


def tuning_row(problem: Problem, strategy: str, tile: Tile, results: dict) -> Row:
    """Forward and backward with one tile.

    Args:
        results: what the chosen tile computes, by strategy; filled by the first call.
    Raises:
        Wrong: this tile computes something else.
    """
    case, device, x = problem.case, problem.device, problem.x
    weights = [problem.weights[name] for name in ("weight_x", "weight_v", "bias")]
    state, gates = problem.v_reset, GATES["full"]

    def forward(plan: Plan) -> tuple:
        return recurrence_forward(x, *weights, state, state, gates, 1, False, plan)

    def backward(plan: Plan, saved: tuple) -> tuple:
        return recurrence_backward(
            problem.cotangent, None, x, *weights, state, saved[3], saved[2],
            gates, "atan", 2.0, 1, False, plan,
        )  # fmt: skip

    chosen = as_strategy(ops._plan(x, "full", 1), strategy, x.dtype)
    if strategy not in results:
        saved = forward(chosen)
        results[strategy] = saved[0], backward(chosen, saved)
    plan = replace(chosen, forward=tile, backward=tile)
    saved = forward(plan)
    flips = (saved[0] != results[strategy][0]).float().mean().item()
    if flips > FLIPS:
        raise Wrong(f"{flips:.2%} of the spikes differ from the chosen tile's")
    for got, expected in zip(backward(plan, saved), results[strategy][1], strict=True):
        error = (torch.linalg.norm((got - expected).float()) / torch.linalg.norm(expected)).item()
        # flipped spikes move gradients by some hundredths; a wrong tile is off by far more
        if not error < 0.2:
            raise Wrong(f"a gradient is off by {error:.2g} of the chosen tile's")
    row: Row = dict(N=case.N, B=case.B, T=case.T, strategy=strategy, dtype=case.dtype, **vars(tile))
    row |= dict(chosen=[tile == chosen.forward, tile == chosen.backward], flips=flips)
    for name, call in (
        ("forward", functools.partial(forward, plan)),
        ("backward", functools.partial(backward, plan, saved)),
    ):
        times = per_step(time_call(captured(call, device), device), case.T)
        row |= {f"{name}_{key}": value for key, value in times.items()}
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
    compared = ["gpn", "lstm", "loop"] if setting.tiny else ["gpn", "gpn-no-graph", "lstm", "loop"]
    for subject in compared:
        for name, samples, T, B, hidden, sizes in table if subject == "gpn" else table[:2]:
            case = Case(f"{name}-T{T}-B{B}", "epoch", T, B, hidden, dtype=setting.dtype, **sizes)
            job = functools.partial(epoch_row, setting, case, subject, samples, kept)
            yield f"{case.name} {subject}", job


def event_store(samples: int, classes: int) -> EventStore:
    """Synthetic samples, repeated to the number wanted, which no step's cost depends on."""
    store = synthetic_splits(min(samples, 2048), 0, classes).train
    times = -(-samples // len(store))
    lengths = np.tile(np.diff(store.offsets), times)
    return EventStore(
        np.tile(store.times, times),
        np.tile(store.units, times),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.tile(store.labels, times),
        None,
        store.num_channels,
        store.class_names,
    )


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
        kept[samples] = Feed(DeviceEvents(event_store(samples, case.classes), device))
    feed = kept[samples]
    trainer = networks.engine(case, subject, device)
    seen = networks.check(trainer, case, device)
    order = torch.randperm(len(feed), device=device)
    steps = len(feed) // case.B
    trainer.start_epoch(feed, 0, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def seconds(count: int) -> float:
        """Of so many steps, the device idle before and after."""
        times = Times()

        def call() -> None:
            for _ in range(count):
                trainer.train_step(feed, case.B)

        feed.start(order, 0, case.B)
        timed(call, device, times)
        return times.wall[0]

    # the runs as they are, and the capture; a replay allocates nothing
    seconds(min(WARM_RUNS + 1, steps))
    peak = torch.cuda.max_memory_allocated() if cuda else None
    count = max(1, min(steps, int((20 if subject == "loop" else 10) / seconds(1))))
    epoch = seconds(count) * samples / (count * case.B)
    floor = cost.training_floor(
        NEURONS[trainer.cfg.neuron].work, case.hidden, case.inputs, case.classes, case.T, samples,
        trainer.cfg.amp, ceilings(device),
    )  # fmt: skip
    return dict(
        T=case.T, B=case.B, hidden=list(case.hidden), subject=subject, dtype=case.dtype,
        samples=samples, steps_timed=count, steps=-(-samples // case.B), seconds_an_epoch=epoch,
        samples_per_second=samples / epoch, floor_seconds=floor, fraction_of_floor=floor / epoch,
        captured=trainer.graphs.enabled, peak_mib=cuda and peak / 2**20 or None, **seen,
    )  # fmt: skip


def run_limited(command: list[str], seconds: float, **options: Any) -> int | None:
    """Run a command, its output shown as it comes; its status, or None if it had to be stopped."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options) as process:
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            # the group: pytest has workers
            os.killpg(process.pid, signal.SIGKILL)
            return None


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
        start = log.tell()
        status = run_limited(command, seconds, stdout=log, stderr=subprocess.STDOUT)
        log.seek(start)
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
    capability = 90
    if setting.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    dtype, gates = getattr(torch, setting.dtype), GATES["full"]
    limits = machine.kernel_limits() if setting.device.type == "cuda" else {}
    plans = {}
    for N, B in setting.shapes:
        plan = tiles.choose(setting.T, B, N, dtype, gates, **limits)
        for one in (plan, as_strategy(plan, "stepwise", dtype)):
            plans[N, one.strategy, one.forward, one.backward] = one
    for N, B, strategy, tile in swept(setting):
        plan = tiles.choose(setting.T, B, N, dtype, gates, **limits)
        one = replace(as_strategy(plan, strategy, dtype), forward=tile, backward=tile)
        plans.setdefault((N, strategy, tile, tile), one)
    # forking after CUDA has started is not allowed
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 6), context) as pool:
        jobs = [
            pool.submit(offline.compile_layer, key[0], dtype, capability, plan=plan)
            for key, plan in plans.items()
        ]
        # a tile that does not compile is named when its turn comes to run
        broken = sum(job.exception() is not None for job in jobs)
    print(f"compiled ahead: {len(jobs)} layers, {broken} do not compile", flush=True)


def describe(row: Row) -> str:
    """A row on one line."""
    if "error" in row:
        return row["error"].splitlines()[-1] if row["status"] == "failed" else row["error"]
    shown = {k: v for k, v in row.items() if k not in ("name", "status", "seconds", "N", "B", "T")}
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in shown.items())  # fmt: skip


def run_part(name: str, setting: Setting, record: Path) -> None:
    """Run one part's jobs while time lasts; the record is written after each."""
    contents = json.loads(record.read_text())
    rows = contents["parts"].setdefault(name, [])
    for label, job in PARTS[name][0](setting):
        began = time.monotonic()
        row: Row = {"name": label, "status": "ok"}
        if setting.left < 0:
            row |= {"status": "left out", "error": "no time left"}
        else:
            try:
                row |= job()
            except (Unavailable, OutOfResources) as error:
                row |= {"status": "left out", "error": str(error)}
            except Exception as error:
                traceback.print_exc()
                row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row["seconds"] = round(time.monotonic() - began, 2)
        rows.append(row)
        write_json(record, contents)
        if row.get("error") != "no time left":
            print(f"[{name}] {label}: {describe(row)}", flush=True)


def finish(process: subprocess.Popen, seconds: float) -> None:
    """Wait so long for a process, then stop it with all that it started."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_parts(parts: list[str], setting: Setting, record: Path) -> None:
    """Run parts one after the other in processes of their own, within the budget."""
    child = [sys.executable, "-m", "bench.gpu", "--record", str(record), "--out", str(setting.out)]
    environment, ahead = dict(os.environ), None
    if setting.tiny:
        child.append("--dry-run")
        environment["TRITON_INTERPRET"] = "1"
    else:
        command = [*child, "--child", "compile-ahead"]
        ahead = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    for name in parts:
        if ahead is not None and name != "tests":
            finish(ahead, 30)
            ahead = None
        limit = min(setting.left, PARTS[name][1])
        status, error = None, "no time left"
        if limit > 5:
            command = [*child, "--child", name, "--budget", f"{limit:.0f}"]
            # a job that has begun may end a little later
            status = run_limited(command, limit + 20, env=environment)
            error = "it hung and was stopped" if status is None else f"it ended with {status}"
        if status != 0:
            contents = json.loads(record.read_text())
            row = {"name": "the part itself", "status": "failed", "error": error}
            contents["parts"].setdefault(name, []).append(row)
            write_json(record, contents)
            print(f"[{name}] {error}", flush=True)
    if ahead is not None:
        finish(ahead, 0)


def pivot(rows: list[Row]) -> str:
    """Microseconds a step of a layer: a line for each size, a column for each subject."""
    subjects_seen = list(dict.fromkeys((row["subject"], row["dtype"]) for row in rows))
    times = {
        (row["N"], row["B"], row["subject"], row["dtype"], row["mode"]): row["median_us"]
        for row in rows
    }
    columns = ["N", "B", *(" ".join(subject) for subject in subjects_seen)]
    lines = [columns, ["---"] * len(columns)]
    for N, B in dict.fromkeys((row["N"], row["B"]) for row in rows):
        cells = []
        for subject in subjects_seen:
            modes = (times.get((N, B, *subject, mode)) for mode in ("forward", "forward+backward"))
            cells.append(" / ".join("-" if time is None else f"{time:.3g}" for time in modes))
        lines.append([str(N), str(B), *cells])
    head = "microseconds a step, median: forward / forward and backward\n\n"
    return head + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best(rows: list[Row], count: int = 4) -> list[Row]:
    """The fastest tiles of each layer and strategy, and whatever is chosen now."""

    def seconds(row: Row) -> float:
        return row["forward_median_us"] + row["backward_median_us"]

    found = []
    for key in dict.fromkeys((row["N"], row["B"], row["strategy"]) for row in rows):
        group = [row for row in rows if (row["N"], row["B"], row["strategy"]) == key]
        group.sort(key=seconds)
        found += group[:count] + [row for row in group[count:] if any(row["chosen"])]
    return found


def show(contents: Row) -> str:
    """A record as Markdown, in short."""
    made = contents["made"]
    text = [f"{made['device']}, commit {made['commit']}, {json.dumps(made['versions'])}"]
    for name, rows in contents["parts"].items():
        done = [row for row in rows if row["status"] == "ok"]
        text.append(f"\n## {name}: {len(done)} of {len(rows)} done\n")
        if name in ("steps", "plain") and done:
            text.append(pivot(done))
        else:
            done = best(done) if name == "tuning" else done
            text += [f"- {row['name']}: {describe(row)}" for row in done]
        text += [
            f"- {row['name']}: {row['status']}: {row['error'].splitlines()[0]}"
            for row in rows
            if row["status"] == "failed"
        ]
    return "\n".join(text)


def main() -> None:
    """Run the parts, or show a record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--commit", help="for the record, where the tree came without its history")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print a record's tables")
    # set by the command itself for its child processes
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        print(show(json.loads(args.show.read_text())))
        return
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; --dry-run runs tiny sizes on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    out = args.out.resolve()
    setting = Setting(device, args.dry_run, time.monotonic() + args.budget, out)
    if args.child == "compile-ahead":
        compile_ahead(setting)
    elif args.child:
        run_part(args.child, setting, args.record)
    else:
        out.mkdir(parents=True, exist_ok=True)
        made = provenance(device)
        made["commit"] = args.commit or made["commit"]
        record = out / f"gpu-{(made['commit'] or 'unknown')[:10]}.json"
        write_json(record, {"made": made, "dry_run": args.dry_run, "parts": {}})
        run_parts(args.parts.split(","), setting, record)
        contents = json.loads(record.read_text())
        print(show(contents), f"\nrecord: {record}", flush=True)
        failed = [r for rows in contents["parts"].values() for r in rows if r["status"] == "failed"]
        sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
