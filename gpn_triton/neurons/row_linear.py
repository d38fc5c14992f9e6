"""A linear layer of which each row, a step of a sequence, has the same bits whatever is beside it.

It is for float64 on a CPU, where results are compared bit for bit: a sequence in a padded batch and
that sequence alone. Anywhere else F.linear computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def row_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(x, weight, bias), in float64 on a CPU row by row; differentiable as that is, but
    that in forward mode and under torch.func it is F.linear itself.

    Args:
        x [..., C], weight [N, C], bias [N]: float, of one dtype.
    Returns:
        y [..., N] of that dtype.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if x.dtype != torch.float64 or x.device.type != "cpu" or transformed:
        return F.linear(x, weight, bias)
    return _row_linear(x, weight, bias)


@torch.library.custom_op("gpn_triton::row_linear", mutates_args=())
def _row_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from gpn_triton.kernels.linear_cpu import linear_forward

    return linear_forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


@_row_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, g_y):
    x, weight = ctx.saved_tensors
    rows = g_y.reshape(-1, g_y.shape[-1])
    return g_y @ weight, rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)


_row_linear.register_autograd(_backward, setup_context=_setup_context)
