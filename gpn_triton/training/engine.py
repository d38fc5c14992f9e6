"""A network in training: batches of sample numbers in, updated weights and running totals out."""

from __future__ import annotations

import functools
import math
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
from gpn_triton.machine.distributed import ALONE, Exchange, World
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
    GPU it is captured (see graphs.Graphs). Of several processes the gradients and the update are
    two captures, between which one collective adds up all gradients: PyTorch's own data parallelism
    would need its hooks in the capture, and a collective a bucket. Where the loss or a gradient is
    not finite the update is left out on the device, without waiting for it, and `check` tells of
    it; under fp16 the scaler does so, and only the loss counts.

    With --tbptt a training step is one piece of a batch's sequences, which the next steps go on
    with: its loss is that of what the network says by then, and no gradient leaves the piece. What
    is logged of a sequence is what the network says at its end.

    Args:
        cfg: the configuration. model: on `device` already. device: where everything happens.
        world: the processes that train together.
    Attributes:
        totals [3 + neurons] float64: this process's sums over the epoch's training samples so far;
            see objective. norms [2 + layers] float64: how many of the epoch's steps were made, and
            the sums over them of each layer's and the readout's gradient norm.
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
        self.graphs = Graphs(device, cuda and not cfg.no_graph and len(self.pieces) == 1)
        self.schedule = Schedule(cfg)
        # numbers that change from step to step live on the device, where a replay finds them: an
        # epoch's learning rates, and which of them is next
        self.rate = torch.full((1,), self.schedule.rate, device=device)
        self.lr = self.rate.view(())
        self.rates: dict[int, Tensor] = {}
        self.shares: dict[int, Tensor] = {}
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.totals = blank_totals(sum(cfg.hidden), device)
        self.evaluated = blank_totals(sum(cfg.hidden), device)
        self.optimizer = torch.optim.Adam(
            model.parameters(), self.lr, weight_decay=cfg.weight_decay, fused=True, capturable=cuda
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
        self.binning = build_binning(cfg, self.amp or torch.float32)
        self.augmentation = build_augmentation(cfg)
        self.parameter_names = [name for name, _ in model.named_parameters()]
        readout = len(cfg.hidden)
        layers = [readout if name.startswith("output.") else int(name.split(".")[1])
                  for name in self.parameter_names]  # fmt: skip
        # which parameters are a layer's [1 + layers, parameters]
        self.of_layer = nn.functional.one_hot(torch.tensor(layers, device=device)).t().float()
        self.norms = torch.zeros(2 + readout, dtype=torch.float64, device=device)
        self.one, self.zeros = torch.ones(1, device=device), torch.zeros(2 + readout, device=device)
        # how many steps were left out; of the last of them the loss and the gradients' norms, but
        # under fp16 the loss alone
        self.bad_steps = torch.zeros((), dtype=torch.float64, device=device)
        watched = 1 + len(self.parameter_names) * (not self.scaler.is_enabled())
        self.bad, self.none = torch.zeros(2, watched, device=device)

    @functools.cached_property
    def exchange(self) -> Exchange:
        """What several processes add up; made at the first step, as they then talk."""
        return Exchange(self.model, self.world)

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
                logits, activity = model(x, draws, by_neuron=True)
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
            return self.model.advance(x, draws, state, by_neuron=True)

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
            self.norms.zero_()
        generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(feed), generator=generator, device=self.device)
        size, pieces = self.cfg.batch_size, len(self.pieces)
        feed.start(order, min(step // pieces * size, len(feed)), size)
        steps = -(-len(feed) // size) * pieces
        self.key.copy_(torch.tensor([seed, epoch]))
        rates = self.schedule.rates(epoch, steps)
        # a graph reads the tensor it was made with, so that a set of another size has another
        self.rates.setdefault(steps, self.rate.new_zeros(steps)).copy_(rates)
        self.steps = steps
        self.step.fill_(step)

    def train_step(self, feed: Feed, size: int) -> None:
        """Update the network on the feed's next samples, or on the next piece of the last ones.

        Args:
            feed: the training samples, after start_epoch. size: how many, on all processes.
        """
        if len(self.pieces) > 1:
            self._train_piece(feed, size)
            return
        feed.ahead(size)
        if size not in self.shares:
            # a sample's share in the batch's mean; a capture takes no number from the host
            self.shares[size] = torch.tensor(1 / size, device=self.device)
        if self.world.size == 1:
            work = lambda: self._update(self._backward(feed, size))  # noqa: E731
            self.graphs.run(("train", feed, size), work)
        else:
            exchange = self.exchange
            work = lambda: exchange.gather(self._backward(feed, size))  # noqa: E731
            self.graphs.run(("train", feed, size), work)
            exchange.add_up()
            self.graphs.run(("update", self.steps), lambda: self._update(exchange.scatter()))

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
        self._update(mean_loss)

    def _backward(self, feed: Feed, size: int) -> Tensor:
        """Leave the gradients of the batch's mean loss in the parameters; returns the loss.

        Both are this process's share, and the sum over processes the whole.
        """
        share, first, weight = self.world.part(feed.batch(size))
        draws = self.model.draw(size)
        losses, count = [], len(share)
        for a, b in _edges(count, min(self.cfg.accumulate, count)):
            rows = [drawn.part(first + a, first + b) for drawn in draws]
            loss, totals = self._forward(
                self.model, feed.events, share[a:b], rows, weight, self.augmentation
            )
            with record_function("backward"):
                loss.backward(self.scaler.scale(self.shares[size]))
            losses.append(loss.detach() * self.shares[size])
            self.totals += totals
        return functools.reduce(torch.add, losses)

    @record_function("update")
    def _update(self, mean_loss: Tensor) -> None:
        """Change the weights by the gradients that are there, and let go of these."""
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.model.parameters()]))
        if norm := clip_norm(self.cfg):
            whole = torch.linalg.vector_norm(norms)
            nn.utils.clip_grads_with_norm_(self.model.parameters(), norm, whole)
        self._watch(mean_loss, norms)
        torch.index_select(self.rates[self.steps], 0, self.step, out=self.rate)
        self.step += 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _watch(self, loss: Tensor, norms: Tensor) -> None:
        """Leave the coming update out where a number is not finite, and remember it.

        Args:
            loss: of the step. norms: of each parameter's gradient, before clipping: one is finite
                where every element is, but for overflow, which is no less bad.
        """
        by_layer = torch.cat([self.one, (self.of_layer @ norms.square()).sqrt()])
        # a scaler leaves out what is not finite itself
        watched = loss[None] if self.scaler.is_enabled() else torch.cat([loss[None], norms])
        # times 0 what is finite is 0, and what is not NaN
        bad = watched.dot(self.none) != 0
        torch.where(bad, watched, self.bad, out=self.bad)
        self.bad_steps += bad
        self.norms += torch.where(by_layer.dot(self.zeros) == 0, by_layer, 0)
        if not self.scaler.is_enabled():
            # fused optimisers skip the update where this is 1
            self.optimizer.found_inf = bad.float()

    def check(self, where: str) -> int:
        """How many steps were left out because a number was not finite; waits for the device.

        Args:
            where: the step, for the error.
        Raises:
            NonFiniteError: there was one, and the configuration does not skip them.
        """
        bad_steps = int(self.bad_steps)
        if bad_steps and not self.cfg.skip_nonfinite:
            loss, *norms = self.bad.tolist()
            found = zip(self.parameter_names, norms, strict=False)
            names = [name for name, norm in found if not math.isfinite(norm)]
            gradients = f"gradients not finite in {', '.join(names)}" if names else ""
            raise NonFiniteError(f"{where}: loss {loss:.4g} {gradients}".strip())
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
        return means(self.world.sum(self.evaluated), self.cfg.hidden)

    def trained_means(self) -> Means:
        """The metrics of the epoch's training samples so far, of all processes."""
        return means(self.world.sum(self.totals), self.cfg.hidden)

    def gradient_norms(self) -> list[float]:
        """Of each layer's parameters and the readout's, the mean over the epoch's steps so far."""
        steps, *norms = self.norms.tolist()
        return [norm / max(steps, 1.0) for norm in norms]

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
            "norms": self.norms.cpu(),
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
        totals = state["totals"]
        if len(totals) == 3 + len(self.cfg.hidden):
            # older runs have a sum a layer
            sizes = torch.tensor([1, 1, 1, *self.cfg.hidden])
            totals = totals.repeat_interleave(sizes)
        self.totals.copy_(totals if self.world.is_writer else torch.zeros(()))
        if "norms" in state:
            self.norms.copy_(state["norms"])
        # a run from before there was --tbptt has none
        sequences = state.get("sequences")
        self.sequences = sequences and Sequences.of(sequences, self.device)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _edges(count: int, parts: int) -> list[tuple[int, int]]:
    """Where a batch of `count` samples is cut into parts."""
    return list(pairwise(count * k // parts for k in range(parts + 1)))
