"""A layer's arguments, run by the kernels where they run, and compared with the specification."""

import torch

from gpn_triton.kernels.gpn_backward import gpn_backward
from gpn_triton.kernels.gpn_forward import gpn_forward
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from gpn_triton.neurons.reference import GATES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(T, B, N, variant="full", dtype=torch.float32, gain=1.5):
    """x, weight_x, weight_v, bias, v_reset, v0, made where they are used; gain 0.7: as a GPN's."""
    g = torch.Generator(DEVICE).manual_seed(0)
    G = len(GATES[variant])

    def uniform(*shape):
        return (torch.rand(shape, generator=g, device=DEVICE) * 2 - 1) * gain * N**-0.5

    x = torch.randn(T, B, N, generator=g, device=DEVICE, dtype=dtype)
    weights = [uniform(G * N, N), uniform(G * N, N), uniform(G * N)] if G else [None] * 3
    v_reset = torch.randn(B, N, generator=g, device=DEVICE) * 0.05
    return [x, *weights, v_reset, v_reset + 0.1]


def run_kernels(
    inputs,
    g_out,
    g_v_final,
    plan,
    variant="full",
    surrogate="atan",
    alpha=2.0,
    every=1,
    lengths=None,
):
    """out, spikes, v_final, v_saved and the gradients that the layer has.

    g_out [T, B, N], or [B, N]: out then is the mean of the spikes, which come from their bits.
    """
    x, *weights, v_reset, _ = inputs
    mean = g_out.ndim == 2
    out, v_final, v_saved, bits = gpn_forward(*inputs, GATES[variant], every, mean, plan, lengths)
    gradients = gpn_backward(
        g_out.to(out.dtype), g_v_final, x, *weights, v_reset, bits, v_saved,
        GATES[variant], surrogate, alpha, every, mean, plan, lengths,
    )  # fmt: skip
    # the last steps alone: unpacked, all of a long sequence would not fit beside it
    first = max(0, len(x) - 70) // 32 * 32
    spikes = out
    if mean:
        spikes = unpack_spikes(bits, 0, len(x), x.dtype)
    else:
        assert torch.equal(unpack_spikes(bits, first, len(x), x.dtype), out[first:])
    return out, spikes, v_final, v_saved, [g for g in gradients if g is not None]


def check_gradients(got, expected, tolerance):
    """Hold each gradient's error against the tolerance, as a share of the gradient's norm."""
    for g, e in zip(got, expected, strict=True):
        assert torch.linalg.norm(g.double() - e) < tolerance * torch.linalg.norm(e.double())
