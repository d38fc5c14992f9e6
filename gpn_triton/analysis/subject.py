"""What an analysis looks at: trained runs, and counts of samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.binning import bin_batch
from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.sources.hdf5 import read_events
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_binning
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.run_folder import TrainedRun


@dataclass(frozen=True)
class Samples:
    """Counts and labels, batch by batch, and what the samples are."""

    batches: list[Tensor]
    labels: list[Tensor]
    store: EventStore

    def accuracy(self, logits: list[Tensor]) -> float:
        """The share of right answers, 0..1."""
        right = sum((a.argmax(1) == b).sum() for a, b in zip(logits, self.labels, strict=True))
        return int(right) / len(self.store)


def load_data(cfg: TrainConfig) -> Splits:
    """The data of a configuration.

    Raises:
        ValueError: training data of one class or without events, and what load_splits raises.
    """
    source = DataSource(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(DataSource)})
    splits = load_splits(source)
    check_store(splits.train, cfg.train_file or cfg.dataset)
    return splits


def check_store(store: EventStore, name: str) -> None:
    """Raise ValueError unless there are events, and samples of at least two classes."""
    if not len(store.times):
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
    if int(store.labels.max()) >= len(trained.class_names):
        raise ValueError(
            f"{file}: expected the run's {len(trained.class_names)} classes, got label "
            f"{store.labels.max()}"
        )
    return bin_samples(trained.config, store, most, time_bins)


def bin_samples(
    cfg: TrainConfig, store: EventStore, most: int | None = None, time_bins: int | None = None
) -> Samples:
    """A store's samples as counts, as a configuration bins them; the rest as run_samples."""
    binning = dataclasses.replace(build_binning(cfg), dtype=torch.float32)
    if time_bins is not None:
        binning = dataclasses.replace(binning, time_bins=time_bins)
    if most is not None:
        store = store.subset(np.arange(min(most, len(store))))
    events = DeviceEvents(store)
    parts = torch.arange(len(store)).split(cfg.batch_size)
    batches = [bin_batch(events, part, binning) for part in parts]
    return Samples(batches, [events.labels[part] for part in parts], store)


def label_of(run: str | Path) -> str:
    """A run's name in a table: its folder's, with the folder above for one of several seeds."""
    path = Path(run).resolve()
    of_seed = path.name.startswith(run_folder.SEED)
    return f"{path.parent.name}/{path.name}" if of_seed else path.name
