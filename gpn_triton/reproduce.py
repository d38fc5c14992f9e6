"""Train the paper's grid: GPN, its ablations and its baselines, each at its best learning rate.

python -m gpn_triton.reproduce synthetic --quick
python -m gpn_triton.reproduce shd --download --amp --preset shd-paper --seed 0 1 2 --jobs 2
python -m gpn_triton.reproduce my_train.h5 my_test.h5 --time-bins 20 --seed 0 1 2
python -m gpn_triton.reproduce --protocol leave-one-speaker-out my_train.h5 --seed 0 1 2

What is finished is not trained again: after Ctrl-C the same command goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gpn_triton.analysis.grid import Grid
from gpn_triton.analysis.report import write_text
from gpn_triton.analysis.subject import load_data
from gpn_triton.analysis.table import SPEAKERS, rows_of, speakers_table, table, write_table
from gpn_triton.data.datasets import DATASETS
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.machine.command import Interrupted, answer
from gpn_triton.machine.figure import new_figure
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training.options import ABOVE_0, TrainConfig
from gpn_triton.training.parser import Parser, add_options, configuration, given_options

RATES = (5e-4, 2e-3, 8e-3)
# what --quick puts in place of the defaults
QUICK: dict[str, Any] = {"hidden": (32,), "time_bins": 10, "epochs": 5, "seed": (0, 1)}
QUICK_RATES, QUICK_SAMPLES = (8e-3,), {"samples": 400, "classes": 8}
SPLIT, LEAVE_OUT = PROTOCOLS = ("split", "leave-one-speaker-out")
# options of one training that a grid sets itself, or that name one training
OWN = (
    "neuron", "lr", "dataset", "train_file", "valid_file", "test_file", "resume", "eval_only",
    "profile", "quiet", "track", "out", "test_speaker",
)  # fmt: skip


def build_parser() -> Parser:
    """The command's parser; it stores only the flags that were given."""
    parser = Parser(
        prog="python -m gpn_triton.reproduce",
        usage="%(prog)s DATA ... [options]",
        description="Train the paper's neurons on one data set, each at the best of a few learning "
        "rates by validation and with several seeds, and compare them with GPN. All options but "
        "the grid's are those of python -m gpn_triton.train.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help=f"Names the data: one of {', '.join(DATASETS)}, or a training file in SHD's layout "
        "and, behind it, a test file.",
    )
    grid = parser.add_argument_group("Grid")
    grid.add_argument(
        "--neurons", nargs="+", choices=NEURONS, metavar="NAME",
        help=f"Chooses the neurons (default: {' '.join(NEURONS)}).",
    )  # fmt: skip
    grid.add_argument(
        "--protocol", choices=PROTOCOLS, metavar="NAME",
        help="Chooses what is tested on: split, the data's own test part or one that is held out; "
        "or leave-one-speaker-out, where each speaker of one file is left out of training and "
        "validation once and tested on (default: split).",
    )  # fmt: skip
    grid.add_argument(
        "--lr-grid", nargs="+", type=float, metavar="RATE",
        help="Names the learning rates of which each neuron gets its best, by the first seed's "
        f"validation (default: {' '.join(map(str, RATES))}).",
    )  # fmt: skip
    grid.add_argument(
        "--jobs", type=int, metavar="J",
        help="Sets how many trainings run at once, which share the cores and the GPUs (default: 1)",
    )  # fmt: skip
    grid.add_argument(
        "--quick", action="store_true",
        help="Takes small networks, two seeds and one learning rate, so that the grid ends within "
        "minutes on two cores; options given beside it win.",
    )  # fmt: skip
    grid.add_argument(
        "--out", metavar="DIR",
        help="Sets the grid's folder, where the same command goes on (default: "
        "runs/reproduce-DATA).",
    )  # fmt: skip
    add_options(parser, everything=True, without=OWN)
    return parser


def parse(argv: list[str] | None) -> Grid:
    """The grid that the command line asks for; ValueError for what does not fit."""
    flags = vars(build_parser().parse_args(argv))
    data, quick = flags.pop("data"), flags.pop("quick", False)
    protocol = flags.pop("protocol", SPLIT)
    neurons = flags.pop("neurons", list(NEURONS))
    rates = flags.pop("lr_grid", QUICK_RATES if quick else RATES)
    jobs, out = flags.pop("jobs", 1), flags.pop("out", f"runs/reproduce-{Path(data[0]).stem}")
    for name, values, (fits, expected) in (
        ("lr-grid", rates, ABOVE_0),
        ("jobs", [jobs], ((lambda v: v >= 1), "at least 1")),
    ):
        if not all(map(fits, values)):
            raise ValueError(f"{name}: expected {expected}, got {' '.join(map(str, values))}")
    if quick:
        flags = QUICK | (QUICK_SAMPLES if data == ["synthetic"] else {}) | flags
    if "preset" not in given_options(flags):
        # the paper's grid starts as the paper does
        flags = {"init": "paper", **flags}
    base = configuration({**flags, **_files(data)})
    neurons, rates = list(dict.fromkeys(neurons)), list(dict.fromkeys(rates))
    speakers = _speakers(base) if protocol == LEAVE_OUT else (None,)
    return Grid(base, neurons, rates, Path(out), jobs, speakers=speakers)


def _speakers(base: TrainConfig) -> list[int]:
    """Everybody who speaks in the one file of a grid."""
    if base.train_file is None or base.test_file is not None:
        raise ValueError(f"protocol: {LEAVE_OUT} expects one file as data, and no test file")
    store = read_events(base.train_file, base.cache_dir)
    found = [] if store.speakers is None else sorted(set(store.speakers.tolist()))
    if len(found) < 3:
        known = "does not name them" if store.speakers is None else f"has {len(found)}"
        raise ValueError(f"protocol: expected at least 3 speakers, {base.train_file} {known}")
    return found


def _files(data: list[str]) -> dict[str, str]:
    """The training options that name the data."""
    if len(data) > 2 or len(data) == 2 and data[0] in DATASETS:
        expected = f"one of {', '.join(DATASETS)}, or a training file and a test file"
        raise ValueError(f"data: expected {expected}, got {' '.join(data)}")
    if data[0] in DATASETS:
        return {"dataset": data[0]}
    return dict(zip(("train_file", "test_file"), data, strict=False))


def report(grid: Grid, data: str) -> int:
    """Print and write a grid's table as far as it is trained; how many cells have no result."""
    outcomes = grid.outcomes()
    rows = rows_of(grid.neurons, outcomes)
    size = "-".join(map(str, grid.base.hidden))
    write_table(grid.out, rows, f"{size}, T = {grid.base.time_bins}, {data}")
    left = sum(outcome.result is None for outcome in outcomes.values())
    if grid.speakers != (None,):
        by_speaker = speakers_table(grid.neurons, outcomes)
        write_text(grid.out / SPEAKERS, by_speaker)
        print(by_speaker)
    print(f"{table(rows)}{grid.out}: {len(outcomes) - left} of {len(outcomes)} trainings")
    return left


def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    grid = parse(argv)
    # what is wrong with the data or the installation is said before the first training
    new_figure(1, 1)
    splits = load_data(grid.base)
    print(splits.description)
    data = splits.description.split(":")[0]
    try:
        grid.train()
    except Interrupted:
        report(grid, data)
        raise
    return int(report(grid, data) > 0)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a training failed."""
    return answer(lambda: run(argv), ValueError, OSError, MemoryError, ModuleNotFoundError)


if __name__ == "__main__":
    sys.exit(main())
