"""A linear layer over binned events: weight rows are gathered and added, no zeros multiplied.

    y[t, b]        = bias + sum of weight[:, c] over the events of time bin t and sample b
    g_weight[:, c] = sum of g_y[t, b] over the events of channel c

For a CPU (kernels/events_cpu.py). Each sum is taken in the list's order: no dense counts exist, and
results do not change from run to run. They equal those of F.linear on the counts but for the order
of float sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.machine.device import autocast_dtype
from gpn_triton.neurons.derivatives import beyond_operators


@dataclass(frozen=True)
class Cells:
    """Binned events of a batch, one entry an event, sorted by time bin and sample.

    shape: (T, B, C) of the counts. channel [E] int: input channel of each event. row_start
    [T B + 1] int: where the events of bin t and sample b begin, at t B + b.
    """

    shape: tuple[int, int, int]
    channel: Tensor
    row_start: Tensor

    @classmethod
    def from_cells(cls, cell: Tensor, shape: tuple[int, int, int]) -> Cells:
        """Sort events by their place in the counts.

        Args:
            cell [E] int64: place of each event in counts.flatten(), in any order. shape: (T, B, C).
        """
        T, B, C = shape
        cell = cell.sort().values
        row = cell // C
        return cls(shape, cell - row * C, torch.searchsorted(row, torch.arange(T * B + 1)))

    def sums(self) -> Tensor:
        """Each channel's counts, summed over bins and samples [C] float64."""
        ones = torch.ones_like(self.channel, dtype=torch.float64)
        return ones.new_zeros(self.shape[2]).index_add_(0, self.channel, ones)

    def dense(self) -> Tensor:
        """The counts [T, B, C] float32."""
        T, B, C = self.shape
        row = torch.arange(T * B).repeat_interleave(self.row_start.diff())
        counts = torch.zeros(T * B * C)
        # sums of ones are exact in whatever order
        return counts.index_add_(0, row * C + self.channel, torch.ones(len(row))).view(T, B, C)


def event_linear(cells: Cells, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(cells.dense(), weight, bias), differentiable in weight and bias.

    In forward mode and under torch.func it is that very product.
    Sums are in weight's dtype, whatever autocast says; the result has autocast's dtype.

    Args:
        cells: T bins, B samples, C channels. weight [N, C] float, bias [N] float.
    Returns:
        y [T, B, N] of weight's dtype, or autocast's.
    Raises:
        ValueError: weight or bias of another shape.
    """
    T, B, C = cells.shape
    if weight.ndim != 2 or weight.shape[1] != C or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight: expected [N, {C}] and bias [N], got {list(weight.shape)} {list(bias.shape)}"
        )
    if beyond_operators(weight, bias):
        return F.linear(cells.dense().to(weight.dtype), weight, bias)
    y = _EventLinear.apply(cells, weight, bias).view(T, B, len(weight))
    autocast = autocast_dtype(y)
    return y if autocast is None else y.to(autocast)


@torch.library.custom_op("gpn_triton::event_gather", mutates_args=())
def _gather(table: Tensor, bias: Tensor, channel: Tensor, row_start: Tensor) -> Tensor:
    from gpn_triton.kernels import events_cpu

    return events_cpu.event_gather(table, bias, channel, row_start)


@_gather.register_fake
def _(table, bias, channel, row_start):
    return table.new_empty(row_start.shape[0] - 1, table.shape[1])


@torch.library.custom_op("gpn_triton::event_scatter", mutates_args=())
def _scatter(g_y: Tensor, channel: Tensor, row_start: Tensor, channels: int) -> Tensor:
    from gpn_triton.kernels import events_cpu

    return events_cpu.event_scatter(g_y, channel, row_start, channels)


@_scatter.register_fake
def _(g_y, channel, row_start, channels):
    return g_y.new_empty(channels, g_y.shape[1])


class _EventLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cells, weight, bias):
        return _gather(weight.t().contiguous(), bias, cells.channel, cells.row_start)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cells = inputs[0]

    @staticmethod
    def backward(ctx, g_y):
        return None, *_EventLinearBackward.apply(ctx.cells, g_y)


class _EventLinearBackward(torch.autograd.Function):
    """Its adjoint, of which it is the adjoint in turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cells, g_y):
        g_table = _scatter(g_y.contiguous(), cells.channel, cells.row_start, cells.shape[2])
        return g_table.t(), g_y.sum(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cells = inputs[0]

    @staticmethod
    def backward(ctx, g_g_weight, g_g_bias):
        return None, _EventLinear.apply(ctx.cells, g_g_weight, g_g_bias)
