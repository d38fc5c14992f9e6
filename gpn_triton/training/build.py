"""What options ask for: the network, how events are binned, how they are augmented."""

from typing import Any

import torch

from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig
from gpn_triton.data.datasets import Splits
from gpn_triton.machine.device import multiplies
from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.training.options import AMP, TrainConfig


def network_arguments(cfg: TrainConfig, channels: int, classes: int) -> dict[str, Any]:
    """The arguments of SpikingClassifier that a configuration asks for; channels: once binned."""
    names = (
        "hidden", "neuron", "dropout", "readout", "time_bins", "surrogate", "alpha", "backend",
        "checkpoint_every",
    )  # fmt: skip
    return {**{k: getattr(cfg, k) for k in names}, "inputs": channels, "classes": classes}


def build_model(cfg: TrainConfig, channels: int, classes: int) -> SpikingClassifier:
    """The network a configuration asks for, for so many binned channels and classes."""
    return SpikingClassifier(**network_arguments(cfg, channels, classes))


def build_binning(cfg: TrainConfig, dtype: torch.dtype = torch.float32) -> BinningConfig:
    """How a configuration bins events, into counts of the dtype."""
    return BinningConfig(**cfg.settings(BinningConfig), dtype=dtype)


def amp_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The half type of a configuration's mixed precision. None: float32, as asked for, or since
    this CPU has no arithmetic for that type and would take several times as long to emulate it."""
    dtype = AMP[cfg.amp]
    return dtype if dtype and multiplies(dtype, device) else None


def build_augmentation(cfg: TrainConfig) -> Augmentation | None:
    """How a configuration changes events in training; None: not at all."""
    augmentation = Augmentation(**cfg.settings(Augmentation))
    return augmentation if augmentation != Augmentation() else None


def network_sizes(cfg: TrainConfig, splits: Splits) -> tuple[int, int]:
    """Input channels, once binned, and classes."""
    return build_binning(cfg).columns(splits.train.num_channels), len(splits.train.class_names)


def build_network(cfg: TrainConfig, splits: Splits) -> SpikingClassifier:
    """The network a configuration asks for on some data."""
    return build_model(cfg, *network_sizes(cfg, splits))
