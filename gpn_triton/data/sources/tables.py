"""Events from files that are not in SHD's layout: tables of events, frames, times in other units.

    NAME.csv    a line an event, with a head line: sample, time, unit (or x, y and polarity), and
                label and speaker, where known, the same in every line of a sample
    NAME.npz    arrays of those names, one number an event, but labels and speakers one a sample;
                or counts [S, T, C] or [S, T, polarities, height, width], labels and speakers;
                names, optional: the classes'
    NAME.h5     SHD's layout, its times perhaps in milliseconds or microseconds

Samples are numbered or named in the column sample, and come in the order of those.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np

from gpn_triton.data.events import EventStore
from gpn_triton.data.sources.hdf5 import read_stored

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SUFFIXES = (".csv", ".npz", ".h5", ".hdf5")
# of a 2-D sensor's event, in place of its unit
_PLACE = ("x", "y", "polarity")


def read_table(
    path: str | os.PathLike, num_channels: int | None = None,
    sensor_size: tuple[int, int, int] | None = None, time_unit: str = "s",
    bin_seconds: float | None = None,
) -> EventStore:  # fmt: skip
    """Read a file as this module's head describes them.

    Args:
        path: the file. num_channels, sensor_size: as EventStore.from_arrays.
        time_unit: of the file's times: s, ms or us. bin_seconds: length of a frame's bin.
    Returns:
        The samples.
    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, a column that is missing
            or a value that does not fit, or an option that has no effect.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
    read = {".csv": _read_csv, ".npz": _read_npz}.get(path.suffix, _read_hdf5)
    columns = read(path)
    if ("counts" in columns) != (bin_seconds is not None):
        found = "counts" if "counts" in columns else "events, which have times"
        raise ValueError(
            f"bin_seconds: expected beside counts and not beside events; {path} has {found}"
        )
    try:
        if "counts" in columns:
            for name, value in (("num_channels", num_channels), ("sensor_size", sensor_size)):
                if value is not None:
                    raise ValueError(f"{name}: has no effect beside counts, whose shape says it")
            if time_unit != "s":
                raise ValueError("time_unit: has no effect beside counts")
            return EventStore.from_frames(
                columns["counts"], bin_seconds, columns.get("labels"), columns.get("speakers"),
                columns.get("names"),
            )  # fmt: skip
        return _store(columns, num_channels, sensor_size, TIME_UNITS[time_unit])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _store(
    columns: dict[str, Any], num_channels: int | None, sensor_size: tuple[int, int, int] | None,
    scale: float,
) -> EventStore:  # fmt: skip
    """A store of columns: sample, time, unit or x, y and polarity; labels and speakers a sample."""
    for name in (
        "sample",
        "time",
        *(_PLACE if sensor_size and "unit" not in columns else ["unit"]),
    ):
        if name not in columns:
            raise ValueError(f"expected a column {name}, got {', '.join(columns)}")
    named, sample = np.unique(columns["sample"], return_inverse=True)
    count = columns.get("samples", len(named))
    if "samples" in columns:
        # numbered, and some may be empty
        sample = np.asarray(columns["sample"])
    units = columns.get("unit")
    if units is None:
        units = np.stack([np.asarray(columns[name]) for name in _PLACE], 1)
    order = np.argsort(sample, kind="stable")
    ends = np.cumsum(np.bincount(sample, minlength=count))[:-1]
    # in float64: a float16 of microseconds overflows, and scaling rounds once
    times = np.asarray(columns["time"]).astype(np.float64)[order] * scale
    return EventStore.from_arrays(
        np.split(times, ends), np.split(np.asarray(units)[order], ends), columns.get("labels"),
        columns.get("speakers"), num_channels, columns.get("names"), sensor_size,
    )  # fmt: skip


def _read_csv(path: Path) -> dict[str, Any]:
    """The columns of a table of events."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a head line and events, got {len(rows)} lines")
    head = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(head):
            raise ValueError(f"{path}: line {number}: expected {len(head)} columns, got {len(row)}")
    columns: dict[str, Any] = dict(zip(head, map(list, zip(*rows[1:], strict=True)), strict=True))
    for name, kind in (("time", float), *((name, int) for name in ("unit", *_PLACE))):
        if name in columns:
            try:
                columns[name] = np.array([kind(value) for value in columns[name]])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    columns["sample"] = _numbers(columns.get("sample", []))
    for name in ("label", "speaker"):
        if name in columns:
            columns[f"{name}s"] = _one_a_sample(path, name, columns.pop(name), columns["sample"])
    return columns


def _numbers(values: list[str]) -> np.ndarray:
    """Words as whole numbers where all are such, else as they are."""
    try:
        return np.array([int(value) for value in values])
    except ValueError:
        return np.array(values)


def _one_a_sample(path: Path, name: str, values: list[str], sample: np.ndarray) -> np.ndarray:
    """What each sample's lines say alike."""
    found: dict[Any, str] = {}
    for number, value in zip(sample.tolist(), values, strict=True):
        if found.setdefault(number, value) != value:
            raise ValueError(
                f"{path}: {name}: expected one in all lines of sample {number}, got "
                f"{found[number]!r} and {value!r}"
            )
    return _numbers([found[number] for number in np.unique(sample).tolist()])


def _read_npz(path: Path) -> dict[str, Any]:
    """The arrays of an archive."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    # what numpy and zipfile raise for a file that is no archive, or one of objects
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path}: expected an archive of arrays: {error}") from None


def _read_hdf5(path: Path) -> dict[str, Any]:
    """The columns of a file in SHD's layout; its samples are numbered, and some may be empty."""
    arrays, about = read_stored(path)
    samples = len(arrays["lengths"])
    columns: dict[str, Any] = {
        "sample": np.repeat(np.arange(samples), arrays["lengths"]),
        "samples": samples,
        "time": arrays["times"],
        "unit": arrays["units"],
    }
    for name in ("labels", "speakers"):
        if name in arrays:
            columns[name] = arrays[name]
    if about["names"]:
        columns["names"] = about["names"]
    return columns
