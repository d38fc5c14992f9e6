"""How far back a loss reaches: the norm of its gradient against the time between them.

Two numbers stand beside each other. Measured: the norms of dL/dh[t] and dL/dv[t] over a batch and
all neurons of a layer, v[t] being what step t begins with. Analytic: of one neuron a sample, drawn
at random, the product of the diagonal of dv[t+1]/dv[t] from step t to the last, as root mean square
over the batch; it leaves out what goes through other neurons, and spikes on their way to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.analysis.replay import Seen, replay
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier

# below this share of its value at the last step a gradient counts as gone
GONE = 1e-6


@dataclass(frozen=True)
class Decay:
    """A layer's gradients at the steps 1 to T - 1 of 0 to T - 1.

    h, v [T - 1]: norms of dL/dh[t] and dL/dv[t]. factor [T - 1]: the analytic one, 1 at the last.
    """

    layer: int
    h: Tensor
    v: Tensor
    factor: Tensor

    def half_life(self) -> int | None:
        """The fewest steps back at which dL/dv is at most half; None: never."""
        return self._reach(0.5)

    def gone(self) -> int | None:
        """The fewest steps back at which dL/dv is under GONE of its value at the end; None: it is
        not within this sequence."""
        return self._reach(GONE)

    def kept(self) -> float:
        """What is left of dL/dv at step 1, as share of its value at the last."""
        return float(self.v[0] / self.v[-1])

    def _reach(self, share: float) -> int | None:
        back = self.v.flip(0)
        below = torch.nonzero(back <= share * back[0]).flatten()
        return int(below[0]) if len(below) else None


def decays(model: SpikingClassifier, x: Tensor, labels: Tensor) -> list[Decay]:
    """The gradients of every layer of a network, in evaluation mode.

    Args:
        x [T, B, C]: counts. labels [B]: the loss is their mean cross-entropy, through the network's
            own readout.
    Raises:
        ValueError: a neuron that sees all bins at once, or fewer than 3 bins.
    """
    check_stepwise(model.neuron)
    if len(x) < 3:
        raise ValueError(f"time_bins: expected at least 3, got {len(x)}")
    seen: list[list[Seen]] = [[] for _ in model.neurons]
    factors: list[list[Tensor]] = [[] for _ in model.neurons]
    draw = torch.Generator().manual_seed(0)
    chosen = [torch.randint(N, (x.shape[1], 1), generator=draw) for N in model.hidden]

    def see(layer: int, t: int, step: Seen) -> None:
        if t:
            before, own = seen[layer][-1].v, chosen[layer]
            one = step.v.view(*own.shape[:1], -1).gather(1, own).sum()
            row = torch.autograd.grad(one, before, retain_graph=True)[0]
            factors[layer].append(row.view(len(own), -1).gather(1, own).flatten())
        seen[layer].append(step)

    with torch.enable_grad():
        # the current carries a gradient, also where no parameter does
        loss = F.cross_entropy(replay(model, x.clone().requires_grad_(), see), labels)
        # only now, so that the factors' passes leave nothing in .grad
        for step in chain.from_iterable(seen):
            step.h.retain_grad()
            step.v.retain_grad()
        loss.backward()
    for p in model.parameters():
        p.grad = None
    return [_decay(k, steps, factors[k]) for k, steps in enumerate(seen)]


def _decay(layer: int, steps: Sequence[Seen], factors: Sequence[Tensor]) -> Decay:
    # factors[k] is of the step k + 1, from v[k + 1] to v[k + 2]; the last leads beyond the loss
    own = torch.stack(factors[:-1]).double()
    product = torch.cat([own, torch.ones_like(own[:1])]).flip(0).cumprod(0).flip(0)
    return Decay(
        layer + 1,
        torch.stack([_norm(step.h) for step in steps[1:]]),
        torch.stack([_norm(step.v) for step in steps[:-1]]),
        product.square().mean(1).sqrt(),
    )


def _norm(tensor: Tensor) -> Tensor:
    gradient = tensor.grad
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient.double().norm()


def check_stepwise(neuron: str) -> None:
    """Raise ValueError for a neuron that sees all bins at once and has no steps."""
    if NEURONS[neuron].needs_time_bins:
        raise ValueError(f"neuron: a {neuron} sees all bins at once and has no steps to look into")
