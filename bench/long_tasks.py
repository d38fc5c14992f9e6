"""Long tasks: what GPN, its paper's start, LIF and the LSTM twin learn of them, cell by cell.

python -m bench.long_tasks runs/long-tasks                        every cell that is not finished
python -m bench.long_tasks runs/long-tasks adding-200-gpn         these cells alone
python -m bench.long_tasks runs/long-tasks --draw docs/results    nothing more: table and picture

A cell is one training command of several seeds, printed before it runs, in DIR/CELL; a cell that
was interrupted is resumed. The table goes to the standard output as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.report import markdown
from gpn_triton import train
from gpn_triton.machine.files import write_atomically

# of each, three seeds
SEEDS = "--seed 0 1 2"
# a sum is known where its mean squared error is below this; always saying the mean gives 1 / 6
KNOWN = 0.01
_ADDING = "--dataset adding --samples 12800 --epochs 3 --hidden 64 --lr 2e-3 --clip-grad 1"
_RECALL = "--dataset recall --samples 2000 --batch-size 32 --hidden 64 --lr 2e-3 --clip-grad 1"
_DIGITS = "--dataset digits --epochs 40 --lr 2e-3 --clip-grad 1"
_MNIST = "--dataset mnist-10k --epochs 20 --lr 2e-3 --clip-grad 1"


def _adding(T: int) -> dict[str, str]:
    at = f"{_ADDING} --time-bins {T}"
    # the shortest time constant is 2 bins, the longest twice the sequence
    quiet = f"--time-constants {2 / T:g} 2"
    return {
        f"adding-{T}-gpn": f"{at} {quiet}",
        f"adding-{T}-gpn-paper": f"{at} --init paper",
        f"adding-{T}-lstm": f"{at} --neuron lstm --time-constants {2 / T:g} 1",
        f"adding-{T}-cuba-lif": f"{at} --neuron cuba-lif",
    }


# by name the options of a training command, without its seeds
CELLS = {
    **_adding(200), **_adding(500), **_adding(1000), **_adding(2000),
    **{
        f"recall-{gap}-{name}": f"{_RECALL} --time-bins {gap + 2} {options}"
        for gap in (100, 1000)
        for name, options in (
            ("gpn", "--epochs 10 --readout membrane --time-constants 0.01 2"),
            ("lif", "--epochs 10 --readout membrane --neuron lif"),
            ("lstm", "--epochs 10 --neuron lstm --time-constants 0.01 2"),
        )
    },
    # 90 neurons of an LSTM have as many parameters as 64 of GPN
    "digits-gpn": f"{_DIGITS} --hidden 64 --readout membrane",
    "digits-lstm": f"{_DIGITS} --hidden 90 --neuron lstm --readout last",
    "digits-lstm-chrono": (
        f"{_DIGITS} --hidden 90 --neuron lstm --readout last --time-constants 0.02 1"
    ),
    **{
        f"mnist-10k{order}-{name}": f"{_MNIST} {options} {flag}".strip()
        for order, flag in (("", ""), ("-permuted", "--permuted"))
        for name, options in (
            ("gpn", "--hidden 64 --readout membrane"),
            ("lstm", "--hidden 90 --neuron lstm --readout last"),
            ("lstm-chrono", "--hidden 90 --neuron lstm --readout last --time-constants 0.003 1"),
        )
    },
}  # fmt: skip


def run_of(folder: Path) -> Path | None:
    """The run in a cell's folder, if it was begun."""
    return next(iter(sorted(folder.glob("*/"))), None)


def train_cell(folder: Path, options: list[str]) -> int:
    """Train or resume a cell; the training command's exit status, 0 where it is finished."""
    run = run_of(folder)
    if run and (run / "result.json").exists():
        return 0
    argv = ["--resume", str(run)] if run else [*options, *SEEDS.split(), "--out", str(folder)]
    print("python -m gpn_triton.train", *argv, flush=True)
    return train.main(argv)


def seeds_of(run: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of each finished seed of a run its result and its epochs."""
    found = []
    for path in sorted(run.glob("seed-*/result.json")):
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append((json.loads(path.read_text(encoding="utf-8")), list(map(json.loads, lines))))
    return found


def updates(lines: list[dict[str, Any]], epoch: int) -> int:
    """How many updates a seed had made after so many epochs; its lines as in metrics.jsonl."""
    cfg, line = lines[0]["config"], lines[1]
    samples = round(line["samples_per_second"] * line["seconds"])
    return epoch * -(-samples // cfg["batch_size"])


def spread(values: list[float], digits: int) -> str:
    """Mean and deviation of one or more values."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(out: Path) -> str:
    """Every cell that has a finished seed, as Markdown."""
    rows = []
    for name in CELLS:
        run = run_of(out / name)
        if not run or not (seeds := seeds_of(run)):
            continue
        adding, known = name.startswith("adding"), []
        for _, lines in seeds:
            epochs = [e["epoch"] for e in lines[1:] if e["valid_loss"] < KNOWN]
            known += [updates(lines, epochs[0])] if epochs else []
        losses = [result["test_loss"] for result, _ in seeds]
        rights = [100 * result["test_accuracy"] for result, _ in seeds]
        rows.append(
            (
                name, len(seeds), seeds[0][0]["parameters"],
                spread(losses, 4) if adding else "", spread(rights, 1) if not adding else "",
                f"{len(known)} of {len(seeds)}, at {max(known)}" if adding and known else
                ("none" if adding else ""),
                updates(seeds[0][1], len(seeds[0][1]) - 1),
                spread([result["seconds"] for result, _ in seeds], 0),
            )
        )  # fmt: skip
    head = (
        "cell", "seeds", "parameters", "test error", "test accuracy, %",
        f"below {KNOWN} by validation, updates at most", "updates", "seconds a seed",
    )  # fmt: skip
    return markdown(head, rows, left=1)


def draw(out: Path, path: Path) -> None:
    """The adding problem's validation error against updates, T by T, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"gpn": "C3", "gpn-paper": "C1", "lstm": "C0", "cuba-lif": "C2"}
    names = {"gpn": "GPN, quiet start", "gpn-paper": "GPN, paper's start",
             "lstm": "LSTM, chrono biases", "cuba-lif": "CuBa-LIF"}  # fmt: skip
    lengths = [T for T in (200, 500, 1000, 2000) if (out / f"adding-{T}-gpn").exists()]
    figure = Figure(figsize=(3 * len(lengths), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, T in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths,
                       strict=True):  # fmt: skip
        for kind, colour in colours.items():
            run, label = run_of(out / f"adding-{T}-{kind}"), names[kind]
            for _, lines in seeds_of(run) if run else ():
                at = [updates(lines, line["epoch"]) for line in lines[1:]]
                errors = [line["valid_loss"] for line in lines[1:]]
                axes.plot(at, errors, "o-", color=colour, label=label, markersize=3)
                label = None
        axes.axhline(1 / 6, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(title=f"T = {T}", xlabel="updates", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean squared error")
    figure.axes[0].legend(frameon=False, fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_tasks", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path, metavar="DIR", help="holds a folder for each cell")
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)}")
    parser.add_argument("--data-dir", help="the folder of MNIST's files")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="trains nothing, and draws")
    options = parser.parse_intermixed_args(argv)
    if unknown := set(options.cells) - CELLS.keys():
        parser.error(f"unknown cells: {', '.join(sorted(unknown))}")
    if options.draw:
        draw(options.out, options.draw / "adding.png")
    else:
        for name in options.cells or CELLS:
            where = ["--data-dir", options.data_dir] if options.data_dir else []
            given = where if name.startswith("mnist") else []
            if status := train_cell(options.out / name, [*CELLS[name].split(), *given]):
                return status
    print(table(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
