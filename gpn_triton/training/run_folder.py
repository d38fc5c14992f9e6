"""A run's folder: the names of its files, how they are written and how they are read back.

Every file is written whole or not at all. A run of several seeds has a folder for each inside its
own, which holds config.json and, at the end, result.json.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gpn_triton.data.datasets import class_difference
from gpn_triton.machine.files import read_json, write_atomically
from gpn_triton.machine.profile import PROFILE, TRACE
from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.neurons.pretrained import (
    RUN_OPTIONS,
    RUN_WEIGHTS,
    load_weights,
    save_weights,
)
from gpn_triton.neurons.time_steps import change_time_step
from gpn_triton.training.build import build_binning, build_model
from gpn_triton.training.objective import Epoch
from gpn_triton.training.options import TrainConfig, check_names, completed

CONFIG, METRICS, RESULT = RUN_OPTIONS, "metrics.jsonl", "result.json"
WEIGHTS, CURVES = RUN_WEIGHTS, "curves.png"
CHECKPOINTS, KEPT_CHECKPOINTS = "checkpoint-*.pt", 2
# weights of an epoch that --keep-epochs names
KEPT = "epoch-*.safetensors"
SEED = "seed-"
# of runs that do not say it, since they were made before files could
NUM_CHANNELS = 700


def make_run_folder(cfg: TrainConfig) -> Path:
    """A new folder under cfg.out, named after the time, the data and the neuron.

    It appears with its config.json in it, or not at all.
    """
    data = Path(cfg.train_file or cfg.dataset).stem
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{data}-{cfg.neuron}"
    temporary = Path(cfg.out, f".{name}.{os.getpid()}")
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_json(temporary / CONFIG, cfg.to_dict())
        for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
            run = Path(cfg.out, name + suffix)
            if not run.exists():
                try:
                    return temporary.rename(run)
                except OSError:
                    # another process may have made a run of this name just now
                    if not run.exists():
                        raise
    except FileExistsError:
        raise ValueError(f"out: expected a folder, {cfg.out} is a file") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    raise ValueError(f"out: no free name for a run in {cfg.out}")


def remove_unused(run: Path) -> bool:
    """Remove a run's folder if nothing but its options has been written; whether it was removed."""
    unused = {path.name for path in run.rglob("*") if path.is_file()} <= {CONFIG}
    if unused:
        shutil.rmtree(run)
    return unused


def seed_folders(run: str | Path, seeds: Sequence[int]) -> list[Path]:
    """Where each seed's files lie: in the run's folder itself if there is only one."""
    return [Path(run, f"{SEED}{seed}") for seed in seeds] if len(seeds) > 1 else [Path(run)]


def how_to_go_on(run: Path) -> str:
    """What --resume would do with a run that was stopped, in words."""
    saved = any(p for name in (CHECKPOINTS, RESULT) for p in run.rglob(name))
    does = "goes on from the last checkpoint" if saved else "begins anew, nothing was saved yet"
    return f"--resume {run} {does}"


def newest(out: str | Path, finished: bool, argument: str) -> Path:
    """The newest run folder under `out` with a result.json, or without; argument asked for it."""
    runs = [p.parent for p in Path(out).glob(f"[!.]*/{CONFIG}")]
    runs = [p for p in runs if (p / RESULT).exists() == finished]
    if not runs:
        kind = "finished" if finished else "unfinished"
        raise FileNotFoundError(f"{argument}: no {kind} run under {out}")
    return max(runs, key=lambda p: (p / CONFIG).stat().st_mtime)


def unfinished_like(cfg: TrainConfig) -> Path | None:
    """The newest unfinished run folder under cfg.out that has these very options, if there is."""
    try:
        run = newest(cfg.out, False, "out")
    except FileNotFoundError:
        return None
    return run if read_options(run) == cfg.to_dict() else None


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files that a process killed while writing left in a run folder."""
    for name in (CHECKPOINTS, WEIGHTS, KEPT, METRICS, RESULT, CURVES, PROFILE, TRACE):
        for path in Path(run).glob(f".{name}.*"):
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def keep_weights(run: Path, model: nn.Module, epoch: int) -> None:
    """Keep a model's weights after so many epochs."""
    save_weights(Path(run, KEPT.replace("*", f"{epoch:05d}")), model)


def kept_weights(run: str | Path) -> dict[int, Path]:
    """The files that keep_weights wrote, by epoch."""
    return {int(path.stem.rpartition("-")[2]): path for path in sorted(Path(run).glob(KEPT))}


def checkpoint_path(run: Path, epoch: int, step: int) -> Path:
    """Where a run's state after so many epochs and steps lies."""
    return Path(run, f"checkpoint-{epoch:05d}-{step:06d}.pt")


def save_checkpoint(run: Path, state: dict[str, Any], epoch: int, step: int) -> Path:
    """Write a run's state to its checkpoint_path and remove all but the newest two."""
    path = checkpoint_path(run, epoch, step)
    # by way of memory: torch.save hides the reason of a disk that is full
    packed = io.BytesIO()
    torch.save(state, packed)
    write_atomically(path, lambda file: file.write(packed.getbuffer()))
    for old in sorted(Path(run).glob(CHECKPOINTS))[:-KEPT_CHECKPOINTS]:
        old.unlink()
    return path


def load_checkpoint(run: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run that can be read, with its path; None if there is none.

    Files are loaded as data only; nothing in them is executed. A damaged newest file, down to one
    flipped bit, is reported and the one before it used.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    paths = sorted(Path(run).glob(CHECKPOINTS), reverse=True)
    for path in paths:
        try:
            # torch.load ignores the checksums of a file's contents
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"{bad} does not have its checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                return state, path
            reason = f"expected a dict, got {type(state).__name__}"
        # what zipfile and torch raise for a file that is cut, altered or no checkpoint at all
        except (
            OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:  # fmt: skip
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"checkpoint {path} cannot be read, trying the one before: {reason}")
    if paths:
        raise ValueError(f"resume: none of the checkpoints in {run} can be read")
    return None


def read_options(run: str | Path, argument: str = "run") -> dict[str, Any]:
    """The options in a run's config.json, by name, as JSON values; newer ones as `completed` says.

    Args:
        run: the folder. argument: what named it, for errors.
    Raises:
        FileNotFoundError: no config.json there. ValueError: no JSON object, or an option in it that
            this program does not have.
    """
    path = Path(run, CONFIG)
    try:
        values = read_json(path, argument)
    except FileNotFoundError:
        raise FileNotFoundError(f"{argument}: {run} is not a run folder: no {CONFIG}") from None
    check_names(values, str(path))
    return completed(values)


def read_seed_options(run: str | Path, argument: str = "run") -> dict[str, Any]:
    """As read_options; the folder of one seed of several has its options in the folder above."""
    run = Path(run)
    of_seed = run.name.startswith(SEED) and not (run / CONFIG).exists()
    return read_options(run.parent if of_seed else run, argument)


def read_metrics(
    run: str | Path, epochs: int | None, layers: int, argument: str = "resume"
) -> tuple[dict[str, Any], list[Epoch]]:
    """The header and the first lines of a run's metrics.jsonl.

    Args:
        run: the folder. epochs: lines to read; None: all. layers: hidden layers, each with its
            activity. argument: what named the run, for errors.
    Raises:
        ValueError: the file cannot be read, or a line lacks a number.
    """
    path = Path(run, METRICS)
    try:
        text = path.read_text(encoding="utf-8")
        written = text.splitlines()
        epochs = len(written) - 1 if epochs is None else epochs
        header, *lines = [json.loads(line) for line in written[: 1 + epochs]]
        found = [Epoch(**line) for line in lines]
        if len(found) != epochs or not all(line.fits(layers) for line in found):
            raise ValueError(f"expected {epochs} epochs of {layers} layers")
        return {"device": None, "commit": None} | header, found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} cannot be read: {error}") from None


def read_result(run: str | Path, argument: str) -> dict[str, Any] | None:
    """What result.json says; None where the run is not finished.

    Args:
        run: the folder. argument: what named the run, for errors.
    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(run, RESULT)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{argument}: {path} cannot be read: expected an object")
    return found


def start_from(run: str, cfg: TrainConfig, model: SpikingClassifier, classes: Sequence[str]) -> str:
    """Give a network the best weights of a run, at its own time step; what was done, in words.

    Args:
        run: the folder. cfg, model: of the network that starts. classes: the names of its classes.
    Raises:
        FileNotFoundError, ValueError: as load_run; or another network, or other classes.
    """
    trained, did = load_run(run).at(cfg.time_bins, cfg.max_time)
    if difference := class_difference(trained.class_names, tuple(classes)):
        raise ValueError(f"init_from: {run} knows {difference}")
    try:
        model.load_state_dict(trained.model.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[:2][-1].strip()
        raise ValueError(f"init_from: {run} is of another network: {reason}") from None
    return f"starts from {run}, {did}"


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run folder read back.

    config: as it was trained. model: with the best epoch's weights, float32, in evaluation mode, on
    the CPU. class_names: as the training data named them, else the classes' numbers. num_channels:
    of the training data, before they were binned. sensor_size: theirs, see data.events, or None.
    """

    config: TrainConfig
    model: SpikingClassifier
    class_names: tuple[str, ...]
    num_channels: int
    sensor_size: tuple[int, int, int] | None = None

    def at(self, time_bins: int, max_time: float) -> tuple[TrainedRun, str]:
        """The same network on other bins, see neurons.time_steps; and what was done, in words.

        Args:
            time_bins: their number. max_time: the window, in seconds.
        Raises:
            ValueError: the network's time step cannot be changed, or its inputs are logarithms of
                counts.
        """
        old = self.config
        config = dataclasses.replace(old, time_bins=time_bins, max_time=max_time)
        before, now = old.max_time / old.time_bins, max_time / time_bins
        if now == before:
            return dataclasses.replace(self, config=config), "on bins as long as in training"
        if old.scale != "counts":
            raise ValueError(
                f"time_bins: expected bins as long as in training with scale {old.scale}, whose "
                f"inputs do not go with a bin's length, got {1e3 * now:.4g} ms, not "
                f"{1e3 * before:.4g}"
            )
        model = copy.deepcopy(self.model)
        change_time_step(model, now / before)
        return dataclasses.replace(self, config=config, model=model), (
            f"trained on bins of {1e3 * before:.4g} ms, converted to bins of {1e3 * now:.4g} ms: "
            f"decays to the power of {now / before:.4g}, gains to match"
        )


def load_run(run: str | Path) -> TrainedRun:
    """Read a run folder's configuration, best weights and class names.

    Args:
        run: a folder as the training command leaves it; of several seeds the folder of one.
    Returns:
        the run; its model computes where it is, with the backend auto.
    Raises:
        FileNotFoundError: no config.json or no weights there.
        ValueError: a file that cannot be read, weights that do not fit the configuration or are not
            finite, or a run of several seeds.
    """
    run, weights = Path(run), Path(run, WEIGHTS)
    values = read_seed_options(run)
    seeds = sorted(run.glob(f"{SEED}*/{WEIGHTS}"))
    if seeds and not weights.exists():
        raise ValueError(f"run: {run} holds {len(seeds)} seeds: name one, as {seeds[0].parent}")
    if not weights.is_file():
        raise FileNotFoundError(f"run: {run} has no {WEIGHTS}: no epoch was finished")
    try:
        with safe_open(weights, "pt") as file:
            classes = file.get_slice("output.weight").get_shape()[0]
    except (SafetensorError, OSError, IndexError) as error:
        raise ValueError(f"weights: {weights} cannot be read: {error}") from None
    # what is computed is the same with every backend
    cfg = TrainConfig(**{**values, "backend": "auto"})
    header = _header(run)
    channels = header.get("num_channels", cfg.channels or NUM_CHANNELS)
    model = build_model(cfg, build_binning(cfg).columns(channels), classes)
    load_weights(weights, model)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"weights: {weights}: {name} holds values that are not finite")
    size = header.get("sensor_size")
    names = class_names(run, classes)
    return TrainedRun(cfg, model.eval(), names, channels, size and tuple(size))


def _header(run: str | Path) -> dict[str, Any]:
    """The first line of metrics.jsonl; empty where there is no such file."""
    path = Path(run, METRICS)
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run: {path}: no header in its first line: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"run: {path}: no header in its first line: expected an object")
    return header


def class_names(run: str | Path, classes: int) -> tuple[str, ...]:
    """The names in the first line of metrics.jsonl; numbers where it holds none."""
    names = _header(run).get("class_names", list(range(classes)))
    if not isinstance(names, list) or len(names) != classes:
        raise ValueError(f"run: {Path(run, METRICS)}: class_names: expected {classes} names")
    return tuple(map(str, names))
