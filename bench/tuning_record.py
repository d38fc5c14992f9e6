"""From a record of bench_tuning.py the tiles that were faster than those chosen, as a source file.

python -m bench.tuning_record bench/results/gpu-tuning.json            shows them
python -m bench.tuning_record bench/results/gpu-tuning.json --write    has tiles.choose take them
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from bench import report
from gpn_triton.kernels import tiles_measured
from gpn_triton.kernels.tiles import Tile
from gpn_triton.machine.files import write_atomically

# what is less than this much faster is noise
LEAST_GAIN = 0.03
_TILE = re.compile(r"(\d+)x(\d+)x(\d+)-warps(\d+)-stages(\d+)(-chained)?")
_TABLE = re.compile(r"^MEASURED: .*? = \{.*?\}$", re.MULTILINE | re.DOTALL)
_STATE = "none has been made\nyet."


def faster(records: list[dict[str, Any]]) -> list[tuple[tuple, int, Tile, str]]:
    """Of each case and way the fastest tile, where it gains enough.

    Args:
        records: of bench_tuning.py on a GPU.
    Returns:
        (capability, strategy, N, way), B, the tile, and what was measured in words.
    """
    found = []
    for name, group in report.by_group(r for r in records if r["kind"] == "tuning").items():
        chosen = next((r for r in group if r["subject"].startswith("gpn-")), None)
        swept = [r for r in group if _TILE.fullmatch(r["subject"])]
        if chosen is None or not swept or chosen["device_median_ms"] is None:
            continue
        best = min(swept, key=lambda r: r["device_median_ms"])
        now, then = best["device_median_ms"], chosen["device_median_ms"]
        if now > (1 - LEAST_GAIN) * then:
            continue
        *sizes, chained = _TILE.fullmatch(best["subject"]).groups()
        way = "forward" if name.startswith("tuning forward") else "backward"
        key = best["capability"], chosen["subject"].removeprefix("gpn-"), best["hidden"][0], way
        what = (
            f"{best['device']}, T {best['T']}, B {best['B']}, {best['dtype']}, {best['mode']}: "
            f"{now:.3g} ms, the tile before {then:.3g}"
        )
        found.append((key, best["B"], Tile(*map(int, sizes), chained=bool(chained)), what))
    return sorted(found, key=lambda one: one[:2])


def table(found: list[tuple[tuple, int, Tile, str]]) -> str:
    """The assignment of MEASURED that holds these tiles, each with what was measured."""
    lines = []
    for key in dict.fromkeys(one[0] for one in found):
        lines.append(f"    {key!r}: {{".replace("'", '"'))
        for own, batch, tile, what in found:
            if own == key:
                lines += [f"        # measured: {what}", f"        {batch}: {astuple(tile)!r},"]
        lines.append("    },")
    kind = "dict[tuple[int, str, int, str], dict[int, tuple]]"
    return f"MEASURED: {kind} = {{\n" + "\n".join(lines) + "\n}"


def main(argv: list[str] | None = None) -> int:
    """Show the faster tiles, or write them; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    parser.add_argument("--write", action="store_true", help="into kernels/tiles_measured.py")
    args = parser.parse_args(argv)
    try:
        found = faster(report.records(report.read(args.record)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found:
        print("no tile is faster than those chosen")
        return 0
    print(table(found))
    if args.write:
        path = Path(tiles_measured.__file__)
        text = _TABLE.sub(lambda _: table(found), path.read_text(encoding="utf-8"))
        text = text.replace(_STATE, f"this one of {args.record.name}.")
        write_atomically(path, lambda file: file.write(text.encode()))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
