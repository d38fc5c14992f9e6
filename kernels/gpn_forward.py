"""GPN forward: one layer over time, as one program per batch tile or as one launch per step.

    z[t]   = weight_v v[t] + weight_x x[t] + bias
    h[t]   = f v[t] + i x[t]
    s[t]   = 1 if h[t] >= theta else 0                    (Heaviside(0) = 1; s is not differentiated
    v[t+1] = (1 - s[t]) h[t] + s[t] v_reset + b            in the reset, see gpn_backward.py)

Grid. persistent: (batch tiles, neuron tiles, segments); a program owns BLOCK_B rows and runs the
time loop, weight_v stays in shared memory. With gates there is one neuron tile, all N. stepwise:
the same grid for one step; a program owns BLOCK_B rows of BLOCK_N neurons and loops over the depth
N of the product; its launches may overlap (operands.dependent_launch). Segments: 1 forward; in a
replay, the stretches between two saved membranes.

Layout, all contiguous. x, spikes [T, B, N] of x's dtype; weight_v, weight_x [G N, N], rows in the
order f, i, b, theta; v_reset, v [B, N] float32; zx = weight_x x + bias [steps, B, G N] for a chunk
of time and v_saved [ceil(T / every), B, N] in the operands' dtype: float16 for half x or float32.

Read: zx, x, v_reset. Written: spikes, or with MEAN their counts [B, N] float32; with SAVE, for
backward, the spikes packed 32 steps a word into bits [ceil(T / 32), B, N] int32 and v at every
`every`-th step. A replay reads the bits and writes v alone. Gates and h are never stored. State,
gates and accumulators are float32. lengths [B] int64, where given: from step lengths[b] on sample b
keeps its v and does not spike.

Source: arXiv 2412.01087. Twin: reference.gpn_loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels import tiles
from gpn_triton.kernels.operands import (
    TL_DTYPES,
    add_product,
    add_spikes,
    cast,
    cast_together,
    dependent_launch,
    layer_constants,
    load_gate,
    load_spikes,
    load_weight_transposed,
    meet_launches,
    own_tile,
    pack_spikes,
    project,
    resize,
    resize_weights,
    tile_constants,
    to_operand,
)
from gpn_triton.kernels.pointwise import cell, next_v


@triton.jit(do_not_specialize=["start", "stop", "T", "B", "every"])
def gpn_forward_persistent_kernel(
    zx_ptr, x_ptr, weight_v_ptr, v_reset_ptr, lengths_ptr, v_in_ptr,
    v_ptr, v_saved_ptr, spikes_ptr, bits_ptr, counts_ptr,
    start, stop, T, B, every,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr,
    MEAN: tl.constexpr, SAVE: tl.constexpr, REPLAY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Steps start..stop - 1 from v_in [B, N] to v [B, N]. DEPTH is G N.

    In a replay v_saved_ptr is v [stop - start, B, N].
    """
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    offs_z = rows * DEPTH + n

    k = tl.arange(0, BLOCK_N)[:, None]
    w_mask = (k < N) & (n < N)
    w_f = load_weight_transposed(weight_v_ptr, k, n, w_mask, "f", GATES, N)
    w_i = load_weight_transposed(weight_v_ptr, k, n, w_mask, "i", GATES, N)
    w_b = load_weight_transposed(weight_v_ptr, k, n, w_mask, "b", GATES, N)
    w_theta = load_weight_transposed(weight_v_ptr, k, n, w_mask, "theta", GATES, N)

    v_reset = tl.load(v_reset_ptr + first * N + offs, mask=mask, other=0.0)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + first + rows, mask=first + rows < B, other=0)
    count = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    word = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
    t_first = start + tl.program_id(2) * every
    t_stop = stop
    if REPLAY:
        # from the membrane saved at t_first up to the one before the next saved one
        t_stop = tl.minimum(t_first + every, stop) - 1
        v_row = (t_first - start).to(tl.int64) * B + first
        v = tl.load(v_saved_ptr + v_row * N + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        v = tl.load(v_in_ptr + first * N + offs, mask=mask, other=0.0)
        if SAVE:
            tl.store(
                v_saved_ptr + first * N + offs, to_operand(v, OPERAND), mask=mask & (start == 0)
            )
        if MEAN:
            count = tl.load(counts_ptr + first * N + offs, mask=mask & (start > 0), other=0.0)

    # addresses made from t, not bumped from step to step, let the compiler load steps ahead
    rows_per_step = B.to(tl.int64)
    for t in tl.range(t_first, t_stop, num_stages=STAGES):
        zx_at = zx_ptr + ((t - start) * rows_per_step + first) * DEPTH
        x = tl.load(x_ptr + (t * rows_per_step + first) * N + offs, mask=mask, other=0.0).to(
            tl.float32
        )
        operand = to_operand(v, OPERAND)
        z_f = load_gate(zx_at, offs_z, mask, "f", GATES, N)
        z_i = load_gate(zx_at, offs_z, mask, "i", GATES, N)
        z_b = load_gate(zx_at, offs_z, mask, "b", GATES, N)
        z_theta = load_gate(zx_at, offs_z, mask, "theta", GATES, N)
        z_f = add_product(z_f, operand, w_f, "f", GATES, PRECISION)
        z_i = add_product(z_i, operand, w_i, "i", GATES, PRECISION)
        z_b = add_product(z_b, operand, w_b, "b", GATES, PRECISION)
        if not REPLAY:
            z_theta = add_product(z_theta, operand, w_theta, "theta", GATES, PRECISION)
        h, theta = cell(z_f, z_i, z_theta, v, x, GATES, FAST)
        if REPLAY:
            s = load_spikes(bits_ptr, t, rows_per_step, first, offs, mask, N) > 0
        else:
            s = h >= theta
        if lengths_ptr is not None:
            s = s & (t < length)
            v = tl.where(t < length, next_v(h, s, z_b, v_reset, GATES, FAST), v)
        else:
            v = next_v(h, s, z_b, v_reset, GATES, FAST)

        if REPLAY:
            v_row = (t + 1 - start) * rows_per_step + first
            tl.store(v_saved_ptr + v_row * N + offs, to_operand(v, OPERAND), mask=mask)
        else:
            if SAVE:
                due = ((t + 1) % every == 0) & (t + 1 < T)
                v_row = ((t + 1) // every) * rows_per_step + first
                tl.store(v_saved_ptr + v_row * N + offs, to_operand(v, OPERAND), mask=mask & due)
                word = pack_spikes(bits_ptr, word, s, t, T, rows_per_step, first, offs, mask, N)
            if MEAN:
                count += s.to(tl.float32)
            else:
                s_row = t * rows_per_step + first
                tl.store(
                    spikes_ptr + s_row * N + offs, s.to(spikes_ptr.dtype.element_ty), mask=mask
                )

    if not REPLAY:
        tl.store(v_ptr + first * N + offs, v, mask=mask)
        if MEAN:
            own = tl.zeros_like(count) + T.to(tl.float32)
            if lengths_ptr is not None:
                own = tl.zeros_like(count) + tl.maximum(length, 1).to(tl.float32)
            count = tl.where(stop == T, tl.div_rn(count, own), count)
            tl.store(counts_ptr + first * N + offs, count, mask=mask)


@triton.jit
def _products(
    z_f, z_i, z_b, z_theta, a_ptr, w_ptr, rows, n, row_mask, N: tl.constexpr, GATES: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add weight a to every gate's z, for the rows a [BLOCK_B, N] at a_ptr."""
    for k0 in tl.range(0, N, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows * N + k[None, :], mask=row_mask & (k[None, :] < N), other=0.0)
        a = to_operand(a, OPERAND)
        w_mask = (k[:, None] < N) & (n < N)
        # loaded at the same depth for every gate: the four products share the operand
        w_f = load_weight_transposed(w_ptr, k[:, None], n, w_mask, "f", GATES, N)
        w_i = load_weight_transposed(w_ptr, k[:, None], n, w_mask, "i", GATES, N)
        w_b = load_weight_transposed(w_ptr, k[:, None], n, w_mask, "b", GATES, N)
        w_theta = load_weight_transposed(w_ptr, k[:, None], n, w_mask, "theta", GATES, N)
        z_f = add_product(z_f, a, w_f, "f", GATES, PRECISION)
        z_i = add_product(z_i, a, w_i, "i", GATES, PRECISION)
        z_b = add_product(z_b, a, w_b, "b", GATES, PRECISION)
        z_theta = add_product(z_theta, a, w_theta, "theta", GATES, PRECISION)
    return z_f, z_i, z_b, z_theta


@triton.jit(do_not_specialize=["t", "zx_row", "in_row", "out_row", "T", "B", "every"])
def gpn_forward_stepwise_kernel(
    zx_ptr, x_ptr, weight_x_ptr, bias_ptr, weight_v_ptr, v_reset_ptr, lengths_ptr, v_in_ptr,
    state_ptr, v_ptr, v_out_ptr, spikes_ptr, bits_ptr, counts_ptr,
    t, zx_row, in_row, out_row, T, B, every,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr, HOIST: tl.constexpr,
    MEAN: tl.constexpr, SAVE: tl.constexpr, REPLAY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Step t: v[t] is read whole from row in_row of v_in, v[t+1] written to row out_row of v_out.

    v_ptr [segments, B, N] float32 is the state, written by the tile's owner alone and read by it at
    state_ptr, the same but at the first step. DEPENDENT: operands.dependent_launch.
    """
    segment = tl.program_id(2)
    t += segment * every
    zx_row += segment * every
    in_row += segment * every
    out_row += segment * every
    rows_per_step = B.to(tl.int64)
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    row_mask = first + rows < B
    x_t = x_ptr + (t * rows_per_step + first) * N

    if HOIST:
        z_ptr = zx_ptr + (zx_row * rows_per_step + first) * DEPTH
        offs_z = rows * DEPTH + n
    else:
        z_ptr = bias_ptr
        offs_z = rows * 0 + n
    z_f = load_gate(z_ptr, offs_z, mask, "f", GATES, N)
    z_i = load_gate(z_ptr, offs_z, mask, "i", GATES, N)
    z_b = load_gate(z_ptr, offs_z, mask, "b", GATES, N)
    z_theta = load_gate(z_ptr, offs_z, mask, "theta", GATES, N)
    if not HOIST:
        z_f, z_i, z_b, z_theta = _products(
            z_f, z_i, z_b, z_theta, x_t, weight_x_ptr, rows, n, row_mask,
            N, GATES, BLOCK_K, STAGES, OPERAND, PRECISION,
        )  # fmt: skip
    x = tl.load(x_t + offs, mask=mask, other=0.0)
    v_reset = tl.load(v_reset_ptr + first * N + offs, mask=mask, other=0.0)
    v_t = v_in_ptr + (in_row * rows_per_step + first) * N
    if DEPENDENT:
        # all above was there before the chain began; what the launch before writes comes below
        meet_launches()
    z_f, z_i, z_b, z_theta = _products(
        z_f, z_i, z_b, z_theta, v_t, weight_v_ptr, rows, n, row_mask,
        N, GATES, BLOCK_K, STAGES, OPERAND, PRECISION,
    )  # fmt: skip

    own = (segment * rows_per_step + first) * N
    v = tl.load(state_ptr + own + offs, mask=mask, other=0.0)
    h, theta = cell(z_f, z_i, z_theta, v, x.to(tl.float32), GATES, FAST)
    if REPLAY:
        s = load_spikes(bits_ptr, t, rows_per_step, first, offs, mask, N) > 0
    else:
        s = h >= theta
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + first + rows, mask=row_mask, other=0)
        goes_on = t < length
        s = s & goes_on
        v = tl.where(goes_on, next_v(h, s, z_b, v_reset, GATES, FAST), v)
    else:
        v = next_v(h, s, z_b, v_reset, GATES, FAST)
    tl.store(v_ptr + own + offs, v, mask=mask)
    out = (out_row * rows_per_step + first) * N
    tl.store(v_out_ptr + out + offs, to_operand(v, OPERAND), mask=mask)
    if not REPLAY:
        if MEAN:
            count = tl.load(counts_ptr + first * N + offs, mask=mask & (t > 0), other=0.0)
            count += s.to(tl.float32)
            own_steps = tl.zeros_like(count) + T.to(tl.float32)
            if lengths_ptr is not None:
                own_steps = tl.zeros_like(count) + tl.maximum(length, 1).to(tl.float32)
            count = tl.where(t + 1 == T, tl.div_rn(count, own_steps), count)
            tl.store(counts_ptr + first * N + offs, count, mask=mask)
        else:
            s_t = spikes_ptr + (t * rows_per_step + first) * N
            tl.store(s_t + offs, s.to(spikes_ptr.dtype.element_ty), mask=mask)
        if SAVE:
            add_spikes(bits_ptr, s, t, rows_per_step, first, offs, mask, N)


def gpn_forward(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    v0: Tensor,
    gates: tuple[str, ...],
    every: int,
    mean: bool,
    plan: tiles.Plan,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run GPN forward with the kernels; arguments and results as recurrence_torch.gpn_forward.

    Args:
        x: float32, float16 or bfloat16; the weights, v_reset and v0: float32.
        gates: reference.GATES[variant]. plan: tiles.choose(...). lengths [B] int64 or None.
    Returns:
        v_saved is of the operands' dtype: float16 for half x, else float32.
    """
    T, B, N = x.shape
    if (P := tiles.padded(N, x.dtype)) != N:
        # a neuron without weights and current stays at 0 and never spikes
        weights = (resize_weights(w, N, P) for w in (weight_x, weight_v, bias))
        state = (resize(v, P) for v in (v_reset, v0))
        results = gpn_forward(resize(x, P), *weights, *state, gates, every, mean, plan, lengths)
        return tuple(resize(a, N) for a in results)
    x, v_reset = x.contiguous(), v_reset.contiguous()
    operand = tiles.operand_dtype(x.dtype)
    first = x
    if gates:
        # the first chunk of x with the weights, the others when their turn comes
        part = x[: plan.forward_steps] if plan.hoist else None
        ((weight_x, weight_v, bias, part),) = cast_together(
            (weight_x, weight_v, bias, part), operand
        )
        first = x if part is None else part
    v0 = v0.contiguous()
    v = torch.empty_like(v0)
    v_saved = x.new_empty((-(-T // every) if every else 0, B, N), dtype=operand)
    bits = x.new_empty((-(-T // tiles.WORD) if every else 0, B, N), dtype=torch.int32)
    counts = torch.empty_like(v) if mean else v
    spikes = x if mean else torch.empty_like(x)
    outputs = (v, v_saved, spikes, bits, counts)
    run = _persistent if plan.strategy == "persistent" else _stepwise
    run(x, first, weight_x, weight_v, bias, v_reset, lengths, v0, outputs, gates, every, mean, plan)
    return (counts if mean else spikes), v, v_saved, bits


def _constants(x: Tensor, gates: tuple[str, ...], plan: tiles.Plan) -> tuple[tuple, dict]:
    """Grid and constexpr arguments that every launch shares."""
    _, B, N = x.shape
    grid, constants = tile_constants(plan.forward, B, N)
    constants |= layer_constants(N, x.dtype, gates)
    operand = TL_DTYPES[tiles.operand_dtype(x.dtype)]
    return grid, dict(constants, OPERAND=operand, PRECISION=plan.precision)


def _persistent(
    x, first, weight_x, weight_v, bias, v_reset, lengths, v, outputs, gates, every, mean, plan
) -> None:
    T, B, _ = x.shape
    grid, constants = _constants(x, gates, plan)
    for start in range(0, T, plan.forward_steps):
        stop = min(T, start + plan.forward_steps)
        zx = project(x[start:stop] if start else first, weight_x, bias)
        gpn_forward_persistent_kernel[(*grid, 1)](
            zx, x, weight_v, v_reset, lengths, v, *outputs, start, stop, T, B, max(1, every),
            MEAN=mean, SAVE=every > 0, REPLAY=False, **constants,
        )  # fmt: skip
        v = outputs[0]


def _stepwise(
    x, first, weight_x, weight_v, bias, v_reset, lengths, v0, outputs, gates, every, mean, plan
) -> None:
    T, B, N = x.shape
    grid, constants = _constants(x, gates, plan)
    v, v_saved, *others = outputs
    # v[t] is read whole by every program of step t: where it is not saved it goes through two rows
    pair = x.new_empty((2, B, N), dtype=v_saved.dtype)
    source, in_row = (v_saved if every else pair), 0
    source[0] = cast(v0, v_saved.dtype)
    for t in range(T):
        chunk_row = t % plan.forward_steps
        if chunk_row == 0 and plan.hoist:
            zx = project(x[t : t + plan.forward_steps] if t else first, weight_x, bias)
        if every and (t + 1) % every == 0 and t + 1 < T:
            target, out_row = v_saved, (t + 1) // every
        else:
            target, out_row = pair, (t + 1) % 2
        gpn_forward_stepwise_kernel[(*grid, 1)](
            zx if plan.hoist else x, x, weight_x, bias, weight_v, v_reset, lengths, source,
            v if t else v0, v, target, *others, t, chunk_row, in_row, out_row, T, B, 0,
            HOIST=plan.hoist, MEAN=mean, SAVE=every > 0, REPLAY=False,
            BLOCK_K=plan.forward.BLOCK_K, **dependent_launch(plan, chunk_row > 0), **constants,
        )  # fmt: skip
        source, in_row = target, out_row


def recurrence_replay(
    v_saved: Tensor,
    x: Tensor,
    bits: Tensor,
    zx: Tensor,
    weight_v: Tensor | None,
    v_reset: Tensor,
    lengths: Tensor | None,
    gates: tuple[str, ...],
    start: int,
    stop: int,
    every: int,
    plan: tiles.Plan,
) -> Tensor:
    """v at every step of a chunk, from the v saved every `every` steps and the saved spikes.

    The stretches between two saved membranes run side by side. The saved spikes reset v, never
    recomputed ones: rounding could cross the threshold the other way.

    Args:
        v_saved [ceil(T / every), B, N], x [T, B, N], bits [ceil(T / 32), B, N]: as
            gpn_forward had and gave them. zx [stop - start, B, G N]: project() of the chunk.
        weight_v [G N, N]: in v_saved's dtype. v_reset [B, N] float32. lengths [B] int64 or None.
        start, stop: the chunk; start is a multiple of every.
    Returns:
        v [stop - start, B, N] of v_saved's dtype.
    """
    _, B, N = x.shape
    steps = stop - start
    v = v_saved.new_empty(steps, B, N)
    v[::every] = v_saved[start // every : -(-stop // every)]
    grid, constants = _constants(x, gates, plan)
    constants |= dict(MEAN=False, SAVE=True, REPLAY=True)
    if plan.strategy == "persistent":
        gpn_forward_persistent_kernel[(*grid, triton.cdiv(steps, every))](
            zx, x, weight_v, v_reset, lengths, v_reset, v_reset, v, x, bits, v_reset,
            start, stop, stop, B, every, **constants,
        )  # fmt: skip
        return v
    state = v_saved[start // every : -(-stop // every)].to(torch.float32, copy=True)
    for j in range(min(every, steps) - 1):
        segments = triton.cdiv(steps - 1 - j, every)
        gpn_forward_stepwise_kernel[(*grid, segments)](
            zx, x, weight_v, zx, weight_v, v_reset, lengths, v,
            state, state, v, x, bits, v_reset,
            start + j, j, j, j + 1, stop, B, every,
            HOIST=True, BLOCK_K=plan.forward.BLOCK_K, **dependent_launch(plan, j > 0), **constants,
        )  # fmt: skip
    return v
