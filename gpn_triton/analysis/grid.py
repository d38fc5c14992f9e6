"""A grid of trainings: every neuron at the best of a few learning rates, with several seeds.

Where each speaker is left out once, a seed is as many trainings, of which the mean counts.

A cell is one training, a run folder and a process of its own: what is finished is not done again,
what was interrupted goes on, and a cell that fails leaves the others alone. The rate is chosen by
the first seed's validation accuracy; the other seeds are trained at that rate only. The test part
chooses nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpn_triton.machine.command import Interrupted
from gpn_triton.training import run_folder
from gpn_triton.training.options import TrainConfig, difference
from gpn_triton.training.run import Interruption

LOG = "log.txt"
# between two looks at the processes
WAIT_SECONDS = 0.3


@dataclass(frozen=True)
class Cell:
    """One training of the grid; speaker: who is tested on and left out of training, if anybody."""

    neuron: str
    lr: float
    seed: int
    speaker: int | None = None

    def __str__(self) -> str:
        left_out = "" if self.speaker is None else f"-speaker{self.speaker}"
        return f"{self.neuron}-lr{self.lr:g}-seed{self.seed}{left_out}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its result.json, or the last line that it said before it failed."""

    result: dict[str, Any] | None
    failure: str = ""


Outcomes = dict[Cell, Outcome]


@dataclass(frozen=True)
class Grid:
    """Which networks are trained, and where.

    base: the options of every cell but neuron, lr and seed; its seeds are the grid's.
    neurons: their names. rates: learning rates to choose from. out: the folder of the cells.
    jobs: trainings at once. command: what trains the folder that --resume names.
    speakers: each is left out once; (None,): nobody is.
    """

    base: TrainConfig
    neurons: Sequence[str]
    rates: Sequence[float]
    out: Path
    jobs: int = 1
    command: Sequence[str] = (sys.executable, "-m", "gpn_triton.train")
    speakers: Sequence[int | None] = (None,)

    def folder(self, cell: Cell) -> Path:
        """Where a cell's files lie."""
        return self.out / str(cell)

    def search(self) -> list[Cell]:
        """The cells among whose rates the validation chooses."""
        rates = [(n, rate) for n in self.neurons for rate in self.rates]
        return [Cell(*pair, self.base.seed[0], who) for pair in rates for who in self.speakers]

    def repeats(self, outcomes: Outcomes) -> list[Cell]:
        """The cells of the other seeds, each neuron's at its best rate."""
        best = best_rates(outcomes)
        seeds = [(n, rate, seed) for n, rate in best.items() for seed in self.base.seed[1:]]
        return [Cell(*one, who) for one in seeds for who in self.speakers]

    def train(self) -> Outcomes:
        """Train what is not trained yet; what became of every cell.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, once every process has saved its state.
            ValueError: a cell's folder holds a run of other options.
        """
        trainings = len(self.neurons) * (len(self.rates) + len(self.base.seed) - 1)
        total = trainings * len(self.speakers) * self.base.epochs
        done = self._epochs(self.outcomes())
        bar = tqdm(total=total, initial=done, unit=" epochs", desc="grid", disable=None)
        with Interruption() as interruption, bar:
            self._train(self.search(), interruption, bar)
            self._train(self.repeats(self.outcomes()), interruption, bar)
        return self.outcomes()

    def outcomes(self) -> Outcomes:
        """What became of every cell until now."""
        found = {cell: self._outcome(cell) for cell in self.search()}
        return found | {cell: self._outcome(cell) for cell in self.repeats(found)}

    def _train(self, cells: list[Cell], interruption: Interruption, bar: tqdm) -> None:
        for cell in cells:
            own = {"neuron": cell.neuron, "lr": cell.lr, "seed": (cell.seed,)}
            cfg = replace(self.base, **own, test_speaker=cell.speaker)
            prepare(self.folder(cell), cfg)
        done = self._epochs(cells)
        waiting = [cell for cell in cells if not (self.folder(cell) / run_folder.RESULT).exists()]
        running: dict[int, tuple[Cell, subprocess.Popen]] = {}
        while waiting or running:
            for slot in range(self.jobs):
                if waiting and slot not in running:
                    cell = waiting.pop(0)
                    running[slot] = cell, self._start(cell, slot)
            time.sleep(WAIT_SECONDS)
            now = self._epochs(cells)
            bar.update(now - done)
            done = now
            if interruption.signal:
                self._stop([process for _, process in running.values()])
                saved = f"all in {self.out}; the same command goes on"
                raise Interrupted(interruption.signal, saved)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode:
                        bar.write(f"{cell} failed: {self._outcome(cell).failure}")

    def _stop(self, processes: list[subprocess.Popen]) -> None:
        """Have every process save its state and end."""
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()

    def _start(self, cell: Cell, slot: int) -> subprocess.Popen:
        """Train a cell in a process of its own, which Ctrl-C here does not reach."""
        environment = dict(os.environ)
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.jobs)))
        gpus = torch.cuda.device_count()
        if gpus > 1 and self.base.device in ("auto", "cuda"):
            environment.setdefault("CUDA_VISIBLE_DEVICES", str(slot % gpus))
        command = [*self.command, "--resume", str(self.folder(cell))]
        with (self.folder(cell) / LOG).open("w") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _epochs(self, cells: Iterable[Cell]) -> int:
        """How many epochs of some cells are finished."""
        paths = [self.folder(cell) / run_folder.METRICS for cell in cells]
        # the first line is the header
        return sum(max(0, p.read_bytes().count(b"\n") - 1) for p in paths if p.exists())

    def _outcome(self, cell: Cell) -> Outcome:
        path = self.folder(cell) / run_folder.RESULT
        if path.exists():
            return Outcome(json.loads(path.read_text(encoding="utf-8")))
        log = self.folder(cell) / LOG
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        said = [line.strip() for line in lines if line.strip()]
        return Outcome(None, said[-1] if said else "not trained yet")


def prepare(folder: Path, cfg: TrainConfig) -> None:
    """Make a run folder that --resume trains in, or make sure that it is of this configuration.

    Raises:
        ValueError: it is of another one.
    """
    if not (folder / run_folder.CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_json(folder / run_folder.CONFIG, cfg.to_dict())
    elif differs := difference(run_folder.read_options(folder, "out"), cfg.to_dict()):
        raise ValueError(f"out: {folder} is a run of other options: {differs}")


def best_rates(outcomes: Outcomes) -> dict[str, float]:
    """Each neuron's learning rate of the best validation; none for one that failed at all rates.

    Args:
        outcomes: of a grid, of whose seeds the first counts; of several speakers left out the mean
            does, of equal rates the one that comes first.
    """
    first = next(iter(outcomes)).seed
    found: dict[str, dict[float, list[float]]] = {}
    for cell, result in finished(outcomes):
        if cell.seed == first:
            rates = found.setdefault(cell.neuron, {})
            rates.setdefault(cell.lr, []).append(result["valid_accuracy"])
    return {
        neuron: max(rates, key=lambda rate: statistics.mean(rates[rate]))
        for neuron, rates in found.items()
    }


def at_best_rates(outcomes: Outcomes) -> Iterable[tuple[Cell, dict[str, Any]]]:
    """The cells that have a result at their neuron's best rate, with it."""
    best = best_rates(outcomes)
    return ((cell, result) for cell, result in finished(outcomes) if best[cell.neuron] == cell.lr)


def finished(outcomes: Outcomes) -> Iterable[tuple[Cell, dict[str, Any]]]:
    """The cells that have a result, with it."""
    return ((cell, o.result) for cell, o in outcomes.items() if o.result is not None)
