"""Experiment trackers a run may also log to: TensorBoard and Weights & Biases, both extras."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpn_triton.training.objective import Epoch


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if one of these trackers is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"track: {name} is not installed: pip install 'gpn-triton[{name}]'")


class Trackers:
    """The trackers of one run, as a context; with none named it does nothing.

    Args:
        names: tensorboard, wandb, see check_trackers. run: the run's folder. config: its options,
            for wandb.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any]):
        self.board = self.wandb = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run)
        if "wandb" in names:
            import wandb

            self.wandb = wandb.init(project="gpn_triton", name=run.name, dir=run, config=config)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def log(self, epoch: Epoch) -> None:
        """Log an epoch's metrics by their names."""
        numbers = dict(epoch.numbers())
        step = numbers.pop("epoch")
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
