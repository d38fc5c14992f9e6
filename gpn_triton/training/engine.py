"""A network in training: batches of sample numbers in, updated weights and running totals out."""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import batch_input
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed
from gpn_triton.machine.distributed import ALONE, World
from gpn_triton.machine.graphs import Graphs
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.neurons.networks import NEURONS, Draws, SpikingClassifier
from gpn_triton.training.build import amp_dtype, build_augmentation, build_binning, clip_norm
from gpn_triton.training.objective import Means, blank_totals, loss_and_totals, means
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.schedule import Schedule


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is not a finite number; names the step and the parameters."""


class Engine:
    """A network with its optimiser, schedule and scaler.

    A training step is device work from the draw of the batch's samples to the running totals; on a
    GPU it is captured (see graphs.Graphs), unless several processes train together. Where the loss
    or a gradient is not finite the update is left out on the device, without waiting for it, and
    `check` tells of it; under fp16 the scaler does so, and only the loss counts.

    Args:
        cfg: the configuration. model: on `device` already. device: where everything happens.
        world: the processes that train together.
    Attributes:
        totals [3 + layers] float64: this process's sums over the epoch's training samples so far;
            see objective.
    """

    def __init__(
        self, cfg: TrainConfig, model: SpikingClassifier, device: torch.device, world: World = ALONE
    ):
        self.cfg, self.model, self.device, self.world = cfg, model, device, world
        self.amp, cuda = amp_dtype(cfg, device), device.type == "cuda"
        self.graphs = Graphs(device, cuda and not cfg.no_graph and world.size == 1)
        self.schedule = Schedule(cfg)
        # numbers that change from step to step live on the device, where a replay finds them
        self.lr = torch.tensor(self.schedule.rate, device=device)
        self.warm_rate = torch.zeros((), dtype=torch.float64, device=device)
        self.warm_steps = torch.ones((), dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.totals = blank_totals(len(cfg.hidden), device)
        self.evaluated = blank_totals(len(cfg.hidden), device)
        self.optimizer = torch.optim.Adam(
            model.parameters(), self.lr, weight_decay=cfg.weight_decay, fused=True, capturable=cuda
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
        self.binning = build_binning(cfg, self.amp or torch.float32)
        self.augmentation = build_augmentation(cfg)
        self.parameter_names = [name for name, _ in model.named_parameters()]
        # how many steps were left out; of the last of them the loss, and whose gradients were bad
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_loss = torch.zeros((), device=device)
        self.bad_parameters = torch.zeros(len(self.parameter_names), device=device)

    @functools.cached_property
    def trained(self) -> nn.Module:
        """The model as training calls it; made at the first step, as the processes then talk."""
        return self.world.wrap(self.model)

    def _forward(
        self, model: nn.Module, events: DeviceEvents, indices: Tensor,
        draws: list[Draws] | None, weight: int, augmentation: Augmentation | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss summed over samples, and what they add to the running totals."""
        with record_function("data"):
            x = self._input(events, indices, augmentation)
            labels = events.labels.index_select(0, indices)
        with record_function("forward"):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                logits, activity = model(x, draws)
            return loss_and_totals(logits, labels, activity, weight)

    def _input(
        self, events: DeviceEvents, indices: Tensor, augmentation: Augmentation | None
    ) -> Tensor | Cells:
        """Samples in the form that the network takes soonest."""
        sparse = self.amp is None and NEURONS[self.cfg.neuron].sparse_input
        return batch_input(events, indices, self.binning, augmentation, self.key, sparse)

    def normalise(self, feed: Feed, seed: int) -> None:
        """Normalise the network's currents, where it starts quietly, by its first training batch.

        Args:
            feed: the training samples. seed: as start_epoch.
        """
        size = min(self.cfg.batch_size, len(feed))

        def batch():
            self.start_epoch(feed, seed, 0)
            feed.ahead(size)
            for part in feed.batch(size).chunk(self.cfg.accumulate * self.world.size):
                yield self._input(feed.events, part, self.augmentation)

        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            self.model.normalise(batch)

    def start_epoch(self, feed: Feed, seed: int, epoch: int, step: int = 0) -> None:
        """Make ready for an epoch's training steps, each on the next samples of a random order.

        Args:
            feed: the training samples. seed, epoch: what the order, the augmentation and the
                learning rate depend on. step: how many steps are done already; the totals are of
                these steps, so 0 zeroes them.
        """
        if step == 0:
            self.totals.zero_()
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(feed), generator=generator, device=self.device)
        size = self.cfg.batch_size
        feed.start(order, min(step * size, len(feed)), size)
        steps = -(-len(feed) // size)
        self.key.copy_(torch.tensor([seed, epoch]))
        self.warm_rate.fill_(self.schedule.rate)
        self.warm_steps.fill_(self.schedule.warm_steps(steps))
        self.steps.fill_(epoch * steps + step)

    def train_step(self, feed: Feed, size: int) -> None:
        """Update the network on the feed's next samples.

        Args:
            feed: the training samples, after start_epoch. size: how many, on all processes.
        """
        feed.ahead(size)
        self.graphs.run(("train", feed, size), lambda: self._train(feed, size))

    def _train(self, feed: Feed, size: int) -> None:
        share, first, weight = self.world.part(feed.batch(size))
        draws = self.model.draw(size)
        mean_loss, count = torch.zeros((), device=self.device), len(share)
        parts = min(self.cfg.accumulate, count)
        edges = [count * k // parts for k in range(parts + 1)]
        for a, b in pairwise(edges):
            rows = [drawn.part(first + a, first + b) for drawn in draws]
            with self.world.apart(self.trained, b < count):
                loss, totals = self._forward(
                    self.trained, feed.events, share[a:b], rows, weight, self.augmentation
                )
                # the processes' gradients are averaged, so that they are those of the batch's mean
                loss = loss * (self.world.size / size)
                with record_function("backward"):
                    self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
            self.totals += totals
        with record_function("update"):
            self._update(mean_loss)

    def _update(self, mean_loss: Tensor) -> None:
        """Change the weights by the gradients that are there, and let go of these."""
        if norm := clip_norm(self.cfg):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        self._watch(mean_loss)
        self.steps += 1
        self.lr.copy_(self.warm_rate * (self.steps / self.warm_steps).clamp(max=1))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

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
        self.bad_loss.copy_(torch.where(bad > 0, loss, self.bad_loss))
        self.bad_parameters.copy_(torch.where(bad > 0, bad_parameters, self.bad_parameters))

    def check(self, where: str) -> int:
        """How many steps were left out because a number was not finite; waits for the device.

        Args:
            where: the step, for the error.
        Raises:
            NonFiniteError: there was one, and the configuration does not skip them.
        """
        bad_steps = int(self.bad_steps)
        if bad_steps and not self.cfg.skip_nonfinite:
            found = zip(self.parameter_names, self.bad_parameters.tolist(), strict=True)
            names = [name for name, bad in found if bad]
            gradients = f"gradients not finite in {', '.join(names)}" if names else ""
            raise NonFiniteError(f"{where}: loss {float(self.bad_loss):.4g} {gradients}".strip())
        return bad_steps

    @torch.no_grad()
    def evaluate(self, feed: Feed) -> Means:
        """The metrics of a whole set, without dropout, noise or augmentation."""
        # evaluation takes no more samples at once than training does
        size = -(-self.cfg.batch_size // self.cfg.accumulate)
        feed.start(None, 0, size)
        self.evaluated.zero_()
        self.model.eval()
        for first in range(0, len(feed), size):
            count = min(size, len(feed) - first)
            feed.ahead(count)
            work = functools.partial(self._evaluate, feed, count)
            self.graphs.run(("evaluate", feed, count), work)
        self.model.train()
        return means(self.world.sum(self.evaluated))

    def _evaluate(self, feed: Feed, size: int) -> None:
        share, _, weight = self.world.part(feed.batch(size))
        self.evaluated += self._forward(self.model, feed.events, share, None, weight)[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training, random states included."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps.cpu(),
            "totals": self.world.sum(self.totals).cpu(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict returned; torch raises for a state that does not fit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            # torch compares no shapes here
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = moments[name].view_as(parameter)
        for group in self.optimizer.param_groups:
            self.lr.copy_(group["lr"])
            group |= {"lr": self.lr, "capturable": self.device.type == "cuda"}
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.bad_steps.copy_(state["bad_steps"])
        self.totals.copy_(state["totals"] if self.world.is_writer else torch.zeros(()))
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
