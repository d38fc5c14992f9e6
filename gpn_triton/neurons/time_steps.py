"""A trained network at another time step: what learned on coarse bins goes on at fine ones.

Where bins are `ratio` times as long, a neuron that had the decay f a step has f^ratio. What drives
it is multiplied so that it comes to rest where it did and takes as long to get there:

    f' = f^ratio        i' = i k        b' = b k        k = (1 - f') / (1 - f)

Events, counts of a bin as well as spikes, come as often in a second as before, so ratio times as
often in a bin: the products that they enter are divided by ratio. Thresholds stay.

A gate is a function of the current and of the membrane. It is exact where both are 0, at its bias,
and its weights are multiplied so that its derivative there is right, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.neurons.layers import GPN, Gate
from gpn_triton.neurons.networks import SpikingClassifier

# an input gate and a bypass cannot reach 1, which a longer bin may ask of them
_MOST = 1 - 1e-4


@torch.no_grad()
def change_time_step(model: SpikingClassifier, ratio: float) -> None:
    """Have a network of GPN neurons compute on bins `ratio` times as long as those it had.

    Args:
        model: changed in place. ratio: the new bins' length over the old ones', above 0; below 1
            is finer.
    Raises:
        ValueError: a neuron without a learned forget gate, whose decay cannot be changed.
    """
    if not ratio > 0:
        raise ValueError(f"ratio: expected more than 0, got {ratio}")
    for neuron in model.neurons:
        if not isinstance(neuron, GPN) or "f" not in neuron.gates():
            raise ValueError(
                "neuron: expected GPN with a forget gate, whose time step can be changed, got "
                f"{model.neuron}"
            )
    for linear, neuron in zip(model.inputs, model.neurons, strict=True):
        linear.scale_events(ratio)
        _change_gates(neuron, ratio)
    if model.readout != "last":
        # the mean's columns come first; a membrane comes to rest where it did
        model.output.weight[:, : model.hidden[-1]].div_(ratio)


def _change_gates(layer: GPN, ratio: float) -> None:
    """Give a layer its gates at bins `ratio` times as long."""
    gates = layer.gates()
    # by logarithms, since decays are near 1
    log_f = F.logsigmoid(gates["f"].bias.double())
    drive = torch.expm1(ratio * log_f) / torch.expm1(log_f)
    _replace(gates["f"], ratio * log_f - torch.log(-torch.expm1(ratio * log_f)), ratio / drive)
    if "i" in gates:
        old = gates["i"].bias.double().sigmoid()
        new = (old * drive).clamp(max=_MOST)
        _replace(gates["i"], torch.logit(new), (1 - old) / (1 - new))
    if "b" in gates:
        old = gates["b"].bias.double().tanh()
        new = (old * drive).clamp(-_MOST, _MOST)
        _replace(gates["b"], torch.atanh(new), drive * (1 - old.square()) / (1 - new.square()))


def _replace(gate: Gate, bias: Tensor, slope: Tensor) -> None:
    """Give a gate another bias, and weights `slope` times as large; both [N] float64."""
    gate.bias.copy_(bias)
    for weight in (gate.weight_x, gate.weight_v):
        weight.mul_(slope.to(weight.dtype)[:, None])
