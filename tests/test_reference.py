"""The specification against the authors' numbers, autograd and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpn_triton.neurons import recurrence_torch, reference
from gpn_triton.neurons.gpn import gpn
from gpn_triton.neurons.surrogate import SURROGATES
from tests.tolerances import DIFFERENCES, REORDERED

GOLDEN = np.load(Path(__file__).parent / "data" / "authors_golden.npz")
CASES = {
    "GPN": "full",
    "GPN_wo_FI": "no-fi",
    "GPN_wo_I": "no-i",
    "GPN_wo_T": "no-t",
    "GPN_wo_B": "no-b",
    "GPN_wo_FITB": "no-fitb",
}
MODES = ("train", "eval")


def golden(case, mode):
    """Every tensor of a case by name."""
    prefix = f"{case}_{mode}/"
    return {k[len(prefix) :]: torch.from_numpy(GOLDEN[k]) for k in GOLDEN if k.startswith(prefix)}


def random_case(variant, T=7, B=3, N=5, seed=0):
    """x, weight_x, weight_v, bias, v_reset, v0 in float64, spiking at a moderate rate."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, dtype=torch.float64, generator=g)

    G = len(reference.GATES[variant])
    weights = [draw(G * N, N, scale=0.6), draw(G * N, N, scale=0.6), draw(G * N, scale=0.3)]
    if not G:
        weights = [None] * 3
    return [draw(T, B, N, scale=1.5), *weights, draw(B, N, scale=0.3), draw(B, N, scale=0.5)]


@pytest.mark.parametrize("how", ["autograd of the loop", "hand-written backward"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_gpn_reproduces_the_authors(case, mode, how):
    g = golden(case, mode)
    x, v_reset = g["x"].requires_grad_(), g["v_reset"]
    N, weights = x.shape[2], [None] * 3
    if "ln_weight" in g:
        parts = (g["ln_weight"][:, N:], g["ln_weight"][:, :N], g["ln_bias"])
        weights = [p.clone().requires_grad_() for p in parts]
    if how == "autograd of the loop":
        spikes, v_final = reference.gpn_loop(x, *weights, v_reset, v_reset, CASES[case])
    else:
        spikes, v_final = gpn(x, *weights, v_reset, variant=CASES[case], backend="torch")
    spikes.backward(g["cotangent"])

    assert torch.equal(spikes, g["spikes"])
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(v_final, g["v_final"], **close)
    torch.testing.assert_close(x.grad, g["grad_x"], **close)
    if "ln_weight" in g:
        grad = torch.cat([weights[1].grad, weights[0].grad], 1)
        torch.testing.assert_close(grad, g["grad_ln_weight"], **close)
        torch.testing.assert_close(weights[2].grad, g["grad_ln_bias"], **close)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case, weights", [
    ("LIF", ()), ("Cuba_LIF", ("fc_U_weight", "fc_U_bias")),
])  # fmt: skip
def test_lif_reproduces_the_authors(case, weights, mode):
    g = golden(case, mode)
    leaves = {name: g[name].requires_grad_() for name in ("x", *weights)}
    zero = torch.zeros_like(g["x"][0])
    if weights:
        spikes, (_, v_final, _) = reference.cuba_lif_loop(*leaves.values(), (zero, zero, zero))
    else:
        spikes, v_final = reference.lif_loop(g["x"], zero, 2.0)
    spikes.backward(g["cotangent"])
    assert torch.equal(spikes, g["spikes"])
    torch.testing.assert_close(v_final, g["v_final"], rtol=0, atol=1e-10)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, g[f"grad_{name}"], rtol=0, atol=1e-10)


def test_plif_learns_its_time_constant_along_the_smooth_derivative():
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    spikes, v_final = reference.lif_loop(x, torch.zeros_like(x[0]), 1 / torch.sigmoid(w))
    v_final.sum().backward()
    assert w.grad.abs() > 0
    fixed, _ = reference.lif_loop(x, torch.zeros_like(x[0]), 2.0)
    assert torch.equal(spikes, fixed)


def witness(inputs, cotangents, variant, surrogate="atan", alpha=2.0):
    """spikes, v_final and the gradients of x, weights and v0 by the specification alone."""
    x, *weights, v_reset, v0 = inputs
    spikes, v = [], [v0]
    for x_t in x:
        s, v_next = reference.gpn_loop(x_t[None], *weights, v_reset, v[-1], variant)
        spikes.append(s[0])
        v.append(v_next)
    spikes, v = torch.stack(spikes), torch.stack(v)
    gradients = reference.gpn_adjoint(
        x, weights, v[:-1], spikes, cotangents, variant, surrogate, alpha
    )
    return [spikes, v[-1], *(g for g in gradients if g is not None)]


def requiring_gradients(inputs):
    """x, the weights and v0, requiring gradients."""
    x, *weights, _, v0 = inputs
    return [t.requires_grad_() for t in (x, *weights, v0) if t is not None]


def assert_reordered(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, **REORDERED)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("variant", reference.GATES)
def test_witness_equals_autograd_of_the_loop(variant, surrogate):
    inputs = random_case(variant)
    cotangents = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    expected = witness(inputs, cotangents, variant, surrogate, 1.5)
    leaves = requiring_gradients(inputs)
    out = reference.gpn_loop(*inputs, variant, surrogate, 1.5)
    assert 0.05 < out[0].mean() < 0.95
    assert_reordered([*out, *torch.autograd.grad(out, leaves, cotangents)], expected)


# chunks of time of the whole sequence, of five steps, of one; v saved every step and more rarely
@pytest.mark.parametrize("T, B, N, every, surrogate", [
    (7, 3, 5, 1, "atan"),
    (7, 3, 5, 3, "sigmoid"),
    (11, 100, 5, 1, "fast-sigmoid"),
    (11, 100, 5, 4, "triangle"),
    (5, 600, 3, 1, "atan"),
    (70, 3, 5, 5, "atan"),
])  # fmt: skip
@pytest.mark.parametrize("output", ["spikes", "mean"])
@pytest.mark.parametrize("variant", reference.GATES)
def test_torch_backend_equals_the_witness(variant, output, T, B, N, every, surrogate):
    inputs = random_case(variant, T, B, N)
    g_s, g_v = torch.randn(T, B, N).double(), torch.randn(B, N).double()
    if output == "mean":
        g_s = g_s[:1]
    full = g_s if output == "spikes" else g_s.expand(T, B, N) / T
    spikes, v_final, *expected = witness(inputs, (full, g_v), variant, surrogate, 1.5)
    leaves = requiring_gradients(inputs)
    out = gpn(
        *inputs, variant, surrogate, 1.5, backend="torch", checkpoint_every=every, output=output
    )
    got = torch.autograd.grad(out, leaves, (g_s if output == "spikes" else g_s[0], g_v))
    if output == "spikes":
        assert torch.equal(out[0], spikes)
    assert_reordered(
        [*out, *got], [spikes if output == "spikes" else spikes.mean(0), v_final, *expected]
    )


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("variant", reference.GATES)
def test_finite_differences_agree_on_the_smooth_twin(variant, surrogate):
    # with the spikes' resets frozen and the step integrated from its surrogate, the network is
    # smooth, takes the spiking one's trajectory and has the gradient that the witness computes
    inputs = random_case(variant, T=4, B=2, N=3)
    cotangents = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    spikes, _, *gradients = witness(inputs, cotangents, variant, surrogate)

    def twin():
        out = reference.gpn_loop(*inputs, variant, surrogate, 2.0, spikes)
        return sum((o * g).sum() for o, g in zip(out, cotangents, strict=True)).item()

    eps = 1e-6
    x, *weights, _, v0 = inputs
    leaves = [t for t in (x, *weights, v0) if t is not None]
    for tensor, gradient in zip(leaves, gradients, strict=True):
        flat, checked = tensor.view(-1), torch.randperm(tensor.numel())[:12]
        differences = []
        for k in checked:
            value = flat[k].item()
            flat[k] = value + eps
            above = twin()
            flat[k] = value - eps
            differences.append((above - twin()) / (2 * eps))
            flat[k] = value
        expected = torch.tensor(differences, dtype=torch.float64)
        torch.testing.assert_close(gradient.view(-1)[checked], expected, **DIFFERENCES)


@pytest.mark.parametrize("name", SURROGATES)
def test_each_surrogate_is_the_derivative_of_its_step(name):
    value, derivative = SURROGATES[name]
    u = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.013
    difference = (value(u + 1e-6, 2.5) - value(u - 1e-6, 2.5)) / 2e-6
    torch.testing.assert_close(derivative(u, 2.5), difference, **DIFFERENCES)
    far = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(value(far, 2.5), ends, **DIFFERENCES)


def test_a_membrane_exactly_at_threshold_spikes():
    # no-fitb: h = 0.5 v + 0.5 x and theta = 1
    x = torch.tensor([2.0, 1.9999999]).view(1, 1, 2)
    spikes, _ = gpn(x, None, None, None, variant="no-fitb")
    assert spikes.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 32, 70])
def test_packed_spikes_are_the_spikes(T, dtype, mean):
    x, *rest = random_case("full", T=T)
    rest = [t if dtype == torch.float64 else t.float() for t in rest]
    spikes, _, _, bits = recurrence_torch.gpn_forward(x.to(dtype), *rest, "full", 1, mean)
    assert bits.dtype == torch.int32 and len(bits) == -(-T // 32)

    def unpacked(start, stop):
        return recurrence_torch.unpack_spikes(bits, start, stop, dtype)

    whole = unpacked(0, T)
    assert whole.any() and not whole.all()
    if mean:
        torch.testing.assert_close(whole.to(spikes.dtype).mean(0), spikes)
    else:
        assert torch.equal(whole, spikes)
    # no bit beyond the last step, and any stretch of steps reads alike
    assert not unpacked(T, 32 * len(bits)).any()
    for start, stop in ((0, 1), (T // 3, T), (max(0, T - 39), T - T // 4)):
        assert torch.equal(unpacked(start, stop), whole[start:stop])
