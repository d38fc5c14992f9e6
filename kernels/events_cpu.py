"""A linear layer over a list of events on a CPU, compiled by Numba: rows gathered, rows scattered.

    y[r]           = bias + sum of table[channel[e]] over the events e of row r
    g_table[c]     = sum of g_y[r] over the events of channel c, r being the event's row

Grid. Forward a thread takes blocks of rows; backward ranges of channels, for which it passes over
all events, so that no two threads add to one number. Either sum runs in the order of the list: the
bits are the same on any number of threads, and a row's do not depend on the other rows.

Layout, all contiguous: table, g_table [C, N]; y, g_y [R, N]; channel [E] int32 or int64;
row_start [R + 1] int32 or int64: where each row's events begin. float32 or float64.

Twin: F.linear on the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpn_triton.kernels.cpu import flat, inner, kernel, row, run, take

# rows a thread takes at a time, forward
ROWS = 64


@inner
def _add_four(y, a, b, c, d, n):
    for j in range(n):
        y[j] = (((y[j] + a[j]) + b[j]) + c[j]) + d[j]


@inner
def _add(y, a, n):
    for j in range(n):
        y[j] += a[j]


@inner
def _set(y, a, n):
    for j in range(n):
        y[j] = a[j]


@kernel()
def gather_kernel(counter, table, bias, channel, row_start, y, R, N):
    """y [R, N] from table [C, N] and bias [N]."""
    while True:
        first = take(counter) * ROWS
        if first >= R:
            break
        for r in range(first, min(R, first + ROWS)):
            y_r = row(y, r * N)
            _set(y_r, bias, N)
            e, stop = row_start[r], row_start[r + 1]
            while e + 4 <= stop:
                _add_four(
                    y_r, row(table, channel[e] * N), row(table, channel[e + 1] * N),
                    row(table, channel[e + 2] * N), row(table, channel[e + 3] * N), N,
                )  # fmt: skip
                e += 4
            while e < stop:
                _add(y_r, row(table, channel[e] * N), N)
                e += 1


@kernel()
def scatter_kernel(counter, g_y, channel, row_start, g_table, C, R, N, width):
    """Add g_y [R, N] to g_table [C, N], in ranges of `width` channels."""
    while True:
        first = take(counter) * width
        if first >= C:
            break
        for r in range(R):
            g_r = row(g_y, r * N)
            for e in range(row_start[r], row_start[r + 1]):
                if first <= channel[e] < first + width:
                    _add(row(g_table, channel[e] * N), g_r, N)


def event_gather(table: Tensor, bias: Tensor, channel: Tensor, row_start: Tensor) -> Tensor:
    """Sum rows of a table over the events of each row.

    Args:
        table [C, N], bias [N]: float32 or float64. channel [E], row_start [R + 1]: see above.
    Returns:
        y [R, N] of table's dtype.
    """
    R, N = len(row_start) - 1, table.shape[1]
    y = table.new_empty(R, N)
    run(
        gather_kernel, torch.get_num_threads(), -(-R // ROWS), flat(table, table),
        flat(bias, table), channel.numpy(), row_start.numpy(), flat(y, table), R, N,
    )  # fmt: skip
    return y


def event_scatter(g_y: Tensor, channel: Tensor, row_start: Tensor, channels: int) -> Tensor:
    """The gradient of event_gather's table.

    Args:
        g_y [R, N] float32 or float64. channel, row_start: as event_gather. channels: C.
    Returns:
        g_table [C, N].
    """
    (R, N), threads = g_y.shape, torch.get_num_threads()
    g_table = g_y.new_zeros(channels, N)
    # two ranges a thread, so that one with more events than another holds up nobody
    ranges = 1 if threads == 1 else 2 * threads
    width = -(-channels // ranges)
    run(
        scatter_kernel, threads, ranges, flat(g_y, g_y), channel.numpy(), row_start.numpy(),
        flat(g_table, g_y), channels, R, N, width,
    )  # fmt: skip
    return g_table
