"""What a sample costs: operations, memory traffic, spikes and energy, from measured rates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpn_triton.analysis.subject import Samples
from gpn_triton.neurons import cost
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training.run_folder import TrainedRun

# two networks' parameters count as equal within this share, their accuracies within these points
SAME_SIZE, SAME_ACCURACY = 0.05, 2.0


@dataclass(frozen=True)
class Constants:
    """Energy in picojoule: of a multiplication with its addition, of an addition alone, and of a
    byte moved; and the source of these numbers."""

    mac_pj: float = 4.6
    ac_pj: float = 0.9
    byte_pj: float = 12.5
    source: str = (
        "45 nm, 0.9 V, float32: addition 0.9 pJ, multiplication 3.7 pJ, 64 bits from a cache of "
        "1 MB 100 pJ (Horowitz, ISSCC 2014, figure 1.1.9)"
    )

    @classmethod
    def read(cls, path: str | Path) -> Constants:
        """Constants from a JSON file with this class's names; what it leaves out is as stated here.

        Raises:
            FileNotFoundError: no such file. ValueError: no object of these names and numbers.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"constants: no such file: {path}") from None
        except ValueError as error:
            raise ValueError(f"constants: {path} is not valid JSON: {error}") from None
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= names:
            raise ValueError(f"constants: {path}: expected an object of {', '.join(sorted(names))}")
        for name, value in {"source": str(path), **values}.items():
            fits = isinstance(value, str) if name == "source" else isinstance(value, (int, float))
            if not fits or (name != "source" and not value >= 0):
                raise ValueError(f"constants: {path}: {name}: got {value!r}")
        return cls(**{"source": str(path), **values})


@dataclass(frozen=True)
class Cost:
    """What a network takes for one sample, on average over samples.

    neuron, hidden, parameters, test: of the run; test in %, None where it was not tested.
    rates: spikes a neuron and step of each layer. events: of the input that lie in its bins.
    spikes: of all layers. operations: of all steps and the readout. energy_nj: by the constants.
    """

    neuron: str
    hidden: tuple[int, ...]
    parameters: int
    test: float | None
    rates: list[float]
    events: float
    spikes: float
    operations: cost.Operations
    energy_nj: float


@torch.no_grad()
def measure(
    trained: TrainedRun, samples: Samples, test: float | None, constants: Constants
) -> Cost:
    """A run's cost on some samples.

    Raises:
        ValueError: a neuron whose work is not counted.
    """
    model, cfg = trained.model, trained.config
    row = NEURONS[cfg.neuron]
    if row.work is None:
        raise ValueError(f"run: the work of a {cfg.neuron} is not counted")
    rates, events = torch.zeros(len(cfg.hidden), dtype=torch.float64), 0.0
    for x in samples.batches:
        rates += model(x)[1].double() * x.shape[1]
        events += float(x.sum())
    rates, events = (rates / len(samples.store)).tolist(), events / len(samples.store)
    T, C = samples.batches[0].shape[0], samples.batches[0].shape[2]
    total, arriving, inputs = cost.Operations(), events / T, C
    for N, rate in zip(cfg.hidden, rates, strict=True):
        total += cost.operations(row.work, N, inputs, arriving, rate) * T
        arriving, inputs = rate * N if row.spiking else None, N
    # the readout of the mean, once
    readout = cfg.hidden[-1] * len(trained.class_names)
    total += cost.Operations(macs=readout, bytes=4.0 * readout)
    picojoule = (
        total.macs * constants.mac_pj
        + total.acs * constants.ac_pj
        + total.bytes * constants.byte_pj
    )
    spikes = T * sum(r * N for r, N in zip(rates, cfg.hidden, strict=True)) if row.spiking else 0.0
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(
        cfg.neuron, cfg.hidden, parameters, test, rates, events, spikes, total, picojoule / 1000
    )


def equal_in(reference: Cost, other: Cost) -> list[str]:
    """In what two networks are equal: size, parameters, accuracy."""
    same = []
    if reference.hidden == other.hidden:
        same.append("size")
    if abs(other.parameters / reference.parameters - 1) <= SAME_SIZE:
        same.append("parameters")
    if None not in (reference.test, other.test):
        if abs(reference.test - other.test) <= SAME_ACCURACY:
            same.append("accuracy")
    return same


def comparisons(costs: Sequence[Cost]) -> list[tuple[Cost, list[str], float]]:
    """Every cost with what it has in common with the first, and its energy as share of that's."""
    first = costs[0]
    return [(c, equal_in(first, c), c.energy_nj / first.energy_nj) for c in costs]
