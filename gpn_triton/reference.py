"""The specification of the neurons in torch: loops for autograd, and GPN's hand-written backward.

Everything runs in any floating dtype on any device and imports no Triton. The kernels are judged
against this file in float64, and `backend="torch"` is this file.

    z[t]   = weight_v v[t] + weight_x x[t] + bias        -> z_f, z_i, z_b, z_theta
    f, i   = sigmoid(z_f), sigmoid(z_i)     theta = sigmoid(z_theta)     b = tanh(z_b)
    h[t]   = f v[t] + i x[t]
    s[t]   = 1 if h[t] >= theta else 0
    v[t+1] = (1 - s[t]) h[t] + s[t] v_reset + b          (s detached; b added after the reset)

Sizes: T time bins, B batch, N neurons, G gates of the variant (4 in full).
Source: Wang, Zhang, Li, Wu, arXiv 2412.01087; the authors' implementation where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.surrogate import SURROGATES, spike

# the gates whose weights a variant has, always in the order f, i, b, theta
GATES: dict[str, tuple[str, ...]] = {
    "full": ("f", "i", "b", "theta"),
    "no-fi": ("b", "theta"),
    "no-i": ("f", "b", "theta"),
    "no-t": ("f", "i", "b"),
    "no-b": ("f", "i", "theta"),
    "no-fitb": (),
}
# hoisted products cover at least this many rows of T B at a time, and 4 N, so that reading the
# weights and adding to their gradients does not outweigh the product; few enough to stay in a CPU's
# cache, and a bound on memory that does not grow with T
CHUNK_ROWS = 512
# steps of packed spikes in a word
WORD = 32


def _gate_values(
    z: Tensor | None, variant: str, names: Sequence[str] | None = None, activated: bool = False
) -> tuple[Tensor | float, ...]:
    """f, i, b, theta [..., N] of z [..., G N]; a gate the variant lacks is its constant.

    Outside autograd z is overwritten by the gates, tanh(z) = 2 sigmoid(2 z) - 1 among them: one
    sigmoid over all is the fastest form on a CPU.

    names: the gates z holds, where they are not all of the variant's. activated: z holds the gates
    already.
    """
    names = GATES[variant] if names is None else names
    parts = dict(zip(names, z.chunk(len(names), -1), strict=True)) if names else {}
    if names and z.requires_grad:
        parts = {k: torch.tanh(p) if k == "b" else torch.sigmoid(p) for k, p in parts.items()}
    elif names and not activated:
        if "b" in parts:
            parts["b"].mul_(2)
        z.sigmoid_()
        if "b" in parts:
            parts["b"].mul_(2).sub_(1)
    f = parts.get("f", 0.5)
    i = parts["i"] if "i" in parts else (1 - f if "f" in parts else 0.5)
    return f, i, parts.get("b", 0.0), parts.get("theta", 1.0)


def _next_v(h: Tensor, s: Tensor, b: Tensor | float, v_reset: Tensor) -> Tensor:
    """Membrane after the reset and the bypass."""
    return torch.lerp(h, v_reset, s) + b


def gpn_loop(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    v0: Tensor,
    variant: str = "full",
    surrogate: str = "atan",
    alpha: float = 2.0,
    smooth: bool = False,
    reset_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run GPN step by step under autograd: the specification itself.

    Args:
        x [T, B, N]: synaptic current.
        weight_x, weight_v [G N, N], bias [G N]: gate weights, gates in the order f, i, b, theta.
        v_reset [B, N]: membrane after a spike. v0 [B, N]: membrane at t = 0.
        variant: a key of GATES. surrogate, alpha: see surrogate.SURROGATES.
        smooth: replace the spike by the surrogate's smooth step, which finite differences can see.
        reset_mask [T, B, N]: which neurons reset; None: those that spike (detached, unless smooth).
    Returns:
        spikes [T, B, N], v_final [B, N].
    """
    v, spikes = v0, []
    for t, x_t in enumerate(x.unbind(0)):
        z = None
        if GATES[variant]:
            z = torch.addmm(F.linear(x_t, weight_x, bias), v, weight_v.t())
        f, i, b, theta = _gate_values(z, variant)
        h = f * v + i * x_t
        if smooth:
            s = SURROGATES[surrogate].value(h - theta, alpha)
            reset = s if reset_mask is None else reset_mask[t]
        else:
            s = spike(h - theta, surrogate, alpha)
            reset = s.detach() if reset_mask is None else reset_mask[t]
        v = _next_v(h, reset, b, v_reset)
        spikes.append(s)
    return torch.stack(spikes), v


def _chunks(T: int, B: int, N: int, every: int) -> Iterator[tuple[int, int]]:
    """Time ranges of about CHUNK_ROWS rows, each a whole number of checkpoints."""
    steps = max(1, max(CHUNK_ROWS, 4 * N) // B)
    steps = max(every, steps // every * every)
    for start in range(0, T, steps):
        yield start, min(T, start + steps)


def _storable(v: Tensor, dtype: torch.dtype) -> Tensor:
    """v in the dtype it is saved in, saturated instead of overflowing to infinity."""
    if dtype == torch.float16 and v.dtype != torch.float16:
        v = v.clamp(-65504.0, 65504.0)
    return v.to(dtype)


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
        x, weight_x, weight_v, bias, v_reset, v0, variant: as gpn_loop. x may be a half type; the
            weights, v_reset and v0 have the dtype the state is computed in.
        every: save v at t = 0, every, 2 every, ...; 0 saves nothing.
        mean: return the mean over time of the spikes [B, N] instead of the spikes.
    Returns:
        spikes [T, B, N] of x's dtype, or their mean [B, N] in the state's dtype;
        v_final [B, N]; v_saved [ceil(T / every), B, N] (half types are saved as float16);
        spike_bits [ceil(T / 32), B, N] int32: see unpack_spikes. Both are empty if every is 0.
    """
    T, B, N = x.shape
    state = v0.dtype
    saved_dtype = torch.float16 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
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
        z_chunk = F.linear(x_chunk, weight_x, bias) if GATES[variant] else None
        for t in range(start, stop):
            if every and t % every == 0:
                v_saved[t // every] = _storable(v, saved_dtype)
            z = None if z_chunk is None else z_chunk[t - start].addmm_(v, weight_v.t())
            f, i, b, theta = _gate_values(z, variant)
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


def _replay(
    saved: Tensor, x: Tensor, s: Tensor, z: Tensor | None, weight_v, v_reset, variant, every
) -> Tensor:
    """v [n, B, N] at every step from the v saved every `every` steps; z, given without v's part, is
    completed and overwritten by the gates.

    The saved spikes reset it, never recomputed ones: rounding could cross the threshold the other
    way, and a hard reset would make that a large error.
    """
    v = x.new_empty(x.shape)
    v_next = None
    for t in range(len(x)):
        v[t] = saved[t // every] if t % every == 0 else v_next
        f, i, b, _ = _gate_values(None if z is None else z[t].addmm_(v[t], weight_v.t()), variant)
        v_next = _next_v(f * v[t] + i * x[t], s[t], b, v_reset)
    return v


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
    """Backpropagate through gpn_forward by hand.

    With g_v[t] = dL/dv[t], g_v[T] = g_v_final, and t from T - 1 down to 0:

        g_h    = g_v[t+1] (1 - s) + g_s[t] sg                  sg = surrogate'(h - theta)
        g_z    = [ g_h v f(1-f), g_h x i(1-i), g_v[t+1] (1 - b^2), -g_s[t] sg theta(1-theta) ]
        g_v[t] = g_h f + weight_v^T g_z
        g_x[t] = g_h i + weight_x^T g_z

    g_z_theta does not depend on g_v, so only the other gates' product is serial; everything else is
    one product over a chunk of time, and sums over chunks run in one fixed order.

    Args:
        g_spikes [T, B, N], or [B, N] if mean; None: zero. g_v_final [B, N]; None: zero.
        bits, v_saved: as gpn_forward returned them.
        The rest as gpn_forward; the weights and v_reset in the dtype the gradients are computed in.
    Returns:
        g_x [T, B, N] of x's dtype, g_weight_x, g_weight_v, g_bias, g_v0 [B, N].
    """
    T, B, N = x.shape
    state = v_reset.dtype
    names = GATES[variant]
    serial = [g for g in names if g != "theta"]
    S = len(serial) * N
    one = v_reset.new_ones(())
    g_v = torch.zeros_like(v_reset) if g_v_final is None else g_v_final.to(state)
    g_x = x.new_empty(x.shape)
    g_w = bias.new_zeros(len(names) * N, 2 * N) if names else None
    g_b = torch.zeros_like(bias) if names else None
    if mean and g_spikes is not None:
        g_spikes = (g_spikes / T).to(state)

    # saving every step, b is what v[t+1] holds beyond h after the reset: one product less in four
    find_b = every == 1 and "b" in names
    recomputed = [k for k, name in enumerate(names) if not (find_b and name == "b")]
    if every == 1 and names:
        weight_xv = torch.cat([weight_x, weight_v], 1)
        rows = torch.cat([torch.arange(k * N, (k + 1) * N, device=x.device) for k in recomputed])
        weight_rows, bias_rows = weight_xv[rows], bias[rows]
    v_after = None

    for start, stop in reversed(list(_chunks(T, B, N, every))):
        n = stop - start
        x_c = x[start:stop].to(state).contiguous()
        s_c = unpack_spikes(bits, start, stop, state)
        saved = v_saved[start // every : -(-stop // every)].to(state)
        g_z = x_c.new_empty(n, B, len(names) * N)
        z, v_c = None, saved
        if every > 1:
            z = F.linear(x_c, weight_x, bias) if names else None
            v_c = _replay(saved, x_c, s_c, z, weight_v, v_reset, variant, every)
        xv = torch.cat([x_c, v_c], -1) if names else None
        if every == 1 and names:
            z = F.linear(xv, weight_rows, bias_rows)

        f, i, b, theta = (
            gate if isinstance(gate, Tensor) else one * gate
            for gate in _gate_values(z, variant, [names[k] for k in recomputed], every > 1)
        )
        h = torch.addcmul(f * v_c, x_c, i)
        if find_b:
            if v_after is None:
                v_after = _next_v(h[-1], s_c[-1], _last_b(xv[-1], weight_xv, bias, names), v_reset)
            v_next = torch.cat([v_c[1:], v_after[None]])
            b = v_next.sub_(torch.lerp(h, v_reset, s_c))
            v_after = v_c[0]
        if g_spikes is None:
            g_u = torch.zeros_like(x_c)
        else:
            g_s = g_spikes if mean else g_spikes[start:stop].to(state)
            g_u = SURROGATES[surrogate].derivative(h.sub_(theta), alpha).mul_(g_s)

        # the factors of g_h and g_v first, then, step by step, g_z itself
        slots = dict(zip(names, g_z.chunk(len(names), -1), strict=True)) if names else {}
        if "f" in slots:
            difference = v_c if "i" in slots else v_c - x_c
            torch.mul(torch.addcmul(f, f, f, value=-1), difference, out=slots["f"])
        if "i" in slots:
            torch.mul(torch.addcmul(i, i, i, value=-1), x_c, out=slots["i"])
        if "b" in slots:
            torch.addcmul(one, b, b, value=-1, out=slots["b"])
        rest = None
        if "theta" in slots:
            torch.mul(torch.addcmul(theta, theta, theta, value=-1), -g_u, out=slots["theta"])
            rest = g_z[..., S:] @ weight_v[S:]

        # g_h, then g_x, straight into the result where the dtype allows
        g_h_c = g_x[start:stop] if g_x.dtype == state else torch.empty_like(x_c)
        keep = 1 - s_c
        for t in range(n - 1, -1, -1):
            g_h = torch.addcmul(g_u[t], g_v, keep[t], out=g_h_c[t])
            f_t = f[t] if "f" in slots else f
            g_direct = g_h * f_t if rest is None else torch.addcmul(rest[t], g_h, f_t)
            for name in serial:
                slots[name][t].mul_(g_v if name == "b" else g_h)
            g_v = g_direct.addmm_(g_z[t, :, :S], weight_v[:S]) if serial else g_direct

        g_h_c *= i
        if names:
            rows_z = g_z.view(n * B, -1)
            g_w.addmm_(rows_z.t(), xv.view(n * B, -1))
            g_b += rows_z.sum(0)
            g_h_c.view(n * B, N).addmm_(rows_z, weight_x)
        if g_x.dtype != state:
            g_x[start:stop] = g_h_c
    g_wx, g_wv = (g_w[:, :N].contiguous(), g_w[:, N:].contiguous()) if names else (None, None)
    return g_x, g_wx, g_wv, g_b, g_v


def _last_b(xv: Tensor, weight_xv: Tensor, bias: Tensor, names: tuple[str, ...]) -> Tensor:
    """b [B, N] of one step from [x, v] [B, 2 N]."""
    k = names.index("b")
    N = xv.shape[-1] // 2
    return torch.tanh(F.linear(xv, weight_xv[k * N : (k + 1) * N], bias[k * N : (k + 1) * N]))


def lif_loop(
    x: Tensor, v0: Tensor, tau: Tensor | float, surrogate: str = "atan", alpha: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire, threshold 1, hard detached reset to 0; PLIF when tau is learned.

    Args:
        x [T, B, N]: synaptic current. v0 [B, N]: membrane at t = 0.
        tau: time constant in bins, a number or a tensor that broadcasts to [N].
    Returns:
        spikes [T, B, N], v_final [B, N].
    Source: Fang et al., ICCV 2021 for the learned tau.
    """
    v, spikes = v0, []
    for x_t in x.unbind(0):
        h = v + (x_t - v) / tau
        s = spike(h - 1.0, surrogate, alpha)
        v = h * (1 - s.detach())
        spikes.append(s)
    return torch.stack(spikes), v


def cuba_lif_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    current_decay: float = 0.5,
    membrane_decay: float = 0.5,
    surrogate: str = "atan",
    alpha: float = 2.0,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Current-based LIF whose spikes feed back through a weight matrix one step later.

        j[t+1] = current_decay j[t] + x[t] + weight s[t-1] + bias
        h[t]   = membrane_decay v[t] + (1 - membrane_decay) j[t+1],  threshold 1, hard reset to 0

    Args:
        x [T, B, N]: input. weight [N, N], bias [N]: recurrent connection from spikes.
        state: current, membrane and last spikes, each [B, N].
    Returns:
        spikes [T, B, N] and the state after the last step.
    Source: the authors' baseline of the same name (arXiv 2412.01087).
    """
    (j, v, s), spikes = state, []
    for x_t in x.unbind(0):
        j = torch.add(x_t + F.linear(s, weight, bias), j, alpha=current_decay)
        h = membrane_decay * v + (1 - membrane_decay) * j
        s = spike(h - 1.0, surrogate, alpha)
        v = h * (1 - s.detach())
        spikes.append(s)
    return torch.stack(spikes), (j, v, s)
