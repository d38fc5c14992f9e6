"""Surrogate gradients: a smooth step and its derivative for each name, in place of Heaviside's.

Every pair is a distribution function and its density in u = h - theta: value(-inf) = 0,
value(0) = 1/2, value(inf) = 1. `alpha` sets the width. A kernel holds the same derivatives
(kernels/pointwise.py); nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpn_triton.neurons.derivatives import beyond_operators


class Surrogate(NamedTuple):
    """value(u, alpha) and derivative(u, alpha), both elementwise on a tensor u of any shape."""

    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _sigmoid_derivative(u: Tensor, alpha: float) -> Tensor:
    p = torch.sigmoid(alpha * u)
    return alpha * p * (1 - p)


def _triangle_value(u: Tensor, alpha: float) -> Tensor:
    w = (alpha / 2 * u).clamp(-1, 1)
    return 0.5 + w - 0.5 * w * w.abs()


# atan is the paper's (alpha = 2); fast-sigmoid is SuperSpike's (Zenke and Ganguli 2018)
SURROGATES: dict[str, Surrogate] = {
    "atan": Surrogate(
        lambda u, alpha: torch.atan(math.pi / 2 * alpha * u) / math.pi + 0.5,
        lambda u, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2),
    ),
    "sigmoid": Surrogate(lambda u, alpha: torch.sigmoid(alpha * u), _sigmoid_derivative),
    "fast-sigmoid": Surrogate(
        lambda u, alpha: 0.5 + 0.5 * alpha * u / (1 + alpha * u.abs()),
        lambda u, alpha: alpha / 2 / (1 + alpha * u.abs()) ** 2,
    ),
    "triangle": Surrogate(
        _triangle_value, lambda u, alpha: alpha / 2 * (1 - (alpha / 2 * u).abs()).clamp(min=0)
    ),
}


class _Spike(torch.autograd.Function):
    """Heaviside forward with Heaviside(0) = 1, the named derivative backward."""

    @staticmethod
    def forward(ctx, u: Tensor, name: str, alpha: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.name, ctx.alpha = name, alpha
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        (u,) = ctx.saved_tensors
        return g * SURROGATES[ctx.name].derivative(u, ctx.alpha), None, None


def spike(u: Tensor, surrogate: str = "atan", alpha: float = 2.0) -> Tensor:
    """Emit 1 where u >= 0, else 0, with a surrogate gradient.

    Args:
        u [...] float: membrane minus threshold.
        surrogate: a key of SURROGATES.
        alpha: width of the surrogate; larger is narrower.
    Returns:
        [...] of u's dtype: spikes, 0 or 1.
    """
    if beyond_operators(u):
        # the step's value, and the smooth step's derivatives in every mode and order
        smooth = SURROGATES[surrogate].value(u, alpha)
        return (u >= 0).to(u.dtype) + (smooth - smooth.detach())
    return _Spike.apply(u, surrogate, alpha)
