"""LIF, PLIF and recurrent current-based LIF on a CPU, compiled by Numba, forward and backward.

    LIF         h[t] = v[t] + (x[t] - v[t]) / tau
    CuBa-LIF    j[t+1] = current_decay j[t] + x[t] + weight s[t-1] + bias
                h[t] = membrane_decay v[t] + (1 - membrane_decay) j[t+1]
    both        s[t] = 1 if h[t] >= 1 else 0              (Heaviside(0) = 1; s is not differentiated
                v[t+1] = h[t] (1 - s[t])                   in the reset)

and with g_v[t] = dL/dv[t], g_j alike, given for t = T, sg = surrogate'(h - 1), from T - 1 to 0:

    LIF         g_h = g_v[t+1] (1 - s) + g_s[t] sg        g_v[t] = g_h - g_x[t]
                g_x[t] = g_h / tau                        g_tau = -sum g_x[t] (h[t] - v[t])
    CuBa-LIF    g_h = g_v[t+1] (1 - s) + (g_s[t] + weight^T g_x[t+1]) sg
                g_x[t] = (1 - membrane_decay) g_h + g_j[t+1]
                g_j[t] = current_decay g_x[t]             g_v[t] = membrane_decay g_h
                g_weight = sum g_x[t] s[t-1]^T            g_bias = sum g_x[t]

Grid. LIF: a thread owns TILE neurons, of whatever samples they are, and runs all steps. CuBa-LIF: a
thread owns a tile of rows and runs all steps of a chunk; its two serial products are cpu.product's,
so that a row's sums run over the depth in order. Spikes, states, g_x and the gradients of the first
state are the same bits whatever else is in the batch and on any number of threads. So is g_tau for
a batch: each neuron's sum over time, then all of them in order; the weight's gradient is
cpu.weight_gradient_kernel's.

Layout, all contiguous. x, spikes, h, g_s, g_x [steps, B, N]; weight [N, N]; states [B, N]; bits
[ceil(T / 32), B, N] int32. Forward holds h and bits for backward, which needs no x; the reset
follows the bits, since a half type may have rounded h over the threshold. Everything is computed in
the state's dtype, float32 or float64; half types are storage, cast a chunk at a time.

Twins: reference.lif_loop and reference.cuba_lif_loop, and autograd's backward of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpn_triton.kernels import cpu, pointwise_cpu
from gpn_triton.kernels.cpu import (
    PANEL,
    ROWS,
    flat,
    kernel,
    multiply,
    pack,
    row,
    run,
    take,
    weight_gradient_kernel,
)
from gpn_triton.kernels.gpn_cpu import choose
from gpn_triton.kernels.pointwise_cpu import (
    SURROGATES,
    add_tau_gradient,
    below_threshold,
    charge,
    charge_adjoint,
    copy,
    count,
    fire,
    leak,
    leak_adjoint,
    reset,
    spike_of,
    start_z,
    surrogate_derivative,
)
from gpn_triton.kernels.tiles import WORD, saturate

# neurons that a thread of LIF takes at a time: their rows of a step stay in the first cache
TILE = 1024
# elements of a chunk of time that half types are cast in
CHUNK = 1 << 18


@kernel(pointwise_cpu.__file__)
def lif_forward_kernel(counter, x, tau, v, spikes, h, bits, start, steps, E, save):
    """Steps start..start + steps - 1 of E = B N neurons; x, spikes, h belong to the chunk."""
    nothing, h_own, none = steps < 0, np.empty(TILE, x.dtype), np.empty(0, x.dtype)
    while True:
        first = take(counter) * TILE
        if first >= E:
            break
        n, own = TILE if first + TILE < E else E - first, row(v, first)
        for k in range(steps):
            at, t = k * E + first, start + k
            h_k, s = row(h, at) if save else h_own, row(spikes, at)
            leak(row(x, at), own, tau, n, h_k)
            fire(h_k, n, own, s)
            count(s, none, row(bits, t // WORD * E + first), t, n, nothing, save)


@kernel(pointwise_cpu.__file__)
def lif_backward_kernel(
    counter, g_s, h, before, bits, tau, g_v, g_x, g_tau, start, steps, E, learns, name, alpha
):  # fmt: skip
    """Steps start + steps - 1 down to start. before [E]: the membrane that step start began with.

    g_v and, where tau learns, g_tau [E] are read and written.
    """
    slope, s, v = np.empty(TILE, h.dtype), np.empty(TILE, h.dtype), np.empty(TILE, h.dtype)
    while True:
        first = take(counter) * TILE
        if first >= E:
            break
        n, own = TILE if first + TILE < E else E - first, row(g_v, first)
        for k in range(steps - 1, -1, -1):
            at, t = k * E + first, start + k
            h_k, g_x_k = row(h, at), row(g_x, at)
            below_threshold(h_k, n, slope)
            surrogate_derivative(n, name, alpha, slope)
            spike_of(row(bits, t // WORD * E + first), t, n, s)
            leak_adjoint(row(g_s, at), slope, s, tau, n, own, g_x_k)
            if learns:
                if k > 0:
                    spike_of(row(bits, (t - 1) // WORD * E + first), t - 1, n, s)
                    reset(row(h, at - E), s, n, v)
                add_tau_gradient(
                    g_x_k, h_k, v if k > 0 else row(before, first), n, row(g_tau, first)
                )


@kernel(pointwise_cpu.__file__)
def cuba_lif_forward_kernel(
    counter, x, weight, bias, current, v, last, spikes, h, bits,
    start, steps, B, N, save, tile, current_decay, membrane_decay,
):  # fmt: skip
    """Steps start..start + steps - 1; current, v and last [B, N] are the state, read and written.

    weight is packed in panels; x, spikes, h belong to the chunk.
    """
    width, room = -(-N // PANEL) * PANEL, -(-tile // ROWS) * ROWS
    z, h_own, none = np.empty(room * width, x.dtype), np.empty(N, x.dtype), np.empty(0, x.dtype)
    zero, one, nothing, panels = np.int64(0), np.int64(1), steps < 0, width // PANEL
    while True:
        first = take(counter) * tile
        if first >= B:
            break
        rows = tile if first + tile < B else B - first
        for k in range(steps):
            t = start + k
            for r in range(room):
                start_z(row(z, r * width), bias, N, width, one)
            multiply(
                z, width, zero, row(last, first * N), N, zero, one, rows, weight, zero, panels, N
            )
            for r in range(rows):
                at, b_at = (k * B + first + r) * N, (first + r) * N
                h_k, s, v_r = row(h, at) if save else h_own, row(spikes, at), row(v, b_at)
                charge(
                    row(x, at), row(z, r * width), current_decay, membrane_decay, N,
                    row(current, b_at), v_r, h_k,
                )  # fmt: skip
                fire(h_k, N, v_r, s)
                copy(s, row(last, b_at), N)
                count(s, none, row(bits, t // WORD * B * N + b_at), t, N, nothing, save)


@kernel(pointwise_cpu.__file__)
def cuba_lif_backward_kernel(
    counter, g_s, h, last, bits, weight_t, g_current, g_v, g_fed_back, g_x, s_before,
    start, steps, B, N, tile, current_decay, membrane_decay, name, alpha,
):  # fmt: skip
    """Steps start + steps - 1 down to start; g_current, g_v, g_fed_back are read and written.

    weight_t is the transpose, packed in panels. last [B, N]: the spikes before the very first step.
    s_before [steps, B, N] is written: the spikes that each step's product took.
    """
    width, room = -(-N // PANEL) * PANEL, -(-tile // ROWS) * ROWS
    slope, s, fed_back = np.empty(N, h.dtype), np.empty(N, h.dtype), np.zeros(room * width, h.dtype)
    zero, one, panels = np.int64(0), np.int64(1), width // PANEL
    while True:
        first = take(counter) * tile
        if first >= B:
            break
        rows = tile if first + tile < B else B - first
        for r in range(rows):
            copy(row(g_fed_back, (first + r) * N), row(fed_back, r * width), N)
        for k in range(steps - 1, -1, -1):
            t, k_at = start + k, (k * B + first) * N
            for r in range(rows):
                at, b_at = k_at + r * N, (first + r) * N
                h_k, own = row(h, at), row(fed_back, r * width)
                below_threshold(h_k, N, slope)
                surrogate_derivative(N, name, alpha, slope)
                spike_of(row(bits, t // WORD * B * N + b_at), t, N, s)
                charge_adjoint(
                    row(g_s, at), own, slope, s, current_decay, membrane_decay, N,
                    row(g_current, b_at), row(g_v, b_at), row(g_x, at),
                )  # fmt: skip
                if t > 0:
                    word = row(bits, (t - 1) // WORD * B * N + b_at)
                    spike_of(word, t - 1, N, row(s_before, at))
                else:
                    copy(row(last, b_at), row(s_before, at), N)
            for j in range(len(fed_back)):
                fed_back[j] = 0
            multiply(
                fed_back, width, zero, row(g_x, k_at), N, zero, one, rows, weight_t, zero, panels, N
            )
        for r in range(rows):
            copy(row(fed_back, r * width), row(g_fed_back, (first + r) * N), N)


def lif_is_compiled() -> bool:
    """Whether a layer of LIF finds its kernels compiled."""
    return all(map(cpu.is_compiled, (lif_forward_kernel, lif_backward_kernel)))


def cuba_lif_is_compiled() -> bool:
    """Whether a layer of CuBa-LIF finds its kernels compiled."""
    return all(map(cpu.is_compiled, (cuba_lif_forward_kernel, cuba_lif_backward_kernel)))


def _number(state: torch.dtype) -> type:
    return np.float64 if state == torch.float64 else np.float32


def _outputs(x: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """spikes, h and bits, to be written; the latter two are empty unless they are saved."""
    T, B, N = x.shape
    steps, words = (T, -(-T // WORD)) if save else (0, 0)
    bits = x.new_empty((words, B, N), dtype=torch.int32)
    return x.new_empty(x.shape), x.new_empty((steps, B, N)), bits


def _copy(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format)


def _in(a: Tensor, start: int, stop: int, like: Tensor) -> np.ndarray:
    """Steps of a tensor in the state's dtype, like `like`'s."""
    return flat(a[start:stop].to(like.dtype), like)


class _Out:
    """Steps of a tensor that a kernel writes in the state's dtype, then cast to the tensor's."""

    def __init__(self, a: Tensor, start: int, stop: int, like: Tensor):
        self.stored = a[start:stop]
        self.own = self.stored
        if a.dtype != like.dtype:
            self.own = torch.empty_like(self.stored, dtype=like.dtype)
        self.flat = flat(self.own, like)

    def keep(self) -> None:
        if self.own is not self.stored:
            self.stored.copy_(saturate(self.own, self.stored.dtype))


def lif_forward(x: Tensor, v0: Tensor, tau: Tensor, save: bool) -> tuple[Tensor, ...]:
    """Run LIF forward.

    Args:
        x [T, B, N] float64, float32, float16 or bfloat16: synaptic current.
        v0 [B, N]: membrane at t = 0, float64 if x is, else float32; tau []: of the same dtype.
        save: whether backward will need h and bits, which are empty else.
    Returns:
        spikes [T, B, N] of x's dtype; v_final [B, N]; h [T, B, N] of x's dtype; bits
        [ceil(T / 32), B, N] int32.
    """
    (T, B, N), v = x.shape, _copy(v0)
    E, threads = B * N, torch.get_num_threads()
    spikes, h, bits = _outputs(x, save)
    # nothing has to be cast: one call for all steps
    chunk = T if x.dtype == v.dtype and x.is_contiguous() else max(1, CHUNK // E)
    for start in range(0, T, chunk):
        stop = min(T, start + chunk)
        outs = [_Out(a, start, stop, v) for a in (spikes, h)]
        run(
            lif_forward_kernel, threads, -(-E // TILE), _in(x, start, stop, v),
            _number(v.dtype)(tau.item()), flat(v, v), *(out.flat for out in outs),
            bits.view(-1).numpy(), start, stop - start, E, save,
        )  # fmt: skip
        for out in outs:
            out.keep()
    return spikes, v, h, bits


def lif_backward(
    g_spikes: Tensor | None,
    g_v_final: Tensor | None,
    h: Tensor,
    v0: Tensor,
    tau: Tensor,
    bits: Tensor,
    learns: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backpropagate through lif_forward.

    Args:
        g_spikes [T, B, N], g_v_final [B, N]: None is zero. h, bits: as lif_forward returned them.
        v0, tau: as it had them. learns: whether tau's gradient is wanted. surrogate, alpha: see
            surrogate.SURROGATES.
    Returns:
        g_x [T, B, N] of h's dtype, g_v0 [B, N], g_tau [] (0 unless tau learns).
    """
    (T, B, N), state = h.shape, v0.dtype
    E, threads, number = B * N, torch.get_num_threads(), _number(state)
    g_v = torch.zeros_like(v0) if g_v_final is None else g_v_final.to(state)
    g_v, g_x, words = _copy(g_v), h.new_empty(h.shape), bits.contiguous()
    if g_spikes is None:
        g_spikes = h.new_zeros(()).expand(h.shape)
    g_tau = v0.new_zeros(E if learns else 0)
    direct = h.dtype == state and g_spikes.dtype == state and g_spikes.is_contiguous()
    chunk = T if direct else max(1, CHUNK // E)
    for start in reversed(range(0, T, chunk)):
        stop, out = min(T, start + chunk), _Out(g_x, start, min(T, start + chunk), g_v)
        before = v0
        if start:
            fired = (words[(start - 1) // WORD] >> (start - 1) % WORD) & 1
            before = h[start - 1].to(state) * (1 - fired)
        run(
            lif_backward_kernel, threads, -(-E // TILE), _in(g_spikes, start, stop, g_v),
            _in(h, start, stop, g_v), flat(before, g_v), words.view(-1).numpy(),
            number(tau.item()), flat(g_v, g_v), out.flat, flat(g_tau, g_v),
            start, stop - start, E, learns, SURROGATES.index(surrogate), number(alpha),
        )  # fmt: skip
        out.keep()
    # numpy adds up in one order on any number of threads
    total = g_tau.numpy().sum(dtype=np.float64)
    return g_x, g_v, torch.as_tensor(total).to(state)


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
) -> tuple[Tensor, ...]:
    """Run CuBa-LIF forward.

    Args:
        x [T, B, N] float64, float32, float16 or bfloat16: input.
        weight [N, N], bias [N]: from the spikes of the step before. current, v, last [B, N]: the
            state at t = 0. These are float64 if x is, else float32.
        current_decay, membrane_decay: see the head of this file. save: as lif_forward.
    Returns:
        spikes [T, B, N] of x's dtype; current and v [B, N] after the last step; h and bits as
        lif_forward.
    """
    (T, B, N), threads, number = x.shape, torch.get_num_threads(), _number(v.dtype)
    tile, _, chunk = choose(B, N, threads, every=1)
    current, v, last = _copy(current), _copy(v), _copy(last)
    spikes, h, bits = _outputs(x, save)
    fixed = (pack(weight, 1, v), flat(bias, v), *(flat(a, v) for a in (current, v, last)))
    chunk = T if x.dtype == v.dtype and x.is_contiguous() else chunk
    for start in range(0, T, chunk):
        stop = min(T, start + chunk)
        outs = [_Out(a, start, stop, v) for a in (spikes, h)]
        run(
            cuba_lif_forward_kernel, threads, -(-B // tile), _in(x, start, stop, v), *fixed,
            *(out.flat for out in outs), bits.view(-1).numpy(), start, stop - start, B, N, save,
            tile, number(current_decay), number(membrane_decay),
        )  # fmt: skip
        for out in outs:
            out.keep()
    return spikes, current, v, h, bits


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
) -> tuple[Tensor, ...]:
    """Backpropagate through cuba_lif_forward.

    Args:
        g_spikes [T, B, N], g_current, g_v [B, N]: of what it returned; None is zero.
        h, bits: as it returned them. weight, last and the decays: as it had them.
        surrogate, alpha: see surrogate.SURROGATES.
    Returns:
        g_x [T, B, N] of h's dtype, g_weight [N, N], g_bias [N], and of the state at t = 0
        g_current, g_v, g_last [B, N].
    """
    (T, B, N), state, threads = h.shape, weight.dtype, torch.get_num_threads()
    tile, _, chunk = choose(B, N, threads, every=1)
    number, words = _number(state), bits.contiguous().view(-1).numpy()
    if g_spikes is None:
        g_spikes = h.new_zeros(()).expand(h.shape)
    g_current, g_v, g_last = (
        last.new_zeros(B, N) if g is None else _copy(g.to(state)) for g in (g_current, g_v, None)
    )
    g_x = h.new_empty(h.shape)
    g_weight, g_bias = weight.new_zeros(N, N), weight.new_zeros(N)
    weight_t, before = pack(weight.t(), 1, g_v), g_v.new_empty(min(T, chunk), B, N)
    share = min(256, max(64, -(-N // (ROWS * threads)) * ROWS))
    for start in reversed(range(0, T, chunk)):
        stop, out = min(T, start + chunk), _Out(g_x, start, min(T, start + chunk), g_v)
        run(
            cuba_lif_backward_kernel, threads, -(-B // tile), _in(g_spikes, start, stop, g_v),
            _in(h, start, stop, g_v), flat(last, g_v), words, weight_t,
            *(flat(a, g_v) for a in (g_current, g_v, g_last)), out.flat, flat(before, g_v),
            start, stop - start, B, N, tile, number(current_decay), number(membrane_decay),
            SURROGATES.index(surrogate), number(alpha),
        )  # fmt: skip
        run(
            weight_gradient_kernel, threads, -(-N // share), out.flat, flat(before, g_v),
            *(flat(a, g_v) for a in (None, g_weight, None, g_bias)),
            (stop - start) * B, N, N, N, share,
        )  # fmt: skip
        out.keep()
    return g_x, g_weight, g_bias, g_current, g_v, g_last
