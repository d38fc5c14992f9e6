"""What an analysis looks at: trained runs, and their samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.binning import BinningConfig, batch_input
from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.dense import DenseStore
from gpn_triton.data.events import EventStore
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_binning
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.run_folder import TrainedRun


class Batches(Sequence[Tensor]):
    """Inputs [T, B, C] of a store's samples, made anew each time one is asked for."""

    def __init__(self, store: EventStore | DenseStore, parts: Sequence[Tensor], how: BinningConfig):
        self._samples, self._parts, self._how = store.on("cpu"), parts, how

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, k):
        return self.of(self._parts[k])

    def of(self, numbers: Tensor) -> Tensor:
        """The inputs of samples of these numbers [B] int64."""
        return batch_input(self._samples, numbers, self._how, None, None, sparse=False)


@dataclass(frozen=True)
class Samples:
    """Inputs and labels, batch by batch, and what the samples are."""

    batches: Batches
    labels: list[Tensor]
    store: EventStore | DenseStore

    def sample(self, k: int) -> Tensor:
        """Sample k alone, [T, 1, C]; ValueError where there is none."""
        if not 0 <= k < len(self.store):
            raise ValueError(f"sample: expected 0..{len(self.store) - 1}, got {k}")
        return self.batches.of(torch.tensor([k]))

    def accuracy(self, logits: list[Tensor]) -> float:
        """The share of right answers, 0..1."""
        right = sum((a.argmax(1) == b).sum() for a, b in zip(logits, self.labels, strict=True))
        return int(right) / len(self.store)


def load_data(cfg: TrainConfig, test: bool = True) -> Splits:
    """The data of a configuration.

    Args:
        test: see load_splits.
    Raises:
        ValueError: training data of one class or without events, and what load_splits raises.
    """
    source = DataSource(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(DataSource)})
    splits = load_splits(source, test=test)
    check_store(splits.train, cfg.train_file or cfg.dataset)
    return splits


def check_store(store: EventStore | DenseStore, name: str) -> None:
    """Raise ValueError unless there are events, and samples of at least two classes."""
    if isinstance(store, EventStore) and not len(store.times):
        raise ValueError(f"{name}: expected events, got {len(store)} samples without any")
    if len(np.unique(store.labels)) < 2:
        raise ValueError(f"{name}: expected samples of at least 2 classes, got 1")


def run_samples(
    trained: TrainedRun, file: str | None, most: int | None = None, time_bins: int | None = None
) -> Samples:
    """A file's samples, or the run's own validation data, binned as the run bins.

    Args:
        file: in SHD's layout. most: so many samples at most, from the first. time_bins: instead of
            the run's.
    Raises:
        ValueError, FileNotFoundError: a file that does not fit; see check_store.
    """
    if file is None:
        store = load_data(trained.config).valid
    else:
        store = read_events(file, num_channels=trained.num_channels, use_cache=False)
        check_store(store, file)
    learns_number = store.labels.dtype.kind == "f"
    if not learns_number and int(store.labels.max()) >= len(trained.class_names):
        raise ValueError(
            f"{file}: expected the run's {len(trained.class_names)} classes, got label "
            f"{store.labels.max()}"
        )
    return bin_samples(trained.config, store, most, time_bins)


def bin_samples(
    cfg: TrainConfig, store: EventStore | DenseStore, most: int | None = None,
    time_bins: int | None = None,
) -> Samples:  # fmt: skip
    """A store's samples as a configuration bins them; the rest as run_samples."""
    binning = dataclasses.replace(build_binning(cfg), dtype=torch.float32)
    if time_bins is not None:
        binning = dataclasses.replace(binning, time_bins=time_bins)
    if most is not None:
        store = store.subset(np.arange(min(most, len(store))))
    labels = torch.from_numpy(store.labels).split(cfg.batch_size)
    parts = torch.arange(len(store)).split(cfg.batch_size)
    return Samples(Batches(store, parts, binning), list(labels), store)


def label_of(run: str | Path) -> str:
    """A run's name in a table: its folder's, with the folder above for one of several seeds."""
    path = Path(run).resolve()
    of_seed = path.name.startswith(run_folder.SEED)
    return f"{path.parent.name}/{path.name}" if of_seed else path.name
