"""One network trained in a folder of its own: checkpoints, resuming, the best epoch, the test."""

import dataclasses
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpn_triton.data.datasets import Splits
from gpn_triton.data.events import EventStore
from gpn_triton.data.feed import Feed, make_feed
from gpn_triton.machine import files
from gpn_triton.machine.command import Interrupted
from gpn_triton.machine.device import ceilings, is_out_of_memory, peak_memory_mib
from gpn_triton.machine.distributed import World
from gpn_triton.machine.profile import profiled
from gpn_triton.machine.provenance import provenance
from gpn_triton.neurons.cost import training_floor
from gpn_triton.neurons.explain import layers_run
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_network, network_sizes
from gpn_triton.training.curves import draw_curves
from gpn_triton.training.engine import Engine, NonFiniteError
from gpn_triton.training.objective import Epoch, Means, means
from gpn_triton.training.options import RESULT_OPTIONS, TrainConfig, difference
from gpn_triton.training.progress import Pace
from gpn_triton.training.trackers import Trackers

LOG_SECONDS = 0.5
# several processes ask each other so seldom whether one of them shall stop: the question waits for
# the slowest, and a step takes milliseconds
ASK_STEPS = 16


class Interruption:
    """Notes SIGTERM and Ctrl-C so that a step can be finished first; a second one stops at once."""

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
        later: trainings like this one that follow it, for the time that is left.
    Raises:
        ValueError: the folder's checkpoints are of another run or other data, or cannot be read.
    """

    def __init__(
        self, cfg: TrainConfig, seed: int, folder: Path, splits: Splits, device: torch.device,
        world: World, later: int = 0,
    ):  # fmt: skip
        self.cfg, self.seed, self.folder, self.splits = cfg, seed, folder, splits
        self.device, self.world, self.later = device, world, later
        torch.manual_seed(seed)
        self.model = build_network(cfg, splits).to(device)
        self.engine = Engine(cfg, self.model, device, world)
        self.training = self._feed("training", splits.train)
        self.validation = self._feed("validation", splits.valid)
        if (peak := self.engine.schedule.peak) != cfg.lr:
            world.say(f"learning rate {peak:.3g} for batches of {cfg.batch_size}")
        # this is where training stands; best_* are of the best epoch so far, by validation
        self.progress: dict[str, Any] = {
            "epoch": 0, "step": 0, "seconds": 0.0,
            "best_accuracy": -1.0, "best_loss": 0.0, "best_epoch": 0,
        }  # fmt: skip
        self.epochs: list[Epoch] = []
        self.to_profile = cfg.profile if world.is_writer else None
        self.last_good = "none yet"
        self.fingerprint = f"{splits.train.fingerprint()}-{splits.valid.fingerprint()}"
        self.header = {
            "config": {**cfg.to_dict(), "seed": seed},
            **provenance(device),
            "computes_in": str(self.engine.amp or torch.float32).removeprefix("torch."),
            "processes": world.size,
            "class_names": splits.train.class_names,
            "layers": self._layers(),
            "num_channels": splits.train.num_channels,
            "sensor_size": getattr(splits.train, "sensor_size", None),
        }
        self.header["ran_on"] = [self._here()]
        # the result depends on these options
        self.computes = {k: v for k, v in self.header["config"].items() if k in RESULT_OPTIONS}
        self.metrics = folder / run_folder.METRICS
        if found := run_folder.load_checkpoint(folder):
            self._take_up(*found)
        elif cfg.init_from is not None:
            names = splits.train.class_names
            world.say(run_folder.start_from(cfg.init_from, cfg, self.model, names))
        else:
            self.engine.normalise(self.training, seed)
        if world.is_writer:
            run_folder.remove_leftovers(folder)
            lines = [self.header, *(epoch.to_dict() for epoch in self.epochs)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            files.write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def _layers(self) -> list[dict[str, Any]]:
        """What computes each layer and why, also said; a warning where a GPU has no kernels."""
        cfg, dtype = self.cfg, self.engine.amp or torch.float32
        at_once = -(-cfg.batch_size // (cfg.accumulate * self.world.size))
        found = layers_run(self.model.neurons, cfg.time_bins, at_once, dtype, self.device)
        for k, layer in enumerate(found, 1):
            how = f"{layer['backend']} {layer['strategy'] or ''}".strip()
            self.world.say(f"layer {k}, {cfg.hidden[k - 1]} {cfg.neuron}: {how}, {layer['reason']}")
        unasked = NEURONS[cfg.neuron].compiles_first and cfg.backend == "auto"
        if unasked and self.device.type == "cuda" and found[0]["backend"] == "torch":
            why = f"warning: {self.device} without kernels: {found[0]['reason']}"
            self.world.say(why, matters=True)
        return found

    def _here(self) -> dict[str, Any]:
        """On what, and with which program, this process runs, from which epoch on."""
        kept = {key: self.header[key] for key in ("device", "commit", "started", "processes")}
        return {**kept, "layers": self.header["layers"]}

    def _feed(self, name: str, store: EventStore) -> Feed:
        """A set's batches, from the device or streamed to it; says which."""
        feed, decision = make_feed(store, self.device, self.cfg.event_mib)
        self.world.say(f"{name} {decision}")
        return feed

    def _take_up(self, state: dict[str, Any], path: Path) -> None:
        """Go on where a checkpoint was written."""
        try:
            computes, fingerprint = state["computes"], state["fingerprint"]
            if there := difference(computes, self.computes):
                raise ValueError(there)
            if fingerprint != self.fingerprint:
                raise ValueError("the data have changed since it was written")
            self.engine.load_state_dict(state["engine"])
            self.progress = {
                name: type(value)(state["progress"][name]) for name, value in self.progress.items()
            }
        # torch raises all of these for states that are not its own
        except (
            ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        ) as error:  # fmt: skip
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            reason = " ".join(reason.split())[:200]
            raise ValueError(f"resume: {path} is not of this run: {reason}") from None
        here = {**self._here(), "from_epoch": self.progress["epoch"] + 1}
        self.header, self.epochs = run_folder.read_metrics(
            self.folder, self.progress["epoch"], len(self.cfg.hidden)
        )
        # a run of before has begun where its header says
        began = {key: self.header.get(key) for key in ("device", "commit", "started")}
        self.header["ran_on"] = [*self.header.get("ran_on", [began]), here]
        self.last_good = str(path)
        self.world.say(f"resumed from {path}")

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
        state = {"engine": self.engine.state_dict()}
        state |= {name: getattr(self, name) for name in ("progress", "fingerprint", "computes")}
        at = self.progress["epoch"], self.progress["step"]
        if self.world.is_writer:
            run_folder.save_checkpoint(self.folder, state, *at)
        self.world.barrier()
        self.last_good = str(run_folder.checkpoint_path(self.folder, *at))

    def train(self) -> dict[str, Any]:
        """Train to the last epoch, test the best one and write the run's files.

        Returns:
            The contents of result.json.
        Raises:
            Interrupted: after SIGTERM or Ctrl-C.
            NonFiniteError: a loss or gradient was not finite.
            MemoryError: a step did not fit into memory.
        """
        track = self.cfg.track if self.world.is_writer else ()
        with (
            Interruption() as interruption,
            Trackers(track, self.folder, self.header["config"]) as trackers,
        ):
            for line in self.train_epochs(interruption):
                trackers.log(line)
        return self._finish()

    def train_epochs(self, interruption: Interruption) -> Iterator[Epoch]:
        """Train to the last epoch; yields each epoch's metrics once its checkpoint is written.

        Whoever stops here has read nothing of the test part. Raises as train.
        """
        if self.progress["epoch"] == self.progress["step"] == 0:
            self._keep_weights()
        pieces, samples = len(self.engine.pieces), len(self.training)
        done = min(self.progress["step"] // pieces * self.cfg.batch_size, samples)
        epochs = self.cfg.epochs * (1 + self.later) - self.progress["epoch"]
        self.pace = Pace(epochs * samples - done)
        self.model.train()
        for epoch in range(self.progress["epoch"], self.cfg.epochs):
            yield self._end_epoch(epoch, self._train_epoch(epoch, interruption))

    def _train_epoch(self, epoch: int, interruption: Interruption) -> Means:
        """Make the rest of an epoch's steps; the metrics of the whole of it."""
        engine, progress = self.engine, self.progress
        samples, batch, pieces = len(self.training), self.cfg.batch_size, len(engine.pieces)
        engine.start_epoch(self.training, self.seed, epoch, progress["step"])
        steps = -(-samples // batch) * pieces
        done = min(progress["step"] // pieces * batch, samples)
        started, shown = time.perf_counter(), 0.0
        bar = tqdm(
            total=samples, initial=done, unit=" samples",
            desc=f"epoch {epoch + 1}/{self.cfg.epochs}", leave=False,
            disable=None if self.world.is_writer and not self.world.quiet else True,
        )  # fmt: skip
        with self._profiled(steps - progress["step"]) as recorded, bar:
            while progress["step"] < steps:
                # the last batch may be shorter
                size = min(batch, samples - progress["step"] // pieces * batch)
                self._step(size)
                recorded()
                progress["step"] += 1
                if progress["step"] % pieces == 0:
                    bar.update(size)
                    self.pace.add(size)
                due = time.perf_counter() - shown > LOG_SECONDS
                # on a GPU reading a number waits for the device, so it is done rarely
                if due or self.device.type == "cpu":
                    self._check()
                if due:
                    told = _describe(means(engine.totals, self.cfg.hidden))
                    bar.set_postfix_str(f"{told}  {self.pace.left()} left of the run")
                    shown = time.perf_counter()
                last = progress["step"] == steps
                asks = self.world.size == 1 or progress["step"] % ASK_STEPS == 0 or last
                if asks and (stop := self.world.any(interruption.signal or 0)):
                    bar.close()
                    progress["seconds"] += time.perf_counter() - started
                    self._save()
                    raise Interrupted(stop, Path(self.last_good).name)
            trained = engine.trained_means()
            progress["seconds"] += time.perf_counter() - started
        return trained

    def _profiled(self, steps: int) -> AbstractContextManager[Callable[[], None]]:
        """A context that records steps of the first of its epochs, if that was asked for."""
        if not self.to_profile or not steps:
            return nullcontext(lambda: None)
        count, self.to_profile = self.to_profile, None
        return profiled(count, steps, self.device, self.folder)

    def _step(self, size: int) -> None:
        """Make a training step; MemoryError with what may help where memory does not suffice."""
        try:
            self.engine.train_step(self.training, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            at_once = -(-size // (self.cfg.accumulate * self.world.size))
            raise MemoryError(
                f"out of memory: a step of {at_once} samples at once did not fit {self.device}; "
                "--accumulate K works a batch off in K parts, --tbptt K takes K time bins at once, "
                "and --checkpoint-every K or a smaller --batch-size need less, too"
            ) from None

    def _end_epoch(self, epoch: int, trained: Means) -> Epoch:
        """Validate, keep the weights if they are the best, log and write a checkpoint."""
        engine, progress = self.engine, self.progress
        valid = engine.evaluate(self.validation)
        engine.schedule.end_epoch(epoch, trained.loss)
        self._check()
        line = Epoch(
            epoch=epoch + 1,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            valid_loss=valid.loss,
            valid_accuracy=valid.accuracy,
            activity=trained.activity,
            lr=float(engine.lr),
            seconds=progress["seconds"],
            samples_per_second=len(self.training) / progress["seconds"],
            skipped_steps=int(engine.bad_steps),
            dead=trained.dead,
            saturated=trained.saturated,
            gradient_norm=engine.gradient_norms(),
        )
        self.epochs.append(line)
        # of equal accuracies the one with the lower loss is better; of numbers always
        best, found = (
            (accuracy, -loss) if not self.splits.learns_number else (accuracy >= 0, -loss)
            for accuracy, loss in (
                (progress["best_accuracy"], progress["best_loss"]), (valid.accuracy, valid.loss),
            )
        )  # fmt: skip
        if found > best:
            if self.world.is_writer:
                run_folder.save_weights(self.folder / run_folder.WEIGHTS, self.model)
            progress |= {"best_accuracy": valid.accuracy, "best_loss": valid.loss}
            progress["best_epoch"] = epoch + 1
        progress |= {"epoch": epoch + 1, "step": 0, "seconds": 0.0}
        self._keep_weights()
        if self.world.is_writer:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line.to_dict()) + "\n")
        self._save()
        skipped = f"  {line.skipped_steps} steps skipped" if line.skipped_steps else ""
        self.world.say(
            f"epoch {epoch + 1:3d}/{self.cfg.epochs}  {_describe(trained)}  "
            f"valid {100 * valid.accuracy:.1f} %{self._error(valid)}  "
            f"{line.samples_per_second:.0f} samples/s{skipped}"
            + (f"  {self.pace.left()} left" if epoch + 1 < self.cfg.epochs or self.later else "")
        )
        return line

    def _keep_weights(self) -> None:
        """Keep the weights where --keep-epochs names this epoch."""
        epoch = self.progress["epoch"]
        if self.world.is_writer and epoch in (self.cfg.keep_epochs or ()):
            run_folder.keep_weights(self.folder, self.model, epoch)

    def _error(self, found: Means) -> str:
        """Beside the share of near numbers their squared error, by which validation chooses."""
        return f" error {found.loss:.5f}" if self.splits.learns_number else ""

    def _finish(self) -> dict[str, Any]:
        """Test the best weights and write result.json and curves.png."""
        cfg, progress, epochs = self.cfg, self.progress, self.epochs
        run_folder.load_weights(self.folder / run_folder.WEIGHTS, self.model)
        # the test set is read here for the first and only time
        test = self.engine.evaluate(self._feed("test", self.splits.test))
        seconds = statistics.median(line.seconds for line in epochs)
        result = {
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "valid_accuracy": progress["best_accuracy"],
            "best_epoch": progress["best_epoch"],
            "epochs": cfg.epochs,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "activity": test.activity,
            "dead": test.dead,
            "saturated": test.saturated,
            "samples_per_second": len(self.training) / seconds,
            "seconds_per_epoch": seconds,
            "floor_seconds_per_epoch": None,
            "fraction_of_floor": None,
            "ceilings": None,
            "seconds": sum(line.seconds for line in epochs),
            "skipped_steps": epochs[-1].skipped_steps,
            # read before the ceilings are measured, which would raise it
            "peak_memory_mib": peak_memory_mib(self.device),
            "seed": self.seed,
            "processes": self.world.size,
            "device": self.header["device"],
            "commit": self.header["commit"],
            "layers": self.header["ran_on"][-1]["layers"],
            "ran_on": self.header["ran_on"],
        }
        if self.world.is_writer:
            title = f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))} on {self.splits.description}"
            try:
                draw_curves(self.folder / run_folder.CURVES, epochs, progress["best_epoch"], title)
            except ModuleNotFoundError:
                print(
                    "curves.png not drawn: matplotlib is missing (pip install 'gpn-triton[plot]')"
                )
            run_folder.write_json(self.folder / run_folder.RESULT, result)
        self._measure(result)
        self.world.barrier()
        return result

    def _measure(self, result: dict[str, Any]) -> None:
        """Add to the result, which is safe by now, what the device could do at best."""
        cfg = self.cfg
        try:
            best = ceilings(self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.world.say(f"no share of the floor: no memory to measure {self.device} with")
            return
        floor = training_floor(
            NEURONS[cfg.neuron].work, cfg.hidden, *network_sizes(cfg, self.splits), cfg.time_bins,
            -(-len(self.training) // self.world.size), self.engine.amp, best,
        )  # fmt: skip
        result |= {
            "floor_seconds_per_epoch": floor,
            "fraction_of_floor": floor and floor / result["seconds_per_epoch"],
            "ceilings": dataclasses.asdict(best),
        }
        if self.world.is_writer:
            run_folder.write_json(self.folder / run_folder.RESULT, result)


def _describe(means: Means) -> str:
    rates = " ".join(f"{a:.3f}" for a in means.activity)
    return f"loss {means.loss:.3f}  train {100 * means.accuracy:.1f} %  rate {rates}"
