"""GPN in torch operators, as fast as they allow: what `backend="torch"` runs.

gpn_forward saves membranes and packed spikes. gpn_backward takes a chunk of time at a time, from
the last to the first, in three parts: _recompute finds the chunk's gates, h and v again, _serial
loops over its steps, and _add_products sums the gradients of the weights. Theta's part of g_z does
not depend on g_v, so that only the other gates' product is serial; everything else is one product
over the chunk, and sums over chunks run in one fixed order.

Runs in any floating dtype on any device and imports no Triton. Twin: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.kernels.tiles import WORD, is_half, saturate
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.surrogate import SURROGATES

# hoisted products cover at least this many rows of T B at a time, and 4 N, so that reading the
# weights and adding to their gradients does not outweigh the product; few enough to stay in a CPU's
# cache, and a bound on memory that does not grow with T
CHUNK_ROWS = 512


def _chunks(T: int, B: int, N: int, every: int) -> Iterator[tuple[int, int]]:
    """Time ranges of about CHUNK_ROWS rows, each a whole number of checkpoints."""
    steps = max(1, max(CHUNK_ROWS, 4 * N) // B)
    steps = max(every, steps // every * every)
    for start in range(0, T, steps):
        yield start, min(T, start + steps)


def _split(z: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The block [..., N] of every named gate in z [..., G N]."""
    return dict(zip(names, z.chunk(len(names), -1), strict=True)) if names else {}


def _complete(gates: dict[str, Tensor]) -> tuple[Tensor | float, ...]:
    """f, i, b, theta; a gate that is not there is its constant."""
    f = gates.get("f", 0.5)
    i = gates["i"] if "i" in gates else 1 - f
    return f, i, gates.get("b", 0.0), gates.get("theta", 1.0)


def _activate(z: Tensor | None, names: tuple[str, ...]) -> tuple[Tensor | float, ...]:
    """f, i, b, theta [..., N] of z [..., G N], which the gates overwrite.

    tanh(z) = 2 sigmoid(2 z) - 1: one sigmoid over all gates is the fastest form on a CPU.
    """
    gates = _split(z, names)
    if "b" in gates:
        gates["b"].mul_(2)
    if gates:
        z.sigmoid_()
    if "b" in gates:
        gates["b"].mul_(2).sub_(1)
    return _complete(gates)


def _next_v(h: Tensor, s: Tensor, b: Tensor | float, v_reset: Tensor) -> Tensor:
    """Membrane after the reset and the bypass."""
    return torch.lerp(h, v_reset, s) + b


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
    state, names = v0.dtype, GATES[variant]
    saved_dtype = torch.float16 if is_half(x.dtype) else x.dtype
    v_saved = x.new_empty((-(-T // every) if every else 0, B, N), dtype=saved_dtype)
    spikes = x.new_zeros((B, N), dtype=state) if mean else x.new_empty(x.shape)
    words = -(-T // WORD) if every else 0
    bits = torch.zeros((words, B, N), dtype=torch.int32, device=x.device)
    # half a word at a time as a float, which holds 16 bits exactly: one pass a step, not three
    half_word, half = torch.zeros_like(v0), WORD // 2
    v = v0
    # where nothing has to be cast, spikes and membranes are written to their place at once
    direct = not mean and x.dtype == state
    for start, stop in _chunks(T, B, N, 1):
        x_chunk = x[start:stop].to(state)
        z_chunk = F.linear(x_chunk, weight_x, bias) if names else None
        for t in range(start, stop):
            if every and t % every == 0:
                v_saved[t // every] = saturate(v, saved_dtype)
            z = None if z_chunk is None else z_chunk[t - start].addmm_(v, weight_v.t())
            f, i, b, theta = _activate(z, names)
            h = f * v + i * x_chunk[t - start]
            s = torch.ge(h, theta, out=spikes[t]) if direct else (h >= theta).to(state)
            if mean:
                spikes += s
            elif not direct:
                spikes[t] = s
            if every:
                half_word.add_(s, alpha=1 << t % half)
                if t % half == half - 1 or t == T - 1:
                    bits[t // WORD] |= half_word.to(torch.int32) << (t & half)
                    half_word.zero_()
            v = _next_v(h, s, b, v_reset)
    return (spikes / T if mean else spikes), v, v_saved, bits


@dataclass
class _Layer:
    """What all chunks of a backward share."""

    weight_x: Tensor | None
    weight_v: Tensor | None
    bias: Tensor | None
    v_reset: Tensor
    names: tuple[str, ...]
    every: int

    @cached_property
    def recomputed(self) -> tuple[str, ...]:
        """The gates that take a product again; b is not among them where every step is saved.

        It is what v[t+1] then holds beyond h after the reset: one product less in four.
        """
        return tuple(name for name in self.names if self.every > 1 or name != "b")

    @cached_property
    def recomputed_rows(self) -> tuple[Tensor, Tensor]:
        return self.rows(self.recomputed)

    def rows(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Rows of [weight_x, weight_v] [n N, 2 N] and of bias [n N] of the named gates."""
        N = self.weight_x.shape[1]
        at = [slice(N * k, N * (k + 1)) for k, name in enumerate(self.names) if name in names]
        weights = [torch.cat([self.weight_x[rows], self.weight_v[rows]], 1) for rows in at]
        return torch.cat(weights), torch.cat([self.bias[rows] for rows in at])


class _Chunk(NamedTuple):
    """Some steps of forward: x, v, s, h and the gates [n, B, N] (a gate that the variant lacks is
    a number [])."""

    x: Tensor
    v: Tensor
    s: Tensor
    xv: Tensor | None
    h: Tensor
    f: Tensor
    i: Tensor
    b: Tensor
    theta: Tensor


def _replay(layer: _Layer, v_saved: Tensor, x: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
    """v [n, B, N] at every step from the v saved every `every` steps.

    z comes without v's part; it is completed and overwritten by the gates. The saved spikes reset
    v, never recomputed ones: rounding could cross the threshold the other way, and a hard reset
    would make that a large error.
    """
    v = x.new_empty(x.shape)
    v_next = None
    for t in range(len(x)):
        v[t] = v_saved[t // layer.every] if t % layer.every == 0 else v_next
        z_t = None if z is None else z[t].addmm_(v[t], layer.weight_v.t())
        f, i, b, _ = _activate(z_t, layer.names)
        v_next = _next_v(f * v[t] + i * x[t], s[t], b, layer.v_reset)
    return v


def _recompute(
    layer: _Layer, x: Tensor, s: Tensor, v_saved: Tensor, v_after: Tensor | None
) -> _Chunk:
    """First part: gates, h and v of a chunk again.

    Args:
        x, s [n, B, N] and v_saved [ceil(n / every), B, N]: of the chunk.
        v_after [B, N]: v of the step after it. None: there is none, and the last step's b takes a
            product.
    """
    names, v_reset = layer.names, layer.v_reset
    if layer.every > 1:
        z = F.linear(x, layer.weight_x, layer.bias) if names else None
        v = _replay(layer, v_saved, x, s, z)
        gates = _complete(_split(z, names))
        xv = torch.cat([x, v], -1) if names else None
    else:
        v = v_saved
        xv = torch.cat([x, v], -1) if names else None
        gates = _activate(F.linear(xv, *layer.recomputed_rows) if names else None, layer.recomputed)
    one = v_reset.new_ones(())
    f, i, b, theta = (gate if isinstance(gate, Tensor) else one * gate for gate in gates)
    h = torch.addcmul(f * v, x, i)
    if layer.recomputed != names:
        if v_after is None:
            last_b = torch.tanh(F.linear(xv[-1], *layer.rows(("b",))))
            v_after = _next_v(h[-1], s[-1], last_b, v_reset)
        b = torch.cat([v[1:], v_after[None]]).sub_(torch.lerp(h, v_reset, s))
    return _Chunk(x, v, s, xv, h, f, i, b, theta)


def _serial(
    layer: _Layer, chunk: _Chunk, g_u: Tensor, g_v: Tensor, g_h: Tensor
) -> tuple[Tensor, Tensor]:
    """Second part: the loop over a chunk's steps, from the last to the first.

    Args:
        g_u [n, B, N]: g_s surrogate'(h - theta). g_v [B, N]: dL/dv after the chunk.
        g_h [n, B, N]: is written.
    Returns:
        g_z [n, B, G N], and dL/dv [B, N] of the chunk's first step.
    """
    names, (x, v, s, _, _, f, i, b, theta) = layer.names, chunk
    serial = [name for name in names if name != "theta"]
    S = len(serial) * x.shape[-1]
    # the factors of g_h and g_v first, then, step by step, g_z itself
    g_z = x.new_empty(*x.shape[:2], len(names) * x.shape[-1])
    slots = _split(g_z, names)
    if "f" in slots:
        difference = v if "i" in slots else v - x
        torch.mul(torch.addcmul(f, f, f, value=-1), difference, out=slots["f"])
    if "i" in slots:
        torch.mul(torch.addcmul(i, i, i, value=-1), x, out=slots["i"])
    if "b" in slots:
        torch.addcmul(g_v.new_ones(()), b, b, value=-1, out=slots["b"])
    rest = None
    if "theta" in slots:
        torch.mul(torch.addcmul(theta, theta, theta, value=-1), -g_u, out=slots["theta"])
        rest = g_z[..., S:] @ layer.weight_v[S:]

    keep = 1 - s
    for t in range(len(x) - 1, -1, -1):
        g_h_t = torch.addcmul(g_u[t], g_v, keep[t], out=g_h[t])
        f_t = f[t] if "f" in slots else f
        g_direct = g_h_t * f_t if rest is None else torch.addcmul(rest[t], g_h_t, f_t)
        for name in serial:
            slots[name][t].mul_(g_v if name == "b" else g_h_t)
        g_v = g_direct.addmm_(g_z[t, :, :S], layer.weight_v[:S]) if serial else g_direct
    return g_z, g_v


def _add_products(
    layer: _Layer, chunk: _Chunk, g_z: Tensor, g_w: Tensor, g_b: Tensor, g_x: Tensor
) -> None:
    """Third part: add a chunk to the gradients of [weight_x, weight_v] and bias, and weight_x^T g_z
    to g_x [n, B, N]."""
    rows = g_z.view(-1, g_z.shape[-1])
    g_w.addmm_(rows.t(), chunk.xv.view(len(rows), -1))
    g_b += rows.sum(0)
    g_x.view(len(rows), -1).addmm_(rows, layer.weight_x)


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
    """Backpropagate through gpn_forward; reference.gpn_adjoint has the formulas.

    Args:
        g_spikes [T, B, N], or [B, N] if mean; None: zero. g_v_final [B, N]; None: zero.
        bits, v_saved: as gpn_forward returned them.
        The rest as gpn_forward; the weights and v_reset in the dtype the gradients are computed in.
    Returns:
        g_x [T, B, N] of x's dtype, g_weight_x, g_weight_v, g_bias, g_v0 [B, N].
    """
    T, B, N = x.shape
    state, names = v_reset.dtype, GATES[variant]
    layer = _Layer(weight_x, weight_v, bias, v_reset, names, every)
    g_v = torch.zeros_like(v_reset) if g_v_final is None else g_v_final.to(state)
    g_x = x.new_empty(x.shape)
    g_w = bias.new_zeros(len(names) * N, 2 * N) if names else None
    g_b = torch.zeros_like(bias) if names else None
    if mean and g_spikes is not None:
        g_spikes = (g_spikes / T).to(state)

    for start, stop in reversed(list(_chunks(T, B, N, every))):
        x_c = x[start:stop].to(state).contiguous()
        s_c = unpack_spikes(bits, start, stop, state)
        saved = v_saved[start // every : -(-stop // every)].to(state)
        v_after = v_saved[stop].to(state) if every == 1 and stop < T else None
        chunk = _recompute(layer, x_c, s_c, saved, v_after)
        if g_spikes is None:
            g_u = torch.zeros_like(x_c)
        else:
            g_s = g_spikes if mean else g_spikes[start:stop].to(state)
            g_u = SURROGATES[surrogate].derivative(chunk.h.sub_(chunk.theta), alpha).mul_(g_s)
        # g_h, then g_x, straight into the result where the dtype allows
        g_x_c = g_x[start:stop] if g_x.dtype == state else torch.empty_like(x_c)
        g_z, g_v = _serial(layer, chunk, g_u, g_v, g_x_c)
        g_x_c *= chunk.i
        if names:
            _add_products(layer, chunk, g_z, g_w, g_b, g_x_c)
        if g_x.dtype != state:
            g_x[start:stop] = g_x_c
    g_wx, g_wv = (g_w[:, :N].contiguous(), g_w[:, N:].contiguous()) if names else (None, None)
    return g_x, g_wx, g_wv, g_b, g_v
