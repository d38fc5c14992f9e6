"""Layers of LIF and CuBa-LIF, run by any backend, and held against float64."""

import torch

from gpn_triton.neurons import reference
from gpn_triton.neurons.lif import cuba_lif, lif
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from tests.tolerances import TOLERANCES, Tolerance

KINDS = ("lif", "cuba-lif")
# float64 sums of up to 300 terms, once a step for up to 65 steps
EXACT = Tolerance(margin=1e-10, state=1e-10, gradient=1e-10)
DECAYS = 0.6, 0.7


def layer(kind, T, B, N, dtype=torch.float64, device="cpu"):
    """x, then v0 and tau, or weight, bias, current, membrane and last spikes; all learn."""
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, scale=1.0):
        return torch.randn(shape, dtype=state, device=device) * scale

    x = draw(T, B, N, scale=1.5).to(dtype)
    if kind == "lif":
        inputs = [x, draw(B, N, scale=0.3), torch.tensor(2.7, dtype=state, device=device)]
    else:
        weights = draw(N, N, scale=N**-0.5), draw(N, scale=0.1)
        inputs = [x, *weights, *(draw(B, N, scale=0.3) for _ in range(2)), (draw(B, N) > 0).to(x)]
        inputs[-1] = inputs[-1].to(state)
    return [t.requires_grad_() for t in inputs]


def run(kind, inputs, backend="cpu", surrogate="atan", alpha=2.0):
    """spikes, the state after the last step (without spikes), bits."""
    if kind == "lif":
        spikes, v, bits = lif(*inputs, surrogate, alpha, backend)
        return spikes, (v,), bits
    x, weight, bias, *state = inputs
    spikes, state, bits = cuba_lif(x, weight, bias, state, *DECAYS, surrogate, alpha, backend)
    assert torch.equal(state[2], spikes[-1].to(state[2].dtype))
    return spikes, state[:2], bits


def exact(kind, inputs, spikes, surrogate="atan", alpha=2.0):
    """h - 1 [T, B, N], spikes and final state in float64, of neurons that spike where `spikes` do;
    differentiable, with the surrogate's gradients."""
    x, *rest = inputs
    weights, state = ((rest[1],), rest[0]) if kind == "lif" else (rest[:2], tuple(rest[2:]))
    far, out = [], []
    for x_t, fired in zip(x, spikes, strict=True):
        options = surrogate, alpha, fired
        if kind == "lif":
            step = reference.lif_step(x_t, state, *weights, *options)
        else:
            step = reference.cuba_lif_step(x_t, *weights, state, *DECAYS, *options)
        state = step.state
        far.append(step.h.detach() - 1)
        out.append(step.s)
    return torch.stack(far), torch.stack(out), (state,) if kind == "lif" else state[:2]


def hold(kind, inputs, spikes, state, gradients, cotangents, surrogate="atan", alpha=2.0):
    """Hold spikes, state and every gradient against float64."""
    dtype = inputs[0].dtype
    assert spikes.dtype == dtype and {a.dtype for a in state} == {inputs[1].dtype}
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    far, *expected = exact(kind, leaves, spikes.detach().double(), surrogate, alpha)
    tolerance = EXACT if dtype == torch.float64 else TOLERANCES[dtype]
    sure = far.abs() > tolerance.margin
    assert torch.equal(spikes[sure] > 0, far[sure] >= 0)
    assert 0.02 < spikes.double().mean() < 0.98 or spikes.numel() < 100
    outputs = [expected[0], *expected[1]]
    for a, b in zip(state, expected[1], strict=True):
        assert (a - b).abs().max() < tolerance.state * max(1, b.abs().max())
    want = torch.autograd.grad(outputs, leaves, [c.double() for c in cotangents])
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    for g, e in zip(gradients, want, strict=True):
        assert torch.linalg.norm(g - e) <= tolerance.gradient * torch.linalg.norm(e)


def check(
    kind, T, B, N, dtype=torch.float64, backend="cpu", surrogate="atan", alpha=2.0, device="cpu"
):  # fmt: skip
    """Hold the operator by a backend against float64."""
    inputs = layer(kind, T, B, N, dtype, device)
    spikes, state, bits = run(kind, inputs, backend, surrogate, alpha)
    if backend != "torch":
        assert torch.equal(unpack_spikes(bits, 0, T, dtype), spikes)
    cotangents = [torch.randn_like(a) for a in (spikes, *state)]
    gradients = torch.autograd.grad([spikes, *state], inputs, cotangents)
    hold(kind, inputs, spikes, state, gradients, cotangents, surrogate, alpha)
