"""What training makes small, and the one list of metrics: summed, logged, resumed, plotted."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# a neuron that spikes in so many of the steps is called saturated
SATURATED = 0.95
# a number is learned where the network says it within this; Hochreiter and Schmidhuber, 1997
NEAR = 0.04
# the metrics that are lists, a number a layer
BY_LAYER = ("activity", "dead", "saturated", "gradient_norm")


@dataclass(frozen=True)
class Means:
    """A set's metrics, over its samples.

    loss: cross-entropy; of a number to learn the squared error. accuracy: share of right answers,
    0..1; of a number of those within NEAR. activity: each hidden layer's mean output, spikes a
    neuron and step for spiking neurons. dead, saturated: each hidden layer's share of neurons that
    never spike, and of those that spike in SATURATED of the steps or more.
    """

    loss: float
    accuracy: float
    activity: list[float]
    dead: list[float]
    saturated: list[float]


@dataclass(frozen=True)
class Epoch:
    """An epoch's metrics: a line of metrics.jsonl has these names in this order.

    The trackers log every one of them, a resumed run reads them back, and the curves are drawn from
    them. One that is added later needs a default, or else older runs cannot be taken up.

    epoch: counted from 1. train_*, valid_*, and activity, dead, saturated (of the training): as
    Means. lr: the last step's. seconds: spent in training steps. skipped_steps: left out since the
    run began. gradient_norm: of each layer's parameters and of the readout's, before clipping, the
    mean over steps; it and dead and saturated are empty in older runs.

    Raises:
        ValueError: a value that is no number. TypeError: what is a number a layer is no list.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    activity: list[float]
    lr: float
    seconds: float
    samples_per_second: float
    skipped_steps: int
    dead: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)

    def __post_init__(self):
        for name, value in self.numbers():
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number, got {value!r}")

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Every number by name; the layers' as activity/1, activity/2 and so on."""
        for name, value in self.to_dict().items():
            if name in BY_LAYER:
                yield from ((f"{name}/{k}", v) for k, v in enumerate(value, 1))
            else:
                yield name, value

    def fits(self, layers: int) -> bool:
        """Whether the line is of a network of so many hidden layers."""
        shares = {len(self.dead), len(self.saturated)}
        return (
            len(self.activity) == layers
            and shares <= {0, layers}
            and len(self.gradient_norm) in (0, layers + 1)
        )

    def to_dict(self) -> dict[str, Any]:
        """The line's JSON values."""
        return dataclasses.asdict(self)


def blank_totals(neurons: int, device: torch.device) -> Tensor:
    """Running totals of no samples [3 + neurons] float64: of loss, right answers, ones, activity.

    Args:
        neurons: of all hidden layers.
    """
    return torch.zeros(3 + neurons, dtype=torch.float64, device=device)


def loss_and_totals(
    logits: Tensor, labels: Tensor, activity: Tensor, weight: int
) -> tuple[Tensor, Tensor]:
    """The loss of some samples, and what they add to the running totals.

    Args:
        logits [B, classes]. labels [B] int64; or float32, a number to learn, with 1 logit.
        activity [neurons]: each neuron's mean over them.
        weight: 1; or 0 for samples that only stand in.
    Returns:
        the cross-entropy's sum over samples; the addition [3 + neurons], in blank_totals' order.
    """
    logits = logits.float()
    if labels.is_floating_point():
        error = logits.squeeze(1) - labels
        loss, correct = error.square().sum(), error.abs() <= NEAR
    else:
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = logits.argmax(1) == labels
    correct = correct.sum(dtype=loss.dtype)
    ones = activity.new_full((1,), len(labels))
    totals = torch.cat([loss.detach()[None], correct[None], ones, activity * len(labels)])
    return (loss, totals) if weight else (loss * 0, totals * 0)


def means(totals: Tensor, hidden: Sequence[int]) -> Means:
    """Running totals divided by their samples; waits for the device.

    Args:
        totals [3 + neurons]. hidden: neurons of each hidden layer.
    """
    totals = totals.cpu()
    n = max(float(totals[2]), 1.0)
    layers = (totals[3:] / n).split(list(hidden))
    return Means(
        float(totals[0]) / n,
        float(totals[1]) / n,
        [float(rates.mean()) for rates in layers],
        [float((rates == 0).double().mean()) for rates in layers],
        [float((rates >= SATURATED).double().mean()) for rates in layers],
    )
