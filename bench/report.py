"""Tables and plots from benchmark records, and what changed between two of them.

python -m bench.report bench/results
python -m bench.report --compare old.json new.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MIB = 2**20
DASH = "–"
# a change counts where quartiles do not overlap and medians are further apart than this
THRESHOLD = 0.05
# memory does not depend on the machine's mood
MEMORY_THRESHOLD = 0.01
# what makes two records ones of the same benchmark
KEY = ("group", "subject", "T", "B", "inputs", "dtype", "hidden")
PLOTS = ("time against T", "time against N", "time against B", "memory against T")
Record = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Read a record file of `pytest bench/ --benchmark-only --benchmark-json=FILE`.

    Returns:
        The file's contents; each benchmark's `extra_info` additionally holds `group` and `rounds`.
    Raises:
        FileNotFoundError: no such file. ValueError: it is not such a record.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write it with --benchmark-json={path}")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        for benchmark in contents["benchmarks"]:
            info, rounds = benchmark["extra_info"], benchmark["stats"]["rounds"]
            info |= {"group": benchmark["group"], "rounds": rounds, "median_ms": info["median_ms"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of these benchmarks: {error!r}") from None
    return contents


def records(contents: dict[str, Any]) -> list[Record]:
    """The benchmarks of a record file, as flat dictionaries."""
    return [benchmark["extra_info"] for benchmark in contents["benchmarks"]]


def _number(value: float | None, digits: int = 3, unit: float = 1) -> str:
    """A number in some unit with so many significant digits, or a dash."""
    if value is None:
        return DASH
    value /= unit
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - magnitude)}f}"


def markdown(columns: Iterable[str], rows: Iterable[Iterable[object]], left: int) -> str:
    """A Markdown table; the first `left` columns are aligned to the left, the others to the right.

    A bar within a cell would end it and becomes a slash.
    """
    columns = list(columns)
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    lines = [[str(cell).replace("|", "/") for cell in row] for row in (columns, rule, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pace(r: Record) -> dict[str, float]:
    """What a record's times come to, where it makes sense: of a step, a sample, an epoch."""
    found = {}
    if r["device_median_ms"] is not None and r["mode"].startswith("forward"):
        found["us a step"] = 1e3 * r["device_median_ms"] / r["T"]
    if "samples" in r:
        found["samples/s"] = 1e3 * r["samples"] / r["median_ms"]
        # an epoch of the whole set, where the shape is the set's
        if r.get("samples_of_full") and not r["scaled"]:
            found["s an epoch"] = r["samples_of_full"] / found["samples/s"]
    return found


def table(group: list[Record]) -> str:
    """A Markdown table of the subjects of one case, the fastest first."""
    columns: dict[str, Callable[[Record], str]] = {
        "subject": lambda r: r["subject"] + (" (in L2)" if r.get("fits_l2") else ""),
        "median ms": lambda r: _number(r["median_ms"]),
        "quartiles ms": lambda r: f"{_number(r['low_ms'])}–{_number(r['high_ms'])}",
        "device ms": lambda r: _number(r["device_median_ms"]),
        "us a step": lambda r: _number(_pace(r).get("us a step")),
        "x ours": lambda r: _number(r["time_ratio"]),
        "peak MiB": lambda r: _number(r["peak_bytes"], unit=MIB),
        "held MiB": lambda r: _number(r["held_bytes"], unit=MIB),
        "beyond MiB": lambda r: _number(r["held_beyond_bytes"], unit=MIB),
        "GFLOP": lambda r: _number(r["flops"], unit=1e9),
        "floor ms": lambda r: _number(r["floor_ms"]),
        "% of floor": lambda r: _number(100 * r["fraction_of_floor"]),
        "spikes a step": lambda r: _number(r.get("spikes_a_step")),
        "samples/s": lambda r: _number(_pace(r).get("samples/s"), 4),
        "s an epoch": lambda r: _number(_pace(r).get("s an epoch")),
        "rounds": lambda r: str(r["rounds"]),
    }
    group = sorted(group, key=lambda r: r["median_ms"])
    cells = {name: [value(r) for r in group] for name, value in columns.items()}
    # some of these mean something for some kinds, and on a GPU, alone
    shown = {name: column for name, column in cells.items() if set(column) != {DASH}}
    return markdown(shown, zip(*shown.values(), strict=True), left=1)


def describe(r: Record) -> str:
    """The sizes of a record in words, and those its name stands for if they are larger."""

    def sizes(T: int, B: int, hidden: list[int]) -> str:
        return f"T {T}, B {B}" + (f", N {'-'.join(map(str, hidden))}" if hidden else "")

    scaled = f"; scaled down from {sizes(*r['full'])}" if r["scaled"] else ""
    return f"{sizes(r['T'], r['B'], r['hidden'])}, {r['inputs']} inputs, {r['dtype']}{scaled}"


def by_group(found: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by case, the headline first."""
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(record["group"], []).append(record)
    # the whole layer first: on a CPU it is the headline
    return dict(sorted(groups.items(), key=lambda item: not item[0].startswith("layer: shd")))


def section(path: Path, contents: dict[str, Any], plots: dict[str, Path]) -> str:
    """The Markdown section of one record file."""
    found = records(contents)
    if not found:
        return f"## {path.stem}\n\nNothing ran.\n"
    first, rate = found[0], found[0]["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v)
    parts = [
        f"## {path.stem}",
        f"{first['device']}, {first['threads']} threads; {versions}; commit {first['commit']}; "
        f"{contents['datetime'][:16]}.\n"
        f"Ceilings: {rate['flops_per_s'] / 1e12:.3g} TFLOP/s, {rate['bytes_per_s'] / 1e9:.4g} GB/s "
        f"({rate['source']}).",
    ]
    for name, group in by_group(found).items():
        parts += [f"### {name}", describe(group[0]) + ".", table(group)]
        algorithms = [
            f"{r['subject']}: {', '.join(r['kernels'])}"
            for r in group
            if r.get("kernels") and r["subject"].startswith(("lstm", "gru"))
        ]
        parts += ["Longest kernels, " + "; ".join(algorithms) + "."] if algorithms else []
    parts += [f"![{name}]({plot.name})" for name, plot in plots.items()]
    reasons = Counter(
        (left["subject"], left["outcome"], left["reason"]) for left in contents.get("left_out", [])
    )
    if reasons:
        rows = [
            (subject, reason if outcome == "skipped" else f"**{outcome}**: {reason}", n)
            for (subject, outcome, reason), n in sorted(reasons.items())
        ]
        parts += ["### Left out", markdown(("subject", "why", "cases"), rows, left=2)]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, found: list[Record]) -> dict[str, Path]:
    """Draw a record's plots beside it; returns name -> file of those that have points.

    Raises:
        ModuleNotFoundError: matplotlib, an extra (`plot`), is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {}
    for name in PLOTS:
        what, axis = name.split(" against ")
        # forward and backward, in the record's first dtype; a case of a recurrence is named for the
        # one size that it varies
        chosen = [
            r
            for r in found
            if r["mode"] == "forward+backward" and r["dtype"] == found[0]["dtype"]
            if r["kind"] == ("long_sequence" if axis == "T" else "recurrence")
            if axis == "T" or re.fullmatch(rf"{axis}\d+(-[a-z]+\d+)?", r["case"])
        ]
        if not chosen:
            continue
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for subject in sorted({r["subject"] for r in chosen}):
            points = sorted(
                (
                    r["hidden"][0] if axis == "N" else r[axis],
                    r["peak_bytes"] / MIB if what == "memory" else r["median_ms"],
                )
                for r in chosen
                if r["subject"] == subject
            )
            width = 2.2 if subject.startswith("gpn") else 1.2
            axes.plot(*zip(*points, strict=True), "o-", label=subject, linewidth=width)
        scaled = ", scaled-down shapes" if any(r["scaled"] for r in found) else ""
        axes.set(
            xlabel={"T": "time bins T", "N": "neurons N", "B": "batch B"}[axis], xscale="log",
            ylabel="peak MiB" if what == "memory" else "median ms", yscale="log",
        )  # fmt: skip
        axes.set_title(f"{name}: {found[0]['device']}{scaled}", fontsize=9)
        axes.grid(True, which="major", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
        drawn[name] = path.with_name(f"{path.stem}-{name.replace(' ', '-')}.png")
        figure.savefig(drawn[name], dpi=110)
    return drawn


def render(folder: Path) -> Path:
    """Write README.md and plots from every record file in a folder; returns the page.

    Raises:
        FileNotFoundError: no record there.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no record; write one: "
            f"pytest bench/ --benchmark-only --benchmark-json={folder}/cpu.json"
        )
    parts = [
        "# Benchmark results\n\nRendered from the JSON files beside this page by `python -m "
        "bench.report bench/results`; what the columns mean and how each was taken: "
        "[../README.md](../README.md).\n"
    ]
    for path in paths:
        contents = read(path)
        parts.append(section(path, contents, draw(path, records(contents))))
    page = folder / "README.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def compare(
    old: dict[str, Any], new: dict[str, Any], threshold: float = THRESHOLD
) -> tuple[list[str], list[str]]:
    """What changed from one record to another.

    A time has changed if the medians are further apart than the threshold and the quartiles do not
    overlap; memory, if it differs by more than MEMORY_THRESHOLD. Only what this project computes
    (subjects gpn-...) can regress; a competitor that moved says that the machine did.

    Args:
        old, new: as `read` returns them. threshold: share of the old median.
    Returns:
        Lines to print, and those of them that are regressions.
    Raises:
        ValueError: the records are of different devices, or have nothing in common.
    """
    before, after = (
        {tuple(str(r[k]) for k in KEY): r for r in records(contents)} for contents in (old, new)
    )
    devices = {(r["device"], r["threads"]) for r in (*before.values(), *after.values())}
    if len(devices) > 1:
        raise ValueError(f"records of different devices: {sorted(devices)}")
    if not before.keys() & after.keys():
        raise ValueError("the records have no benchmark in common")
    lines, regressions = [], []
    failed = {
        (left["group"], left["subject"]): left["reason"]
        for left in new.get("left_out", [])
        if left["outcome"] == "failed"
    }
    for key, was in before.items():

        def note(kind: str, what: str, worse: bool, was: Record = was) -> None:
            lines.append(f"{kind:11} {was['group']}: {was['subject']}{what}")
            if worse and was["subject"].startswith("gpn"):
                regressions.append(lines[-1])

        if (now := after.get(key)) is None:
            reason = failed.get((was["group"], was["subject"]))
            note("failed" if reason else "gone", f": {reason}" if reason else "", bool(reason))
            continue
        ratio = now["median_ms"] / was["median_ms"]
        slower = ratio > 1 + threshold and now["low_ms"] > was["high_ms"]
        if slower or (ratio < 1 - threshold and now["high_ms"] < was["low_ms"]):
            times = f": {_number(was['median_ms'])} -> {_number(now['median_ms'])} ms"
            note("slower" if slower else "faster", f"{times} (x {ratio:.2f})", slower)
        for field in ("peak_bytes", "held_bytes"):
            a, b = was[field], now[field]
            if a and b and abs(b / a - 1) > MEMORY_THRESHOLD:
                memory = f": {field} {a / MIB:.3g} -> {b / MIB:.3g} MiB"
                note("more memory" if b > a else "less memory", memory, b > a)
    return lines, regressions


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 on a regression, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Render benchmark records (JSON of pytest-benchmark) into DIR/README.md with "
        "plots, or compare two of them.",
        epilog="exit status of --compare: 0 no regression of this project's own subjects, 1 a "
        "regression beyond the spread or more memory, 2 nothing to compare",
    )
    add = parser.add_argument
    add("dir", nargs="?", type=Path, metavar="DIR", help="holds the records")
    add("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"), help="two records")
    shown = f"least change of a median that counts (default: {THRESHOLD})"
    add("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help=shown)
    options = parser.parse_args(argv)
    if (options.dir is None) == (options.compare is None):
        parser.error("expected either DIR or --compare OLD.json NEW.json")
    try:
        if options.dir is not None:
            print(f"wrote {render(options.dir)}")
            return 0
        lines, regressions = compare(*map(read, options.compare), options.threshold)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines) or "no change beyond the spread")
    if regressions:
        print(f"\n{len(regressions)} regressions:\n" + "\n".join(regressions))
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
