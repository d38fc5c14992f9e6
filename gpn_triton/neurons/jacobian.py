"""The Jacobian of a layer's step, whose products over time are what gradients are made of.

Eigenvalues far inside the unit circle forget, those far outside explode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.reference import gpn_loop


def step_jacobian(layer: GPN, x: Tensor, v: Tensor) -> Tensor:
    """dv[t+1] / dv[t] of a layer in evaluation, the reset not differentiated.

    Args:
        layer: the layer. x [B, N]: the current of a step. v [B, N]: the membrane before it.
    Returns:
        [B, N, N]: of each sample, a row for each neuron of v[t+1].
    """
    parameters = [
        p if p is None else p.detach().to(v.dtype)
        for p in (layer.weight_x, layer.weight_v, layer.bias)
    ]
    reset = torch.zeros_like(v[:1])

    def step(v_row: Tensor, x_row: Tensor) -> Tensor:
        return gpn_loop(x_row[None, None], *parameters, reset, v_row[None], layer.variant)[1][0]

    return torch.func.vmap(torch.func.jacrev(step))(v, x)


def trajectory(layer: GPN, x: Tensor) -> Tensor:
    """The membrane before every step [T, B, N] that a current x [T, B, N] leads to, from 0."""
    v, states = torch.zeros_like(x[0]), []
    for current in x.split(1):
        states.append(v)
        v = layer(current, v)[1]
    return torch.stack(states)
