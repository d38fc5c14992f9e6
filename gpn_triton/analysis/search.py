"""A search over training options by validation alone: Optuna draws, prunes and remembers trials.

A trial is a training, of each seed that is given, in a run folder of its own. Its value is the
validation accuracy of the best epoch, of numbers to learn the squared error; of several seeds it is
their mean, and the first one's epochs prune. What stops in the middle, at the end of the budget, by
a signal or a crash, goes on from its last epoch the next time. A trial's draws depend on the seed,
its number and the trials before it, so that a search comes to the same however often it is stopped.
"""

from __future__ import annotations

import fcntl
import math
import os
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from gpn_triton.analysis.grid import prepare
from gpn_triton.analysis.space import Space
from gpn_triton.data.datasets import Splits
from gpn_triton.machine.command import Interrupted
from gpn_triton.machine.distributed import World
from gpn_triton.machine.files import read_json
from gpn_triton.training import run_folder
from gpn_triton.training.engine import NonFiniteError
from gpn_triton.training.objective import Epoch
from gpn_triton.training.options import TrainConfig, difference
from gpn_triton.training.parser import configuration
from gpn_triton.training.run import Interruption, Run

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

# the folder's own record, whose name is none of a run's: no command takes the folder for one
SETTINGS, STORAGE, TRIAL = "search.json", "trials.db", "trial-{:04d}"
# a trial may be pruned once a third of its epochs are trained, so that recipes that start slowly,
# as with strong augmentation, are not judged by their start; unmeasured
WARM_UP = 3
# what a trial's record has beside Optuna's own
LOSS, BEST_EPOCHS, SECONDS, REASON = "valid_loss", "best_epochs", "seconds", "reason"


def load_optuna() -> Any:
    """Optuna, which says warnings alone.

    Raises:
        ModuleNotFoundError: it is an extra (`search`) and not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("optuna is missing (pip install 'gpn-triton[search]')") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Search:
    """A search in its folder, begun or taken up; a context, for which the folder is its alone.

    Args:
        given: the options that are fixed, by name, see parser.configuration. space: those that are
            searched. splits: the data, whose test part is not asked for. device: where to train.
        folder: of the search; made if it is missing.
    Raises:
        ValueError: the folder holds a search of other options, another space or other data, or one
            that runs now.
    """

    def __init__(
        self, given: dict[str, Any], space: Space, splits: Splits, device: torch.device,
        folder: Path,
    ):  # fmt: skip
        self.given, self.space, self.splits = given, space, splits
        self.device, self.folder = device, folder
        self.base = configuration(given)
        self.optuna = load_optuna()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_settings()
            self.study = self._open_study()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"out: another process searches in {folder} now") from None
            raise

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_) -> None:
        self._storage.engine.dispose()
        os.close(self._lock)

    @property
    def learns_number(self) -> bool:
        """Whether trials are judged by their squared error, the smaller the better."""
        return self.splits.learns_number

    def trial_folder(self, number: int) -> Path:
        """Where a trial's run lies."""
        return self.folder / TRIAL.format(number)

    def trials(self) -> list[FrozenTrial]:
        """All trials that were begun, by number."""
        waiting = self.optuna.trial.TrialState.WAITING
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != waiting]

    def ended(self) -> list[FrozenTrial]:
        """The trials that are over: finished, pruned or failed."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def best(self) -> FrozenTrial | None:
        """The best of the finished trials, if there is any."""
        complete = self.optuna.trial.TrialState.COMPLETE
        finished = [trial for trial in self.trials() if trial.state == complete]
        return min(finished, key=self.rank, default=None)

    def value_of(self, trial: FrozenTrial) -> float | None:
        """A trial's value; of one that has not finished its first seed's best epoch until now."""
        # Optuna gives a pruned trial the last value that was reported
        value = trial.value
        if value is None:
            value = trial.intermediate_values.get(trial.last_step)
        return value if value is not None and math.isfinite(value) else None

    def rank(self, trial: FrozenTrial) -> tuple[float, ...]:
        """By what trials are sorted, the best first, of equal ones that of the lower loss."""
        value = self.value_of(trial)
        by_value = math.inf if value is None else value if self.learns_number else -value
        return by_value, trial.user_attrs.get(LOSS, math.inf), trial.number

    def options_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial drew of the space, by name, as the options take it."""
        return {
            s.name: trial.params[s.name] if s.is_range else s.values[trial.params[s.name]]
            for s in self.space
            if s.name in trial.params
        }

    def run(self, seconds: float, trials: int | None = None) -> Iterator[FrozenTrial]:
        """Train trials, an unfinished one first; yields each that ended.

        Args:
            seconds: no epoch is begun after so long. trials: as many are trained at most, those of
                earlier calls included.
        Raises:
            Interrupted: after SIGTERM or Ctrl-C, with all saved.
            ValueError, OSError: what has to do with the data or the machine, not with a trial.
        """
        deadline = time.monotonic() + seconds
        with Interruption() as interruption:
            while time.monotonic() < deadline and (trials is None or len(self.ended()) < trials):
                trial = self._next_trial()
                try:
                    over = self._train(trial, deadline, interruption)
                except Interrupted:
                    over = False
                if over:
                    self._tidy()
                    yield self.study.get_trials(deepcopy=False)[trial.number]
                if interruption.signal:
                    saved = f"all in {self.folder}; the same command goes on"
                    raise Interrupted(interruption.signal, saved)

    def _check_settings(self) -> None:
        """Write down what the search is of, or make sure that it is of the same."""
        data = f"{self.splits.train.fingerprint()}-{self.splits.valid.fingerprint()}"
        space = {searched.name: searched.spec for searched in self.space}
        here = {"options": self.base.to_dict(), "space": space, "data": data}
        path = self.folder / SETTINGS
        if not path.exists():
            run_folder.write_json(path, here)
            return
        there = read_json(path, "out")
        if differs := difference(there["options"], here["options"]):
            raise ValueError(f"out: {self.folder} is a search of other options: {differs}")
        if there["space"] != space:
            of = " ".join(f"{name}={spec}" for name, spec in there["space"].items())
            raise ValueError(f"out: {self.folder} is a search of another space: {of}")
        if there["data"] != data:
            raise ValueError(f"out: the data have changed since {self.folder} was begun")

    def _open_study(self) -> Study:
        """The study in the folder, whose first trial is of the fixed options as they stand."""
        # by a connection of its own, since not every path can be part of an address
        connect = partial(sqlite3.connect, self.folder / STORAGE)
        self._storage = self.optuna.storages.RDBStorage("sqlite://", {"creator": connect})
        warm_up = -(-self.base.epochs // WARM_UP)
        study = self.optuna.create_study(
            study_name="search",
            storage=self._storage,
            pruner=self.optuna.pruners.MedianPruner(n_warmup_steps=warm_up),
            direction="minimize" if self.learns_number else "maximize",
            load_if_exists=True,
        )
        first = {s.name: s.text_of(getattr(self.base, s.name)) for s in self.space}
        if not study.trials and None not in first.values():
            study.enqueue_trial(first)
        return study

    def _next_trial(self) -> Trial:
        """The trial that was stopped in the middle, or else a new one; its options are drawn."""
        running = self.optuna.trial.TrialState.RUNNING
        stopped = [trial.number for trial in self.trials() if trial.state == running]
        number = stopped[0] if stopped else len(self.trials())
        seed = np.random.SeedSequence((self.base.seed[0], number)).generate_state(1)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed[0]))
        if not stopped:
            return self.study.ask()
        # Optuna's own way to take up a trial is to retry it from its first step, as a new one
        study = self._storage.get_study_id_from_name(self.study.study_name)
        kept = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        return self.optuna.Trial(self.study, kept)

    def _train(self, trial: Trial, deadline: float, interruption: Interruption) -> bool:
        """Train a trial, or the rest of it, until it is over or the time is; whether it is over."""
        state = self.optuna.trial.TrialState
        drawn = {searched.name: searched.draw(trial) for searched in self.space}
        try:
            # the ends of ranges fit each other two by two; what lies between need not
            cfg = configuration(self.given | drawn)
        except ValueError as error:
            return self._end(trial, state.FAIL, reason=str(error))
        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        last = max(reported, default=0)
        lines: list[list[Epoch]] = [[] for _ in cfg.seed]
        bar = tqdm(
            total=cfg.epochs * len(cfg.seed), unit=" epochs", desc=f"trial {trial.number}",
            leave=False, disable=True if cfg.quiet else None,
        )  # fmt: skip
        try:
            with bar:
                for place, line, trained in self._epochs(trial.number, cfg, interruption):
                    lines[place].append(line)
                    bar.update()
                    left = deadline - time.monotonic()
                    bar.set_postfix_str(f"{tqdm.format_interval(max(left, 0))} of the budget left")
                    if place == 0 and line.epoch not in reported:
                        trial.report(self._value(self._best_epoch(lines[0])), line.epoch)
                    if (place, line.epoch) == (len(cfg.seed) - 1, cfg.epochs):
                        break
                    if place == 0 and line.epoch >= last and trial.should_prune():
                        return self._end(trial, state.PRUNED, lines)
                    if trained and left <= 0:
                        return False
        except NonFiniteError as error:
            # the sampler learns from it as from a trial that was pruned
            return self._end(trial, state.PRUNED, lines, str(error))
        except MemoryError as error:
            return self._end(trial, state.FAIL, lines, str(error))
        return self._end(trial, state.COMPLETE, lines)

    def _epochs(
        self, number: int, cfg: TrainConfig, interruption: Interruption
    ) -> Iterator[tuple[int, Epoch, bool]]:
        """Every epoch of a trial, those of earlier calls first: the place of its seed among the
        seeds, the epoch, and whether it was trained just now."""
        folder, world = self.trial_folder(number), World(quiet=True)
        prepare(folder, cfg)
        folders = run_folder.seed_folders(folder, cfg.seed)
        for place, (seed, own) in enumerate(zip(cfg.seed, folders, strict=True)):
            own.mkdir(exist_ok=True)
            run = Run(cfg, seed, own, self.splits, self.device, world)
            yield from ((place, line, False) for line in run.epochs[:])
            yield from ((place, line, True) for line in run.train_epochs(interruption))

    def _best_epoch(self, lines: list[Epoch]) -> Epoch:
        """The epoch whose weights a run keeps: the first of the best."""
        by_loss = self.learns_number
        return min(
            lines, key=lambda line: (0 if by_loss else -line.valid_accuracy, line.valid_loss)
        )

    def _value(self, line: Epoch) -> float:
        """By what an epoch is judged."""
        return line.valid_loss if self.learns_number else line.valid_accuracy

    def _end(
        self, trial: Trial, state: Any, lines: Sequence[list[Epoch]] = (), reason: str = ""
    ) -> bool:
        """Tell Optuna what became of a trial; True: it is over."""
        trained = [of_seed for of_seed in lines if of_seed]
        best = [self._best_epoch(of_seed) for of_seed in trained]
        if best:
            trial.set_user_attr(LOSS, statistics.mean(line.valid_loss for line in best))
            trial.set_user_attr(BEST_EPOCHS, [line.epoch for line in best])
            seconds = sum(line.seconds for of_seed in trained for line in of_seed)
            trial.set_user_attr(SECONDS, seconds)
        if reason:
            trial.set_user_attr(REASON, reason)
        complete = state == self.optuna.trial.TrialState.COMPLETE
        value = statistics.mean(map(self._value, best)) if complete else None
        if complete and not math.isfinite(value):
            trial.set_user_attr(REASON, f"the validation error is {value}")
            state, value = self.optuna.trial.TrialState.PRUNED, None
        self.study.tell(trial, value, state=state)
        return True

    def _tidy(self) -> None:
        """Remove the checkpoints of trials that are over, which are most of a search's bytes.

        The best trial keeps its own: python -m gpn_triton.train --resume has it tested.
        """
        best = self.best()
        for trial in self.ended():
            if best is None or trial.number != best.number:
                for path in self.trial_folder(trial.number).rglob(run_folder.CHECKPOINTS):
                    path.unlink()
