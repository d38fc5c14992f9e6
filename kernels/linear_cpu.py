"""A linear layer on a CPU whose rows do not know of each other, compiled by Numba.

    y[r] = bias + sum over k of x[r, k] weight[:, k], added in the order of k

A library's product may round a row otherwise beside other rows, or by its place among them. Here
every product is cpu.product: a row's bits are the same alone, in a batch, and on any number of
threads.

Grid. A thread takes TILE rows at a time. Layout, all contiguous: x [R, C]; weight [N, C], packed in
panels; bias [N]; y [R, N]. float32 or float64.

Twin: F.linear.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpn_triton.kernels import pointwise_cpu
from gpn_triton.kernels.cpu import PANEL, flat, kernel, multiply, pack, row, run, take
from gpn_triton.kernels.pointwise_cpu import copy, start_z

# rows for which a panel of the weight is read once, as many as a block of gpn_cpu's; a multiple of
# cpu.ROWS
TILE = 64


@kernel(pointwise_cpu.__file__)
def linear_kernel(counter, x, weight, bias, y, R, C, N):
    """Rows of y, for the tiles this thread takes."""
    panels = -(-N // PANEL)
    width = panels * PANEL
    z = np.empty(TILE * width, x.dtype)
    # as variables: a function is compiled again for a literal
    zero, one = np.int64(0), np.int64(1)
    while True:
        first = take(counter) * TILE
        if first >= R:
            break
        rows = TILE if first + TILE < R else R - first
        for r in range(TILE):
            start_z(row(z, r * width), bias, N, width, one)
        multiply(
            z, width, zero, row(x, first * C), C, zero, one, rows, weight, zero, panels, C
        )  # fmt: skip
        for r in range(rows):
            copy(row(z, r * width), row(y, (first + r) * N), N)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [R, C], weight [N, C] and bias [N], of one dtype -> y [R, N]."""
    (R, C), N = x.shape, len(weight)
    y = x.new_empty(R, N)
    run(
        linear_kernel, torch.get_num_threads(), -(-R // TILE), flat(x, x), pack(weight, 1, x),
        flat(bias, x), flat(y, x), R, C, N,
    )  # fmt: skip
    return y
