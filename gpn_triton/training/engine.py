"""A network in training: batches of sample numbers in, updated weights and running totals out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_map_only

from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import Steps, batch_input
from gpn_triton.data.dense import DeviceDense
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed
from gpn_triton.machine.distributed import ALONE, World
from gpn_triton.machine.graphs import Graphs
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.neurons.networks import NEURONS, Draws, SpikingClassifier, StreamState
from gpn_triton.training.build import amp_dtype, build_augmentation, build_binning, clip_norm
from gpn_triton.training.objective import Means, blank_totals, loss_and_totals, means
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.schedule import Schedule


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is not a finite number; names the step and the parameters."""


@dataclass
class Sequences:
    """A batch of sequences that is worked off piece by piece (--tbptt).

    draws: the batch's. done: pieces behind. states: of each part of the batch, see --accumulate;
    None before its first piece. activity [layers] float64: of the pieces behind, summed over bins
    and samples. indices [B]: where the feed has the samples; None where another process, since
    stopped, asked it.
    """

    draws: list[Draws]
    done: int
    states: list[StreamState | None]
    activity: Tensor
    indices: Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """All but the indices, in plain containers."""
        states = [s and (s.neurons, s.readout, s.steps) for s in self.states]
        draws = [tuple(drawn) for drawn in self.draws]
        return {"draws": draws, "done": self.done, "states": states, "activity": self.activity}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> Sequences:
        """The inverse of state_dict, on a device."""
        state = tree_map_only(Tensor, lambda tensor: tensor.to(device), state)
        states = [s and StreamState(*s) for s in state["states"]]
        draws = [Draws(*drawn) for drawn in state["draws"]]
        return cls(draws, state["done"], states, state["activity"], None)


class Engine:
    """A network with its optimiser, schedule and scaler.

    A training step is device work from the draw of the batch's samples to the running totals; on a
    GPU it is captured (see graphs.Graphs), unless several processes train together. Where the loss
    or a gradient is not finite the update is left out on the device, without waiting for it, and
    `check` tells of it; under fp16 the scaler does so, and only the loss counts.

    With --tbptt a training step is one piece of a batch's sequences, which the next steps go on
    with: its loss is that of what the network says by then, and no gradient leaves the piece. What
    is logged of a sequence is what the network says at its end.

    Args:
        cfg: the configuration. model: on `device` already. device: where everything happens.
        world: the processes that train together.
    Attributes:
        totals [3 + layers] float64: this process's sums over the epoch's training samples so far;
            see objective.
        pieces: the time bins of each piece, of which there is one without --tbptt.
    Raises:
        ValueError: several processes with --tbptt.
    """

    def __init__(
        self, cfg: TrainConfig, model: SpikingClassifier, device: torch.device, world: World = ALONE
    ):
        self.cfg, self.model, self.device, self.world = cfg, model, device, world
        self.amp, cuda = amp_dtype(cfg, device), device.type == "cuda"
        T = cfg.time_bins
        K = min(cfg.tbptt or T, T)
        self.pieces = [(first, min(first + K, T)) for first in range(0, T, K)]
        if len(self.pieces) > 1 and world.size > 1:
            raise ValueError(f"tbptt: expected one process, got {world.size}")
        self.sequences: Sequences | None = None
        alone = world.size == 1 and len(self.pieces) == 1
        self.graphs = Graphs(device, cuda and not cfg.no_graph and alone)
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
        self, model: nn.Module, events: DeviceEvents | DeviceDense, indices: Tensor,
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

    def _advance(
        self, events: DeviceEvents | DeviceDense, indices: Tensor, draws: list[Draws] | None,
        state: StreamState | None, steps: Steps, augmentation: Augmentation | None = None,
    ) -> tuple[Tensor, Tensor, StreamState]:  # fmt: skip
        """A piece of some samples: logits after it, its activity, the state after it."""
        with record_function("data"):
            x = self._input(events, indices, augmentation, steps)
        with (
            record_function("forward"),
            torch.autocast(self.device.type, self.amp, enabled=self.amp is not None),
        ):
            return self.model.advance(x, draws, state)

    def _input(
        self, events: DeviceEvents | DeviceDense, indices: Tensor,
        augmentation: Augmentation | None, steps: Steps = None,
    ) -> Tensor | Cells:  # fmt: skip
        """Samples in the form that the network takes soonest."""
        sparse = self.amp is None and NEURONS[self.cfg.neuron].sparse_input
        return batch_input(events, indices, self.binning, augmentation, self.key, sparse, steps)

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
                yield self._in_pieces(feed.events, part)

        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            self.model.normalise(batch)

    def _in_pieces(
        self, events: DeviceEvents | DeviceDense, indices: Tensor
    ) -> Iterator[Tensor | Cells]:
        """Some training samples piece by piece, augmented."""
        for steps in self.pieces if len(self.pieces) > 1 else [None]:
            yield self._input(events, indices, self.augmentation, steps)

    def start_epoch(self, feed: Feed, seed: int, epoch: int, step: int = 0) -> None:
        """Make ready for an epoch's training steps, each on the next samples of a random order.

        Args:
            feed: the training samples. seed, epoch: what the order, the augmentation and the
                learning rate depend on. step: how many steps are done already, of which each
                batch has one a piece; the totals are of these steps, so 0 zeroes them.
        """
        if step == 0:
            self.totals.zero_()
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(feed), generator=generator, device=self.device)
        size, pieces = self.cfg.batch_size, len(self.pieces)
        feed.start(order, min(step // pieces * size, len(feed)), size)
        steps = -(-len(feed) // size) * pieces
        self.key.copy_(torch.tensor([seed, epoch]))
        self.warm_rate.fill_(self.schedule.rate)
        self.warm_steps.fill_(self.schedule.warm_steps(steps))
        self.steps.fill_(epoch * steps + step)

    def train_step(self, feed: Feed, size: int) -> None:
        """Update the network on the feed's next samples, or on the next piece of the last ones.

        Args:
            feed: the training samples, after start_epoch. size: how many, on all processes.
        """
        if len(self.pieces) > 1:
            self._train_piece(feed, size)
            return
        feed.ahead(size)
        self.graphs.run(("train", feed, size), lambda: self._train(feed, size))

    def _train_piece(self, feed: Feed, size: int) -> None:
        parts = min(self.cfg.accumulate, size)
        now = self.sequences
        if now is None:
            activity = torch.zeros_like(self.totals[3:])
            now = Sequences(self.model.draw(size), 0, [None] * parts, activity, None)
            self.sequences = now
        if now.indices is None:
            feed.ahead(size)
            now.indices = feed.batch(size)
        steps, last = self.pieces[now.done], now.done == len(self.pieces) - 1
        mean_loss, edges = torch.zeros((), device=self.device), _edges(size, parts)
        for part, (a, b) in enumerate(edges):
            rows, indices = [drawn.part(a, b) for drawn in now.draws], now.indices[a:b]
            logits, activity, state = self._advance(
                feed.events, indices, rows, now.states[part], steps, self.augmentation
            )
            now.states[part] = state.detach()
            now.activity += activity * ((steps[1] - steps[0]) * (b - a))
            labels = feed.events.labels.index_select(0, indices)
            loss, totals = loss_and_totals(logits, labels, torch.zeros_like(activity), 1)
            with record_function("backward"):
                self.scaler.scale(loss / size).backward()
            mean_loss += loss.detach() / size
            if last:
                self.totals += totals
        now.done += 1
        if last:
            self.totals[3:] += now.activity / self.cfg.time_bins
            self.sequences = None
        with record_function("update"):
            self._update(mean_loss)

    def _train(self, feed: Feed, size: int) -> None:
        share, first, weight = self.world.part(feed.batch(size))
        draws = self.model.draw(size)
        mean_loss, count = torch.zeros((), device=self.device), len(share)
        for a, b in _edges(count, min(self.cfg.accumulate, count)):
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
        if len(self.pieces) == 1:
            self.evaluated += self._forward(self.model, feed.events, share, None, weight)[1]
            return
        state, activity = None, 0.0
        for steps in self.pieces:
            logits, found, state = self._advance(feed.events, share, None, state, steps)
            activity += found * ((steps[1] - steps[0]) / self.cfg.time_bins)
        labels = feed.events.labels.index_select(0, share)
        self.evaluated += loss_and_totals(logits, labels, activity, 1)[1]

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
            "sequences": self.sequences and self.sequences.state_dict(),
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
        # a run from before there was --tbptt has none
        sequences = state.get("sequences")
        self.sequences = sequences and Sequences.of(sequences, self.device)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _edges(count: int, parts: int) -> list[tuple[int, int]]:
    """Where a batch of `count` samples is cut into parts."""
    return list(pairwise(count * k // parts for k in range(parts + 1)))
