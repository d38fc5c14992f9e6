"""What a configuration asks for: the network, how events are binned, how they are augmented."""

from __future__ import annotations

import torch

from gpn_triton.config import TrainConfig
from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig
from gpn_triton.data.datasets import Splits
from gpn_triton.model import SpikingClassifier

AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(cfg: TrainConfig, channels: int, classes: int) -> SpikingClassifier:
    """The network a configuration asks for, for so many input channels and classes."""
    return SpikingClassifier(
        cfg.hidden,
        cfg.neuron,
        channels,
        classes,
        cfg.dropout,
        cfg.readout,
        cfg.time_bins,
        cfg.surrogate,
        cfg.alpha,
        cfg.backend,
        cfg.checkpoint_every,
    )


def build_binning(cfg: TrainConfig) -> BinningConfig:
    """How a configuration bins events; counts come in the dtype of its mixed precision."""
    return BinningConfig(
        time_bins=cfg.time_bins,
        max_time=cfg.max_time,
        channel_bin=cfg.channel_bin,
        overflow=cfg.overflow,
        style=cfg.binning,
        dtype=AMP[cfg.amp] or torch.float32,
    )


def build_augmentation(cfg: TrainConfig) -> Augmentation | None:
    """How a configuration changes events in training; None: not at all."""
    augmentation = Augmentation(
        channel_shift=cfg.channel_shift,
        time_stretch=cfg.time_stretch,
        time_jitter=cfg.time_jitter,
        drop=cfg.event_drop,
        noise=cfg.noise,
    )
    return augmentation if augmentation != Augmentation() else None


def network_sizes(cfg: TrainConfig, splits: Splits) -> tuple[int, int]:
    """Input channels, once binned, and classes."""
    columns = build_binning(cfg).columns(splits.train.num_channels)
    return columns, len(splits.train.class_names)


def build_network(cfg: TrainConfig, splits: Splits) -> SpikingClassifier:
    """The network a configuration asks for on some data."""
    return build_model(cfg, *network_sizes(cfg, splits))
