"""What an analysis looks at: a trained run or a new network, and samples for it."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpn_triton.data.datasets import DataSource, Splits, load_splits
from gpn_triton.data.events import EventStore
from gpn_triton.training.options import TrainConfig


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
