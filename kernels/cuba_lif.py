"""Recurrent current-based LIF, forward and backward, in the two forms of GPN's kernels.

    j[t+1] = current_decay j[t] + x[t] + weight s[t-1] + bias
    h[t]   = membrane_decay v[t] + (1 - membrane_decay) j[t+1]
    s[t]   = 1 if h[t] >= 1 else 0                        (Heaviside(0) = 1; s is not differentiated
    v[t+1] = (1 - s[t]) h[t]                               in the reset)

and with g_v[t] = dL/dv[t], g_j alike, given for t = T, sg = surrogate'(h - 1), from T - 1 to 0:

    g_h    = g_v[t+1] (1 - s[t]) + (g_s[t] + weight^T g_x[t+1]) sg
    g_x[t] = (1 - membrane_decay) g_h + g_j[t+1]
    g_j[t] = current_decay g_x[t]                         g_v[t] = membrane_decay g_h
    g_weight = sum g_x[t] s[t-1]^T                        g_bias = sum g_x[t]

and weight^T g_x[0] is the gradient of the spikes before the first step.

Grid, as GPN's. persistent: (row tiles, 1); a program owns BLOCK_B rows and all N neurons, runs the
time loop, and weight stays in shared memory. stepwise: (row tiles, neuron tiles) for one step; a
program loops over the depth N of its product. The launch of step t backward first takes the product
of step t + 1's g_x, so that a last one closes the first step. Backward goes by chunks of time, each
followed by its part of the weight's and the bias's gradients.

Layout, all contiguous. x, spikes, h, g_s, g_x [T, B, N] of x's dtype; weight [N, N] in the dtype of
the operands: for half x float16 forward and bfloat16 backward (range matters for gradients), else
float32; bias [N] and states [B, N] float32; bits [ceil(T / 32), B, N] int32. A chunk's g_x [steps,
B, N] has the dtype of the backward operands. States and sums are float32, in one fixed order.

Forward reads x and writes spikes and, with SAVE, for backward h and the packed spikes. Backward
reads h and g_s, finds s[t] in h[t] (operands.store_fired), and unpacks the bits for g_weight.

Source: arXiv 2412.01087. Twin: reference.cuba_lif_loop and autograd's backward of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels import tiles
from gpn_triton.kernels.operands import (
    TL_DTYPES,
    add_spikes,
    cast,
    float32_product,
    own_tile,
    pack_spikes,
    resize,
    resize_weights,
    store_fired,
    tile_constants,
    to_operand,
)
from gpn_triton.kernels.pointwise import charge, charge_gradient, fire
from gpn_triton.kernels.spikes import spikes_unpack


@triton.jit(do_not_specialize=["T", "B"])
def cuba_lif_forward_persistent_kernel(
    x_ptr, weight_ptr, bias_ptr, current_in_ptr, v_in_ptr, last_ptr,
    current_ptr, v_ptr, spikes_ptr, h_ptr, bits_ptr, T, B, current_decay, membrane_decay,
    N: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps. last [B, N] of x's dtype: the spikes before the first."""
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    k = tl.arange(0, BLOCK_N)[:, None]
    # the transpose: entry [k, n] is row n, column k
    weight = tl.load(weight_ptr + n * N + k, mask=(k < N) & (n < N), other=0.0)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    current = tl.load(current_in_ptr + first * N + offs, mask=mask, other=0.0)
    v = tl.load(v_in_ptr + first * N + offs, mask=mask, other=0.0)
    last = tl.load(last_ptr + first * N + offs, mask=mask, other=0.0).to(tl.float32).to(OPERAND)
    word = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
    rows_per_step = B.to(tl.int64)
    for t in tl.range(0, T, num_stages=STAGES):
        at = (t * rows_per_step + first) * N
        x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        recurrent = tl.dot(last, weight, input_precision=PRECISION) + bias
        current, h = charge(current, v, x, recurrent, current_decay, membrane_decay)
        s, v = fire(h)
        last = s.to(OPERAND)
        store_fired(spikes_ptr + at, h_ptr + at, offs, s, h, mask, SAVE)
        if SAVE:
            word = pack_spikes(bits_ptr, word, s, t, T, rows_per_step, first, offs, mask, N)
    tl.store(current_ptr + first * N + offs, current, mask=mask)
    tl.store(v_ptr + first * N + offs, v, mask=mask)


@triton.jit
def _product(
    a_ptr, weight_ptr, rows, n, row_mask, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows a [BLOCK_B, N] at a_ptr times weight or its transpose: columns n of the result."""
    total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for k0 in tl.range(0, N, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows * N + k[None, :], mask=row_mask & (k[None, :] < N), other=0.0)
        w_offs = n * N + k[:, None] if TRANSPOSED else k[:, None] * N + n
        w = tl.load(weight_ptr + w_offs, mask=(k[:, None] < N) & (n < N), other=0.0)
        if a.dtype != OPERAND:
            a = a.to(tl.float32).to(OPERAND)
        total = tl.dot(a, w, acc=total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["t", "last_row", "B"])
def cuba_lif_forward_stepwise_kernel(
    x_ptr, weight_ptr, bias_ptr, current_in_ptr, v_in_ptr, last_ptr,
    current_ptr, v_ptr, spikes_ptr, h_ptr, bits_ptr, t, last_row, B, current_decay, membrane_decay,
    N: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step t; the spikes before it are row last_row of last. current_in and v_in are current and v,
    which the tile's owner alone reads and writes, but at the first step."""
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    rows_per_step = B.to(tl.int64)
    recurrent = _product(
        last_ptr + (last_row * rows_per_step + first) * N, weight_ptr, rows, n, first + rows < B,
        N, True, BLOCK_B, BLOCK_N, BLOCK_K, STAGES, OPERAND, PRECISION,
    )  # fmt: skip
    recurrent += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    at = (t * rows_per_step + first) * N
    x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    current = tl.load(current_in_ptr + first * N + offs, mask=mask, other=0.0)
    v = tl.load(v_in_ptr + first * N + offs, mask=mask, other=0.0)
    current, h = charge(current, v, x, recurrent, current_decay, membrane_decay)
    s, v = fire(h)
    tl.store(current_ptr + first * N + offs, current, mask=mask)
    tl.store(v_ptr + first * N + offs, v, mask=mask)
    store_fired(spikes_ptr + at, h_ptr + at, offs, s, h, mask, SAVE)
    if SAVE:
        add_spikes(bits_ptr, s, t, rows_per_step, first, offs, mask, N)


@triton.jit
def _step(
    g_current, g_v, g_fed_back, g_s_ptr, h_ptr, g_x_ptr, row, t, rows_per_step, first, offs, mask,
    current_decay, membrane_decay, alpha, N: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """One step of a tile backward; row is its place in the chunk, g_fed_back its weight^T g_x[t+1].

    Returns:
        g_current and g_v before the step, and g_x as stored.
    """
    at = (t * rows_per_step + first) * N
    h = tl.load(h_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    g_s = g_fed_back
    if g_s_ptr is not None:
        g_s += tl.load(g_s_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    g_current, g_v, g_x = charge_gradient(
        g_current, g_v, g_s, h, current_decay, membrane_decay, alpha, SURROGATE
    )
    g_x = to_operand(g_x, g_x_ptr.dtype.element_ty)
    tl.store(g_x_ptr + (row * rows_per_step + first) * N + offs, g_x, mask=mask)
    return g_current, g_v, g_x


@triton.jit(do_not_specialize=["start", "steps", "B"])
def cuba_lif_backward_persistent_kernel(
    g_s_ptr, h_ptr, weight_ptr, g_current_ptr, g_v_ptr, g_fed_back_ptr, g_x_ptr,
    start, steps, B, current_decay, membrane_decay, alpha,
    N: tl.constexpr, SURROGATE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps start + steps - 1 down to start; g_current, g_v and g_fed_back are read and written.
    g_s may be None, for zeros."""
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    k = tl.arange(0, BLOCK_N)[:, None]
    weight = tl.load(weight_ptr + k * N + n, mask=(k < N) & (n < N), other=0.0)
    own = first * N + offs
    g_current = tl.load(g_current_ptr + own, mask=mask, other=0.0)
    g_v = tl.load(g_v_ptr + own, mask=mask, other=0.0)
    g_fed_back = tl.load(g_fed_back_ptr + own, mask=mask, other=0.0)
    rows_per_step = B.to(tl.int64)
    for back in tl.range(0, steps, num_stages=STAGES):
        row = steps - 1 - back
        g_current, g_v, g_x = _step(
            g_current, g_v, g_fed_back, g_s_ptr, h_ptr, g_x_ptr, row, start + row, rows_per_step,
            first, offs, mask, current_decay, membrane_decay, alpha, N, SURROGATE,
        )  # fmt: skip
        g_fed_back = tl.dot(g_x.to(OPERAND), weight, input_precision=PRECISION)
    tl.store(g_current_ptr + own, g_current, mask=mask)
    tl.store(g_v_ptr + own, g_v, mask=mask)
    tl.store(g_fed_back_ptr + own, g_fed_back, mask=mask)


@triton.jit(do_not_specialize=["row", "start", "B"])
def cuba_lif_backward_stepwise_kernel(
    g_s_ptr, h_ptr, weight_ptr, g_current_ptr, g_v_ptr, g_fed_back_ptr, g_x_ptr,
    row, start, B, current_decay, membrane_decay, alpha,
    N: tl.constexpr, SURROGATE: tl.constexpr, PRODUCT: tl.constexpr, CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PRODUCT takes weight^T g_x of step row + 1, else g_fed_back has it; CELL then takes step row,
    else g_fed_back keeps it for the chunk before. g_s may be None, for zeros."""
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    rows_per_step = B.to(tl.int64)
    own = first * N + offs
    if PRODUCT:
        g_fed_back = _product(
            g_x_ptr + ((row + 1) * rows_per_step + first) * N, weight_ptr, rows, n,
            first + rows < B,
            N, False, BLOCK_B, BLOCK_N, BLOCK_K, STAGES, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        g_fed_back = tl.load(g_fed_back_ptr + own, mask=mask, other=0.0)
    if CELL:
        g_current = tl.load(g_current_ptr + own, mask=mask, other=0.0)
        g_v = tl.load(g_v_ptr + own, mask=mask, other=0.0)
        g_current, g_v, _ = _step(
            g_current, g_v, g_fed_back, g_s_ptr, h_ptr, g_x_ptr, row, start + row, rows_per_step,
            first, offs, mask, current_decay, membrane_decay, alpha,
            N, SURROGATE,
        )  # fmt: skip
        tl.store(g_current_ptr + own, g_current, mask=mask)
        tl.store(g_v_ptr + own, g_v, mask=mask)
    else:
        tl.store(g_fed_back_ptr + own, g_fed_back, mask=mask)


def _constants(tile: tiles.Tile, B: int, N: int, operand: torch.dtype, plan: tiles.Plan) -> tuple:
    """Grid and constexpr arguments of every launch."""
    grid, constants = tile_constants(tile, B, N)
    constants |= dict(N=N, OPERAND=TL_DTYPES[operand], PRECISION=plan.precision)
    if plan.strategy == "stepwise":
        constants["BLOCK_K"] = tile.BLOCK_K
    return grid, constants


def cuba_lif_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    current: Tensor,
    v: Tensor,
    last: Tensor,
    current_decay: float,
    membrane_decay: float,
    save: bool,
    plan: tiles.Plan,
) -> tuple[Tensor, ...]:
    """Run CuBa-LIF forward; arguments and results as lif_cpu.cuba_lif_forward.

    Args:
        x: float32, float16 or bfloat16; the others: float32. plan: tiles.choose_cuba_lif(...).
    """
    T, B, N = x.shape
    decays = current_decay, membrane_decay
    if (P := tiles.padded(N, x.dtype)) != N:
        # a neuron without weights and current stays at 0 and never spikes
        weights = (resize_weights(w, N, P) for w in (weight, bias))
        state = (resize(a, P) for a in (current, v, last))
        results = cuba_lif_forward(resize(x, P), *weights, *state, *decays, save, plan)
        return tuple(resize(a, N) for a in results)
    x, bias = x.contiguous(), bias.contiguous()
    operand = tiles.operand_dtype(x.dtype)
    weight, last = cast(weight, operand), cast(last, x.dtype)
    state = current.contiguous(), v.contiguous()
    ends = torch.empty_like(state[0]), torch.empty_like(state[1])
    spikes, h = torch.empty_like(x), x.new_empty((T if save else 0, B, N))
    bits = x.new_empty((-(-T // tiles.WORD) if save else 0, B, N), dtype=torch.int32)
    grid, constants = _constants(plan.forward, B, N, operand, plan)
    outputs = (*ends, spikes, h, bits)
    if plan.strategy == "persistent":
        cuba_lif_forward_persistent_kernel[grid](
            x, weight, bias, *state, last, *outputs, T, B, *decays, SAVE=save, **constants
        )
        return spikes, *ends, h, bits
    for t in range(T):
        cuba_lif_forward_stepwise_kernel[grid](
            x, weight, bias, *(ends if t else state), spikes if t else last, *outputs,
            t, max(0, t - 1), B, *decays, SAVE=save, **constants,
        )  # fmt: skip
    return spikes, *ends, h, bits


def cuba_lif_backward(
    g_spikes: Tensor | None,
    g_current: Tensor | None,
    g_v: Tensor | None,
    h: Tensor,
    bits: Tensor,
    weight: Tensor,
    last: Tensor,
    current_decay: float,
    membrane_decay: float,
    surrogate: str,
    alpha: float,
    plan: tiles.Plan,
) -> tuple[Tensor, ...]:
    """Backpropagate through cuba_lif_forward; arguments and results as lif_cpu.cuba_lif_backward.

    Args:
        plan: as cuba_lif_forward had it.
    """
    T, B, N = h.shape
    options = current_decay, membrane_decay, surrogate, alpha, plan
    if (P := tiles.padded(N, h.dtype)) != N:
        g_x, *g_weights, g_current, g_v, g_last = cuba_lif_backward(
            *(resize(a, P) for a in (g_spikes, g_current, g_v, h, bits)),
            resize_weights(weight, N, P), resize(last, P), *options,
        )  # fmt: skip
        g_weights = (resize_weights(g, P, N) for g in g_weights)
        return resize(g_x, N), *g_weights, *(resize(g, N) for g in (g_current, g_v, g_last))
    h, gradient = h.contiguous(), tiles.gradient_dtype(h.dtype)
    weight_g, g_s = cast(weight, gradient), None if g_spikes is None else g_spikes.contiguous()
    # read and written: those after a chunk become those before it
    states = tuple(
        last.new_zeros(B, N) if g is None else g.clone(memory_format=torch.contiguous_format)
        for g in (g_current, g_v, None)
    )
    g_x = torch.empty_like(h)
    g_weight, g_bias = weight.new_zeros(N, N), weight.new_zeros(N)
    for start in reversed(range(0, T, plan.backward_steps)):
        stop = min(T, start + plan.backward_steps)
        chunk = g_x[start:stop]
        if g_x.dtype != gradient:
            chunk = torch.empty_like(chunk, dtype=gradient)
        _backward_chunk((g_s, h, weight_g, *states, chunk), start, stop - start, *options)
        # the spikes that each step's product took
        before = spikes_unpack(bits, None, max(0, start - 1), stop - 1, gradient)
        if start == 0:
            before = torch.cat([last[None].to(gradient), before])
        rows = chunk.view(-1, N)
        g_weight += float32_product(rows.t(), before.view(-1, N))
        g_bias += rows.sum(0, dtype=torch.float32)
        if g_x.dtype != gradient:
            g_x[start:stop] = tiles.saturate(chunk, g_x.dtype)
    return g_x, g_weight, g_bias, *states


def _backward_chunk(
    tensors: tuple, start: int, steps: int, current_decay: float, membrane_decay: float,
    surrogate: str, alpha: float, plan: tiles.Plan,
) -> None:  # fmt: skip
    """Launch the serial part of a chunk; tensors in the kernels' order, its g_x the last."""
    *_, g_x = tensors
    _, B, N = g_x.shape
    numbers = current_decay, membrane_decay, alpha
    grid, constants = _constants(plan.backward, B, N, g_x.dtype, plan)
    constants["SURROGATE"] = surrogate
    if plan.strategy == "persistent":
        cuba_lif_backward_persistent_kernel[grid](*tensors, start, steps, B, *numbers, **constants)
        return
    # the last launch has no step of its own: it takes the product of the chunk's first step
    for row in range(steps - 1, -2, -1):
        cuba_lif_backward_stepwise_kernel[grid](
            *tensors, row, start, B, *numbers, PRODUCT=row < steps - 1, CELL=row >= 0, **constants
        )
