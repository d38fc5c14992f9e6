"""The specification as an operator: what `backend="torch"` runs, on devices without kernels.

gpn_forward runs reference.gpn_loop without autograd and saves membranes and packed spikes;
gpn_backward replays the steps between two saved membranes and hands them to reference.gpn_adjoint.
No formula stands here. It is as fast as a loop in Python: Apple's and AMD's GPUs, float64 on any
GPU, and Windows' GPUs have nothing better. Runs in any floating dtype and imports no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpn_triton.kernels.tiles import WORD, is_half, saturate
from gpn_triton.neurons.reference import gpn_adjoint, gpn_loop


def _pack_spikes(spikes: Tensor, start: int, bits: Tensor) -> None:
    """Add the spikes [n, B, N] of steps start, start + 1, ... to their words of bits."""
    for t, s in enumerate(spikes.int(), start):
        bits[t // WORD] |= s << t % WORD


def unpack_spikes(bits: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Read steps start..stop - 1 of spikes packed 32 steps a word.

    Args:
        bits [ceil(T / 32), B, N] int32: bit t % 32 of word t // 32 is the spike at step t.
    Returns:
        [stop - start, B, N] of dtype: 0 or 1.
    """
    spikes = torch.empty((stop - start, *bits.shape[1:]), dtype=dtype, device=bits.device)
    place = torch.arange(WORD, dtype=torch.int32, device=bits.device)[:, None, None]
    # word by word: gathering the word of every step costs as much as all the rest
    for word in range(start // WORD, -(-stop // WORD)):
        first, last = max(start - WORD * word, 0), min(stop - WORD * word, WORD)
        at = WORD * word - start
        spikes[at + first : at + last] = (bits[word] >> place[first:last]).bitwise_and_(1)
    return spikes


def gpn_forward(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    v0: Tensor,
    variant: str,
    every: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run GPN without autograd, saving what gpn_backward needs.

    Args:
        x, weight_x, weight_v, bias, v_reset, v0, variant: as reference.gpn_loop. x may be a half
            type; the weights, v_reset and v0 have the dtype the state is computed in.
        every: save v at t = 0, every, 2 every, ...; 0 saves nothing.
        mean: return the mean over time of the spikes [B, N] instead of the spikes.
    Returns:
        spikes [T, B, N] of x's dtype, or their mean [B, N] in the state's dtype;
        v_final [B, N]; v_saved [ceil(T / every), B, N] (half types are saved as float16);
        spike_bits [ceil(T / 32), B, N] int32: see unpack_spikes. Both are empty if every is 0.
    """
    T, B, N = x.shape
    state, v = v0.dtype, v0.clone()
    saved_dtype = torch.float16 if is_half(x.dtype) else x.dtype
    v_saved = x.new_empty((-(-T // every) if every else 0, B, N), dtype=saved_dtype)
    words = -(-T // WORD) if every else 0
    bits = torch.zeros((words, B, N), dtype=torch.int32, device=x.device)
    out = x.new_zeros((B, N), dtype=state) if mean else x.new_empty(x.shape)
    steps = every or WORD
    for start in range(0, T, steps):
        part = slice(start, start + steps)
        if every:
            v_saved[start // every] = saturate(v, saved_dtype)
        s, v = gpn_loop(x[part].to(state), weight_x, weight_v, bias, v_reset, v, variant)
        if every:
            _pack_spikes(s, start, bits)
        if mean:
            out += s.sum(0)
        else:
            out[part] = s
    return out / T if mean else out, v, v_saved, bits


def gpn_backward(
    g_spikes: Tensor | None,
    g_v_final: Tensor | None,
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    bits: Tensor,
    v_saved: Tensor,
    variant: str,
    surrogate: str,
    alpha: float,
    every: int,
    mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Backpropagate through gpn_forward.

    Args:
        g_spikes [T, B, N], or [B, N] if mean; None: zero. g_v_final [B, N]; None: zero.
        bits, v_saved: as gpn_forward returned them. The saved spikes reset v in the replay, never
            recomputed ones: rounding could cross the threshold the other way.
        The rest as gpn_forward; the weights and v_reset in the dtype the gradients are computed in.
    Returns:
        g_x [T, B, N] of x's dtype, g_weight_x, g_weight_v, g_bias, g_v0 [B, N].
    """
    T, state, weights = len(x), v_reset.dtype, (weight_x, weight_v, bias)
    g_v = torch.zeros_like(v_reset) if g_v_final is None else g_v_final.to(state)
    g_x = x.new_empty(x.shape)
    g_weights = [None if w is None else torch.zeros_like(w) for w in weights]
    if g_spikes is None or mean:
        g_s = torch.zeros_like(v_reset) if g_spikes is None else g_spikes.to(state) / T
        g_spikes = g_s.expand(x.shape)
    for start in reversed(range(0, T, every)):
        part = slice(start, min(T, start + every))
        x_c, s_c = x[part].to(state), unpack_spikes(bits, part.start, part.stop, state)
        v = [v_saved[start // every].to(state)]
        for t in range(len(x_c) - 1):
            now = slice(t, t + 1)
            v.append(gpn_loop(x_c[now], *weights, v_reset, v[t], variant, reset_mask=s_c[now])[1])
        cotangents = g_spikes[part].to(state), g_v
        g_x[part], *g_w, g_v = gpn_adjoint(
            x_c, weights, torch.stack(v), s_c, cotangents, variant, surrogate, alpha
        )
        for total, g in zip(g_weights, g_w, strict=True):
            if total is not None:
                total += g
    return g_x, *g_weights, g_v
