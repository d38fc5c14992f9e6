"""A linear layer of which each row, a step of a sequence, has the same bits whatever is beside it.

It is for float64 on a CPU, where results are compared bit for bit: a sequence in a padded batch and
that sequence alone. Anywhere else F.linear computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(x, weight, bias), in float64 on a CPU row by row; differentiable as that is.

    Args:
        x [..., C], weight [N, C], bias [N]: float, of one dtype.
    Returns:
        y [..., N] of that dtype.
    """
    transformed = torch._C._are_functorch_transforms_active()
    if x.dtype != torch.float64 or x.device.type != "cpu" or transformed:
        return F.linear(x, weight, bias)
    # forward mode has no rule here, and a compiled program computes with the library's product
    if torch.autograd.forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _RowLinear.apply(x, weight, bias)


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        from gpn_triton.kernels.linear_cpu import linear_forward

        ctx.save_for_backward(x, weight)
        return linear_forward(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g_y):
        x, weight = ctx.saved_tensors
        rows = g_y.reshape(-1, g_y.shape[-1])
        return g_y @ weight, rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)
