"""Real-valued sequences of a whole data set: on the host numpy's, on a device a tensor.

They stand where EventStore and DeviceEvents stand: a feed numbers their samples, and
binning.batch_input hands out a batch of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseStore:
    """All samples' inputs, of equal lengths.

    Args:
        inputs [S, T, C] uint8 or float32: what the network sees, divided by `top`.
        labels [S]: the class of each sample, int64; or a number to learn, float32.
        class_names: one name a class, in label order; of a number to learn its name alone.
        top: the largest input, 1 for what is to be taken as it is.
        speakers: None; no sample has one.
    """

    inputs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    top: float = 1.0
    speakers: None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_channels(self) -> int:
        """C."""
        return self.inputs.shape[2]

    def subset(self, indices: np.ndarray) -> DenseStore:
        """The samples of numbers indices [K] int, in that order, in a store of copies."""
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices])

    def on(self, device: torch.device | str) -> DeviceDense:
        """The samples on a device."""
        return DeviceDense(self, device)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 of all contents."""
        digest = hashlib.sha256(repr((self.top, self.class_names)).encode())
        for array in (self.inputs, self.labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for people: samples, classes or the number to learn, steps and channels."""
        _, T, C = self.inputs.shape
        learned = f"{len(self.class_names)} classes"
        if self.labels.dtype == np.float32:
            learned = f"a {self.class_names[0]} to learn, of variance {self.labels.var():.3f}"
        return f"{len(self)} samples of {T} steps, {learned}, {C} real-valued channels"


class DeviceDense:
    """A dense store's arrays as tensors on a device.

    Args:
        store: the samples. On a CPU the tensors share its memory. device: where they shall be.
    Attributes:
        labels [S], num_channels: as in DenseStore.
    """

    def __init__(self, store: DenseStore, device: torch.device | str = "cpu"):
        self._inputs = torch.from_numpy(store.inputs).to(device)
        self._scale = 1 / store.top
        self.labels = torch.from_numpy(store.labels).to(device)
        self.num_channels = store.num_channels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Steps first..last - 1 of samples indices [B] int64: [last - first, B, C] of dtype."""
        found = self._inputs[:, first:last].index_select(0, indices).transpose(0, 1)
        # products and norms want time first in memory, too
        return found.to(torch.float32).mul(self._scale).to(dtype).contiguous()
