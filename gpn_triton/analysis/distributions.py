"""How a trained GPN's gates are spread: over neurons, over samples and over time.

Gates are computed a step at a time for a batch, [B, N] each; what is kept are sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gpn_triton.analysis.replay import Seen, replay
from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.neurons.reference import GATES

# a gate's values lie between these
RANGES = {"f": (0.0, 1.0), "i": (0.0, 1.0), "theta": (0.0, 1.0), "b": (-1.0, 1.0)}
BINS = 50


class Range(NamedTuple):
    """A published range and its unit."""

    low: float
    high: float
    unit: str


# of six groups of cortical pyramidal neurons; of the time constants the means less and plus one
# deviation, of the thresholds the groups' means
CORTEX = "PMC6623880, table 3: pyramidal neurons of the layers 2/3 to 6 of the cortex"
MEMBRANE = Range(3.0, 16.8, "ms")
THRESHOLD = Range(14.2, 27.0, "mV above rest")


@dataclass
class Spread:
    """One gate of one layer over a data set.

    low, high: of the histogram. samples: how many. total, square [N]: the sums over samples of each
    neuron's mean over time, and of its square; within [N]: of its variance over time.
    histogram [BINS]: of all values.
    """

    low: float
    high: float
    samples: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0
    within: Tensor | float = 0.0
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, mean: Tensor, square: Tensor) -> None:
        """Take in a batch: its means over time of the gate and of its square, each [B, N]."""
        self.samples += len(mean)
        self.total = self.total + mean.sum(0)
        self.square = self.square + mean.square().sum(0)
        self.within = self.within + (square - mean.square()).clamp(min=0).sum(0)

    @property
    def neuron_means(self) -> Tensor:
        """Each neuron's mean over samples and time [N]."""
        return self.total / self.samples

    def variances(self) -> dict[str, float]:
        """The gate's variance in three parts that add up to the whole: between neurons (of their
        means), between samples (of a neuron's time means) and over time (within a sample)."""
        mean = self.neuron_means
        between = (self.square / self.samples - mean.square()).clamp(min=0)
        return {
            "neurons": float(mean.var(correction=0)),
            "samples": float(between.mean()),
            "time": float((self.within / self.samples).mean()),
        }


Spreads = list[dict[str, Spread]]


@torch.no_grad()
def spread(model: SpikingClassifier, batches: Sequence[Tensor]) -> Spreads:
    """Every gate of every layer over batches of counts [T, B, C].

    Raises:
        ValueError: a neuron without gates of its own to look at.
    """
    check_gated(model)
    names = gates_of(model)
    spreads = [{name: Spread(*RANGES[name]) for name in names} for _ in model.neurons]
    for x in batches:
        sums: list[dict[str, list[Tensor | float]]]
        sums = [{name: [0.0, 0.0] for name in names} for _ in model.neurons]

        def see(layer: int, t: int, seen: Seen, sums=sums) -> None:
            for name in names:
                gate, own = getattr(seen.gates, name).double(), sums[layer][name]
                own[0], own[1] = own[0] + gate, own[1] + gate.square()
                of = spreads[layer][name]
                of.histogram += torch.histc(gate, BINS, of.low, of.high)

        replay(model, x, see)
        for of, own in zip(spreads, sums, strict=True):
            for name, (total, square) in own.items():
                of[name].add(total / len(x), square / len(x))
    return spreads


def gates_of(model: SpikingClassifier) -> list[str]:
    """The gates that a network's neurons compute; i = 1 - f is one where f is."""
    own = GATES[model.neurons[0].variant]
    return [name for name in RANGES if name in own or name == "i" and "f" in own]


def check_gated(model: SpikingClassifier) -> None:
    """Raise ValueError unless a network's neurons have gates."""
    if not hasattr(model.neurons[0], "gates") or not gates_of(model):
        raise ValueError(f"run: expected GPN with gates, got a run of {model.neuron}")


def time_constants_ms(f: Tensor, bin_ms: float) -> Tensor:
    """-dt / ln f in ms, of leaks f in (0, 1)."""
    return -bin_ms / f.double().clamp(1e-12, 1 - 1e-12).log()


def share_inside(values: Tensor, of: Range) -> float:
    """The share of values within a published range."""
    return float(((values >= of.low) & (values <= of.high)).double().mean())


def percentiles(values: Tensor) -> list[float]:
    """The 5th, 50th and 95th percentile."""
    return values.double().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()


@dataclass(frozen=True)
class Trace:
    """One sample through one layer: every field [T, N]; gates by name, none where it has none.

    Of a neuron that does not spike, spikes are its output.
    """

    spikes: Tensor
    h: Tensor
    gates: dict[str, Tensor]


@torch.no_grad()
def trace(model: SpikingClassifier, x: Tensor) -> list[Trace]:
    """What one sample x [T, 1, C] does in every layer."""
    names = gates_of(model) if hasattr(model.neurons[0], "gates") else []
    steps: list[list[Seen]] = [[] for _ in model.neurons]
    replay(model, x, lambda layer, t, seen: steps[layer].append(seen))

    return [
        Trace(
            torch.cat([seen.s for seen in own]),
            torch.cat([seen.h for seen in own]),
            {name: torch.cat([getattr(seen.gates, name) for seen in own]) for name in names},
        )
        for own in steps
    ]
