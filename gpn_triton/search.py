"""Search for better training options within a budget of minutes, by validation alone.

python -m gpn_triton.search my_train.h5 --budget 60
python -m gpn_triton.search shd --preset shd-paper --amp --download --budget 240
python -m gpn_triton.search synthetic --budget 5 --epochs 5 --search lr hidden=64,128,128-64

What is tried is kept: the same command goes on with it for another budget.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpn_triton.analysis.search import Search, load_optuna
from gpn_triton.analysis.space import DEFAULT, Space, read_space
from gpn_triton.analysis.subject import load_data
from gpn_triton.analysis.trials import (
    BEST,
    FINISHED,
    described,
    draw_picture,
    table,
    write_tables,
)
from gpn_triton.data.datasets import DATASETS
from gpn_triton.machine.command import Interrupted, answer
from gpn_triton.machine.device import memory_named
from gpn_triton.machine.distributed import World, several
from gpn_triton.machine.figure import new_figure
from gpn_triton.training.experiment import advise, ready_device
from gpn_triton.training.parser import Parser, add_options, configuration, given_options

# options of one training that a search sets itself, or that name one training
OWN = (
    "dataset", "train_file", "resume", "eval_only", "profile", "track", "keep_epochs", "out",
)  # fmt: skip
# so many of the best trials are printed; the files have all
PRINTED = 10


def build_parser() -> Parser:
    """The command's parser; it stores only the flags that were given."""
    parser = Parser(
        prog="python -m gpn_triton.search",
        usage="%(prog)s DATA --budget MINUTES [options]",
        description="Search for better training options: Optuna draws trials, each is trained, and "
        "validation alone says which is best; a trial that falls behind the others is pruned, and "
        "the test part is never read, a test file not even opened. All options but the search's "
        "are those of python -m gpn_triton.train, and what is given is fixed. The first trial is "
        "of the options as they stand; of several seeds a trial's mean counts, and the first "
        "prunes. The folder gets table.md, table.csv, search.png and best.toml, which python -m "
        "gpn_triton.train --config takes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "data", metavar="DATA",
        help=f"Names the data: one of {', '.join(DATASETS)}, or a training file in SHD's layout.",
    )  # fmt: skip
    group = parser.add_argument_group("Search")
    group.add_argument(
        "--budget", type=float, required=True, metavar="MINUTES",
        help="Sets for how long this call trains; the epoch that is begun by then is finished, and "
        "the next call goes on behind it.",
    )  # fmt: skip
    space = " ".join(f"{name}={spec}" for name, spec in DEFAULT.items())
    group.add_argument(
        "--search", nargs="+", action="extend", metavar="NAME=VALUES",
        help="Chooses the options that are searched, and over what: NAME=LOW..HIGH is a range, "
        "NAME=LOW..HIGH:log one of even steps of the logarithm, NAME=A,B,C a list, "
        "hidden=128,256-128 one of networks of one and two layers; NAME alone has its range of "
        f"the default (default, without what is fixed or has no effect: {space}).",
    )  # fmt: skip
    group.add_argument(
        "--trials", type=int, metavar="N",
        help="Ends the search before its budget once so many trials are over, those of earlier "
        "calls included.",
    )  # fmt: skip
    group.add_argument(
        "--out", metavar="DIR",
        help="Sets the search's folder, where the same command goes on (default: "
        "runs/search-DATA).",
    )  # fmt: skip
    add_options(parser, everything=True, without=OWN)
    return parser


@dataclass(frozen=True)
class Asked:
    """What the command line asks for: the fixed options by name, the space, the folder, seconds of
    training, and the number of trials, if any."""

    given: dict[str, Any]
    space: Space
    out: Path
    seconds: float
    trials: int | None


def parse(argv: list[str] | None) -> Asked:
    """What the command line asks for; ValueError for what does not fit."""
    flags = vars(build_parser().parse_args(argv))
    data, budget = flags.pop("data"), flags.pop("budget")
    texts, trials = flags.pop("search", []), flags.pop("trials", None)
    out = Path(flags.pop("out", f"runs/search-{Path(data).stem}"))
    if not 0 < budget < math.inf:
        raise ValueError(f"budget: expected minutes above 0, got {budget:g}")
    if trials is not None and trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    if Path(data).is_dir():
        raise ValueError(
            f"data: expected one of {', '.join(DATASETS)} or a file, {data} is a folder: python "
            "-m gpn_triton.encode makes a file of recordings"
        )
    file = flags.get("config")
    flags["dataset" if data in DATASETS else "train_file"] = data
    given = given_options(flags)
    given.pop("config", None)
    for name in OWN:
        if name in given and name not in flags:
            raise ValueError(f"{name}: has no effect in a search: remove it from {file}")
    return Asked(given, read_space(texts, given), out, 60 * budget, trials)


def report(search: Search) -> None:
    """Write a search's tables and its picture, and print the best of its trials."""
    rows = write_tables(search)
    draw_picture(search, rows)
    counts = {row.outcome: 0 for row in rows}
    for row in rows:
        counts[row.outcome] += 1
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(table(search, rows[:PRINTED]), end="")
    print(f"{search.folder}: trials: {told or 'none'}")
    if FINISHED not in counts:
        print("no trial has finished: the same command goes on")
        return
    print(
        f"best: {described(search, rows[0])}\n"
        f"python -m gpn_triton.train --config {search.folder / BEST} trains it anew and tests it, "
        f"--resume {search.trial_folder(rows[0].trial)} tests it as it is"
    )


# memory may also not suffice between trainings
@memory_named()
def run(argv: list[str] | None) -> int:
    """Do what the command line asks for; returns the exit status."""
    asked = parse(argv)
    # what is wrong with the installation or the data is said before the first trial
    load_optuna()
    new_figure(1, 1)
    if several():
        raise ValueError("search: expected one process, torchrun started several")
    cfg = configuration(asked.given)
    device, world = ready_device(cfg), World(quiet=cfg.quiet)
    splits = load_data(cfg, test=False)
    world.say(f"{splits.description}\nsearches {' '.join(map(str, asked.space))}")
    advise(cfg, device, world)
    with Search(asked.given, asked.space, splits, device, asked.out) as search:
        try:
            for trial in search.run(asked.seconds, asked.trials):
                rows = write_tables(search)
                world.say(described(search, next(r for r in rows if r.trial == trial.number)))
        except Interrupted:
            report(search)
            raise
        report(search)
        return int(search.best() is None)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where no trial has finished yet."""
    return answer(
        lambda: run(argv),
        ValueError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        stopped="stopped at once: the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
