"""GPN on a CPU, compiled by Numba: the recurrence and its adjoint, each as one compiled loop.

    z[t]   = weight_v v[t] + weight_x x[t] + bias
    h[t]   = f v[t] + i x[t]
    s[t]   = 1 if h[t] >= theta else 0                    (Heaviside(0) = 1; s is not differentiated
    v[t+1] = (1 - s[t]) h[t] + s[t] v_reset + b            in the reset)

and with g_v[t] = dL/dv[t], g_v[T] = dL/dv_final, sg = surrogate'(h - theta), t from T - 1 to 0:

    g_h    = g_v[t+1] (1 - s) + g_s[t] sg
    g_z    = [ g_h v f(1-f), g_h x i(1-i), g_v[t+1] (1 - b^2), -g_s[t] sg theta(1-theta) ]
    g_v[t] = g_h f + weight_v^T g_z                       <- the only serial product
    g_x[t] = g_h i + weight_x^T g_z

Grid. A thread owns a tile of rows of the batch and runs all steps of a chunk of time; tiles are
handed out one by one. A tile takes BLOCK rows x steps at a time: the product with weight_x, and
backward those of z with weight_v and of g_x, over the whole block, the serial product step by step.
Every product is cpu.product: four rows by one panel of PANEL neurons in registers, weights packed
in panels. A row's sums thus run over the depth in order, whatever else is in the batch, in the tile
or on the other threads: spikes, v, g_x and g_v0 are the same bits, and spikes and v are so whatever
parts a sequence comes in. The weights' gradients are cpu.weight_gradient_kernel's products over a
chunk of time, the same bits on any number of threads. torch multiplies nothing here: its product
is slower for few rows, its bits may depend on the number of rows, and its threads spin for
milliseconds after each on the cores that the next kernel wants (T=1600 B=16 N=64 on two busy cores:
518 ms of processor time with torch's weight gradients, 280 without; one thread 270).

Layout, all contiguous. x, spikes, g_s, g_x [steps, B, N]; weights [G N, N] in the order f, i, b,
theta; v, v_reset, g_v [B, N]; v_saved [ceil(T / every), B, N]; bits [ceil(T / 32), B, N] int32;
g_z [steps, B, G N]. Everything here is of the state's dtype, float32 or float64; half types are
storage, cast a chunk at a time. z lives in a tile's scratch memory only. Backward recomputes z from
the saved v, or replays v with the saved spikes (never recomputed ones), and where every v is saved,
takes b as what v[t+1] holds beyond the reset, which saves a quarter of that product.
lengths [B] int64: from step lengths[b] on sample b keeps its v, does not spike and has no gradient
but g_v's, which passes through.

In float32, exp is a polynomial and tanh a rational function, within 3 ulp; in float64 both are
libm's. NaN and infinity are never assumed away.

Source: arXiv 2412.01087. Twin: reference.gpn_loop and reference.gpn_adjoint.
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
from gpn_triton.kernels.pointwise_cpu import (
    SURROGATES,
    activate,
    adjoint,
    constants,
    copy,
    count,
    distance,
    fill,
    gate,
    input_gate,
    replay,
    start_z,
    step,
    surrogate_derivative,
)
from gpn_triton.kernels.tiles import WORD, own_steps, saturate


@kernel(pointwise_cpu.__file__)
def gpn_forward_kernel(
    counter, x, weight_x, weight_v, bias, v_reset, lengths, v, v_saved, spikes, bits, counts,
    start, steps, B, N, G, every, mean, tile, block, p_f, p_i, p_b, p_t,
):  # fmt: skip
    """Steps start..start + steps - 1 of x, for the tiles this thread takes; every 0 saves nothing.

    weight_x, weight_v are packed in panels, all arrays flat. p_f, p_i, p_b, p_t: the gate's place
    among the G gates, or -1. spikes belongs to the chunk, v_saved to the chunk's saved steps, bits
    to all steps.
    """
    width = -(-N // PANEL) * PANEL
    depth, room = G * width, -(-tile // ROWS) * ROWS
    panels = depth // PANEL
    z = np.empty(block * room * depth, x.dtype)
    own, s = np.zeros(room * N, x.dtype), np.empty(N, x.dtype)
    fixed, i_own = constants(N, x), np.empty(N, x.dtype)
    # as variables: a function is compiled again for a literal
    zero, one, nothing, nought = np.int64(0), np.int64(1), every < 0, x.dtype.type(0)
    while True:
        first = take(counter) * tile
        if first >= B:
            break
        rows = tile if first + tile < B else B - first
        copy(row(v, first * N), own, rows * N)
        for t_block in range(0, steps, block):
            n = block if t_block + block < steps else steps - t_block
            chunk_at = (t_block * B + first) * N
            if G > 0:
                for r in range(n * room):
                    start_z(row(z, r * depth), bias, N, width, G)
                multiply(
                    z, depth, room * depth, row(x, chunk_at), N, B * N,
                    n, rows, weight_x, zero, panels, N,
                )  # fmt: skip
            for k in range(n):
                t = start + t_block + k
                if every > 0 and t % every == 0:
                    at = (t // every - -(-start // every)) * B + first
                    copy(own, row(v_saved, at * N), rows * N)
                z_k = row(z, k * room * depth)
                if G > 0:
                    multiply(
                        z_k, depth, zero, own, N, zero, one, rows, weight_v, zero, panels, N
                    )  # fmt: skip
                for r in range(rows):
                    z_r = row(z_k, r * depth)
                    at, b_at = chunk_at + (k * B + r) * N, (first + r) * N
                    s_r = s if mean else row(spikes, at)
                    if t < lengths[first + r]:
                        activate(z_r, N, width, G, p_b, nothing)
                        f = gate(z_r, p_f * width, p_f, fixed, zero)
                        i = gate(z_r, p_i * width, p_i, i_own, zero)
                        if p_i < 0:
                            input_gate(f, i, N)
                        step(
                            f, i, gate(z_r, p_b * width, p_b, fixed, 2 * N),
                            gate(z_r, p_t * width, p_t, fixed, 3 * N),
                            row(x, at), row(v_reset, b_at), N, row(own, r * N), s_r,
                        )  # fmt: skip
                    else:
                        fill(s_r, nought, N)
                    word = ((t // WORD) * B + first + r) * N
                    count(s_r, row(counts, b_at), row(bits, word), t, N, mean, every > 0)
        copy(own, row(v, first * N), rows * N)


@kernel(pointwise_cpu.__file__)
def gpn_backward_kernel(
    counter, g_s, scale, x, v, weight_x, weight_v, weight_xt, weight_vt, bias, v_reset, lengths,
    bits, g_v, g_z, g_x,
    start, steps, B, N, G, every, per_step, known, tile, block, name, alpha, p_f, p_i, p_b, p_t,
):  # fmt: skip
    """Steps start + steps - 1 down to start, for the tiles this thread takes.

    x, g_s, g_z, g_x, v belong to the chunk; v is read, and where every > 1 its steps between two
    saved ones are written. g_s is one [B, N] unless per_step. known: for so many steps v[t+1] is
    there to take b from. weight_xt, weight_vt are the transposes, packed in panels.
    """
    width = -(-N // PANEL) * PANEL
    depth, room = G * width, -(-tile // ROWS) * ROWS
    panels, n_panels, z_row = depth // PANEL, width // PANEL, G * N + PANEL
    z = np.empty(block * room * depth, x.dtype)
    g_own, g_x_own = np.zeros(room * width, x.dtype), np.zeros(block * room * width, x.dtype)
    g_u, unused = np.empty(N, x.dtype), np.empty(4 * N, x.dtype)
    of_f, nought = x.dtype.type(1 if p_f >= 0 and p_i < 0 else 0), x.dtype.type(0)
    fixed, i_own = constants(N, x), np.empty(N, x.dtype)
    zero, one = np.int64(0), np.int64(1)
    b_start, b_stop = panels, panels
    if p_b >= 0 and known > 0:
        b_start, b_stop = p_b * n_panels, (p_b + 1) * n_panels
    while True:
        first = take(counter) * tile
        if first >= B:
            break
        rows = tile if first + tile < B else B - first
        for r in range(rows):
            copy(row(g_v, (first + r) * N), row(g_own, r * width), N)
        for t_block in range((steps - 1) // block * block, -1, -block):
            n = block if t_block + block < steps else steps - t_block
            chunk_at = (t_block * B + first) * N
            if G > 0:
                for r in range(n * room):
                    start_z(row(z, r * depth), bias, N, width, G)
                for turn in range(4):
                    a, w = (x, weight_x) if turn < 2 else (v, weight_v)
                    if turn >= 2 and every > 1:
                        break
                    # where v[t+1] is known b is found without its panels, between the others
                    multiply(
                        z, depth, room * depth, row(a, chunk_at), N, B * N, n, rows, w,
                        b_stop if turn % 2 else zero, panels if turn % 2 else b_start, N,
                    )  # fmt: skip
                    if turn % 2 and t_block + n > known:
                        # only the very last v[t+1] can be missing
                        multiply(
                            row(z, (n - 1) * room * depth), depth, zero,
                            row(a, chunk_at + (n - 1) * B * N), N, zero,
                            one, rows, w, b_start, b_stop, N,
                        )  # fmt: skip
            # forward over the block for the gates, backward for the gradients
            for turn in range(2 * n):
                back = turn >= n
                k = 2 * n - 1 - turn if back else turn
                t, k_at = start + t_block + k, chunk_at + k * B * N
                z_k = row(z, k * room * depth)
                if every > 1 and G > 0 and not back:
                    multiply(
                        z_k, depth, zero, row(v, k_at), N, zero,
                        one, rows, weight_v, zero, panels, N,
                    )  # fmt: skip
                find_b = p_b >= 0 and t_block + k < known
                replays = (t_block + k + 1) % every != 0 and t_block + k + 1 < steps
                for r in range(rows):
                    z_r, at, b_at = row(z_k, r * depth), k_at + r * N, (first + r) * N
                    bits_r = row(bits, (t // WORD) * B * N + b_at)
                    f = gate(z_r, p_f * width, p_f, fixed, zero)
                    i = gate(z_r, p_i * width, p_i, i_own, zero)
                    b = gate(z_r, p_b * width, p_b, fixed, 2 * N)
                    theta = gate(z_r, p_t * width, p_t, fixed, 3 * N)
                    x_r, v_r, reset_r = row(x, at), row(v, at), row(v_reset, b_at)
                    if not back:
                        activate(z_r, N, width, G, p_b, find_b)
                    if p_i < 0:
                        input_gate(f, i, N)
                    z_at, ended = at // N * z_row, t >= lengths[first + r]
                    if not back:
                        if ended and replays:
                            copy(v_r, row(v_r, B * N), N)
                        elif replays or find_b:
                            v_next = row(v_r, B * N)
                            replay(f, i, b, x_r, v_r, v_next, reset_r, bits_r, t, N, find_b)
                        continue
                    if ended:
                        # g_v[t] is g_v[t+1]
                        fill(row(g_z, z_at), nought, G * N)
                        fill(row(g_x_own, (k * room + r) * width), nought, N)
                        continue
                    distance(f, i, theta, x_r, v_r, N, g_u)
                    surrogate_derivative(N, name, alpha, g_u)
                    adjoint(
                        f, i, b, theta, x_r, v_r, row(g_s, at if per_step else b_at), bits_r, t,
                        scale, of_f, N, g_u, row(g_own, r * width),
                        gate(g_z, z_at + p_f * N, p_f, unused, zero),
                        gate(g_z, z_at + p_i * N, p_i, unused, N),
                        gate(g_z, z_at + p_b * N, p_b, unused, 2 * N),
                        gate(g_z, z_at + p_t * N, p_t, unused, 3 * N),
                        row(g_x_own, (k * room + r) * width),
                    )  # fmt: skip
                if back and G > 0:
                    multiply(
                        g_own, width, zero, row(g_z, k_at // N * z_row), z_row, zero,
                        one, rows, weight_vt, zero, n_panels, G * N,
                    )  # fmt: skip
            if G > 0:
                multiply(
                    g_x_own, width, room * width, row(g_z, chunk_at // N * z_row), z_row, B * z_row,
                    n, rows, weight_xt, zero, n_panels, G * N,
                )  # fmt: skip
            for k in range(n):
                for r in range(rows):
                    g_x_r = row(g_x, chunk_at + (k * B + r) * N)
                    copy(row(g_x_own, (k * room + r) * width), g_x_r, N)
        for r in range(rows):
            copy(row(g_own, r * width), row(g_v, (first + r) * N), N)


def choose(B: int, N: int, threads: int, every: int) -> tuple[int, int, int]:
    """How the work is cut: rows of a tile, steps of a block, steps of a chunk of time.

    Milliseconds are processor time of forward and backward on one Zen core (L2 512 KB, L3 8 MB,
    AVX2; other work on the machine), float32. Torch's product per step around the cell is nowhere
    faster there (reference's form takes 1.1 to 1.5 times ours at N = 512, B = 16 and 128).
    A block and a chunk are whole stretches between saved membranes: their memory grows with every.
    """
    # weights that fit the second cache are read by 8 to 64 rows alike (T=50 B=256 N=128: 435 to
    # 452); wider ones want as many rows as there are (T=4 B=128 N=512: 301 at 16 rows, 291 at 32,
    # 271 at 64, 262 at 128; T=4 B=256 N=1024: 2291 at 32, 2108 at 128)
    share = -(-B // threads)
    tile = min(32 if N <= 192 else 128, -(-share // ROWS) * ROWS)
    # weight_x is read once for 64 rows (T=4 B=16 N=1024: 237 at 16, 222 at 32, 211 at 64)
    block = max(1, 64 // tile)
    block = max(every, block // every * every)
    # the weights' gradients are read and written once a chunk, and g_z should stay in the third
    # cache (T=800 B=16 N=64: 134 at 512 rows, 127 at 2048). Neither threads nor tile decide, since
    # the order of these sums is the chunk's
    chunk = max(1, max(512, N, (1 << 17) // N) // B)
    return tile, block, max(every, chunk // every * every)


def is_compiled() -> bool:
    """Whether a layer's first call finds its kernels compiled; else it takes some 10 s longer."""
    return all(map(cpu.is_compiled, (gpn_forward_kernel, gpn_backward_kernel)))


def _places(gates: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(gates.index(g) if g in gates else -1 for g in ("f", "i", "b", "theta"))


def _ends(lengths: Tensor | None, T: int, B: int) -> np.ndarray:
    """The step [B] int64 at which each sequence has ended."""
    return np.full(B, T) if lengths is None else lengths.contiguous().numpy()


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
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run GPN forward; arguments and results as recurrence_torch.gpn_forward.

    Args:
        x [T, B, N] float64, float32, float16 or bfloat16: synaptic current.
        weight_x, weight_v [G N, N], bias [G N]: gate weights; None without gates.
        v_reset, v0 [B, N]. These and the weights are float64 if x is, else float32.
        lengths [B] int64: steps of each sequence; None: T.
        gates: reference.GATES[variant].
        every: save v every so many steps; 0 saves nothing. mean: return the mean spike only.
    Returns:
        spikes [T, B, N] of x's dtype, or their mean [B, N] in the state's dtype; v_final [B, N];
        v_saved [ceil(T / every), B, N] (half types are saved as float16) and spike_bits
        [ceil(T / 32), B, N] int32, empty if every is 0.
    """
    T, B, N = x.shape
    G, state, threads = len(gates), v0.dtype, torch.get_num_threads()
    tile, block, chunk = choose(B, N, threads, every=1)
    direct = x.dtype == state
    saved_dtype = state if direct else torch.float16
    v_saved = x.new_empty((-(-T // every) if every else 0, B, N), dtype=saved_dtype)
    bits = x.new_empty((-(-T // WORD) if every else 0, B, N), dtype=torch.int32)
    counts = torch.zeros_like(v0) if mean else v0.new_empty(0)
    spikes = x.new_empty(0 if mean else x.shape)
    v = v0.clone(memory_format=torch.contiguous_format)
    weights = [pack(w, G, v) for w in (weight_x, weight_v)]
    fixed = (*weights, flat(bias, v), flat(v_reset, v), _ends(lengths, T, B), flat(v, v))
    if direct and x.is_contiguous():
        # nothing has to be cast: one call for all steps
        chunk = T
    for start in range(0, T, chunk):
        stop = min(T, start + chunk)
        x_c = x[start:stop].to(state)
        s_c, v_c = spikes[start:stop], v_saved
        if every:
            v_c = v_saved[-(-start // every) : -(-stop // every)]
        if not direct:
            s_c = torch.empty_like(s_c, dtype=state)
            v_c_stored, v_c = v_c, torch.empty_like(v_c, dtype=state)
        run(
            gpn_forward_kernel, threads, -(-B // tile), flat(x_c, v), *fixed,
            flat(v_c, v), flat(s_c, v), bits.view(-1).numpy(), flat(counts, v),
            start, stop - start, B, N, G, every, mean, tile, block, *_places(gates),
        )  # fmt: skip
        if not direct:
            v_c_stored.copy_(saturate(v_c, saved_dtype))
            if not mean:
                spikes[start:stop] = s_c
    return (counts / own_steps(T, lengths) if mean else spikes), v, v_saved, bits


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
    gates: tuple[str, ...],
    surrogate: str,
    alpha: float,
    every: int,
    mean: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Backpropagate through gpn_forward; arguments and results as recurrence_torch.gpn_backward.

    Args:
        g_spikes [T, B, N], or [B, N] if mean: gradient of the spikes or of their mean; None: zero.
        g_v_final [B, N]: gradient of v_final; None: zero.
        x, weight_x, weight_v, bias, v_reset, lengths, gates: as gpn_forward had them.
        bits [ceil(T / 32), B, N], v_saved: as gpn_forward returned them.
        surrogate, alpha: see surrogate.SURROGATES.
    Returns:
        g_x [T, B, N] of x's dtype, g_weight_x, g_weight_v, g_bias, g_v0 [B, N].
    """
    T, B, N = x.shape
    G, state, threads = len(gates), v_reset.dtype, torch.get_num_threads()
    tile, block, chunk = choose(B, N, threads, every)
    number = np.float64 if state == torch.float64 else np.float32
    scale = number(1 / T if mean else 1)
    if g_spikes is None:
        g_spikes, mean = torch.zeros_like(v_reset), True
    elif mean and lengths is not None:
        g_spikes, scale = g_spikes / own_steps(T, lengths), number(1)
    g_v = torch.zeros_like(v_reset) if g_v_final is None else g_v_final.to(state)
    g_v = g_v.clone(memory_format=torch.contiguous_format)
    g_x = x.new_empty(x.shape)
    g_weights = [
        None if w is None else torch.zeros_like(w, memory_format=torch.contiguous_format)
        for w in (weight_x, weight_v, bias)
    ]
    transposed = [w if w is None else w.t() for w in (weight_x, weight_v)]
    fixed = (
        *(pack(w, G, g_v) for w in (weight_x, weight_v)),
        *(pack(w, 1, g_v) for w in transposed),
        flat(bias, g_v), flat(v_reset, g_v), _ends(lengths, T, B),
        bits.contiguous().view(-1).numpy(), flat(g_v, g_v),
    )  # fmt: skip
    # rows that do not lie a power of two apart, which a cache would put in one place
    z_row = G * N + PANEL
    # 28 to 30 GFLOP/s with 128 and 256 rows a share, 26 to 28 with 64; torch 29 to 33
    share = min(256, max(64, -(-G * N // (ROWS * threads)) * ROWS))
    z_memory = g_v.new_empty(min(T, chunk) * B * z_row)
    for start in reversed(range(0, T, chunk)):
        stop = min(T, start + chunk)
        n = stop - start
        x_c = x[start:stop].to(state).contiguous()
        if every == 1:
            # one step more, if there is one
            v_c = v_saved[start : stop + 1].to(state).contiguous()
        else:
            v_c = x_c.new_empty(n, B, N)
            v_c[::every] = v_saved[start // every : -(-stop // every)]
        g_s = g_spikes if mean else g_spikes[start:stop]
        g_x_c = g_x[start:stop]
        if g_x.dtype != state:
            g_x_c = torch.empty_like(x_c)
        run(
            gpn_backward_kernel, threads, -(-B // tile), flat(g_s.to(state), g_v), scale,
            flat(x_c, g_v), flat(v_c, g_v), *fixed, flat(z_memory, g_v), flat(g_x_c, g_v),
            start, n, B, N, G, every, not mean, len(v_c) - 1 if every == 1 else 0, tile, block,
            SURROGATES.index(surrogate), number(alpha), *_places(gates),
        )  # fmt: skip
        if G:
            run(
                weight_gradient_kernel, threads, -(-G * N // share), flat(z_memory, g_v),
                flat(x_c, g_v), flat(v_c, g_v), *(flat(g, g_v) for g in g_weights),
                n * B, G * N, N, z_row, share,
            )  # fmt: skip
        if g_x.dtype != state:
            g_x[start:stop] = g_x_c
    return g_x, *g_weights, g_v
