"""Spike events of a whole data set in flat arrays: on the host numpy's, on a device tensors.

A store is made of arrays, of dense frames or of a dataset of tonic's by the constructors below, or
read from a file by data.sources.hdf5. Times are seconds from the start of a sample. An event of a
2-D sensor of (width, height, polarities), in column x and row y, has the unit

    (polarity height + y) width + x

so that counts [T, B, C] are images [T, B, polarities, height, width].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# longest sample believed to be in seconds; a second in ms, or anything in us, lies above
MAX_SECONDS = 600.0
# units are stored in 16 bits
MAX_CHANNELS = 1 << 16
# the label of samples whose class nobody knows
UNKNOWN = -1
# passes over all events go in blocks, so that they need little memory beside the events
_BLOCK = 1 << 24


@dataclass(frozen=True)
class EventStore:
    """All samples' spikes, concatenated; sample k owns events offsets[k]:offsets[k + 1].

    Args:
        times [E] float32: spike times from the start of the sample, seconds, sorted in a sample.
        units [E] uint16: input channel of each spike, 0..num_channels - 1.
        offsets [S + 1] int64: where each sample's events begin; offsets[0] = 0, offsets[S] = E.
        labels [S] int64: class of each sample, 0..len(class_names) - 1; or all UNKNOWN.
        speakers [S] int32 or None: who spoke, where the source says so.
        num_channels: number of input channels.
        class_names: one name a class, in label order.
        sensor_size: (width, height, polarities) of a 2-D sensor, see this module's head, or None.
    """

    times: np.ndarray
    units: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    speakers: np.ndarray | None
    num_channels: int
    class_names: tuple[str, ...]
    sensor_size: tuple[int, int, int] | None = None

    @classmethod
    def from_arrays(
        cls, times: Sequence[Any], units: Sequence[Any], labels: Sequence[Any] | None = None,
        speakers: Sequence[Any] | None = None, num_channels: int | None = None,
        class_names: Sequence[str] | None = None,
        sensor_size: tuple[int, int, int] | None = None,
    ) -> EventStore:  # fmt: skip
        """A store of samples that lie in memory.

        Args:
            times: of each sample its spike times [E], seconds from its start, in any order.
            units: of each sample its input channels [E], whole numbers from 0 on; with sensor_size
                also [E, 3]: column x, row y and polarity of each event.
            labels [S]: each sample's class, a number from 0 on or a name. None: nobody knows them.
            speakers [S]: who or what each sample is from, numbers or names. Validation data are
                whole speakers, where that is affordable.
            num_channels: C, to 65536. Default: what sensor_size says, else the largest unit + 1.
            class_names: one a class. Default: the names in labels, in alphabetical order, else
                numbers.
            sensor_size: (width, height, polarities) of a 2-D sensor.
        Returns:
            The store, checked.
        Raises:
            ValueError: arrays of other lengths or types, or values out of their range.
        """
        if len(times) != len(units):
            raise ValueError(f"units: expected {len(times)} samples as in times, got {len(units)}")
        rows = [
            _sample(k, t, u, sensor_size) for k, (t, u) in enumerate(zip(times, units, strict=True))
        ]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(t) for t, _ in rows], out=offsets[1:])
        flat_units = np.concatenate([np.empty(0, np.int64), *(u for _, u in rows)])
        if num_channels is None:
            num_channels = math.prod(sensor_size) if sensor_size else _top(flat_units) + 1
        if not 1 <= num_channels <= MAX_CHANNELS:
            raise ValueError(f"num_channels: expected 1..{MAX_CHANNELS}, got {num_channels}")
        check_range("units", flat_units, num_channels - 1, offsets=offsets)
        numbers, names = _classes(labels, class_names, len(rows))
        return cls(
            times=np.concatenate([np.empty(0, np.float32), *(t for t, _ in rows)]),
            units=flat_units.astype(np.uint16),
            offsets=offsets,
            labels=numbers,
            speakers=None if speakers is None else _numbered(speakers),
            num_channels=num_channels,
            class_names=names,
            sensor_size=None if sensor_size is None else _size(sensor_size),
        ).validate("arrays")

    @classmethod
    def from_frames(
        cls, counts: Any, bin_seconds: float, labels: Sequence[Any] | None = None,
        speakers: Sequence[Any] | None = None, class_names: Sequence[str] | None = None,
    ) -> EventStore:  # fmt: skip
        """A store of dense spike counts: as many events as were counted, in the middle of the bin.

        data.loader.frames is the way back: binned as they were, the counts are the same.

        Args:
            counts [S, T, C], or of images [S, T, polarities, height, width]: whole numbers, 0 or
                more.
            bin_seconds: length of a bin, seconds. labels, speakers, class_names: as from_arrays.
        Returns:
            The store, checked.
        Raises:
            ValueError: counts of another rank or no whole numbers, and what from_arrays raises.
        """
        counts = np.asarray(counts)
        if counts.ndim not in (3, 5):
            raise ValueError(
                "counts: expected [S, T, C] or [S, T, polarities, height, width], got "
                f"{list(counts.shape)}"
            )
        if not bin_seconds > 0:
            raise ValueError(f"bin_seconds: expected more than 0, got {bin_seconds!r}")
        sensor_size = None if counts.ndim == 3 else _size(counts.shape[:1:-1])
        counts = counts.reshape(*counts.shape[:2], -1)
        whole = counts.astype(np.int64)
        if (whole < 0).any() or (whole != counts).any():
            raise ValueError("counts: expected whole numbers, 0 or more, got others")
        times, units = [], []
        for sample in whole:
            bins, channels = np.nonzero(sample)
            many = sample[bins, channels]
            times.append(np.repeat((bins + 0.5) * bin_seconds, many))
            units.append(np.repeat(channels, many))
        return cls.from_arrays(
            times, units, labels, speakers, counts.shape[2], class_names, sensor_size
        )

    @classmethod
    def from_tonic(cls, dataset: Iterable[Any]) -> EventStore:
        """A store of a dataset of tonic's, or of one that is like them.

        Args:
            dataset: gives of each sample its events, a structured array with the fields t
                (microseconds), x and, where its sensor has them, y and p, and its label. It has the
                attribute sensor_size (width, height, polarities), and may have classes and speaker.
        Returns:
            The store, checked.
        Raises:
            ValueError: events without t or x, a dataset without sensor_size, and what from_arrays
                raises.
        """
        size = getattr(dataset, "sensor_size", None)
        if size is None or len(size) != 3:
            raise ValueError(
                "dataset: expected the attribute sensor_size (width, height, polarities), got "
                f"{size}"
            )
        times, units, labels = [], [], []
        for events, label in dataset:
            fields = getattr(events, "dtype", np.dtype(float)).names or ()
            if "t" not in fields or "x" not in fields:
                raise ValueError(f"dataset: expected events with the fields t and x, got {fields}")
            nought = np.zeros(len(events), np.int64)
            row = events["y"].astype(np.int64) if "y" in fields and size[1] > 1 else nought
            polarity = events["p"].astype(np.int64) if "p" in fields and size[2] > 1 else nought
            # of two polarities some sets have 0 and 1, others -1 and 1
            polarity = polarity > 0 if size[2] == 2 else polarity
            columns = events["x"].astype(np.int64), row, polarity
            times.append(events["t"] / 1e6)
            units.append(np.stack(columns, 1))
            labels.append(label)
        names, speakers = getattr(dataset, "classes", None), getattr(dataset, "speaker", None)
        if speakers is not None and len(speakers) != len(labels):
            speakers = None
        # sets of sounds are sensors of one row
        image = _size(size) if size[1] > 1 else None
        if image is None:
            units = [sensor_units(rows, size) for rows in units]
        return cls.from_arrays(
            times, units, labels, speakers, math.prod(map(int, size)), names, image
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the samples' classes are known."""
        return not len(self) or bool((self.labels != UNKNOWN).any())

    def validate(self, name: str) -> EventStore:
        """Check every promise of the class; returns the store itself.

        Args:
            name: the file or argument to name in an error.
        Raises:
            ValueError: an array of another type or length, or a value out of its range.
        """
        samples, events = len(self.labels), len(self.times)
        for field, dtype, length in (
            ("times", np.float32, events), ("units", np.uint16, events),
            ("offsets", np.int64, samples + 1), ("labels", np.int64, samples),
            *([] if self.speakers is None else [("speakers", np.int32, samples)]),
        ):  # fmt: skip
            array = getattr(self, field)
            if array.dtype != dtype or array.shape != (length,):
                raise ValueError(
                    f"{name}: {field}: expected {np.dtype(dtype)} [{length}], "
                    f"got {array.dtype} {list(array.shape)}"
                )
        if not samples:
            raise ValueError(f"{name}: expected at least one sample, got none")
        if self.offsets[0] != 0 or self.offsets[-1] != events or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"{name}: offsets: expected to rise from 0 to {events}")
        if self.labelled:
            check_range(f"{name}: labels", self.labels, len(self.class_names) - 1)
        if not 1 <= self.num_channels <= MAX_CHANNELS:
            raise ValueError(
                f"{name}: num_channels: expected 1..{MAX_CHANNELS}, got {self.num_channels}"
            )
        if self.sensor_size is not None and math.prod(self.sensor_size) != self.num_channels:
            raise ValueError(
                f"{name}: sensor_size: expected (width, height, polarities) of "
                f"{self.num_channels} channels, got {self.sensor_size}"
            )
        check_range(f"{name}: units", self.units, self.num_channels - 1, offsets=self.offsets)
        check_range(f"{name}: times", self.times, MAX_SECONDS, "seconds", self.offsets)
        unsorted = unsorted_samples(self.times, self.offsets)
        if len(unsorted):
            raise ValueError(f"{name}: times: expected sorted, sample {unsorted[0]} is not")
        return self

    def subset(self, indices: np.ndarray) -> EventStore:
        """The samples of numbers indices [K] int, in that order, in a store of copies."""
        indices = np.asarray(indices, dtype=np.int64)
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(np.diff(self.offsets)[indices], out=offsets[1:])
        spans = list(map(slice, self.offsets[indices], self.offsets[indices + 1]))
        return replace(
            self,
            times=np.concatenate([self.times[:0], *(self.times[span] for span in spans)]),
            units=np.concatenate([self.units[:0], *(self.units[span] for span in spans)]),
            offsets=offsets,
            labels=self.labels[indices],
            speakers=None if self.speakers is None else self.speakers[indices],
        )

    def on(self, device: torch.device | str) -> DeviceEvents:
        """The samples on a device."""
        return DeviceEvents(self, device)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 of all contents: 0.5 s for SHD, a few s for SSC."""
        size = () if self.sensor_size is None else (self.sensor_size,)
        digest = hashlib.sha256(repr((self.num_channels, self.class_names, *size)).encode())
        for array in (self.times, self.units, self.offsets, self.labels, self.speakers):
            if array is not None:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for people: samples, classes, speakers, channels, events and the last time."""
        events = len(self.times)
        speakers = "" if self.speakers is None else f"{len(np.unique(self.speakers))} speakers, "
        last = f", up to {self.times.max():.2f} s" if events else ""
        classes = f"{len(self.class_names)} classes" if self.labelled else "no labels"
        size = f" ({' x '.join(map(str, self.sensor_size))})" if self.sensor_size else ""
        return (
            f"{len(self)} samples, {classes}, {speakers}{self.num_channels} channels{size}, "
            f"{events / max(len(self), 1):.0f} events a sample{last}"
        )


class DeviceEvents:
    """An event store's arrays as tensors on a device, 6 bytes an event.

    Args:
        store: the samples. On a CPU the tensors share its memory.
        device: where the tensors shall be.
        numbers [S] int64, on the device: each sample's number in the whole set, where the store is
            a part of one: draws depend on it. None: the sample's place in the store.
    Attributes:
        times [E] float32, units [E] int16 (the bits of uint16), offsets [S + 1] int64, labels [S]
        int64: as in EventStore. numbers: as given. num_channels: C. longest, mean: events of the
        longest sample, and of a sample on average.
    """

    def __init__(
        self, store: EventStore, device: torch.device | str = "cpu", numbers: Tensor | None = None
    ):
        self.times = torch.from_numpy(store.times).to(device)
        # int16 holds the bits, since few operations of torch know uint16
        self.units = torch.from_numpy(store.units.view("int16")).to(device)
        self.offsets = torch.from_numpy(store.offsets).to(device)
        self.labels = torch.from_numpy(store.labels).to(device)
        self.num_channels, self.numbers = store.num_channels, numbers
        self.longest = int(np.diff(store.offsets).max(initial=0))
        self.mean = len(store.times) / max(len(store), 1)

    def __len__(self) -> int:
        return len(self.labels)


def sensor_units(events: Any, sensor_size: Sequence[int]) -> np.ndarray:
    """The units of a 2-D sensor's events.

    Args:
        events [E, 3] integer: column x, row y and polarity. sensor_size: (width, height,
            polarities).
    Returns:
        units [E] int64, see this module's head.
    Raises:
        ValueError: an event outside the sensor.
    """
    events = np.asarray(events)
    width, height, polarities = map(int, sensor_size)
    for column, (name, size) in enumerate((("x", width), ("y", height), ("polarity", polarities))):
        values = events[:, column]
        if len(values) and not (values.min() >= 0 and values.max() < size):
            got = f"{values.min()}..{values.max()}"
            raise ValueError(f"{name}: expected 0..{size - 1}, got {got}")
    x, y, polarity = events.astype(np.int64).T
    return (polarity * height + y) * width + x


def sensor_events(units: np.ndarray, sensor_size: Sequence[int]) -> np.ndarray:
    """The inverse of sensor_units: column x, row y and polarity of each unit [E, 3] int64."""
    width, height, _ = map(int, sensor_size)
    row, x = np.divmod(np.asarray(units, np.int64), width)
    polarity, y = np.divmod(row, height)
    return np.stack([x, y, polarity], 1)


def _sample(
    k: int, times: Any, units: Any, sensor_size: tuple[int, int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """A sample's times [E] float32, sorted, and its units [E] int64; ValueError with its number."""
    # not in float16, whose microseconds overflow
    times, units = np.asarray(times).astype(np.float32), np.asarray(units)
    if times.ndim != 1:
        raise ValueError(f"times: sample {k}: expected [E], got {list(times.shape)}")
    shapes = [times.shape] + [(len(times), 3)] * (sensor_size is not None)
    if units.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"units: sample {k}: expected {expected}, got {list(units.shape)}")
    if units.size and units.dtype.kind not in "iub":
        raise ValueError(f"units: sample {k}: expected whole numbers, got {units.dtype}")
    if units.ndim == 2 and sensor_size is not None:
        try:
            units = sensor_units(units, sensor_size)
        except ValueError as error:
            raise ValueError(f"units: sample {k}: {error}") from None
    order = np.argsort(times, kind="stable")
    return times[order], units.astype(np.int64)[order]


def _size(sensor_size: Sequence[int]) -> tuple[int, int, int]:
    width, height, polarities = map(int, sensor_size)
    return width, height, polarities


def _top(values: np.ndarray) -> int:
    """The largest value; 0 of none."""
    return int(values.max(initial=0))


def _classes(
    labels: Sequence[Any] | None, class_names: Sequence[str] | None, samples: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as numbers [S] int64, and a name a class; ValueError for what are none."""
    names = None if class_names is None else tuple(map(str, class_names))
    if labels is None:
        return np.full(samples, UNKNOWN, np.int64), names or ()
    given = np.asarray(labels)
    if given.shape != (samples,):
        raise ValueError(f"labels: expected [{samples}], got {list(given.shape)}")
    if given.dtype.kind in "iu":
        top = _top(given)
        if names is None and top >= MAX_CHANNELS:
            raise ValueError(f"labels: expected class_names beside labels of up to {top}")
        return given.astype(np.int64), names or tuple(map(str, range(top + 1)))
    if given.dtype.kind not in "USO":
        raise ValueError(f"labels: expected whole numbers or names, got {given.dtype}")
    words = [v.decode() if isinstance(v, bytes) else str(v) for v in given]
    names = tuple(sorted(set(words))) if names is None else names
    places = {name: k for k, name in enumerate(names)}
    for name in words:
        if name not in places:
            raise ValueError(f"labels: expected one of class_names, got {name!r}")
    return np.array([places[name] for name in words], np.int64), names


def _numbered(speakers: Sequence[Any]) -> np.ndarray:
    """Speakers as int32: their numbers, or places in alphabetical order."""
    given = np.asarray(speakers)
    if given.dtype.kind in "iu" and (given.astype(np.int32) == given).all():
        return given.astype(np.int32)
    return np.unique(given, return_inverse=True)[1].astype(np.int32)


def check_range(
    what: str, values: np.ndarray, top: float, unit: str = "", offsets: np.ndarray | None = None
) -> None:
    """Raise ValueError unless all values are in 0..top; NaN is not.

    Args:
        what, unit: for the error. offsets [S + 1]: where each sample's values begin, if not one a
            sample, so that the error can name the first bad sample.
    """
    if not len(values):
        return
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        first = int(np.argmin((values >= 0) & (values <= top)))
        if offsets is not None:
            first = int(np.searchsorted(offsets, first, side="right")) - 1
        raise ValueError(
            f"{what}: expected 0..{top} {unit}".rstrip()
            + f", got {low}..{high}; sample {first} is the first to mend or leave out"
        )


def unsorted_samples(times: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Numbers of the samples in which an event is earlier than the one before it."""
    found = [np.empty(0, np.int64)]
    for a in range(0, len(times), _BLOCK):
        block = times[a : a + _BLOCK + 1]
        falls = a + 1 + np.flatnonzero(block[1:] < block[:-1])
        owner = np.searchsorted(offsets, falls, side="right") - 1
        # a fall from one sample to the next is none
        found.append(owner[offsets[owner] != falls])
    return np.unique(np.concatenate(found))
