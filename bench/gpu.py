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
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from bench import report
from bench.gpu_parts import PARTS, ROOT, Row, Setting, compile_ahead, start, wait
from bench.subjects import Unavailable
from gpn_triton.checkpoint import write_json
from gpn_triton.provenance import provenance

BUDGET_SECONDS = 460.0


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


def run_parts(parts: list[str], setting: Setting, record: Path) -> None:
    """Run parts one after the other in processes of their own, within the budget."""
    child = [sys.executable, "-m", "bench.gpu", "--record", str(record), "--out", str(setting.out)]
    environment, ahead = dict(os.environ), None
    if setting.tiny:
        child.append("--dry-run")
        environment["TRITON_INTERPRET"] = "1"
    else:
        ahead = start([*child, "--child", "compile-ahead"])
    for name in parts:
        if ahead is not None and name != "tests":
            wait(ahead, 30)
            ahead = None
        limit = min(setting.left, PARTS[name][1])
        status, error = None, "no time left"
        if limit > 5:
            command = [*child, "--child", name, "--budget", f"{limit:.0f}"]
            # a job that has begun may end a little later
            status = wait(start(command, env=environment), limit + 20)
            error = "it hung and was stopped" if status is None else f"it ended with {status}"
        if status != 0:
            contents = json.loads(record.read_text())
            row = {"name": "the part itself", "status": "failed", "error": error}
            contents["parts"].setdefault(name, []).append(row)
            write_json(record, contents)
            print(f"[{name}] {error}", flush=True)
    if ahead is not None:
        wait(ahead, 0)


def pivot(rows: list[Row]) -> str:
    """Microseconds a step of a layer: a line for each size, a column for each subject."""
    seen = dict.fromkeys((row["subject"], row["dtype"]) for row in rows)
    times = {
        (row["N"], row["B"], row["subject"], row["dtype"], row["mode"]): f"{row['median_us']:.3g}"
        for row in rows
    }
    lines = [
        [N, B]
        + [
            " / ".join(
                times.get((N, B, *one, mode), "-") for mode in ("forward", "forward+backward")
            )
            for one in seen
        ]
        for N, B in dict.fromkeys((row["N"], row["B"]) for row in rows)
    ]
    head = "microseconds a step, median: forward / forward and backward\n\n"
    return head + report.markdown(["N", "B", *map(" ".join, seen)], lines, left=2)


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
