"""What a trained network answers: to a set of samples, and to one of them bin by bin."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gpn_triton.analysis.distributions import Trace, trace
from gpn_triton.analysis.subject import Samples
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier
from gpn_triton.training.objective import NEAR
from gpn_triton.training.run_folder import TrainedRun


@dataclass(frozen=True)
class Answers:
    """A network's answers to a set of samples, in float64 throughout, as predict gives them.

    trained: the run. model: its network in float64. samples: the set. logits [S, classes]; of a
    number to learn [S, 1]. labels [S].
    """

    trained: TrainedRun
    model: SpikingClassifier
    samples: Samples
    logits: Tensor
    labels: Tensor

    @property
    def learns_number(self) -> bool:
        """Whether the labels are numbers to come near to, not classes."""
        return self.labels.is_floating_point()

    @property
    def said(self) -> Tensor:
        """The likeliest class of each sample [S] int64, or its number [S] float64."""
        return self.logits[:, 0] if self.learns_number else self.logits.argmax(1)

    @property
    def right(self) -> Tensor:
        """Which answers are right, or near enough [S] bool."""
        if self.learns_number:
            return (self.said - self.labels).abs() <= NEAR
        return self.said == self.labels

    def confusion(self) -> Tensor:
        """How many samples of each class were taken for each [classes, classes] int64: a row what
        they are, a column what was said."""
        classes = self.logits.shape[1]
        cells = self.labels * classes + self.said
        return cells.bincount(minlength=classes * classes).view(classes, classes)

    def surest(self) -> list[int]:
        """The numbers of the surest right and the surest wrong answer, as far as there are such;
        of a number to learn the nearest and the farthest."""
        if self.learns_number:
            error = (self.said - self.labels).abs()
            return list(dict.fromkeys([int(error.argmin()), int(error.argmax())]))
        sure = self.logits.softmax(1).amax(1)
        return [
            int(sure.where(group, -1.0).argmax())
            for group in (self.right, ~self.right) if group.any()
        ]  # fmt: skip


@torch.no_grad()
def answers(trained: TrainedRun, samples: Samples) -> Answers:
    """A run's answers to some samples."""
    model = copy.deepcopy(trained.model).double()
    logits = torch.cat([model(x.double())[0] for x in samples.batches])
    return Answers(trained, model, samples, logits, torch.cat(samples.labels))


@dataclass(frozen=True)
class View:
    """One sample on its way through a network.

    number: among the samples. inputs [T, C]: what the network saw. label: what it is, a class or a
    number. said [T, classes]: after each bin the probability of every class, or the number [T, 1].
    layers: what every hidden layer did.
    """

    number: int
    inputs: Tensor
    label: int | float
    said: Tensor
    layers: list[Trace]


@torch.no_grad()
def view(found: Answers, number: int) -> View:
    """What a network does with one of the samples, bin by bin.

    Raises:
        ValueError: no such sample, or a network that sees all bins at once.
    """
    model, x = found.model, found.samples.sample(number).double()
    if NEURONS[model.neuron].needs_time_bins:
        raise ValueError(f"run: a {model.neuron} sees all bins at once: it does nothing bin by bin")
    state, said = None, []
    for bin in x.split(1):
        logits, state = model.stream(bin, state)
        said.append(logits if found.learns_number else logits.softmax(1))
    label = found.labels[number].item()
    return View(number, x[:, 0], label, torch.cat(said), trace(model, x))
