"""A network run step by step, with all that its neurons do in sight, and their gates in reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.neurons.reference import Gates

# what takes the place of a layer's gates: of the layer's number and its gates
Change = Callable[[int, Gates], Gates]


class Seen(NamedTuple):
    """A step of a layer: its output s, the membrane h before the threshold and v after the step,
    each [B, N], and its gates, where it is GPN. Of an LSTM h is the output and v the cell, of GRU
    and RNN both are the output."""

    s: Tensor
    h: Tensor
    v: Tensor
    gates: Gates | None


def replay_layer(
    neuron: nn.Module, x: Tensor, change: Callable[[Gates], Gates] | None = None
) -> Iterator[Seen]:
    """The steps of a layer in evaluation mode, on its current x [T, B, N]."""
    state: Any = None
    for x_t in x:
        gates = None
        if hasattr(neuron, "gates"):
            state = torch.zeros_like(x_t) if state is None else state
            gates = neuron.gates_at(x_t, state)
            gates = gates if change is None else change(gates)
            s, h, state = neuron.step(x_t, state, gates)
        elif hasattr(neuron, "step"):
            s, h, state = neuron.step(x_t, state)
        else:
            _, state = neuron(x_t[None], state)
            # the tensor that the next step reads, so that its gradient is whole
            s = h = state[0] if isinstance(state, tuple) else state
        yield Seen(s.view_as(h), h, state if isinstance(state, Tensor) else state[1], gates)


def replay(
    model: SpikingClassifier,
    x: Tensor,
    see: Callable[[int, int, Seen], None] | None = None,
    change: Change | None = None,
) -> Tensor:
    """A network's logits, in evaluation mode.

    Args:
        x [T, B, C]: counts. see: called with each step's layer, number and what is seen of it.
        change: see Change; None: the gates stay.
    Returns:
        logits [B, classes].
    """
    for k, (linear, neuron) in enumerate(zip(model.inputs, model.neurons, strict=True)):
        of_layer = None if change is None else (lambda gates, k=k: change(k, gates))
        spikes = []
        for t, seen in enumerate(replay_layer(neuron, linear(x), of_layer)):
            if see is not None:
                see(k, t, seen)
            spikes.append(seen.s.flatten(0, -2))
        x = torch.stack(spikes)
    if model.readout == "membrane":
        return model.output(torch.cat([x.mean(0), seen.v.flatten(0, -2)], -1))
    return model.output(x.mean(0) if model.readout == "mean" else x[-1])
