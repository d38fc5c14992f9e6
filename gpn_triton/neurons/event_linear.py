"""A linear layer over binned events: weight rows are gathered and added, no zeros multiplied.

    y[t, b]        = bias + sum of weight[:, c] over the events of time bin t and sample b
    g_weight[:, c] = sum of g_y[t, b] over the events of channel c

Both are sums of table rows over segments of a sorted list (torch's embedding_bag), each sum taken
in the list's order: no dense counts exist, and results do not change from run to run. They equal
those of F.linear on the counts but for the order of float sums.
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
    """Binned events of a batch, one entry an event, sorted by time bin, sample and channel.

    shape: (T, B, C) of the counts. channel [E], row [E] int: input channel and t B + b of each
    event. row_start [T B + 1] int: where each row's events begin in channel.
    """

    shape: tuple[int, int, int]
    channel: Tensor
    row: Tensor
    row_start: Tensor

    @classmethod
    def from_cells(cls, cell: Tensor, shape: tuple[int, int, int]) -> Cells:
        """Sort events by their place in the counts.

        Args:
            cell [E] int64: place of each event in counts.flatten(), in any order. shape: (T, B, C).
        """
        T, B, C = shape
        short = torch.int32 if T * B * C < 1 << 31 else torch.int64
        cell = cell.to(short).sort().values
        row = cell // C
        return cls(shape, cell - row * C, row, _starts(row, T * B))

    def sums(self) -> Tensor:
        """Each channel's counts, summed over bins and samples [C] float64."""
        ones = torch.ones_like(self.channel, dtype=torch.float64)
        return ones.new_zeros(self.shape[2]).index_add_(0, self.channel, ones)

    def dense(self) -> Tensor:
        """The counts [T, B, C] float32."""
        T, B, C = self.shape
        cell = self.row.long() * C + self.channel
        counts = torch.zeros(T * B * C, device=cell.device)
        # sums of ones are exact in whatever order
        return counts.index_add_(0, cell, torch.ones_like(cell, dtype=counts.dtype)).view(T, B, C)


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


class _EventLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cells, weight, bias):
        return _sum_rows(weight.t().contiguous(), cells.channel, cells.row_start).add_(bias)

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
        channel, order = cells.channel.sort(stable=True)
        row = cells.row.index_select(0, order)
        g_weight = _sum_rows(g_y.contiguous(), row, _starts(channel, cells.shape[2]))
        return g_weight.t(), g_y.sum(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cells = inputs[0]

    @staticmethod
    def backward(ctx, g_g_weight, g_g_bias):
        return None, _EventLinear.apply(ctx.cells, g_g_weight, g_g_bias)


def _sum_rows(table: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """out[s] = sum of table[index[e]] for start[s] <= e < start[s + 1]: [S, N]."""
    return F.embedding_bag(index, table, start, mode="sum", include_last_offset=True)


def _starts(group: Tensor, groups: int) -> Tensor:
    """start [groups + 1]: where each group begins in a sorted list of group numbers."""
    numbers = torch.arange(groups + 1, dtype=group.dtype, device=group.device)
    return torch.searchsorted(group, numbers, out_int32=group.dtype == torch.int32)
