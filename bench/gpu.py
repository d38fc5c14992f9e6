"""Everything that needs a GPU, in one command that installs nothing: tests first, then figures.

python -m bench.gpu                            on a machine with a GPU, at most 8 minutes
python -m bench.gpu                            again: goes on with what did not fit
python -m bench.gpu --parts steps,epochs       some parts
python -m bench.gpu --show FILE.json           the tables of a record, without a GPU
python -m bench.gpu --dry-run --out DIR        the same code at tiny sizes on a CPU

Parts come in the order of PARTS, the most valuable first. Each is a process of its own: one that
hangs or breaks the device leaves the others alone. What ended stands in gpu-parts.json, with the
tree's commit and the GPU: the next call of the same leaves it out, and of a part that was cut short
it takes up the cases that are missing. A part of bench/ writes its record, gpu-PART.json, which
`python -m bench.report` reads, too, and of a second call gpu-PART-2.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.contest import NO_TIME
from gpn_triton.machine.files import write_atomically
from gpn_triton.machine.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 460.0
TINY = ["--size", "tiny", "--rounds", "1", "--case-seconds", "0", "--bench-device", "cpu"]


@dataclass(frozen=True)
class Part:
    """What one process is given: a run of pytest, alone or under a tool, or of another module.

    seconds: the most that it may take of a budget of 460, but for a dry run.
    files: test or benchmark files.
    chosen, cases: what pytest's -k selects; of cases only where they have their full size.
    workers: processes, where pytest-xdist is installed: compiling takes most of the tests' time.
    tool: a command of NVIDIA's that runs Python; a part whose tool is not there is left out.
    module, options: what runs instead of pytest; OUT stands for the folder of the records.
    """

    seconds: float
    files: tuple[str, ...] = ()
    chosen: str = ""
    cases: str = ""
    workers: int = 1
    tool: tuple[str, ...] = ()
    module: str = "pytest"
    options: tuple[str, ...] = ()

    @property
    def is_benchmark(self) -> bool:
        return bool(self.files) and self.files[0].startswith("bench/")


def _sanitizer(check: str) -> Part:
    """The smallest tests on a GPU under one of compute-sanitizer's checks."""
    tool = "compute-sanitizer", "--tool", check, "--error-exitcode", "9"
    chosen = "(teacher_forced or leaky_neurons_equal) and 4-5-16"
    return Part(60, GPU_TESTS[:1], chosen, tool=tool)


def _trace(preset: str) -> Part:
    """A trace of captured training steps of a preset's network on a set of its size and classes."""
    options = f"--preset {preset} --amp --dataset synthetic --samples 2000 --epochs 1 --profile 10"
    return Part(
        40, module="gpn_triton.train", options=(*options.split(), "--out", f"OUT/trace-{preset}")
    )


GPU_TESTS = ("tests/test_kernels_gpu.py", "tests/test_engine_gpu.py")
# share of the peak: device memory, L2, tensor cores, issued instructions
COUNTERS = ",".join((
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.avg.pct_of_peak_sustained_active",
))  # fmt: skip
PARTS = {
    "tests": Part(160, GPU_TESTS, "not 2_to_the_31 and not inductor", workers=6),
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
    **{f"trace-{preset}": _trace(preset) for preset in ("shd-small", "ssc-small")},
    **{check: _sanitizer(check) for check in ("memcheck", "racecheck", "initcheck")},
    "counters": Part(
        60, ("bench/bench_recurrence.py",), "backward and (persistent or stepwise)",
        "(N128-bfloat16 or N512-bfloat16)",
        tool=("ncu", "--target-processes", "all", "--kernel-name", "regex:gpn_", "--launch-count",
              "40", "--metrics", COUNTERS, "--csv", "--log-file", "OUT/gpu-counters.csv"),
    ),
    "more-tests": Part(120, ("tests/test_kernels_interpreted.py",), workers=6),
    # what compiles with inductor takes longest and says least
    "tests-inductor": Part(120, GPU_TESTS, "inductor"),
    "benchmarks": Part(
        3600,
        tuple(f"bench/bench_{k}.py" for k in ("train_step", "layer", "long_sequence", "binning")),
    ),
}  # fmt: skip


def record_paths(out: Path, name: str) -> list[Path]:
    """The records of a part, one of each call that ran cases of it."""
    return sorted(out.glob(f"gpu-{name}.json")) + sorted(out.glob(f"gpu-{name}-[0-9]*.json"))


def command(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """What to run, behind Python's -m, for a part that may take so many seconds."""
    part = PARTS[name]
    if part.module != "pytest":
        tiny = "--hidden 8 --time-bins 4 --samples 60 --device cpu --backend cpu".split()
        options = [option.replace("OUT", str(args.out.resolve())) for option in part.options]
        return [part.module, *options, *(tiny if args.dry_run else [])]
    return ["pytest", *arguments(name, args, seconds)]


def arguments(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """Of pytest, for a part that may take so many seconds."""
    part, tiny = PARTS[name], args.dry_run
    found, chosen = ["-q", "-ra", "--durations=5", *part.files], [part.chosen]
    if part.is_benchmark:
        before = record_paths(args.out.resolve(), name)
        file = f"gpu-{name}-{len(before) + 1}.json" if before else f"gpu-{name}.json"
        found += ["--benchmark-only", f"--benchmark-json={args.out.resolve() / file}"]
        found += [f"--recorded={path}" for path in before]
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


def start(*command: str, tool: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start a Python module in a group of its own, at the root of the repository."""
    whole = [*tool, sys.executable, "-m", *command]
    return subprocess.Popen(whole, cwd=ROOT, start_new_session=True)


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


class Ended:
    """The parts that ended, in gpu-parts.json: of one commit on one GPU, else it begins anew."""

    def __init__(self, out: Path, of: dict[str, Any]):
        self.path, self.of, self.parts = out / "gpu-parts.json", of, {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["of"] == of:
                self.parts = found["parts"]
            else:
                for path in out.glob("gpu-*.json"):
                    # an older tree's cases are not this one's
                    path.rename(path.with_name(f"old-{path.name}"))

    def add(self, name: str, how: str) -> None:
        """Write down that a part ended, and how."""
        self.parts[name] = how
        text = json.dumps({"of": self.of, "parts": self.parts}, indent=1)
        write_atomically(self.path, lambda file: file.write(text.encode()))


def is_whole(out: Path, name: str) -> bool:
    """Whether the last record of a part lacks no case for want of time."""
    paths = record_paths(out, name)
    left = json.loads(paths[-1].read_text()).get("left_out", []) if paths else []
    return all(one["reason"] != NO_TIME for one in left)


def run(names: list[str], args: argparse.Namespace, ended: Ended) -> dict[str, str]:
    """Run parts one after the other within the budget; returns how those that failed ended."""
    deadline, failed = time.monotonic() + args.budget, {}
    ahead = None if args.dry_run else start("bench.tuning")
    for name in names:
        part = PARTS[name]
        if name in ended.parts:
            print(f"{name}: {ended.parts[name]} in an earlier call")
            continue
        if part.tool and not args.dry_run and not shutil.which(part.tool[0]):
            failed[name] = f"left out: {part.tool[0]} is not here"
            continue
        if ahead is not None and not name.startswith("tests"):
            wait(ahead, 30)
            ahead = None
        limit = deadline - time.monotonic()
        if not args.dry_run:
            limit = min(limit, part.seconds)
        if limit <= 5:
            failed[name] = NO_TIME
            continue
        print(f"\n=== {name}", flush=True)
        tool = () if args.dry_run else part.tool
        tool = tuple(word.replace("OUT", str(args.out.resolve())) for word in tool)
        # a contest that has begun may end a little later
        status = wait(start(*command(name, args, limit), tool=tool), limit + 20)
        # 5: nothing was selected
        if status not in (0, 5):
            failed[name] = "it hung" if status is None else f"it ended with status {status}"
        elif not is_whole(args.out, name):
            failed[name] = "cases are left: the same command goes on with them"
        if status is not None and is_whole(args.out, name):
            ended.add(name, failed.get(name, "ran"))
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
    found = provenance(torch.device("cpu" if args.dry_run else "cuda"))
    of = {"commit": args.commit or found["commit"], "device": found["device"]}
    failed = run(names, args, Ended(args.out, of))
    for record in (path for name in names for path in record_paths(args.out, name)):
        print(show(record))
    print("\n".join(f"{name}: {how}" for name, how in failed.items()) or "every part ran")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
