"""Train a spiking network on events, choose the best epoch by validation and test it once.

python -m gpn_triton.train --amp
python -m gpn_triton.train --amp --preset shd-small --download
python -m gpn_triton.train --train-file my_train.h5 --test-file my_test.h5 --seed 1 2 3
python -m gpn_triton.train --resume auto
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpn_triton import checkpoint, config, ops, roofline
from gpn_triton.config import TrainConfig
from gpn_triton.curves import draw_curves
from gpn_triton.data import EventStore, Splits, load_splits
from gpn_triton.data.feed import Feed, StreamedFeed, make_feed
from gpn_triton.distributed import World
from gpn_triton.engine import Engine, NonFiniteError, build_model, choose_device, means
from gpn_triton.memory import advice, is_out_of_memory
from gpn_triton.profile import StepProfile
from gpn_triton.provenance import provenance
from gpn_triton.trackers import Trackers

# data are split with this seed whatever the training seed, so that seeds compare like with like
SPLIT_SEED = 0
LOG_SECONDS = 0.5


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


def train(
    cfg: TrainConfig, seed: int, run: Path, splits: Splits, device: torch.device, world: World
) -> dict[str, Any]:
    """Train one network and test it; writes the run's files into `run` and returns its result.

    Args:
        cfg: the configuration. seed: of the weights, the order and every random draw.
        run: an existing folder; where it holds checkpoints, training goes on from the newest.
        splits: the data. device: where to train. world: the processes that train together.
    Returns:
        The contents of result.json.
    Raises:
        SystemExit: after SIGTERM or Ctrl-C, with everything needed to go on saved.
        NonFiniteError: a loss or gradient was not finite.
    """
    torch.manual_seed(seed)
    classes = len(splits.train.class_names)
    channels = -(-splits.train.num_channels // cfg.channel_bin)
    model = build_model(cfg, channels, classes).to(device)
    engine = Engine(cfg, model, device, world)
    say = print if world.is_writer else lambda *_: None
    train_feed, valid_feed = (
        _feed(cfg, name, store, device, say)
        for name, store in (("training", splits.train), ("validation", splits.valid))
    )
    if engine.schedule.peak != cfg.lr:
        say(f"learning rate {engine.schedule.peak:.3g} for batches of {cfg.batch_size}")
    fingerprint = f"{splits.train.fingerprint()}-{splits.valid.fingerprint()}"
    progress = {"epoch": 0, "step": 0, "best_accuracy": -1.0, "best_loss": 0.0, "best_epoch": 0}
    progress["seconds"] = 0.0
    epochs: list[dict[str, Any]] = []

    metrics = run / "metrics.jsonl"
    header = {"config": {**cfg.to_dict(), "seed": seed}, **provenance(device)}
    # what the result depends on; where things are may change
    places = ("device", "backend", "data_dir", "cache_dir", "download", "out", "config", "track")
    places += ("no_graph", "event_mib", "accumulate", "profile")
    computes = {
        name: value
        for name, value in header["config"].items()
        if name not in (*places, "resume", "eval_only", "dataset") and not name.endswith("_file")
    }
    header |= {"processes": world.size, "class_names": splits.train.class_names}
    last_good = "none yet"
    found = checkpoint.load_checkpoint(run)
    if found:
        state, path = found
        expected = {
            "engine": engine.expected_state(),
            "progress": progress,
            "fingerprint": fingerprint,
            "computes": computes,
        }
        checkpoint.check_form(state, expected, f"resume: {path} is not of this run")
        for name, value in computes.items():
            if state["computes"][name] != value:
                raise ValueError(
                    f"resume: {path} is of another run: {name} {state['computes'][name]} there, "
                    f"{value} here"
                )
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"resume: the data have changed since {path} was written")
        engine.load_state_dict(state["engine"])
        progress = state["progress"]
        header, epochs = _read_metrics(metrics, progress["epoch"], len(cfg.hidden))
        last_good = str(path)
        say(f"resumed from {path}")
    if world.is_writer:
        checkpoint.remove_leftovers(run)
        _write_lines(metrics, [header, *epochs])

    def check(last_good: str) -> None:
        try:
            engine.check(f"epoch {progress['epoch'] + 1}, step {progress['step']}")
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}; last good checkpoint: {last_good}; "
                "--skip-nonfinite leaves such steps out"
            ) from None

    def save() -> str:
        engine.check(f"epoch {progress['epoch'] + 1}, step {progress['step']}")
        state = {
            "engine": engine.state_dict(),
            "progress": progress,
            "fingerprint": fingerprint,
            "computes": computes,
        }
        if world.is_writer:
            checkpoint.save_checkpoint(run, state, progress["epoch"], progress["step"])
        world.barrier()
        return f"checkpoint-{progress['epoch']:05d}-{progress['step']:06d}.pt"

    samples = len(train_feed)
    model.train()
    trackers = Trackers(cfg.track if world.is_writer else (), run, header["config"])
    profile = None
    if cfg.profile and world.is_writer:
        profile = StepProfile(cfg.profile, device=device)
    with Interruption() as interruption, trackers, profile or nullcontext():
        for epoch in range(progress["epoch"], cfg.epochs):
            engine.start_epoch(train_feed, seed, epoch, progress["step"])
            started, shown = time.perf_counter(), 0.0
            bar = tqdm(
                total=samples, initial=progress["step"] * cfg.batch_size, unit=" samples",
                desc=f"epoch {epoch + 1}/{cfg.epochs}", leave=False,
                disable=None if world.is_writer else True,
            )  # fmt: skip
            with bar:
                for first in range(progress["step"] * cfg.batch_size, samples, cfg.batch_size):
                    size = min(cfg.batch_size, samples - first)
                    _step(engine, train_feed, size)
                    if profile is not None:
                        profile.step()
                    progress["step"] += 1
                    bar.update(size)
                    # on a GPU reading a number waits for the device, so it is done rarely
                    if device.type == "cpu" or time.perf_counter() - shown > LOG_SECONDS:
                        check(last_good)
                        if not bar.disable and time.perf_counter() - shown > LOG_SECONDS:
                            bar.set_postfix_str(_describe(means(engine.totals)))
                            shown = time.perf_counter()
                    if stop := world.any(interruption.signal or 0):
                        bar.close()
                        progress["seconds"] += time.perf_counter() - started
                        say(f"interrupted: saved {save()}; go on with --resume {run}")
                        world.close()
                        raise SystemExit(128 + stop)
                trained = means(world.sum(engine.totals))
            seconds = progress["seconds"] + time.perf_counter() - started

            with profile.paused() if profile is not None else nullcontext():
                valid = engine.evaluate(valid_feed)
                engine.schedule.end_epoch(epoch, trained["loss"])
                line = {
                    "epoch": epoch + 1,
                    "train_loss": trained["loss"],
                    "train_accuracy": trained["accuracy"],
                    "valid_loss": valid["loss"],
                    "valid_accuracy": valid["accuracy"],
                    "activity": trained["activity"],
                    "lr": float(engine.lr),
                    "seconds": seconds,
                    "samples_per_second": samples / seconds,
                    "skipped_steps": engine.check(f"epoch {epoch + 1}"),
                }
                epochs.append(line)
                # of equal accuracies, the lower loss
                best = (progress["best_accuracy"], -progress["best_loss"])
                if (valid["accuracy"], -valid["loss"]) > best:
                    if world.is_writer:
                        checkpoint.save_weights(run / "best.safetensors", model)
                    progress |= {f"best_{key}": valid[key] for key in ("accuracy", "loss")}
                    progress |= {"best_epoch": epoch + 1}
                progress |= {"epoch": epoch + 1, "step": 0, "seconds": 0.0}
                engine.totals.zero_()
                if world.is_writer:
                    with metrics.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                trackers.log(line)
                last_good = str(run / save())
                skipped = (
                    f"  {line['skipped_steps']} steps skipped" if line["skipped_steps"] else ""
                )
                say(
                    f"epoch {epoch + 1:3d}/{cfg.epochs}  {_describe(trained)}  "
                    f"valid {100 * valid['accuracy']:.1f} %  "
                    f"{line['samples_per_second']:.0f} samples/s{skipped}"
                )
    if profile is not None:
        say(profile.table())
        profile.write(run)

    checkpoint.load_weights(run / "best.safetensors", model)
    # the test set is read here for the first and only time
    test = engine.evaluate(_feed(cfg, "test", splits.test, device, say))
    peak_memory_mib = _peak_memory_mib(device)
    seconds_per_epoch = statistics.median(line["seconds"] for line in epochs)
    at_best = roofline.ceilings(device)
    floor = roofline.training_floor(
        cfg.neuron, cfg.hidden, channels, classes, cfg.time_bins, -(-samples // world.size),
        cfg.amp, at_best,
    )  # fmt: skip
    result = {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "valid_accuracy": progress["best_accuracy"],
        "best_epoch": progress["best_epoch"],
        "epochs": cfg.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "activity": test["activity"],
        "samples_per_second": samples / seconds_per_epoch,
        "seconds_per_epoch": seconds_per_epoch,
        "floor_seconds_per_epoch": floor,
        "fraction_of_floor": floor and floor / seconds_per_epoch,
        "ceilings": dataclasses.asdict(at_best),
        "seconds": sum(line["seconds"] for line in epochs),
        "skipped_steps": epochs[-1]["skipped_steps"],
        "peak_memory_mib": peak_memory_mib,
        "seed": seed,
        "processes": world.size,
        "device": header["device"],
        "commit": header["commit"],
    }
    if world.is_writer:
        title = f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))} on {splits.description}"
        _draw(run, epochs, title)
        checkpoint.write_json(run / "result.json", result)
    world.barrier()
    return result


def _step(engine: Engine, feed: Feed | StreamedFeed, size: int) -> None:
    """A training step; MemoryError with advice where memory does not suffice."""
    try:
        engine.train_step(feed, size)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # no sooner: the error's frames hold what the step had allocated
    raise MemoryError(advice(engine, feed))


def _feed(
    cfg: TrainConfig, name: str, store: EventStore, device: torch.device, say: Callable
) -> Feed | StreamedFeed:
    """A set's batches, from the device or streamed to it; says which."""
    feed, decision = make_feed(store, device, cfg.event_mib)
    say(f"{name} {decision}")
    return feed


def _read_metrics(path: Path, epochs: int, layers: int) -> tuple[dict, list[dict]]:
    """The header and the first so many epochs of a run's metrics.jsonl."""
    numbers = "epoch train_loss train_accuracy valid_loss valid_accuracy lr seconds"
    line = dict.fromkeys([*numbers.split(), "samples_per_second", "skipped_steps"], 0.0)
    line["activity"] = [0.0] * layers
    try:
        text = path.read_text(encoding="utf-8")
        header, *lines = [json.loads(line) for line in text.splitlines()[: 1 + epochs]]
        checkpoint.check_form(lines, [line] * epochs, "epochs")
        checkpoint.check_form(header, {}, "header")
        for name in ("device", "commit"):
            header.setdefault(name)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from None
    return header, lines


def _describe(means: dict[str, Any]) -> str:
    rates = " ".join(f"{a:.3f}" for a in means["activity"])
    return f"loss {means['loss']:.3f}  train {100 * means['accuracy']:.1f} %  rate {rates}"


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _draw(run: Path, epochs: list[dict[str, Any]], title: str) -> None:
    try:
        draw_curves(run / "curves.png", epochs, title)
    except ModuleNotFoundError:
        print("curves.png not drawn: matplotlib is missing (pip install 'gpn-triton[plot]')")


def make_run_folder(cfg: TrainConfig) -> Path:
    """A new folder under cfg.out, named after the time, the data and the neuron."""
    data = Path(cfg.train_file or cfg.dataset).stem
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{data}-{cfg.neuron}"
    for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
        run = Path(cfg.out, name + suffix)
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            if not Path(cfg.out).is_dir():
                raise ValueError(f"out: expected a folder, {cfg.out} is a file") from None
    raise ValueError(f"out: no free name for a run in {cfg.out}")


def load_data(cfg: TrainConfig) -> Splits:
    """The configuration's data, split; the test file is not read yet."""
    return load_splits(
        dataset=cfg.dataset,
        train_file=cfg.train_file,
        valid_file=cfg.valid_file,
        test_file=cfg.test_file,
        samples=cfg.samples,
        valid_split=cfg.valid_split,
        valid_fraction=cfg.valid_fraction,
        seed=SPLIT_SEED,
        data_dir=cfg.data_dir,
        cache_dir=cfg.cache_dir,
        download=cfg.download,
    )


def evaluate_run(cfg: TrainConfig, runs: list[Path], splits: Splits, device: torch.device) -> None:
    """Print the test accuracy of finished runs' best weights."""
    test = _feed(cfg, "test", splits.test, device, print)
    channels = -(-splits.train.num_channels // cfg.channel_bin)
    for run in runs:
        model = build_model(cfg, channels, len(splits.train.class_names)).to(device)
        checkpoint.load_weights(run / "best.safetensors", model)
        result = Engine(cfg, model, device).evaluate(test)
        print(f"test accuracy {100 * result['accuracy']:.2f} %  loss {result['loss']:.4f}  {run}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        return _main(config.parse(argv))
    except (ValueError, OSError, MemoryError, NonFiniteError) as error:
        # a user's mistake or the machine's, named where it was found
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        # where memory does not suffice before or after the training
        if not is_out_of_memory(error):
            raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


def _main(cfg: TrainConfig) -> int:
    device = choose_device(cfg.device)
    if cfg.backend == "triton" and cfg.neuron.startswith("gpn"):
        reason = ops.triton_unavailable(torch.empty(1, device=device))
        if reason:
            raise ValueError(f"backend: triton cannot run: {reason}")
    if cfg.deterministic:
        # what cuBLAS asks for to be deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    splits = load_data(cfg)
    world = World(device)
    say = print if world.is_writer else lambda *_: None
    taken_up = cfg.eval_only or cfg.resume
    run = taken_up or world.share(str(make_run_folder(cfg)) if world.is_writer else None)
    runs = [Path(run)]
    if len(cfg.seed) > 1:
        runs = [Path(run, f"seed-{seed}") for seed in cfg.seed]
    say(f"{splits.description}\n{splits.train.summary()}")
    if cfg.eval_only:
        evaluate_run(cfg, runs, splits, device)
        return 0
    if world.is_writer:
        if not cfg.resume:
            checkpoint.write_json(Path(run, "config.json"), cfg.to_dict())
        for folder in runs:
            folder.mkdir(exist_ok=True)
    world.barrier()

    results = []
    for seed, folder in zip(cfg.seed, runs, strict=True):
        if (folder / "result.json").exists():
            say(f"{folder} is finished")
            results.append(json.loads((folder / "result.json").read_text()))
            continue
        if len(runs) > 1:
            say(f"seed {seed}")
        results.append(train(cfg, seed, folder, splits, device, world))
        if len(runs) > 1:
            say(f"test accuracy {100 * results[-1]['test_accuracy']:.2f} %  {folder}")
    accuracies = [result["test_accuracy"] for result in results]
    if len(results) > 1 and world.is_writer:
        summary = {
            "test_accuracy": statistics.mean(accuracies),
            "test_accuracy_deviation": statistics.stdev(accuracies),
            "seeds": [result["seed"] for result in results],
            "results": results,
        }
        checkpoint.write_json(Path(run, "result.json"), summary)
    say(_summary(cfg, results, run))
    world.close()
    return 0


def _summary(cfg: TrainConfig, results: list[dict[str, Any]], run: str) -> str:
    """One line to paste into an appendix."""
    accuracies = [100 * result["test_accuracy"] for result in results]
    spread = ""
    if len(results) > 1:
        spread = f" +- {statistics.stdev(accuracies):.2f}"
    last = results[-1]
    return (
        f"{cfg.neuron} {'-'.join(map(str, cfg.hidden))}, T={cfg.time_bins}: test accuracy "
        f"{statistics.mean(accuracies):.2f}{spread} % ({len(results)} seed"
        f"{'s' * (len(results) > 1)}), {last['parameters']} parameters, "
        f"{sum(r['seconds'] for r in results):.0f} s on {last['processes']} x {last['device']}, "
        f"commit {(last['commit'] or 'unknown')[:12]}, {run}"
    )


if __name__ == "__main__":
    sys.exit(main())
