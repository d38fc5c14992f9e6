"""What is in a file of events, and all that is wrong with it: not the first mistake alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpn_triton.data.events import MAX_CHANNELS, MAX_SECONDS, unsorted_samples
from gpn_triton.data.sources.hdf5 import likely_channels, read_stored

# so many names, or numbers of samples, are listed
_SHOWN = 8
# a window that keeps this share of the events is worth its name
_MOST = 0.99


@dataclass(frozen=True)
class Inspection:
    """What was found in a file.

    facts: what is in it, by heading. mistakes: why no command can read it. remarks: what its reader
    may want to know.
    """

    facts: dict[str, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def inspect(
    path: str | os.PathLike, num_channels: int | None = None, max_time: float = 1.0
) -> Inspection:
    """Look into a file in SHD's layout.

    Args:
        path: the file. num_channels: that it shall have; None: as it says. max_time: the window
            that events would be binned in, seconds.
    Returns:
        What was found; a file that is not of the layout at all is one mistake.
    Raises:
        FileNotFoundError: no such file.
    """
    found = Inspection()
    try:
        arrays, about = read_stored(Path(path))
    except ValueError as error:
        found.mistakes.append(str(error).removeprefix(f"{path}: "))
        return found
    samples = len(arrays["lengths"])
    if not samples:
        found.mistakes.append("expected at least one sample, got none")
        return found
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    _labels(found, arrays, about, samples)
    _channels(found, arrays["units"], about, num_channels, offsets)
    _events(found, arrays["lengths"])
    _times(found, arrays["times"], offsets, max_time)
    return found


def _labels(
    found: Inspection, arrays: dict[str, np.ndarray], about: dict[str, Any], samples: int
) -> None:
    """Samples, classes and speakers."""
    labels, names, speakers = arrays.get("labels"), about["names"], arrays.get("speakers")
    who = "" if speakers is None else f", {len(np.unique(speakers))} speakers"
    if labels is None:
        found.facts["samples"] = f"{samples}, without labels{who}"
        found.remarks.append("no labels: predict reads the file, train does not")
        return
    top = len(names or range(MAX_CHANNELS)) - 1
    _out_of_range(found, "labels", labels, top, np.arange(samples + 1))
    counts = Counter(labels.tolist())
    classes = len(names) if names else max(int(labels.max()) + 1, 0)
    found.facts["samples"] = f"{samples}, {classes} classes{who}"
    each = [f"{names[k] if names else k}: {counts[k]}" for k in range(min(classes, _SHOWN))]
    found.facts["classes"] = ", ".join(each) + ", ..." * (classes > _SHOWN)
    empty = [str(names[k]) for k in range(classes) if not counts[k]] if names else []
    if empty:
        found.remarks.append(f"{len(empty)} classes have no sample: {_some(empty)}")
    if speakers is None:
        found.remarks.append(
            "no extra/speaker: validation data will be a random part, perhaps of who is in training"
        )


def _channels(
    found: Inspection, units: np.ndarray, about: dict[str, Any], asked: int | None,
    offsets: np.ndarray,
) -> None:  # fmt: skip
    """Units and what they belong to."""
    says, largest = about["num_channels"], int(units.max(initial=0))
    channels = asked or says or likely_channels(min(max(largest, 0), MAX_CHANNELS - 1))
    how = "as asked" if asked else "as the file says" if says else f"largest unit {largest}"
    found.facts["channels"] = f"{channels} ({how})"
    if about["sensor_size"]:
        size = " x ".join(map(str, about["sensor_size"]))
        found.facts["sensor"] = f"{size} (width, height, polarities)"
    if not says:
        found.remarks.append(
            f"the file does not say num_channels: {channels} is taken; convert writes it in"
        )
    elif asked and asked != says:
        found.mistakes.append(f"num_channels: expected {asked}, the file says {says}")
    _out_of_range(found, "spikes/units", units, channels - 1, offsets)
    used = len(np.unique(units))
    if units.size and used < channels:
        found.remarks.append(f"{channels - used} of {channels} channels have no event")


def _events(found: Inspection, lengths: np.ndarray) -> None:
    """How many events there are."""
    found.facts["events"] = (
        f"{lengths.sum()} in all; a sample {lengths.min()} to {lengths.max()}, median "
        f"{np.median(lengths):g}"
    )
    if empty := int((lengths == 0).sum()):
        found.remarks.append(f"{empty} samples have no event")


def _times(found: Inspection, times: np.ndarray, offsets: np.ndarray, max_time: float) -> None:
    """When they are."""
    wide = times.astype(np.float64)
    if not wide.size:
        return
    _out_of_range(found, "spikes/times", wide, MAX_SECONDS, offsets, " seconds")
    if not np.isfinite(wide).all():
        return
    high = float(wide.max())
    found.facts["times"] = f"{wide.min():.4g} to {high:.4g} s, stored as {times.dtype}"
    if high > MAX_SECONDS:
        unit = "ms" if high < 1000 * MAX_SECONDS else "us"
        found.remarks.append(
            f"times up to {high:.4g} look like {unit}: convert --time-unit {unit} mends them"
        )
        return
    late = float((wide >= max_time).mean())
    if late:
        most = float(np.quantile(wide, _MOST))
        found.remarks.append(
            f"{100 * late:.1f} % of the events are later than --max-time {max_time:g} and would be "
            f"dropped; {100 * _MOST:g} % of all are within {most:.4g} s"
        )
    unsorted = unsorted_samples(times, offsets)
    if len(unsorted):
        found.remarks.append(
            f"{len(unsorted)} samples are not sorted by time ({_some(unsorted.tolist())}): "
            "readers sort them"
        )


def _out_of_range(
    found: Inspection, name: str, values: np.ndarray, top: float, offsets: np.ndarray,
    unit: str = "",
) -> None:  # fmt: skip
    """A mistake for values that are not in 0..top, with the samples they are of."""
    wrong = ~((values >= 0) & (values <= top))
    if wrong.any():
        owners = np.unique(np.searchsorted(offsets, np.flatnonzero(wrong), side="right") - 1)
        found.mistakes.append(
            f"{name}: expected 0..{top:g}{unit}, got {values.min():g}..{values.max():g}: "
            f"{wrong.sum()} values of {len(owners)} samples ({_some(owners.tolist())})"
        )


def _some(values: list[Any]) -> str:
    """The first few of a list, in words."""
    return ", ".join(map(str, values[:_SHOWN])) + ", ..." * (len(values) > _SHOWN)
