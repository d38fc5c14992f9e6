"""What run folders say of their runs: options, epochs, outcome, and where the time went."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpn_triton.analysis.subject import label_of
from gpn_triton.machine.profile import PROFILE
from gpn_triton.training import run_folder
from gpn_triton.training.objective import Epoch
from gpn_triton.training.options import OPTIONS, completed

# options that say where a run lies or how it was asked for, not what it is
PLACES = ("preset", "config", "out", "resume", "eval_only")


class Spent(NamedTuple):
    """A kernel's or an op's own time over the profiled steps, in ms."""

    name: str
    ms: float


@dataclass(frozen=True)
class Record:
    """A run of one seed as its folder has it.

    label: its name among others. options: by name, as JSON values; its seed is a number. header:
    the first line of metrics.jsonl. epochs: one or more. result: of result.json, None where the run
    is not finished. profile: what --profile left, None where it left nothing.
    """

    label: str
    folder: Path
    options: dict[str, Any]
    header: dict[str, Any]
    epochs: list[Epoch]
    result: dict[str, Any] | None
    profile: str | None

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were tested; None where the run is not finished."""
        number = (self.result or {}).get("best_epoch")
        return next((epoch for epoch in self.epochs if epoch.epoch == number), None)


def read_records(runs: Iterable[str]) -> list[Record]:
    """The records of run folders; of a run of several seeds those of all its seeds.

    Raises:
        FileNotFoundError: not a run folder. ValueError: no epoch was finished there, or a file
            cannot be read.
    """
    folders = list(dict.fromkeys(folder for run in runs for folder in _seeds(run)))
    labels = [label_of(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        labels = list(map(str, folders))
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _seeds(run: str) -> list[Path]:
    """The folders under a run folder that hold metrics."""
    path = Path(run)
    seeds = run_folder.read_seed_options(path)["seed"]
    if (path / run_folder.METRICS).exists():
        return [path]
    folders = run_folder.seed_folders(path, seeds)
    found = [folder for folder in folders if (folder / run_folder.METRICS).exists()]
    if not found:
        raise ValueError(f"run: {run}: no epoch was finished, there is nothing to show")
    return found


def _read(folder: Path, label: str) -> Record:
    options = run_folder.read_seed_options(folder)
    header, epochs = run_folder.read_metrics(folder, None, len(options["hidden"]), "run")
    if not epochs:
        raise ValueError(f"run: {folder}: no epoch was finished, there is nothing to show")
    # there each seed has its own
    options |= completed(header.get("config", {"seed": options["seed"]}))
    profile = folder / PROFILE
    return Record(
        label, folder, options, header, epochs, run_folder.read_result(folder, "run"),
        profile.read_text(encoding="utf-8") if profile.exists() else None,
    )  # fmt: skip


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The options in which runs differ, by name, with each run's value; of one run those that are
    not as by default, with the default before."""
    columns = [record.options for record in records]
    if len(columns) == 1:
        columns.insert(0, {f.name: _plain(f.default) for f in OPTIONS} | {"seed": 0})
    found = {}
    for f in OPTIONS:
        values = [column[f.name] for column in columns]
        if f.name not in PLACES and any(value != values[0] for value in values):
            found[f.name] = values
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def spent(profile: str, most: int = 12) -> tuple[str, list[Spent]]:
    """Where the time of profiled steps went, by their own time, the longest first.

    Args:
        profile: the text that machine.profile writes. most: so many rows at most.
    Returns:
        its first line; the rows, none where the table is of another form.
    """
    lines = profile.splitlines()
    titles: list[str] = []
    rows = []
    for line in lines:
        cells = re.split(r"\s{2,}", line.strip())
        if cells[0] == "Name":
            titles = cells
        elif titles and len(cells) == len(titles):
            column = "Self CUDA" if "Self CUDA" in titles else "Self CPU"
            if column in titles and (ms := _ms(cells[titles.index(column)])):
                rows.append(Spent(cells[0], ms))
    return lines[0] if lines else "", sorted(rows, key=lambda row: -row.ms)[:most]


def _ms(text: str) -> float:
    """A duration as the profiler prints it, in ms; 0 for what is none."""
    found = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]] if found else 0.0
