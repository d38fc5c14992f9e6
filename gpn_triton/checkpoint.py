"""Files of a run, each written whole or not at all: checkpoints, weights, JSON, metrics."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from gpn_triton.files import write_atomically

KEPT_CHECKPOINTS = 2


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files that a process killed while writing left in a run folder."""
    for name in (
        "checkpoint-*.pt", "best.safetensors", "metrics.jsonl", "result.json", "profile.txt",
        "trace.json.gz",
    ):  # fmt: skip
        for path in Path(run).glob(f".{name}.*"):
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as safetensors."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(tensors)))


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what save_weights wrote into a model of the same shape.

    Raises:
        FileNotFoundError: no such file. ValueError: not safetensors, or of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        # the first of several lines says only that there is an error
        lines = str(error).strip().splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()
        raise ValueError(f"weights: {path} does not fit this network: {reason}") from None


def checkpoint_path(run: Path, epoch: int, step: int) -> Path:
    """Where a run's state after so many epochs and steps lies."""
    return Path(run, f"checkpoint-{epoch:05d}-{step:06d}.pt")


def save_checkpoint(run: Path, state: dict[str, Any], epoch: int, step: int) -> Path:
    """Write a run's state to its checkpoint_path and remove all but the newest two."""
    path = checkpoint_path(run, epoch, step)
    write_atomically(path, lambda file: torch.save(state, file))
    for old in sorted(Path(run).glob("checkpoint-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()
    return path


def load_checkpoint(run: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint of a run that can be read, with its path; None if there is none.

    Files are loaded as data only; nothing in them is executed. A damaged newest file, down to one
    flipped bit, is reported and the one before it used.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    paths = sorted(Path(run).glob("checkpoint-*.pt"), reverse=True)
    for path in paths:
        try:
            _check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                return state, path
            reason = f"expected a dict, got {type(state).__name__}"
        # what zipfile and torch raise for a file that is cut, altered or no checkpoint at all
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"checkpoint {path} cannot be read, trying the one before: {reason}")
    if paths:
        raise ValueError(f"resume: none of the checkpoints in {run} can be read")
    return None


def _check_sums(path: Path) -> None:
    """Raise BadZipFile unless a file's contents have their checksums, which torch.load ignores."""
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise zipfile.BadZipFile(f"{bad} does not have its checksum")


def check_form(found: Any, expected: Any, where: str) -> None:
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
            check_form(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list) and expected:
        if len(found) != len(expected):
            raise ValueError(f"{where}: expected {len(expected)} values, got {len(found)}")
        for k, value in enumerate(expected):
            check_form(found[k], value, f"{where}: {k}")
