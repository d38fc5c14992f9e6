"""One network trained in a folder of its own: checkpoints, resuming, the best epoch, the test."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpn_triton import files, run_folder
from gpn_triton.build import build_network, network_sizes
from gpn_triton.cost import training_floor
from gpn_triton.curves import draw_curves
from gpn_triton.data.datasets import Splits
from gpn_triton.data.events import EventStore
from gpn_triton.data.feed import Feed, StreamedFeed, make_feed
from gpn_triton.device import ceilings, is_out_of_memory, peak_memory_mib
from gpn_triton.distributed import World
from gpn_triton.engine import Engine, NonFiniteError, means
from gpn_triton.memory import advice
from gpn_triton.model import NEURONS
from gpn_triton.options import RESULT_OPTIONS, TrainConfig, difference
from gpn_triton.profile import StepProfile
from gpn_triton.provenance import provenance
from gpn_triton.trackers import Trackers

LOG_SECONDS = 0.5
# of a line of metrics.jsonl, beside the activity of each layer
NUMBERS = (
    "epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr", "seconds",
    "samples_per_second", "skipped_steps",
)  # fmt: skip


class Interruption:
    """Notes SIGTERM and Ctrl-C so that a step can be finished first; a second Ctrl-C stops."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Run:
    """One network trained, chosen by validation and tested once.

    Args:
        cfg: the configuration. seed: of the weights, the order and every random draw.
        folder: an existing folder; where it holds checkpoints, training goes on from the newest.
        splits: the data. device: where to train. world: the processes that train together.
    Raises:
        ValueError: the folder's checkpoints are of another run or other data, or cannot be read.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        seed: int,
        folder: Path,
        splits: Splits,
        device: torch.device,
        world: World,
    ):
        self.cfg, self.seed, self.folder, self.splits = cfg, seed, folder, splits
        self.device, self.world = device, world
        torch.manual_seed(seed)
        self.model = build_network(cfg, splits).to(device)
        self.engine = Engine(cfg, self.model, device, world)
        self.training = self._feed("training", splits.train)
        self.validation = self._feed("validation", splits.valid)
        if self.engine.schedule.peak != cfg.lr:
            self.say(
                f"learning rate {self.engine.schedule.peak:.3g} for batches of {cfg.batch_size}"
            )
        # where training stands; best_* are of the best epoch so far, by validation
        self.progress: dict[str, Any] = {
            "epoch": 0, "step": 0, "seconds": 0.0,
            "best_accuracy": -1.0, "best_loss": 0.0, "best_epoch": 0,
        }  # fmt: skip
        self.epochs: list[dict[str, Any]] = []
        self.last_good = "none yet"
        self.fingerprint = f"{splits.train.fingerprint()}-{splits.valid.fingerprint()}"
        self.header = {
            "config": {**cfg.to_dict(), "seed": seed},
            **provenance(device),
            "processes": world.size,
            "class_names": splits.train.class_names,
        }
        # what the result depends on
        self.computes = {k: v for k, v in self.header["config"].items() if k in RESULT_OPTIONS}
        self.metrics = folder / "metrics.jsonl"
        if found := run_folder.load_checkpoint(folder):
            self._take_up(*found)
        if world.is_writer:
            run_folder.remove_leftovers(folder)
            _write_lines(self.metrics, [self.header, *self.epochs])

    def say(self, line: str) -> None:
        """Print a line, once however many processes there are."""
        if self.world.is_writer:
            print(line)

    def _feed(self, name: str, store: EventStore) -> Feed | StreamedFeed:
        """A set's batches, from the device or streamed to it; says which."""
        feed, decision = make_feed(store, self.device, self.cfg.event_mib)
        self.say(f"{name} {decision}")
        return feed

    def _state(self, engine: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's contents."""
        return {
            "engine": engine,
            "progress": self.progress,
            "fingerprint": self.fingerprint,
            "computes": self.computes,
        }

    def _take_up(self, state: dict[str, Any], path: Path) -> None:
        """Go on where a checkpoint was written."""
        expected = self._state(self.engine.expected_state())
        _check_form(state, {**expected, "computes": {}}, f"resume: {path} is not of this run")
        if there := difference(state["computes"], self.computes):
            raise ValueError(f"resume: {path} is of another run: {there}")
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(f"resume: the data have changed since {path} was written")
        self.engine.load_state_dict(state["engine"])
        self.progress = state["progress"]
        self.header, self.epochs = run_folder.read_metrics(
            self.folder, self.progress["epoch"], len(self.cfg.hidden), NUMBERS
        )
        self.last_good = str(path)
        self.say(f"resumed from {path}")

    def _check(self) -> None:
        """Raise NonFiniteError if a step had to be left out; waits for the device."""
        try:
            self.engine.check(f"epoch {self.progress['epoch'] + 1}, step {self.progress['step']}")
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}; last good checkpoint: {self.last_good}; "
                "--skip-nonfinite leaves such steps out"
            ) from None

    def _save(self) -> None:
        """Write a checkpoint, if all was well until now."""
        self._check()
        state, progress = self._state(self.engine.state_dict()), self.progress
        at = progress["epoch"], progress["step"]
        if self.world.is_writer:
            run_folder.save_checkpoint(self.folder, state, *at)
        self.world.barrier()
        self.last_good = str(run_folder.checkpoint_path(self.folder, *at))

    def train(self) -> dict[str, Any]:
        """Train to the last epoch, test the best one and write the run's files.

        Returns:
            The contents of result.json.
        Raises:
            SystemExit: after SIGTERM or Ctrl-C, with everything needed to go on saved.
            NonFiniteError: a loss or gradient was not finite.
            MemoryError: a step did not fit into memory; says what would.
        """
        cfg, profile = self.cfg, None
        if cfg.profile and self.world.is_writer:
            profile = StepProfile(cfg.profile, device=self.device)
        track = cfg.track if self.world.is_writer else ()
        self.model.train()
        try:
            with (
                Interruption() as interruption,
                Trackers(track, self.folder, self.header["config"]) as trackers,
                profile or nullcontext(),
            ):
                for epoch in range(self.progress["epoch"], cfg.epochs):
                    trained = self._train_epoch(epoch, interruption, profile)
                    with profile.paused() if profile else nullcontext():
                        trackers.log(self._end_epoch(epoch, trained))
        finally:
            if profile:
                self.say(profile.table())
                profile.write(self.folder)
        return self._finish()

    def _train_epoch(
        self, epoch: int, interruption: Interruption, profile: StepProfile | None
    ) -> dict[str, Any]:
        """The rest of an epoch's steps; loss, accuracy and activity over the whole of it."""
        engine, progress, samples = self.engine, self.progress, len(self.training)
        batch = self.cfg.batch_size
        engine.start_epoch(self.training, self.seed, epoch, progress["step"])
        started, shown = time.perf_counter(), 0.0
        bar = tqdm(
            total=samples, initial=progress["step"] * batch, unit=" samples",
            desc=f"epoch {epoch + 1}/{self.cfg.epochs}", leave=False,
            disable=None if self.world.is_writer else True,
        )  # fmt: skip
        with bar:
            for first in range(progress["step"] * batch, samples, batch):
                size = min(batch, samples - first)
                self._step(size)
                if profile:
                    profile.step()
                progress["step"] += 1
                bar.update(size)
                due = time.perf_counter() - shown > LOG_SECONDS
                # on a GPU reading a number waits for the device, so it is done rarely
                if due or self.device.type == "cpu":
                    self._check()
                if due and not bar.disable:
                    bar.set_postfix_str(_describe(means(engine.totals)))
                if due:
                    shown = time.perf_counter()
                if stop := self.world.any(interruption.signal or 0):
                    bar.close()
                    progress["seconds"] += time.perf_counter() - started
                    self._save()
                    saved = Path(self.last_good).name
                    self.say(f"interrupted: saved {saved}; go on with --resume {self.folder}")
                    self.world.close()
                    raise SystemExit(128 + stop)
            trained = means(self.world.sum(engine.totals))
        progress["seconds"] += time.perf_counter() - started
        return trained

    def _step(self, size: int) -> None:
        """A training step; MemoryError with advice where memory does not suffice."""
        try:
            self.engine.train_step(self.training, size)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # no sooner: the error's frames hold what the step had allocated
        raise MemoryError(advice(self.engine, self.training))

    def _end_epoch(self, epoch: int, trained: dict[str, Any]) -> dict[str, Any]:
        """Validate, keep the weights if they are the best, write a checkpoint; metrics' line."""
        engine, progress = self.engine, self.progress
        valid = engine.evaluate(self.validation)
        engine.schedule.end_epoch(epoch, trained["loss"])
        self._check()
        line = {
            "epoch": epoch + 1,
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "valid_loss": valid["loss"],
            "valid_accuracy": valid["accuracy"],
            "activity": trained["activity"],
            "lr": float(engine.lr),
            "seconds": progress["seconds"],
            "samples_per_second": len(self.training) / progress["seconds"],
            "skipped_steps": int(engine.bad_steps),
        }
        self.epochs.append(line)
        # of equal accuracies, the lower loss
        best = (progress["best_accuracy"], -progress["best_loss"])
        if (valid["accuracy"], -valid["loss"]) > best:
            if self.world.is_writer:
                run_folder.save_weights(self.folder / "best.safetensors", self.model)
            progress |= {f"best_{key}": valid[key] for key in ("accuracy", "loss")}
            progress["best_epoch"] = epoch + 1
        progress |= {"epoch": epoch + 1, "step": 0, "seconds": 0.0}
        engine.totals.zero_()
        if self.world.is_writer:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._save()
        skipped = f"  {line['skipped_steps']} steps skipped" if line["skipped_steps"] else ""
        self.say(
            f"epoch {epoch + 1:3d}/{self.cfg.epochs}  {_describe(trained)}  "
            f"valid {100 * valid['accuracy']:.1f} %  "
            f"{line['samples_per_second']:.0f} samples/s{skipped}"
        )
        return line

    def _finish(self) -> dict[str, Any]:
        """Test the best weights and write result.json and curves.png."""
        cfg, progress, epochs = self.cfg, self.progress, self.epochs
        run_folder.load_weights(self.folder / "best.safetensors", self.model)
        # the test set is read here for the first and only time
        test = self.engine.evaluate(self._feed("test", self.splits.test))
        # measuring the device would raise it
        peak = peak_memory_mib(self.device)
        seconds = statistics.median(line["seconds"] for line in epochs)
        best = ceilings(self.device)
        floor = training_floor(
            NEURONS[cfg.neuron].work, cfg.hidden, *network_sizes(cfg, self.splits), cfg.time_bins,
            -(-len(self.training) // self.world.size), cfg.amp, best,
        )  # fmt: skip
        result = {
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "valid_accuracy": progress["best_accuracy"],
            "best_epoch": progress["best_epoch"],
            "epochs": cfg.epochs,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "activity": test["activity"],
            "samples_per_second": len(self.training) / seconds,
            "seconds_per_epoch": seconds,
            "floor_seconds_per_epoch": floor,
            "fraction_of_floor": floor and floor / seconds,
            "ceilings": dataclasses.asdict(best),
            "seconds": sum(line["seconds"] for line in epochs),
            "skipped_steps": epochs[-1]["skipped_steps"],
            "peak_memory_mib": peak,
            "seed": self.seed,
            "processes": self.world.size,
            "device": self.header["device"],
            "commit": self.header["commit"],
        }
        if self.world.is_writer:
            sizes = "-".join(map(str, cfg.hidden))
            _draw(self.folder, epochs, f"{cfg.neuron} {sizes} on {self.splits.description}")
            run_folder.write_json(self.folder / "result.json", result)
        self.world.barrier()
        return result


def _describe(means: dict[str, Any]) -> str:
    rates = " ".join(f"{a:.3f}" for a in means["activity"])
    return f"loss {means['loss']:.3f}  train {100 * means['accuracy']:.1f} %  rate {rates}"


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write_atomically(path, lambda file: file.write(text.encode()))


def _draw(run: Path, epochs: list[dict[str, Any]], title: str) -> None:
    try:
        draw_curves(run / "curves.png", epochs, title)
    except ModuleNotFoundError:
        print("curves.png not drawn: matplotlib is missing (pip install 'gpn-triton[plot]')")


def _check_form(found: Any, expected: Any, where: str) -> None:
    """Raise ValueError unless a state has the keys, types and tensor shapes of another.

    Args:
        found: from a file. expected: a state of this run; None in it fits anything, an empty dict
            or list any dict or list. where: names the state in the error.
    """
    if expected is None:
        return
    # a float may have come as a whole number
    if type(found) is not type(expected) and (type(expected), type(found)) != (float, int):
        wanted, got = type(expected).__name__, type(found).__name__
        raise ValueError(f"{where}: expected {wanted}, got {got}")
    if isinstance(expected, torch.Tensor):
        for wanted, got in ((expected.shape, found.shape), (expected.dtype, found.dtype)):
            if wanted != got:
                raise ValueError(f"{where}: expected {wanted}, got {got}")
    elif isinstance(expected, dict) and expected:
        if different := sorted(map(str, found.keys() ^ expected.keys())):
            raise ValueError(f"{where}: {different[0]} is in only one of it and this run")
        for key, value in expected.items():
            _check_form(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list) and expected:
        if len(found) != len(expected):
            raise ValueError(f"{where}: expected {len(expected)} values, got {len(found)}")
        for k, value in enumerate(expected):
            _check_form(found[k], value, f"{where}: {k}")
