"""Everything that needs a GPU, in one command that installs nothing: tests first, then figures.

python -m bench.gpu                            on a machine with a GPU, at most 8 minutes
python -m bench.gpu --parts steps,epochs       some parts
python -m bench.gpu --show FILE.json           the tables of a record, without a GPU
python -m bench.gpu --dry-run --out DIR        the same code at tiny sizes on a CPU

Parts are runs of pytest, in the order of PARTS, the most valuable first. Each is a process of its
own: one that hangs or breaks the device leaves the others alone. What does not fit the budget is
named, not run. A part of bench/ writes its record, gpu-PART.json, which `python -m bench.report`
reads, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 460.0
TINY = ["--size", "tiny", "--rounds", "1", "--case-seconds", "0", "--bench-device", "cpu"]


@dataclass(frozen=True)
class Part:
    """What one run of pytest is given.

    seconds: the most that it may take of a budget of 460, but for a dry run.
    files: test or benchmark files.
    chosen, cases: what pytest's -k selects; of cases only where they have their full size.
    workers: processes, where pytest-xdist is installed: compiling takes most of the tests' time.
    """

    seconds: float
    files: tuple[str, ...]
    chosen: str = ""
    cases: str = ""
    workers: int = 1

    @property
    def is_benchmark(self) -> bool:
        return self.files[0].startswith("bench/")


GPU_TESTS = ("tests/test_kernels_gpu.py", "tests/test_engine_gpu.py")
PARTS = {
    "tests": Part(160, GPU_TESTS, "not 2_to_the_31", workers=6),
    # takes half the memory, so by itself
    "tests-large": Part(60, GPU_TESTS, "2_to_the_31"),
    "steps": Part(
        110, ("bench/bench_recurrence.py",),
        "(persistent or stepwise or lstm) and not flashrnn and not lstm-bfloat16",
        "bfloat16 and not T1000",
    ),
    "epochs": Part(
        110, ("bench/bench_epoch.py",), "not every",
        "bfloat16 and not ((loop or lstm or no-graph) and ssc-T)",
    ),
    "tuning": Part(60, ("bench/bench_tuning.py",)),
    "plain": Part(
        60, ("bench/bench_recurrence.py",), "backward and (stepwise or loop or authors or hoisted)",
        "(N128 or N512) and bfloat16 and not B2048 and not B32",
    ),
    "more-tests": Part(120, ("tests/test_kernels_interpreted.py",), workers=6),
    "benchmarks": Part(
        3600,
        tuple(f"bench/bench_{k}.py" for k in ("train_step", "layer", "long_sequence", "binning")),
    ),
}  # fmt: skip


def arguments(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """Of pytest, for a part that may take so many seconds."""
    part, tiny = PARTS[name], args.dry_run
    found, chosen = ["-q", "-ra", "--durations=5", *part.files], [part.chosen]
    if part.is_benchmark:
        found += ["--benchmark-only", f"--benchmark-json={args.out.resolve()}/gpu-{name}.json"]
        found += [f"--budget={seconds:.0f}", *(TINY if tiny else [])]
        found += [f"--commit={args.commit}"] if args.commit else []
        chosen += [] if tiny else [part.cases]
    elif tiny:
        # without a GPU, the tiny cases of the same tests
        chosen += ["stepwise_equals and 1-1-1"] if name == "more-tests" else []
    else:
        found += ["-m", "gpu"] if part.files == GPU_TESTS else []
    if importlib.util.find_spec("xdist") and part.workers > 1:
        found += ["-n", str(part.workers)]
    if chosen := [f"({words})" for words in chosen if words]:
        found += ["-k", " and ".join(chosen)]
    return found


def start(*command: str) -> subprocess.Popen:
    """Start a Python module in a group of its own, at the root of the repository."""
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, start_new_session=True)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """A process's status, or None if it had to be killed, with all that it started."""
    # at the first pytest writes what it has
    for stop in (signal.SIGINT, signal.SIGKILL):
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, stop)
            seconds = 10
    process.wait()
    return None


def run(names: list[str], args: argparse.Namespace) -> dict[str, str]:
    """Run parts one after the other within the budget; returns how those that failed ended."""
    deadline, failed = time.monotonic() + args.budget, {}
    ahead = None if args.dry_run else start("bench.tuning")
    for name in names:
        if ahead is not None and not name.startswith("tests"):
            wait(ahead, 30)
            ahead = None
        limit = deadline - time.monotonic()
        if not args.dry_run:
            limit = min(limit, PARTS[name].seconds)
        if limit <= 5:
            failed[name] = "no time left"
            continue
        print(f"\n=== {name}", flush=True)
        # a contest that has begun may end a little later
        status = wait(start("pytest", *arguments(name, args, limit)), limit + 20)
        # 5: nothing was selected
        if status not in (0, 5):
            failed[name] = "it hung" if status is None else f"pytest ended with {status}"
    if ahead is not None:
        wait(ahead, 0)
    return failed


def show(record: Path) -> str:
    """A record as Markdown."""
    return report.section(record, report.read(record), {})


def main() -> None:
    """Run the parts, or show a record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--commit", help="for the record, where the tree came without its history")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print a record's tables")
    args = parser.parse_args()
    if args.show:
        print(show(args.show))
        return
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; --dry-run runs tiny sizes on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = run(names, args)
    for record in (args.out / f"gpu-{name}.json" for name in names):
        if record.exists():
            print(show(record))
    print("\n".join(f"{name}: {how}" for name, how in failed.items()) or "every part ran")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
