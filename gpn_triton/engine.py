"""A network in training: batches of sample numbers in, updated weights and running totals out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpn_triton.config import TrainConfig
from gpn_triton.data import (
    Augmentation,
    BinningConfig,
    DeviceEvents,
    bin_batch,
    bin_cells,
    prefers_cells,
)
from gpn_triton.distributed import World
from gpn_triton.event_linear import Cells
from gpn_triton.model import Draws, SpikingClassifier


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


AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is not a finite number; names the step and the parameters."""


class Engine:
    """A network with its optimiser, schedule and scaler.

    A step's update is left out, on the device and without waiting for it, where the loss or a
    gradient is not finite; `check` tells of it. Under fp16 the scaler does so, and only a loss that
    is not finite counts.

    Args:
        cfg: the configuration. model: on `device` already. device: where everything happens.
        world: the processes that train together; None: this one alone.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        model: SpikingClassifier,
        device: torch.device,
        world: World | None = None,
    ):
        self.cfg, self.model, self.device = cfg, model, device
        self.world = World(device) if world is None else world
        self.amp = AMP[cfg.amp]
        self.trained = self.world.wrap(model)
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True
        )
        self.schedule = build_schedule(cfg, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
        self.binning = build_binning(cfg)
        augmentation = Augmentation(
            channel_shift=cfg.channel_shift,
            time_stretch=cfg.time_stretch,
            time_jitter=cfg.time_jitter,
            drop=cfg.event_drop,
            noise=cfg.noise,
        )
        self.augmentation = augmentation if augmentation != Augmentation() else None
        self.parameter_names = [name for name, _ in model.named_parameters()]
        # steps left out, and of the last of them the loss and which parameters' gradients were bad
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_loss = torch.zeros((), device=device)
        self.bad_parameters = torch.zeros(len(self.parameter_names), device=device)

    def _forward(
        self,
        model: nn.Module,
        x: Tensor | Cells,
        labels: Tensor,
        draws: list[Draws] | None,
        counted: int,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the loss, and [loss, correct, samples, activity ...] for the running totals."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits, activity = model(x, draws)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") * min(counted, 1)
        correct = (logits.argmax(1) == labels).sum() * min(counted, 1)
        totals = torch.stack([loss.detach(), correct, torch.full_like(correct, counted)])
        return loss, torch.cat([totals, activity * counted])

    def _input(
        self,
        events: DeviceEvents,
        share: Tensor,
        augmentation: Augmentation | None = None,
        key: Tensor | None = None,
    ) -> Tensor | Cells:
        """Samples as counts, or as a list of events where a Linear reads few of them on a CPU."""
        sparse = self.amp is None and hasattr(self.model.inputs[0], "weight")
        if sparse and prefers_cells(events, self.binning):
            return bin_cells(events, share, self.binning, augmentation, key)
        return bin_batch(events, share, self.binning, augmentation, key)

    def train_step(self, events: DeviceEvents, indices: Tensor, key: Tensor) -> Tensor:
        """Update the network on one batch.

        Args:
            events: all samples. indices [B] int64: the batch, the same on every process.
            key [2] int64: what augmentation draws depend on, (seed, epoch).
        Returns:
            totals [3 + layers] of this process's share: loss, correct, samples, activity.
        """
        share, rows, counted = self.world.part(indices)
        x = self._input(events, share, self.augmentation, key)
        first, total = rows
        draws = [drawn.part(first, first + len(share)) for drawn in self.model.draw(total)]
        loss, totals = self._forward(self.trained, x, events.labels[share], draws, counted)
        # gradients are averaged over processes: this makes them those of the whole batch's mean
        loss = loss * (self.world.size / len(indices))
        self.scaler.scale(loss).backward()
        if self.cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self._watch(loss.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    def _watch(self, loss: Tensor) -> None:
        """Leave the coming update out where a number is not finite, and remember it."""
        bad_loss = self.world.sum((~loss.isfinite()).float())
        bad_parameters = torch.zeros_like(self.bad_parameters)
        if not self.scaler.is_enabled():
            gradients = [p.grad for p in self.model.parameters()]
            # a norm is finite where every element is, but for overflow, which is no less bad
            norms = torch.stack(torch._foreach_norm(gradients))
            bad_parameters = (~norms.isfinite()).float()
        bad = ((bad_loss + bad_parameters.sum()) > 0).float()
        if not self.scaler.is_enabled():
            # fused optimisers skip the update where this is 1
            self.optimizer.found_inf = bad
        self.bad_steps += bad
        self.bad_loss = torch.where(bad > 0, loss, self.bad_loss)
        self.bad_parameters = torch.where(bad > 0, bad_parameters, self.bad_parameters)

    def check(self, where: str) -> int:
        """How many steps were left out because a number was not finite; waits for the device.

        Args:
            where: the step, for the error.
        Raises:
            NonFiniteError: there was one, and the configuration does not skip them.
        """
        bad_steps = int(self.bad_steps)
        if bad_steps and not self.cfg.skip_nonfinite:
            names = [
                name
                for name, bad in zip(
                    self.parameter_names, self.bad_parameters.tolist(), strict=True
                )
                if bad
            ]
            gradients = f"gradients not finite in {', '.join(names)}" if names else ""
            raise NonFiniteError(f"{where}: loss {float(self.bad_loss):.4g} {gradients}".strip())
        return bad_steps

    @torch.no_grad()
    def evaluate(self, events: DeviceEvents) -> dict[str, Any]:
        """Loss, accuracy and activity on a whole set, without dropout, noise or augmentation."""
        self.model.eval()
        totals = torch.zeros(3 + len(self.cfg.hidden), dtype=torch.float64, device=self.device)
        for indices in torch.arange(len(events), device=self.device).split(self.cfg.batch_size):
            share, _, counted = self.world.part(indices)
            x = self._input(events, share)
            totals += self._forward(self.model, x, events.labels[share], None, counted)[1]
        self.model.train()
        return means(self.world.sum(totals))

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training, random states included."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps.cpu(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def expected_state(self) -> dict[str, Any]:
        """A state of the form that state_dict has once a step was made; see checkpoint.check_form.

        The random state of a GPU is missing where a run is taken up on another kind of device.
        """
        state = self.state_dict() | {"random_cuda": None}
        moments = {
            k: {"step": torch.zeros(()), "exp_avg": p.detach(), "exp_avg_sq": p.detach()}
            for k, p in enumerate(self.model.parameters())
        }
        state["optimizer"] = state["optimizer"] | {"state": moments}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = state["bad_steps"].to(self.device)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def build_schedule(cfg: TrainConfig, optimizer: torch.optim.Optimizer):
    """The learning rate by epoch, stepped once an epoch."""
    lr = torch.optim.lr_scheduler
    if cfg.schedule == "plateau":
        return lr.ReduceLROnPlateau(optimizer, factor=0.75, patience=3)
    warm = cfg.warmup_epochs
    if cfg.schedule == "cosine":
        main = lr.CosineAnnealingLR(optimizer, cfg.epochs - warm)
    else:
        main = lr.ConstantLR(optimizer, 1.0)
    if not warm:
        return main
    start = lr.LinearLR(optimizer, 1 / (warm + 1), 1.0, warm)
    return lr.SequentialLR(optimizer, [start, main], [warm])


def means(totals: Tensor) -> dict[str, Any]:
    """Totals as loss, accuracy and activity a sample."""
    loss, correct, n, *activity = totals.tolist()
    n = max(n, 1.0)
    return {"loss": loss / n, "accuracy": correct / n, "activity": [a / n for a in activity]}
