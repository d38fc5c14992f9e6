"""What it costs to hold a trained GPN's gates fixed: over time, over neurons, over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpn_triton.analysis.distributions import Spreads, spread
from gpn_triton.analysis.replay import Change, replay
from gpn_triton.analysis.subject import Samples
from gpn_triton.analysis.tasks import TASKS, parse_task, task_events
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.neurons.reference import Gates

FREEZINGS = ("time", "neurons", "both")
TRAINING, TEST = "train.h5", "test.h5"


@dataclass(frozen=True)
class Loss:
    """One network's test accuracy, %: as it is, and what each freezing takes away, in points."""

    task: str
    seed: int
    accuracy: float
    lost: dict[str, float]


def frozen(how: str, spreads: Spreads) -> Change:
    """Gates held at their mean.

    Args:
        how: time: each neuron's own mean over samples and time, so that neurons differ and nothing
            changes; neurons: the mean over the layer's neurons at every step of a sample, so that
            all are alike and change together; both: one number a gate and layer.
        spreads: of the training data, where the means over time come from.
    """

    def change(layer: int, gates: Gates) -> Gates:
        held = {}
        for name, of in spreads[layer].items():
            gate = getattr(gates, name)
            if how == "neurons":
                held[name] = gate.mean(-1, keepdim=True).expand_as(gate)
            else:
                mean = of.neuron_means if how == "time" else of.neuron_means.mean()
                held[name] = mean.to(gate.dtype).expand_as(gate)
        return gates._replace(**held)

    return change


@torch.no_grad()
def losses(
    model: SpikingClassifier, training: Samples, test: Samples, task: str, seed: int
) -> Loss:
    """What every freezing takes from a trained network's accuracy on test samples."""
    spreads = spread(model, training.batches)

    def accuracy(change: Change | None) -> float:
        logits = [replay(model, x, change=change) for x in test.batches]
        return 100 * test.accuracy(logits)

    own = accuracy(None)
    lost = {how: own - accuracy(frozen(how, spreads)) for how in FREEZINGS}
    return Loss(task, seed, own, lost)


def task_files(name: str, out: Path, samples: int) -> dict[str, str]:
    """The training options that name a task's data; a task of TASKS is made in a folder.

    Args:
        name: one of TASKS, or a file in SHD's layout. out: the folder. samples: for training; the
            test gets half as many.
    """
    if name not in TASKS:
        return {"train_file": name}
    files = out / TRAINING, out / TEST
    out.mkdir(parents=True, exist_ok=True)
    for seed, (path, count) in enumerate(zip(files, (samples, samples // 2), strict=True)):
        if not path.exists():
            write_events(path, task_events(name, count, seed))
    return {"train_file": str(files[0]), "test_file": str(files[1])}


def series_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The tasks by series, each in the order of its complexity; files are a series, as given."""
    found: dict[str, list[str]] = {}
    for name in names:
        parsed = parse_task(name)
        found.setdefault(parsed[0] if parsed else "files", []).append(name)
    for series, tasks in found.items():
        if series != "files":
            tasks.sort(key=lambda name: parse_task(name)[1])
    return found
