"""The learning rate: scaled with the batch, warmed up step by step, then changed by epoch."""

import math
from typing import Any

import torch
from torch import Tensor

from gpn_triton.training.options import TrainConfig


class Schedule:
    """A run's learning rate: peak x warm-up x shape.

    Warm-up rises by step, linearly, over the first warmup_epochs; the shape then changes by epoch:
    cosine to 0, x 0.75 after 3 epochs without a lower training loss (plateau), or none.

    Args:
        cfg: lr, batch_size, lr_batch_size, schedule, warmup_epochs and epochs count.
    Attributes:
        peak: lr, times sqrt(batch_size / lr_batch_size) where that is given.
    Source: the square-root rule for Adam: Malladi et al., arXiv 2205.10287.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.peak = cfg.lr * math.sqrt(cfg.batch_size / (cfg.lr_batch_size or cfg.batch_size))
        # torch's schedules shape the rate of an optimiser that has nothing else to do
        self._shape = torch.optim.SGD([torch.zeros(())], lr=1.0)
        lr = torch.optim.lr_scheduler
        if cfg.schedule == "plateau":
            self._schedule = lr.ReduceLROnPlateau(self._shape, factor=0.75, patience=3)
        elif cfg.schedule == "cosine":
            self._schedule = lr.CosineAnnealingLR(self._shape, cfg.epochs - cfg.warmup_epochs)
        else:
            self._schedule = lr.ConstantLR(self._shape, 1.0)

    @property
    def rate(self) -> float:
        """This epoch's learning rate once warm."""
        return self.peak * self._shape.param_groups[0]["lr"]

    def warm_steps(self, steps: int) -> int:
        """The step, counted from 1 over all epochs of `steps` each, that is the first warm one."""
        return self.cfg.warmup_epochs * steps + 1

    def rates(self, epoch: int, steps: int) -> Tensor:
        """The learning rate of each of an epoch's steps [steps] float64; epoch: from 0."""
        done = torch.arange(epoch * steps + 1, (epoch + 1) * steps + 1, dtype=torch.float64)
        return self.rate * (done / self.warm_steps(steps)).clamp(max=1)

    def end_epoch(self, epoch: int, train_loss: float) -> None:
        """Go on to the next epoch; `epoch` is the one that ended, from 0, with its mean loss."""
        if epoch < self.cfg.warmup_epochs:
            return
        # torch wants the optimiser's step first; without a gradient it does nothing
        self._shape.step()
        self._schedule.step(*([train_loss] if self.cfg.schedule == "plateau" else []))

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {"factor": self._shape.param_groups[0]["lr"], "shape": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned; KeyError, TypeError: it is of another schedule."""
        for name, value in self._schedule.state_dict().items():
            # torch would take anything
            if type(state["shape"][name]) is not type(value):
                raise TypeError(f"{name}: expected {value!r} or such, got {state['shape'][name]!r}")
        self._shape.param_groups[0]["lr"] = float(state["factor"])
        self._schedule.load_state_dict(state["shape"])
