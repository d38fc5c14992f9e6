"""Spike events of a whole data set in flat arrays: on the host numpy's, on a device tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# longest sample believed to be in seconds; a second in ms, or anything in us, lies above
MAX_SECONDS = 600.0
# passes over all events go in blocks, so that they need little memory beside the events
_BLOCK = 1 << 24


@dataclass(frozen=True)
class EventStore:
    """All samples' spikes, concatenated; sample k owns events offsets[k]:offsets[k + 1].

    Args:
        times [E] float32: spike times from the start of the sample, seconds, sorted in a sample.
        units [E] uint16: input channel of each spike, 0..num_channels - 1.
        offsets [S + 1] int64: where each sample's events begin; offsets[0] = 0, offsets[S] = E.
        labels [S] int64: class of each sample, 0..len(class_names) - 1.
        speakers [S] int32 or None: who spoke, where the source says so.
        num_channels: number of input channels.
        class_names: one name a class, in label order.
    """

    times: np.ndarray
    units: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    speakers: np.ndarray | None
    num_channels: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

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
        check_range(f"{name}: labels", self.labels, len(self.class_names) - 1)
        check_range(f"{name}: units", self.units, self.num_channels - 1)
        check_range(f"{name}: times", self.times, MAX_SECONDS, "seconds")
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

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 of all contents: 0.5 s for SHD, a few s for SSC."""
        digest = hashlib.sha256(repr((self.num_channels, self.class_names)).encode())
        for array in (self.times, self.units, self.offsets, self.labels, self.speakers):
            if array is not None:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8))
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for people: samples, classes, speakers, channels, events and the last time."""
        events = len(self.times)
        speakers = "" if self.speakers is None else f"{len(np.unique(self.speakers))} speakers, "
        last = f", up to {self.times.max():.2f} s" if events else ""
        return (
            f"{len(self)} samples, {len(self.class_names)} classes, {speakers}"
            f"{self.num_channels} channels, {events / max(len(self), 1):.0f} events a sample{last}"
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
