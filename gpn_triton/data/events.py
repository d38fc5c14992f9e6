"""Spike events of a whole data set in flat arrays: the form every other part of the engine reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
