"""LIF and PLIF, forward and backward: neurons without weights, each by itself over all steps.

    h[t]   = v[t] + (x[t] - v[t]) / tau
    s[t]   = 1 if h[t] >= 1 else 0                        (Heaviside(0) = 1; s is not differentiated
    v[t+1] = (1 - s[t]) h[t]                               in the reset)

and with g_v[t] = dL/dv[t], given for t = T, sg = surrogate'(h - 1), from T - 1 down to 0:

    g_h    = g_v[t+1] (1 - s[t]) + g_s[t] sg
    g_x[t] = g_h / tau        g_v[t] = g_h - g_x[t]        g_tau = -sum g_x[t] (h[t] - v[t])

Grid: a program owns BLOCK of the E = B N neurons, of whatever samples they are, and runs the time
loop. g_tau is summed over time by each neuron, then over a program's neurons, then over programs,
in one order.

Layout, all contiguous. x, spikes, h, g_s, g_x [T, B, N] of x's dtype; v0, v, g_v [B, N] and tau []
float32; bits [ceil(T / 32), B, N] int32. State and sums are float32.

Forward reads x and writes spikes and, with SAVE, for backward h, and for the next layer's Linear
the spikes packed 32 steps a word. Backward reads h and g_s and writes g_x; it finds s[t] in h[t]
(operands.store_fired), and for tau v[t] in h[t-1].

At tau = 2 and v_reset = 0 this is the gate-less GPN. Its kernels are not used: made for gates, they
hold x beside v, and pass over six tensors backward where these pass over three.

Source: Fang et al., ICCV 2021. Twin: reference.lif_loop and autograd's backward of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels import tiles
from gpn_triton.kernels.operands import pack_spikes, store_fired, to_operand
from gpn_triton.kernels.pointwise import fire, leak, leak_gradient


@triton.jit
def _own_neurons(E, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Of a program: its first neuron (int64), offsets and mask [BLOCK]; E as int64, which the
    compiler may take for a multiple of ALIGNED."""
    step = tl.multiple_of(E.to(tl.int64), ALIGNED)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    return first, offs, first + offs < step, step


@triton.jit(do_not_specialize=["T", "E"])
def lif_forward_kernel(
    x_ptr, v0_ptr, tau_ptr, spikes_ptr, v_ptr, h_ptr, bits_ptr, T, E,
    ALIGNED: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first, offs, mask, step = _own_neurons(E, BLOCK, ALIGNED)
    rate = 1.0 / tl.load(tau_ptr)
    v = tl.load(v0_ptr + first + offs, mask=mask, other=0.0)
    word = tl.zeros([BLOCK], tl.int32)
    for t in tl.range(0, T, num_stages=STAGES):
        at = t * step + first
        x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        h = leak(v, x, rate)
        s, v = fire(h)
        store_fired(spikes_ptr + at, h_ptr + at, offs, s, h, mask, SAVE)
        if SAVE:
            word = pack_spikes(bits_ptr, word, s, t, T, step, first, offs, mask, 1)
    tl.store(v_ptr + first + offs, v, mask=mask)


@triton.jit(do_not_specialize=["T", "E"])
def lif_backward_kernel(
    g_s_ptr, g_v_in_ptr, h_ptr, v0_ptr, tau_ptr, g_x_ptr, g_v_ptr, g_tau_ptr, T, E, alpha,
    ALIGNED: tl.constexpr, LEARNS: tl.constexpr, SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """g_s and g_v_in may be None, for zeros. LEARNS: g_tau [programs] float32 is written."""
    first, offs, mask, step = _own_neurons(E, BLOCK, ALIGNED)
    rate = 1.0 / tl.load(tau_ptr)
    g_v = tl.zeros([BLOCK], tl.float32)
    if g_v_in_ptr is not None:
        g_v = tl.load(g_v_in_ptr + first + offs, mask=mask, other=0.0)
    if LEARNS:
        v0 = tl.load(v0_ptr + first + offs, mask=mask, other=0.0)
    g_tau = tl.zeros([BLOCK], tl.float32)
    h = tl.load(h_ptr + (T - 1) * step + first + offs, mask=mask, other=0.0).to(tl.float32)
    for back in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - back
        at = t * step + first
        g_s = tl.zeros([BLOCK], tl.float32)
        if g_s_ptr is not None:
            g_s = tl.load(g_s_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        # each h is loaded once: a step loads that of the step before
        before = tl.load(h_ptr + at - step + offs, mask=mask & (t > 0), other=0.0).to(tl.float32)
        g_v, g_x = leak_gradient(g_v, g_s, h, rate, alpha, SURROGATE)
        tl.store(g_x_ptr + at + offs, to_operand(g_x, g_x_ptr.dtype.element_ty), mask=mask)
        if LEARNS:
            _, v = fire(before)
            g_tau -= g_x * (h - tl.where(t > 0, v, v0))
        h = before
    tl.store(g_v_ptr + first + offs, g_v, mask=mask)
    if LEARNS:
        tl.store(g_tau_ptr + tl.program_id(0), tl.sum(g_tau))


def _constants(E: int, tile: tiles.Tile) -> tuple[tuple[int], dict]:
    """Grid and constexpr arguments for E neurons."""
    # how far every step's row is a multiple of: so wide may the compiler's loads be
    constants = dict(BLOCK=tile.BLOCK_N, STAGES=tile.num_stages, ALIGNED=min(16, E & -E))
    return (triton.cdiv(E, tile.BLOCK_N),), dict(constants, num_warps=tile.num_warps)


def lif_forward(
    x: Tensor, v0: Tensor, tau: Tensor, save: bool, plan: tiles.Plan
) -> tuple[Tensor, ...]:
    """Run LIF forward; arguments and results as lif_cpu.lif_forward.

    Args:
        x: float32, float16 or bfloat16; v0, tau: float32. plan: tiles.choose_lif(T).
    """
    T, B, N = x.shape
    spikes, v = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (x, v0))
    h = x.new_empty((T if save else 0, B, N))
    bits = x.new_empty((-(-T // tiles.WORD) if save else 0, B, N), dtype=torch.int32)
    grid, constants = _constants(B * N, plan.forward)
    lif_forward_kernel[grid](
        x.contiguous(), v0.contiguous(), tau, spikes, v, h, bits, T, B * N, SAVE=save, **constants
    )
    return spikes, v, h, bits


def lif_backward(
    g_spikes: Tensor | None,
    g_v_final: Tensor | None,
    h: Tensor,
    v0: Tensor,
    tau: Tensor,
    learns: bool,
    surrogate: str,
    alpha: float,
    plan: tiles.Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backpropagate through lif_forward; arguments (but for the bits, which it does not need) and
    results as lif_cpu.lif_backward."""
    T, B, N = h.shape
    h = h.contiguous()
    g_s, g_v_in = (None if g is None else g.contiguous() for g in (g_spikes, g_v_final))
    g_x, g_v = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (h, v0))
    grid, constants = _constants(B * N, plan.backward)
    g_tau = v0.new_empty(grid) if learns else v0.new_zeros(1)
    lif_backward_kernel[grid](
        g_s, g_v_in, h, v0.contiguous(), tau, g_x, g_v, g_tau, T, B * N, alpha,
        LEARNS=learns, SURROGATE=surrogate, **constants,
    )  # fmt: skip
    return g_x, g_v, g_tau.sum()
