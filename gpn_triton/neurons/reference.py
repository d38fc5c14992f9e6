"""The specification of the neurons: loops for autograd, and GPN's adjoint written by hand.

Everything runs in any floating dtype on any device and imports no Triton. What computes GPN faster,
the kernels, is judged against this file in float64.

    z[t]   = weight_v v[t] + weight_x x[t] + bias        -> z_f, z_i, z_b, z_theta
    f, i   = sigmoid(z_f), sigmoid(z_i)     theta = sigmoid(z_theta)     b = tanh(z_b)
    h[t]   = f v[t] + i x[t]
    s[t]   = 1 if h[t] >= theta else 0
    v[t+1] = (1 - s[t]) h[t] + s[t] v_reset + b          (s detached; b added after the reset)

A formula is written here, and once in each kind of kernel: in kernels/pointwise.py and in
kernels/pointwise_cpu.py.

Sizes: T time bins, B batch, N neurons, G gates of the variant (4 in full).
Source: Wang, Zhang, Li, Wu, arXiv 2412.01087; the authors' implementation where the two differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.neurons.surrogate import SURROGATES, spike

# the gates whose weights a variant has, always in the order f, i, b, theta
GATES: dict[str, tuple[str, ...]] = {
    "full": ("f", "i", "b", "theta"),
    "no-fi": ("b", "theta"),
    "no-i": ("f", "b", "theta"),
    "no-t": ("f", "i", "b"),
    "no-b": ("f", "i", "theta"),
    "no-fitb": (),
}


class Gates(NamedTuple):
    """GPN's gates at a step [B, N]; a gate the variant lacks is its constant."""

    f: Tensor | float
    i: Tensor | float
    b: Tensor | float
    theta: Tensor | float


class Step(NamedTuple):
    """What a neuron's step gives: spikes s and membrane before the threshold h [B, N], and the
    state after it."""

    s: Tensor
    h: Tensor
    state: Any


def gpn_gates(x_t: Tensor, v: Tensor, weights: tuple, variant: str) -> Gates:
    """The gates of one step, of current and membrane [B, N]."""
    names, z = GATES[variant], {}
    if names:
        weight_x, weight_v, bias = weights
        z_t = torch.addmm(F.linear(x_t, weight_x, bias), v, weight_v.t())
        z = dict(zip(names, z_t.chunk(len(names), -1), strict=True))
    f = torch.sigmoid(z["f"]) if "f" in z else 0.5
    i = torch.sigmoid(z["i"]) if "i" in z else 1 - f
    b = torch.tanh(z["b"]) if "b" in z else 0.0
    theta = torch.sigmoid(z["theta"]) if "theta" in z else 1.0
    return Gates(f, i, b, theta)


def gpn_step(
    x_t: Tensor, v: Tensor, gates: Gates, v_reset: Tensor, surrogate: str = "atan",
    alpha: float = 2.0, reset: Tensor | None = None,
) -> Step:  # fmt: skip
    """One step of GPN with these gates; its state is the membrane v. reset: see gpn_loop."""
    f, i, b, theta = gates
    h = f * v + i * x_t
    if reset is None:
        s = spike(h - theta, surrogate, alpha)
        reset = s.detach()
    else:
        s = SURROGATES[surrogate].value(h - theta, alpha)
    return Step(s, h, torch.lerp(h, v_reset, reset) + b)


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
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run GPN step by step under autograd: the specification itself.

    Args:
        x [T, B, N]: synaptic current.
        weight_x, weight_v [G N, N], bias [G N]: gate weights, gates in the order f, i, b, theta.
        v_reset [B, N]: membrane after a spike. v0 [B, N]: membrane at t = 0.
        variant: a key of GATES. surrogate, alpha: see surrogate.SURROGATES.
        reset_mask [T, B, N]: makes the neuron smooth, as finite differences need it: neurons reset
            where the mask is 1, and the surrogate's smooth step stands in place of every spike.
            Its gradient is that of the neuron which spikes where the mask is 1.
        lengths [B] int: steps of each sequence, 0..T. One that has ended keeps its membrane and
            spikes no more; its x, which must be finite, does not count. None: T.
    Returns:
        spikes [T, B, N], v_final [B, N].
    """
    v, spikes = v0, []
    for t, x_t in enumerate(x.unbind(0)):
        gates = gpn_gates(x_t, v, (weight_x, weight_v, bias), variant)
        reset = None if reset_mask is None else reset_mask[t]
        s, _, v_next = gpn_step(x_t, v, gates, v_reset, surrogate, alpha, reset)
        if lengths is not None:
            goes_on = (t < lengths)[:, None]
            s, v_next = torch.where(goes_on, s, 0), torch.where(goes_on, v_next, v)
        v = v_next
        spikes.append(s)
    return torch.stack(spikes), v


def gpn_adjoint(
    x: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    v: Tensor,
    spikes: Tensor,
    cotangents: tuple[Tensor, Tensor],
    variant: str = "full",
    surrogate: str = "atan",
    alpha: float = 2.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Backpropagate through GPN by hand, a step at a time: the witness of every other backward.

    With g_v[t] = dL/dv[t], sg = surrogate'(h - theta), and t from T - 1 down to 0:

        g_h    = g_v[t+1] (1 - s) + g_s[t] sg
        g_z    = [ g_h v f(1-f), g_h x i(1-i), g_v[t+1] (1 - b^2), -g_s[t] sg theta(1-theta) ]
        g_v[t] = g_h f + weight_v^T g_z
        g_x[t] = g_h i + weight_x^T g_z

    Where a sequence has ended, g_z and g_x are 0 and g_v[t] = g_v[t+1].
    Without a gate i of its own, i = 1 - f, and v - x stands for v in f's part of g_z.

    Args:
        x [T, B, N], variant, surrogate, alpha, lengths: as gpn_loop had them.
        weights: weight_x, weight_v and bias, as gpn_loop had them.
        v [T, B, N]: the membrane that every step began with. spikes [T, B, N]: 0 or 1.
        cotangents: dL/dspikes [T, B, N] and dL/dv_final [B, N].
    Returns:
        g_x [T, B, N], g_weight_x, g_weight_v, g_bias (None without gates), g_v0 [B, N].
    """
    weight_x, weight_v, _ = weights
    names, (g_s, g_v) = GATES[variant], cotangents
    g_x = torch.empty_like(x)
    g_weight_x, g_weight_v, g_bias = (None if w is None else torch.zeros_like(w) for w in weights)
    for t in reversed(range(len(x))):
        f, i, b, theta = gpn_gates(x[t], v[t], weights, variant)
        h = f * v[t] + i * x[t]
        goes_on = 1 if lengths is None else (t < lengths).to(x.dtype)[:, None]
        g_u = goes_on * g_s[t] * SURROGATES[surrogate].derivative(h - theta, alpha)
        g_kept, g_v = (1 - goes_on) * g_v, goes_on * g_v
        g_h = g_v * (1 - spikes[t]) + g_u
        g_gates = {
            "f": g_h * (v[t] - x[t] if "i" not in names else v[t]) * f * (1 - f),
            "i": g_h * x[t] * i * (1 - i),
            "b": g_v * (1 - b * b),
            "theta": -g_u * theta * (1 - theta),
        }
        g_v, g_x[t] = g_h * f + g_kept, g_h * i
        if names:
            g_z = torch.cat([g_gates[name] for name in names], -1)
            g_v = g_v + g_z @ weight_v
            g_x[t] += g_z @ weight_x
            g_weight_x += g_z.t() @ x[t]
            g_weight_v += g_z.t() @ v[t]
            g_bias += g_z.sum(0)
    return g_x, g_weight_x, g_weight_v, g_bias, g_v


def _fire(u: Tensor, surrogate: str, alpha: float, fired: Tensor | None) -> Tensor:
    """spike(u), or the spikes that are given in its place, with its gradient."""
    if fired is None:
        return spike(u, surrogate, alpha)
    smooth = SURROGATES[surrogate].value(u, alpha)
    return fired + (smooth - smooth.detach())


def lif_step(
    x_t: Tensor, v: Tensor, tau: Tensor | float, surrogate: str = "atan", alpha: float = 2.0,
    fired: Tensor | None = None,
) -> Step:  # fmt: skip
    """One step of lif_loop; its state is the membrane v. fired [B, N]: who spikes, whatever h."""
    h = v + (x_t - v) / tau
    s = _fire(h - 1.0, surrogate, alpha, fired)
    return Step(s, h, h * (1 - s.detach()))


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
        s, _, v = lif_step(x_t, v, tau, surrogate, alpha)
        spikes.append(s)
    return torch.stack(spikes), v


def cuba_lif_step(
    x_t: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    current_decay: float = 0.5,
    membrane_decay: float = 0.5,
    surrogate: str = "atan",
    alpha: float = 2.0,
    fired: Tensor | None = None,
) -> Step:
    """One step of cuba_lif_loop; its state is (current, membrane, spikes). fired: as lif_step."""
    j, v, s = state
    j = torch.add(x_t + F.linear(s, weight, bias), j, alpha=current_decay)
    h = membrane_decay * v + (1 - membrane_decay) * j
    s = _fire(h - 1.0, surrogate, alpha, fired)
    return Step(s, h, (j, h * (1 - s.detach()), s))


def cuba_lif_loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    *options: float | str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Current-based LIF whose spikes feed back through a weight matrix one step later.

        j[t+1] = current_decay j[t] + x[t] + weight s[t-1] + bias
        h[t]   = membrane_decay v[t] + (1 - membrane_decay) j[t+1],  threshold 1, hard reset to 0

    Args:
        x [T, B, N]: input. weight [N, N], bias [N]: recurrent connection from spikes.
        state: current, membrane and last spikes, each [B, N]. options: those of cuba_lif_step.
    Returns:
        spikes [T, B, N] and the state after the last step.
    Source: the authors' baseline of the same name (arXiv 2412.01087).
    """
    spikes = []
    for x_t in x.unbind(0):
        s, _, state = cuba_lif_step(x_t, weight, bias, state, *options)
        spikes.append(s)
    return torch.stack(spikes), state
