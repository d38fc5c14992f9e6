"""Samples as dense counts, for other people's trainers: a torch Dataset, and a whole store at once.

    store = read_events("my_train.h5")
    loader = DataLoader(EventDataset(store, time_bins=50), 32, shuffle=True, collate_fn=time_first)
    for counts, labels in loader:                       # [T, B, C] float32, [B] int64

Here and in the training command an event falls into the same bin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import DeviceEvents, EventStore

# samples that are binned at once where a whole store is
_AT_ONCE = 64


class EventDataset(Dataset):
    """Samples of a store, binned when they are asked for; a worker of a DataLoader may do it.

    Args:
        store: the samples. time_bins: T. max_time: the window [0, max_time), seconds.
        channel_bin: input channels summed into one. overflow: drop or clip what is later. scale:
            counts, or log, see data.binning.
    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, store: EventStore, time_bins: int, max_time: float = 1.0, channel_bin: int = 1,
        overflow: str = "drop", scale: str = "counts",
    ):  # fmt: skip
        self.store = store
        self.binning = BinningConfig(time_bins, max_time, channel_bin, overflow, scale=scale)
        self._events = DeviceEvents(store)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """counts [T, C] float32 and the label, int64, of one sample.

        Raises:
            IndexError: there is no such sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected one of {len(self)} samples, got {index}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> list[tuple[Tensor, Tensor]]:
        """As __getitem__, of several samples, which are binned at once; a DataLoader asks so."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        # the kernels' threads would not outlive the fork of a worker
        counts = bin_batch(self._events, chosen, self.binning, backend="torch")
        return list(zip(counts.unbind(1), self._events.labels[chosen], strict=True))


def time_first(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A DataLoader's collate_fn: counts [T, B, C] and labels [B] of samples [T, C]."""
    counts, labels = zip(*samples, strict=True)
    return torch.stack(counts, 1), torch.stack(labels)


def frames(
    store: EventStore, time_bins: int, max_time: float = 1.0, channel_bin: int = 1,
    overflow: str = "drop",
) -> Tensor:  # fmt: skip
    """All samples of a store as dense counts; the way back from EventStore.from_frames.

    Args:
        store, time_bins, max_time, channel_bin, overflow: as EventDataset.
    Returns:
        counts [S, T, C] float32; of a 2-D sensor (and with channel_bin 1) their view
        counts.view(S, T, polarities, height, width) are images.
    """
    data = EventDataset(store, time_bins, max_time, channel_bin, overflow)
    parts = [data.__getitems__(part) for part in torch.arange(len(data)).split(_AT_ONCE)]
    return torch.stack([counts for part in parts for counts, _ in part])
