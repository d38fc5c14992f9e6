"""Everything that needs a GPU, in one command that installs nothing: tests first, then figures.

python -m bench.gpu                            on a machine with a GPU, at most 8 minutes
python -m bench.gpu --parts steps,epochs       some parts
python -m bench.gpu --show FILE.json           the tables of a record, without a GPU
python -m bench.gpu --dry-run --out DIR        the same code at tiny sizes on a CPU

Parts run in the order of PARTS, the most valuable first, each in a process of its own: one that
hangs or breaks the device leaves the others alone. What does not fit the budget is named, not run.
The record has the form of pytest's, and `python -m bench.report` reads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import networks, report, subjects, tuning
from bench.cases import SHD, SSC, Case
from bench.contest import Contest, header
from bench.kernel_call import STRATEGIES
from bench.subjects import Entry
from gpn_triton import device as machine
from gpn_triton.checkpoint import write_json

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 460.0
# N, B in the order of what they decide
SHAPES = [
    (128, 256), (512, 256), (256, 256), (64, 256), (128, 2048), (512, 2048),
    (128, 32), (512, 32), (256, 2048), (256, 32), (64, 2048), (64, 32),
]  # fmt: skip
ROUNDS = 7
# so long a contest goes on past ROUNDS
CASE_SECONDS = 1.0
MODES = {"forward+backward": True, "forward": False}


class Part:
    """One part's run: where, until when, and the record that it adds to.

    Args:
        device: what computes. tiny: a dry run. deadline: on time.monotonic's clock.
        record: the file, written after every contest. commit: for it, if the tree has no history.
    """

    def __init__(
        self,
        device: torch.device,
        tiny: bool,
        deadline: float,
        record: Path,
        commit: str | None,
    ):
        self.device, self.tiny, self.deadline = device, tiny, deadline
        self.record, self.commit = record, commit
        self.T = 3 if tiny else 100
        self.shapes = [(16, 3)] if tiny else SHAPES
        self.dtype = "float32" if tiny else "bfloat16"
        self.graph = "-graph" if device.type == "cuda" else ""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def layer(self, N: int, B: int, dtype: str | None = None, compiled: bool = False) -> Case:
        """One layer of N neurons at a batch of B, without an input Linear."""
        dtype, size = dtype or self.dtype, (self.T, B, (N,))
        name = f"N{N}-B{B}-{dtype}"
        return Case(name, "recurrence", *size, N, 0, dtype, full=size, compiled=compiled)

    def contest(
        self, what: str, case: Case, prepare: Callable[[str], Entry], names: list[str], **info: Any
    ) -> None:
        """Measure subjects of a case, and write and print what was found."""
        group = f"{what}: {case}"
        rounds, seconds = (2, 0.0) if self.tiny else (ROUNDS, CASE_SECONDS)
        run = Contest(case, prepare, names, self.device, rounds, seconds, self.deadline)
        ceilings = machine.ceilings(self.device, 128 if self.tiny else None)
        if self.commit:
            info["commit"] = self.commit
        records = [run.record(name, ceilings, group=group, **info) for name in run.times]
        found = [
            {"group": group, "stats": {"rounds": r["rounds"]}, "extra_info": r} for r in records
        ]
        left_out = [self.left_out(group, name, *run.left_out(name)) for name in run.failed]
        self.write(benchmarks=found, left_out=left_out)
        if records:
            print(f"\n{group}: {report.describe(records[0])}\n{report.table(records)}", flush=True)

    def left_out(self, group: str, subject: str, outcome: str, reason: str) -> dict[str, str]:
        """What did not run, and why, for the record; printed, too."""
        print(f"[{group}] {subject}: {outcome}: {reason}", flush=True)
        return {"group": group, "subject": subject, "outcome": outcome, "reason": reason}

    def write(self, **found: list) -> None:
        """Add to the lists of the record."""
        contents = json.loads(self.record.read_text())
        for key, rows in found.items():
            contents[key] += rows
        write_json(self.record, contents)

    def pytest(self, name: str, workers: int, *arguments: str) -> None:
        """Run tests and count their outcomes; the output goes to pytest.log beside the record.

        Args:
            workers: processes, where pytest-xdist is installed: compiling takes most of the time.
        """
        seconds = self.left
        command = [sys.executable, "-m", "pytest", "-q", "-ra", "--durations=5", *arguments]
        if importlib.util.find_spec("xdist") and workers > 1:
            command += ["-n", str(workers)]
        with (self.record.parent / "pytest.log").open("ab+") as log:
            begin = log.tell()
            status = wait(start(command, stdout=log, stderr=subprocess.STDOUT), seconds)
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        if status == 0:
            found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1])
            counts = ", ".join(map(" ".join, found))
            print(f"[tests] {name}: {counts}", flush=True)
            return self.write(tests=[{"name": name, "outcomes": counts}])
        how = f"stopped after {seconds:.0f} s" if status is None else f"pytest ended with {status}"
        print("\n".join(line for line in lines[-60:] if not line.startswith("SKIPPED")))
        self.write(left_out=[self.left_out("tests", name, "failed", f"{how}: see pytest.log")])


def tests(part: Part) -> None:
    """The tests marked gpu, then the one of them that takes half the memory."""
    # without a GPU, the tiny cases of the same tests
    marked = [] if part.tiny else ["-m", "gpu"]
    files = ["tests/test_kernels_gpu.py", "tests/test_engine_gpu.py"]
    for name, which, workers in (("gpu", "not 2_to_the_31", 6), ("gpu-large", "2_to_the_31", 1)):
        part.pytest(name, workers, *files, *marked, "-k", which)


def steps(part: Part) -> None:
    """Each strategy beside LSTM twins in float16, bfloat16, float32; all in graphs."""
    twins = ("lstm", "lstm-float16", "lstm-bfloat16", "lstm-float32")
    names = [name + part.graph for name in (*(f"gpn-{s}" for s in STRATEGIES), *twins)]
    cases = [part.layer(N, B) for N, B in part.shapes]
    cases += [part.layer(N, B, "float32") for N, B in part.shapes[:3] if not part.tiny]
    for case in cases:
        for mode, backward in MODES.items():
            prepare = subjects.entries(case, part.device, backward)
            part.contest(f"step {mode}", case, prepare, names, mode=mode)


def plain(part: Part) -> None:
    """The layer in plain torch: hoisted product in a graph, loops, the compiled step."""
    names = ["gpn-stepwise" + part.graph, *subjects.LOOPS]
    for k, (N, B) in enumerate(part.shapes[:2]):
        # compiling takes tens of seconds: once
        case = part.layer(N, B, compiled=k == 0)
        prepare = subjects.entries(case, part.device, True)
        part.contest("plain", case, prepare, names, mode="forward+backward")


def sweep(part: Part) -> list[tuple]:
    """What the part called tuning compares."""
    return list(tuning.swept(part.shapes[:6], part.tiny))


def tune(part: Part) -> None:
    """Tiles, warps and stages of each strategy."""
    for N, B, strategy, tiles in sweep(part):
        for mode, backward in MODES.items():
            case = part.layer(N, B)
            prepare = tuning.entries(case, part.device, strategy, tiles, backward)
            names = [f"gpn-{strategy}", *tiles]
            part.contest(f"{strategy} {mode}", case, prepare, names, mode=mode)


def epochs(part: Part) -> None:
    """Training steps on sets of SHD's and SSC's size, by the engine of the training command."""
    hidden = (512, 256, 128)
    table = [
        ("shd", 8156, 100, 256, (128,), SHD),
        ("ssc", 75466, 50, 256, hidden, SSC),
        ("ssc", 75466, 100, 2048, hidden, SSC),
        ("ssc", 75466, 100, 256, hidden, SSC),
        ("ssc", 75466, 50, 2048, hidden, SSC),
    ]
    if part.tiny:
        table = [("shd", 9, 3, 4, (8,), SHD)]
    batches = 2 if part.tiny else 8
    for k, (name, samples, T, B, hidden, sizes) in enumerate(table):
        size = (T, B, hidden)
        case = Case(f"{name}-T{T}-B{B}", "epoch", *size, dtype=part.dtype, full=size, **sizes)
        part.contest(
            "epoch", case, networks.steps(case, part.device, batches, samples),
            ["gpn", "gpn-no-graph", "lstm", "loop"] if k < 2 else ["gpn"],
            mode="training steps", samples=batches * B, samples_of_full=samples,
        )  # fmt: skip


def more_tests(part: Part) -> None:
    """The kernel tests that the interpreter runs elsewhere, on the GPU."""
    some = ["-k", "stepwise_equals and 1-1-1"] if part.tiny else []
    part.pytest("kernels", 6, "tests/test_kernels_interpreted.py", *some)


def benchmarks(part: Part) -> None:
    """All of bench/, a file at a time, each with a record for `python -m bench.report`."""
    sizes = ["--size", "tiny", "--rounds", "1", "--case-seconds", "0"] if part.tiny else []
    for kind in ("train_step", "recurrence", "epoch", "layer", "long_sequence", "binning"):
        name = f"bench_{kind}"
        record = f"--benchmark-json={part.record.parent / name}.json"
        part.pytest(kind, 1, f"bench/{name}.py", "--benchmark-only", record, *sizes)


# name -> what to do, and the most seconds it may take of a budget of 460
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "tests": (tests, 160),
    "steps": (steps, 110),
    "epochs": (epochs, 110),
    "tuning": (tune, 60),
    "plain": (plain, 60),
    "more-tests": (more_tests, 120),
    "benchmarks": (benchmarks, 3600),
}


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """Start a command in a group of its own, at the root of the repository."""
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """A process's status, or None if it had to be stopped, with all that it started."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        # the group: pytest has workers
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run_parts(names: list[str], part: Part) -> None:
    """Run parts one after the other in processes of their own, within the budget."""
    child = [sys.executable, "-m", "bench.gpu", "--record", str(part.record)]
    child += ["--commit", part.commit] if part.commit else []
    environment, ahead = dict(os.environ), None
    if part.tiny:
        child.append("--dry-run")
        environment["TRITON_INTERPRET"] = "1"
    else:
        ahead = start([*child, "--child", "compile-ahead"])
    for name in names:
        if ahead is not None and name != "tests":
            wait(ahead, 30)
            ahead = None
        limit = min(part.left, PARTS[name][1])
        status, error = None, "no time left"
        if limit > 5:
            command = [*child, "--child", name, "--budget", f"{limit:.0f}"]
            # a contest that has begun may end a little later
            status = wait(start(command, env=environment), limit + 20)
            error = "it hung and was stopped" if status is None else f"it ended with {status}"
        if status != 0:
            part.write(left_out=[part.left_out(name, "the part itself", "failed", error)])
    if ahead is not None:
        wait(ahead, 0)


def show(record: Path) -> str:
    """A record as Markdown."""
    contents = report.read(record)
    lines = [f"- {row['name']}: {row['outcomes']}" for row in contents["tests"]]
    return "\n".join([report.section(record, contents, {}), *lines])


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
        print(show(args.show))
        return
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; --dry-run runs tiny sizes on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    commit = args.commit or header(device)["commit"]
    record = args.record or args.out.resolve() / f"gpu-{(commit or 'unknown')[:10]}.json"
    part = Part(device, args.dry_run, time.monotonic() + args.budget, record, args.commit)
    if args.child == "compile-ahead":
        dtype = getattr(torch, part.dtype)
        tuning.compile_ahead(part.T, part.shapes, sweep(part), dtype, device)
    elif args.child:
        PARTS[args.child][0](part)
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        made = {"commit": commit, "datetime": datetime.now().isoformat(timespec="seconds")}
        empty = {"tests": [], "benchmarks": [], "left_out": []}
        write_json(record, {**made, "dry_run": args.dry_run, **empty})
        run_parts(args.parts.split(","), part)
        print(show(record), f"\nrecord: {record}", flush=True)
        left_out = json.loads(record.read_text())["left_out"]
        sys.exit(any(row["outcome"] == "failed" for row in left_out))


if __name__ == "__main__":
    main()
