"""What training makes small, and the one list of metrics: summed, logged, resumed, plotted."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# a number is learned where the network says it within this; Hochreiter and Schmidhuber, 1997
NEAR = 0.04


@dataclass(frozen=True)
class Means:
    """A set's metrics, over its samples.

    loss: cross-entropy; of a number to learn the squared error. accuracy: share of right answers,
    0..1; of a number of those within NEAR. activity: each hidden layer's mean
    output, spikes a neuron and step for spiking neurons.
    """

    loss: float
    accuracy: float
    activity: list[float]


@dataclass(frozen=True)
class Epoch:
    """An epoch's metrics: a line of metrics.jsonl has these names in this order.

    The trackers log every one of them, a resumed run reads them back, and the curves are drawn from
    them. One that is added later needs a default, or else older runs cannot be taken up.

    epoch: counted from 1. train_*, valid_*, activity (of the training): as Means. lr: the last
    step's. seconds: spent in training steps. skipped_steps: left out since the run began.

    Raises:
        ValueError: a value that is no number. TypeError: activity is no list.
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

    def __post_init__(self):
        for name, value in self.numbers():
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name}: expected a number, got {value!r}")

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Every number by name; the layers' activity as activity/1, activity/2 and so on."""
        for name, value in self.to_dict().items():
            if name == "activity":
                yield from ((f"activity/{k}", v) for k, v in enumerate(value, 1))
            else:
                yield name, value

    def to_dict(self) -> dict[str, Any]:
        """The line's JSON values."""
        return dataclasses.asdict(self)


def blank_totals(layers: int, device: torch.device) -> Tensor:
    """Running totals of no samples [3 + layers] float64: of loss, right answers, ones, activity."""
    return torch.zeros(3 + layers, dtype=torch.float64, device=device)


def loss_and_totals(
    logits: Tensor, labels: Tensor, activity: Tensor, weight: int
) -> tuple[Tensor, Tensor]:
    """The loss of some samples, and what they add to the running totals.

    Args:
        logits [B, classes]. labels [B] int64; or float32, a number to learn, with 1 logit.
        activity [layers]: each layer's mean over them.
        weight: 1; or 0 for samples that only stand in.
    Returns:
        the cross-entropy's sum over samples; the addition [3 + layers], in blank_totals' order.
    """
    if labels.is_floating_point():
        error = logits.float().squeeze(1) - labels
        loss, correct = error.square().sum(), error.abs() <= NEAR
    else:
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        correct = logits.argmax(1) == labels
    loss, correct = loss * weight, correct.sum() * weight
    samples = weight * len(labels)
    totals = torch.stack([loss.detach(), correct, torch.full_like(correct, samples)])
    return loss, torch.cat([totals, activity * samples])


def means(totals: Tensor) -> Means:
    """Running totals divided by their samples; waits for the device."""
    loss, correct, n, *activity = totals.tolist()
    n = max(n, 1.0)
    return Means(loss / n, correct / n, [a / n for a in activity])
