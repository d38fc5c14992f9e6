"""GPN backward: the adjoint of gpn_forward.py, three gates in the serial part.

g_v[t] = dL/dv[t], g_v[T] = dL/dv_final (zero unless given); the s that resets v is detached. With
g_s[t] = dL/ds[t] and sg = surrogate'(h - theta), for t from T - 1 down to 0:

    g_u    = g_s[t] sg                                  -> with g_z_theta, before the loop
    g_h    = g_v[t+1] (1 - s) + g_u
    g_z    = [ g_h v f(1-f), g_h x i(1-i), g_v[t+1] (1 - b^2), -g_u theta(1-theta) ]
    g_v[t] = g_h f + weight_v^T g_z                     <- the only serial product
    g_x[t] = g_h i + weight_x^T g_z

and where a sequence has ended (t >= lengths[b]) g_u, g_z and g_x are 0 and g_v[t] is g_v[t+1].

    g_weight_v = sum g_z v^T    g_weight_x = sum g_z x^T    g_bias = sum g_z    g_v0 = g_v[0]

g_z_theta does not depend on g_v, so its product with weight_v (rest) is taken for a chunk of time
at once, and the loop multiplies the gates f, i, b only. For each chunk, from the last to the first:

    z = weight_x x + weight_v v + bias        two products (v replayed first if not saved)
    recurrence_gradient_kernel                g_u, and g_z_theta over z_theta
    rest = g_z_theta weight_v[theta]          one product
    the serial kernel                         g_z over z, g_h i
    weight gradients, g_bias, g_x             products over all rows of the chunk

Grid of the serial kernels: as forward, a program owns BLOCK_B rows (persistent) or, one launch a
step, BLOCK_B rows of BLOCK_N neurons (stepwise; the launch of step t first takes the product that
step t + 1 left open). Layout as forward; z and g_z [steps, B, G N] share their memory: float16 and
bfloat16 for half x (range matters for gradients), else float32. g_v and accumulators are float32,
sums over chunks and steps run in one fixed order.

Source: arXiv 2412.01087. Twin: reference.gpn_adjoint.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels.gpn_forward import recurrence_replay
from gpn_triton.kernels.operands import (
    TL_DTYPES,
    add_product,
    cast_together,
    dependent_launch,
    float32_product,
    layer_constants,
    load_gate,
    load_spikes,
    load_weight_as_stored,
    meet_launches,
    own_tile,
    project,
    resize,
    resize_weights,
    store_gate,
    tile_constants,
    to_operand,
)
from gpn_triton.kernels.pointwise import cell_gradient, has, next_v_gradient, place
from gpn_triton.kernels.tiles import (
    Plan,
    elementwise_blocks,
    gradient_dtype,
    own_steps,
    padded,
)


@triton.jit(do_not_specialize=["start", "steps", "B"])
def recurrence_gradient_kernel(
    z_ptr, x_ptr, v_ptr, g_s_ptr, lengths_ptr, g_u_ptr, g_z_ptr, v_copy_ptr,
    start, steps, B, alpha, scale,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr, SURROGATE: tl.constexpr,
    MEAN: tl.constexpr, COPY: tl.constexpr, FAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g_u [steps, B, N] and g_z_theta of a chunk from scale g_s, [T, B, N] or [B, N] if MEAN.

    COPY: v is written to v_copy, which has g_z's dtype.
    """
    rows_per_step = B.to(tl.int64)
    first, rows, n, mask, offs = own_tile(steps * rows_per_step, N, BLOCK_R, BLOCK_N)
    offs_z = rows * DEPTH + n
    whole = (start * rows_per_step + first) * N

    z_row = first * DEPTH
    z_f = load_gate(z_ptr + z_row, offs_z, mask, "f", GATES, N)
    z_i = load_gate(z_ptr + z_row, offs_z, mask, "i", GATES, N)
    z_theta = load_gate(z_ptr + z_row, offs_z, mask, "theta", GATES, N)
    x = tl.load(x_ptr + whole + offs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + first * N + offs, mask=mask, other=0.0).to(tl.float32)
    if COPY:
        tl.store(v_copy_ptr + first * N + offs, v.to(v_copy_ptr.dtype.element_ty), mask=mask)
    if MEAN:
        batch = (first + rows) % rows_per_step
        g_s = tl.load(g_s_ptr + batch * N + n, mask=mask, other=0.0).to(tl.float32)
    else:
        g_s = tl.load(g_s_ptr + whole + offs, mask=mask, other=0.0).to(tl.float32)
    if lengths_ptr is not None:
        sample = (first + rows) % rows_per_step
        length = tl.load(lengths_ptr + sample, mask=first + rows < steps * rows_per_step, other=0)
        # a spike that cannot be has no gradient, whatever is in it
        g_s = tl.where(start + (first + rows) // rows_per_step < length, g_s, 0.0)
    g_u, g_z_theta = cell_gradient(
        z_f, z_i, z_theta, v, x, g_s * tl.cast(scale, tl.float32), tl.cast(alpha, tl.float32),
        GATES, SURROGATE, FAST,
    )  # fmt: skip
    tl.store(g_u_ptr + first * N + offs, g_u.to(g_u_ptr.dtype.element_ty), mask=mask)
    store_gate(g_z_ptr + z_row, offs_z, g_z_theta, mask, "theta", GATES, N)


@triton.jit
def _load_step(
    z_ptr, x_ptr, bits_ptr, v_ptr, g_u_ptr, rest_ptr,
    row, t, rows_per_step, first, offs, offs_z, mask,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What one step of a tile reads beside g_v, as float32; row is its place in the chunk."""
    at = (row * rows_per_step + first) * N
    z_at = z_ptr + (row * rows_per_step + first) * DEPTH
    z_f = load_gate(z_at, offs_z, mask, "f", GATES, N)
    z_i = load_gate(z_at, offs_z, mask, "i", GATES, N)
    z_b = load_gate(z_at, offs_z, mask, "b", GATES, N)
    x = tl.load(x_ptr + (t * rows_per_step + first) * N + offs, mask=mask, other=0.0)
    x = x.to(tl.float32)
    v = tl.load(v_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    g_u = tl.load(g_u_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    s = load_spikes(bits_ptr, t, rows_per_step, first, offs, mask, N)
    rest = 0.0
    if has(GATES, "theta"):
        rest = tl.load(rest_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    return z_f, z_i, z_b, x, v, g_u, s, rest


@triton.jit
def _take_step(
    g_v, z_f, z_i, z_b, x, v, g_u, s, rest, lengths_ptr, g_z_ptr, g_x_ptr,
    row, t, B, rows_per_step, first, offs, offs_z, mask,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store the g_z and g_h i of one step of a tile.

    Returns:
        g_v[t] without the product, and g_z_f, g_z_i, g_z_b.
    """
    g_direct, g_x, g_z_f, g_z_i, g_z_b = next_v_gradient(
        g_v, g_u, z_f, z_i, z_b, v, x, s, GATES, FAST
    )
    g_direct += rest
    if lengths_ptr is not None:
        sample = first + tl.arange(0, g_v.shape[0])[:, None]
        goes_on = t < tl.load(lengths_ptr + sample, mask=sample < B, other=0)
        g_direct = tl.where(goes_on, g_direct, g_v)
        g_x = tl.where(goes_on, g_x, 0.0)
        g_z_f, g_z_i, g_z_b = (
            tl.where(goes_on, g_z_f, 0.0), tl.where(goes_on, g_z_i, 0.0),
            tl.where(goes_on, g_z_b, 0.0),
        )  # fmt: skip
    at = (row * rows_per_step + first) * N
    tl.store(g_x_ptr + at + offs, g_x.to(g_x_ptr.dtype.element_ty), mask=mask)
    g_z_at = g_z_ptr + (row * rows_per_step + first) * DEPTH
    store_gate(g_z_at, offs_z, g_z_f, mask, "f", GATES, N)
    store_gate(g_z_at, offs_z, g_z_i, mask, "i", GATES, N)
    store_gate(g_z_at, offs_z, g_z_b, mask, "b", GATES, N)
    return g_direct, g_z_f, g_z_i, g_z_b


@triton.jit(do_not_specialize=["start", "steps", "B", "given"])
def gpn_backward_persistent_kernel(
    z_ptr, x_ptr, bits_ptr, lengths_ptr, v_ptr, g_u_ptr, rest_ptr, weight_v_ptr, g_v_in_ptr,
    g_v_ptr, g_z_ptr, g_x_ptr,
    start, steps, B, given,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Steps start + steps - 1 down to start; g_v [B, N] float32 is made of g_v_in, zeros unless
    given.
    """
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    offs_z = rows * DEPTH + n
    k = tl.arange(0, BLOCK_N)[:, None]
    w_mask = (k < N) & (n < N)
    w_f = load_weight_as_stored(weight_v_ptr, k, n, w_mask, "f", GATES, N)
    w_i = load_weight_as_stored(weight_v_ptr, k, n, w_mask, "i", GATES, N)
    w_b = load_weight_as_stored(weight_v_ptr, k, n, w_mask, "b", GATES, N)

    rows_per_step = B.to(tl.int64)
    g_v = tl.load(g_v_in_ptr + first * N + offs, mask=mask & (given != 0), other=0.0)
    for back in tl.range(0, steps, num_stages=STAGES):
        row = steps - 1 - back
        z_f, z_i, z_b, x, v, g_u, s, rest = _load_step(
            z_ptr, x_ptr, bits_ptr, v_ptr, g_u_ptr, rest_ptr,
            row, start + row, rows_per_step, first, offs, offs_z, mask, N, GATES, DEPTH,
        )  # fmt: skip
        g_v, g_z_f, g_z_i, g_z_b = _take_step(
            g_v, z_f, z_i, z_b, x, v, g_u, s, rest, lengths_ptr, g_z_ptr, g_x_ptr,
            row, start + row, B, rows_per_step, first, offs, offs_z, mask, N, GATES, DEPTH, FAST,
        )  # fmt: skip
        # three sums side by side, not one chain three times as long
        none = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        g_i = add_product(none, to_operand(g_z_i, OPERAND), w_i, "i", GATES, PRECISION)
        g_b = add_product(none, to_operand(g_z_b, OPERAND), w_b, "b", GATES, PRECISION)
        g_v = add_product(g_v, to_operand(g_z_f, OPERAND), w_f, "f", GATES, PRECISION)
        g_v += g_i + g_b
    tl.store(g_v_ptr + first * N + offs, g_v, mask=mask)


@triton.jit
def _load_open(
    g_z_ptr, rows, k, mask, gate: tl.constexpr,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Columns k of the gate's g_z, as a product's operand; nothing if absent."""
    if has(GATES, gate):
        offs = rows * DEPTH + place(GATES, gate) * N + k
        return tl.load(g_z_ptr + offs, mask=mask, other=0.0)
    else:
        return 0.0


@triton.jit(do_not_specialize=["row", "start", "B", "given"])
def gpn_backward_stepwise_kernel(
    z_ptr, x_ptr, bits_ptr, lengths_ptr, v_ptr, g_u_ptr, rest_ptr, weight_v_ptr, g_v_in_ptr,
    g_v_ptr, g_z_ptr, g_x_ptr,
    row, start, B, given,
    N: tl.constexpr, GATES: tl.constexpr, DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr, CELL: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """PRODUCT closes g_v of step row + 1, CELL then takes step row and leaves its product open.

    g_v [B, N] float32, made of g_v_in (zeros unless given), is g_v[t] between chunks, and g_v[t]
    without the product while open. DEPENDENT: operands.dependent_launch.
    """
    first, rows, n, mask, offs = own_tile(B, N, BLOCK_B, BLOCK_N)
    row_mask = first + rows < B
    offs_z = rows * DEPTH + n
    rows_per_step = B.to(tl.int64)

    # where all of it fits the registers: 128 x 64 spills
    EARLY: tl.constexpr = CELL and DEPENDENT and BLOCK_B * BLOCK_N <= 4096
    if EARLY:
        # all of it was there before the chain began; what the launch before writes comes below
        z_f, z_i, z_b, x, v, g_u, s, rest = _load_step(
            z_ptr, x_ptr, bits_ptr, v_ptr, g_u_ptr, rest_ptr,
            row, start + row, rows_per_step, first, offs, offs_z, mask, N, GATES, DEPTH,
        )  # fmt: skip
    if DEPENDENT:
        meet_launches()
    if PRODUCT:
        open_z = g_z_ptr + ((row + 1) * rows_per_step + first) * DEPTH
        # CHAINED: one sum for all gates, else one a gate, side by side
        g_f = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        g_i = g_f
        g_b = g_f
        for k0 in tl.range(0, N, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            z_mask = row_mask & (k[None, :] < N)
            w_mask = (k[:, None] < N) & (n < N)
            g_z_f = _load_open(open_z, rows, k[None, :], z_mask, "f", N, GATES, DEPTH)
            g_z_i = _load_open(open_z, rows, k[None, :], z_mask, "i", N, GATES, DEPTH)
            g_z_b = _load_open(open_z, rows, k[None, :], z_mask, "b", N, GATES, DEPTH)
            w_f = load_weight_as_stored(weight_v_ptr, k[:, None], n, w_mask, "f", GATES, N)
            w_i = load_weight_as_stored(weight_v_ptr, k[:, None], n, w_mask, "i", GATES, N)
            w_b = load_weight_as_stored(weight_v_ptr, k[:, None], n, w_mask, "b", GATES, N)
            g_f = add_product(g_f, g_z_f, w_f, "f", GATES, PRECISION)
            if CHAINED:
                g_f = add_product(g_f, g_z_i, w_i, "i", GATES, PRECISION)
                g_f = add_product(g_f, g_z_b, w_b, "b", GATES, PRECISION)
            else:
                g_i = add_product(g_i, g_z_i, w_i, "i", GATES, PRECISION)
                g_b = add_product(g_b, g_z_b, w_b, "b", GATES, PRECISION)
    # behind the product: ahead of it g_v holds registers all through the loop, and spills
    g_v = tl.load(g_v_in_ptr + first * N + offs, mask=mask & (given != 0), other=0.0)
    if PRODUCT:
        g_v += g_f if CHAINED else g_f + g_i + g_b
    if CELL:
        if not EARLY:
            z_f, z_i, z_b, x, v, g_u, s, rest = _load_step(
                z_ptr, x_ptr, bits_ptr, v_ptr, g_u_ptr, rest_ptr,
                row, start + row, rows_per_step, first, offs, offs_z, mask, N, GATES, DEPTH,
            )  # fmt: skip
        g_v, _, _, _ = _take_step(
            g_v, z_f, z_i, z_b, x, v, g_u, s, rest, lengths_ptr, g_z_ptr, g_x_ptr,
            row, start + row, B, rows_per_step, first, offs, offs_z, mask, N, GATES, DEPTH, FAST,
        )  # fmt: skip
    tl.store(g_v_ptr + first * N + offs, g_v, mask=mask)


def gpn_backward(
    g_out: Tensor | None,
    g_v_final: Tensor | None,
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    bits: Tensor,
    v_saved: Tensor,
    gates: tuple[str, ...],
    surrogate: str,
    alpha: float,
    every: int,
    mean: bool,
    plan: Plan,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Backpropagate with the kernels; arguments and results as recurrence_torch.gpn_backward.

    Args:
        g_out: gradient of the spikes, or of their mean. surrogate, alpha: see surrogate.SURROGATES.
        The rest as gpn_forward had and returned them; the weights and v_reset are float32.
    """
    T, B, N = x.shape
    if (P := padded(N, x.dtype)) != N:
        g_x, *g_weights, g_v = gpn_backward(
            *(resize(a, P) for a in (g_out, g_v_final, x)),
            *(resize_weights(w, N, P) for w in (weight_x, weight_v, bias)),
            *(resize(a, P) for a in (v_reset, bits, v_saved)),
            gates, surrogate, alpha, every, mean, plan, lengths,
        )  # fmt: skip
        g_weights = (resize_weights(g, P, N) for g in g_weights)
        return resize(g_x, N), *g_weights, resize(g_v, N)
    G = len(gates)
    x, v_reset, bits = x.contiguous(), v_reset.contiguous(), bits.contiguous()
    operand, gradient = v_saved.dtype, gradient_dtype(x.dtype)
    # forward's operands make z again; what multiplies g_z has its dtype
    starts, g_weights = range(0, T, plan.backward_steps), None
    x_z = x_g = x[starts[-1] :]
    weight_x_z = bias_z = weight_v_z = weight_v_g = None
    if G:
        # the first chunk of x with the weights, the others when their turn comes
        (weight_x_z, weight_v_z, bias_z, x_z), (weight_x_g, weight_v_g, _, x_g) = cast_together(
            (weight_x, weight_v, bias, x_z), operand, gradient
        )
    if g_out is None:
        # the mean's cotangent is the small one: [B, N] of zeros serves either output
        g_out, g_per_step = torch.zeros_like(v_reset), True
    else:
        g_out, g_per_step = g_out.contiguous(), mean
    scale = 1 / T if mean else 1.0
    if mean and lengths is not None:
        g_out, scale = g_out / own_steps(T, lengths), 1.0
    # None: zeros, which the kernels then do not read
    g_v = torch.empty_like(v_reset)
    g_v_in = g_v_final if g_v_final is None else g_v_final.to(torch.float32).contiguous()
    g_x = torch.empty_like(x)
    in_place = x.dtype == gradient
    constants = layer_constants(N, x.dtype, gates)
    serial = sum(gate != "theta" for gate in gates) * N
    blocks = elementwise_blocks(N)
    run = _persistent if plan.strategy == "persistent" else _stepwise

    for start in reversed(starts):
        stop = min(T, start + plan.backward_steps)
        steps = stop - start
        # without gates z is never read, and x stands in for the pointer
        if G and start != starts[-1]:
            (x_z,), (x_g,) = cast_together((x[start:stop],), operand, gradient)
        z = project(x_z if G else x[start:stop], weight_x_z, bias_z)
        if every == 1:
            v = v_saved[start:stop]
        else:
            v = recurrence_replay(
                v_saved, x, bits, z, weight_v_z, v_reset, lengths, gates, start, stop, every, plan
            )
        g_u = x.new_empty(steps, B, N, dtype=gradient)
        g_x_direct = g_x[start:stop] if in_place else torch.empty_like(g_u)
        g_z, rest, v_g = g_u, g_u, v
        if G:
            if v.dtype != gradient:
                v_g = torch.empty_like(g_u)
            z.view(steps * B, -1).addmm_(v.view(steps * B, N), weight_v_z.t())
            g_z = z.view(gradient)
        grid = (triton.cdiv(steps * B, blocks["BLOCK_R"]), triton.cdiv(N, blocks["BLOCK_N"]))
        recurrence_gradient_kernel[grid](
            z, x, v, g_out, lengths, g_u, g_z, v_g,
            start, steps, B, alpha, scale,
            SURROGATE=surrogate, MEAN=g_per_step, COPY=v_g is not v, **blocks, **constants,
        )  # fmt: skip
        g_z_rows = g_z.view(steps * B, -1)
        if "theta" in gates:
            rest = g_z_rows[:, serial:] @ weight_v_g[serial:]
        run(
            (z, x, bits, lengths, v, g_u, rest, weight_v_g), g_v_in, (g_v, g_z, g_x_direct),
            start, steps, B, plan, constants,
        )  # fmt: skip
        g_v_in = g_v
        g_x_rows = g_x_direct.view(steps * B, N)
        if G:
            x_rows, v_rows = (a.view(steps * B, N) for a in (x_g, v_g))
            chunk = (
                float32_product(g_z_rows.t(), x_rows),
                float32_product(g_z_rows.t(), v_rows),
                g_z_rows.sum(0, dtype=torch.float32),
            )
            if g_weights is not None:
                torch._foreach_add_(chunk, g_weights)
            g_weights = chunk
            g_x_rows.addmm_(g_z_rows, weight_x_g)
        if not in_place:
            g_x[start:stop] = g_x_direct
    return g_x, *(g_weights or (None,) * 3), g_v


def _persistent(inputs, g_v_in, outputs, start: int, steps: int, B: int, plan: Plan, constants):
    grid, tile = tile_constants(plan.backward, B, constants["N"])
    g_v, g_z, _ = outputs
    gpn_backward_persistent_kernel[grid](
        *inputs, g_v if g_v_in is None else g_v_in, *outputs,
        start, steps, B, int(g_v_in is not None),
        OPERAND=TL_DTYPES[g_z.dtype], PRECISION=plan.precision, **tile, **constants,
    )  # fmt: skip


def _stepwise(inputs, g_v_in, outputs, start: int, steps: int, B: int, plan: Plan, constants):
    grid, tile = tile_constants(plan.backward, B, constants["N"])
    g_v = outputs[0]
    # the last launch has no step of its own: it closes g_v at the chunk's first step
    for row in range(steps - 1, -2, -1):
        gpn_backward_stepwise_kernel[grid](
            *inputs, g_v if g_v_in is None else g_v_in, *outputs, row, start, B,
            int(g_v_in is not None), PRODUCT=row < steps - 1, CELL=row >= 0,
            CHAINED=plan.backward.chained, BLOCK_K=plan.backward.BLOCK_K,
            PRECISION=plan.precision, **dependent_launch(plan, row < steps - 1), **tile,
            **constants,
        )  # fmt: skip
        g_v_in = g_v
