"""The specification against the authors' numbers, autograd and finite differences."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpn_triton import reference
from gpn_triton.ops import gpn
from gpn_triton.surrogate import SURROGATES

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
def test_lif_reproduces_the_authors(mode):
    g = golden("LIF", mode)
    x = g["x"].requires_grad_()
    spikes, v_final = reference.lif_loop(x, torch.zeros_like(x[0]), 2.0)
    spikes.backward(g["cotangent"])
    assert torch.equal(spikes, g["spikes"])
    torch.testing.assert_close(v_final, g["v_final"], rtol=0, atol=1e-10)
    torch.testing.assert_close(x.grad, g["grad_x"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_cuba_lif_reproduces_the_authors(mode):
    g = golden("Cuba_LIF", mode)
    x, weight, bias = (g[k].requires_grad_() for k in ("x", "fc_U_weight", "fc_U_bias"))
    zero = torch.zeros_like(x[0])
    spikes, (_, v_final, _) = reference.cuba_lif_loop(x, weight, bias, (zero, zero, zero))
    spikes.backward(g["cotangent"])
    assert torch.equal(spikes, g["spikes"])
    torch.testing.assert_close(v_final, g["v_final"], rtol=0, atol=1e-10)
    for tensor, name in ((x, "grad_x"), (weight, "grad_fc_U_weight"), (bias, "grad_fc_U_bias")):
        torch.testing.assert_close(tensor.grad, g[name], rtol=0, atol=1e-10)


def test_plif_learns_its_time_constant_along_the_smooth_derivative():
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    spikes, v_final = reference.lif_loop(x, torch.zeros_like(x[0]), 1 / torch.sigmoid(w))
    v_final.sum().backward()
    assert w.grad.abs() > 0
    fixed, _ = reference.lif_loop(x, torch.zeros_like(x[0]), 2.0)
    assert torch.equal(spikes, fixed)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("variant", reference.GATES)
def test_hand_written_backward_equals_autograd(variant, surrogate):
    inputs = random_case(variant)
    leaves = [t for i, t in enumerate(inputs) if t is not None and i != 4]
    gradients = []
    for run in (
        lambda: reference.gpn_loop(*inputs, variant, surrogate, 1.5),
        lambda: gpn(*inputs, variant, surrogate, 1.5, backend="torch"),
        lambda: gpn(*inputs, variant, surrogate, 1.5, backend="torch", checkpoint_every=3),
    ):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        spikes, v_final = run()
        assert 0.05 < spikes.mean() < 0.95
        (spikes.cos().sum() + (spikes * torch.arange(5.0)).sum() + v_final.pow(2).sum()).backward()
        gradients.append([spikes.detach(), v_final.detach(), *(leaf.grad for leaf in leaves)])
    for others in gradients[1:]:
        for expected, got in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("variant", reference.GATES)
def test_finite_differences_agree_on_the_smooth_twin(variant, surrogate):
    # with the spikes' resets frozen and the step integrated from its surrogate, the network is
    # smooth and its exact gradient is what the hand-written backward computes
    inputs = random_case(variant, T=4, B=2, N=3)
    x, weight_x, weight_v, bias, v_reset, v0 = inputs
    spikes, _, v_saved, bits = reference.gpn_forward(*inputs, variant, 1, False)
    g_s, g_v = torch.randn_like(spikes), torch.randn_like(v0)
    # the twin's own trajectory is the spiking one, because the frozen mask resets it
    *got, g_v0 = reference.gpn_backward(
        g_s, g_v, x, weight_x, weight_v, bias, v_reset, bits, v_saved,
        variant, surrogate, 2.0, 1, False,
    )  # fmt: skip

    def twin():
        s, v = reference.gpn_loop(*inputs, variant, surrogate, 2.0, True, spikes)
        return ((s * g_s).sum() + (v * g_v).sum()).item()

    eps = 1e-6
    pairs = [
        (t, g) for t, g in zip((x, weight_x, weight_v, bias), got, strict=True) if g is not None
    ]
    for tensor, gradient in [*pairs, (v0, g_v0)]:
        flat, checked = tensor.view(-1), torch.randperm(tensor.numel())[:12]
        for k in checked.tolist():
            value = flat[k].item()
            flat[k] = value + eps
            above = twin()
            flat[k] = value - eps
            below = twin()
            flat[k] = value
            assert (above - below) / (2 * eps) == pytest.approx(
                gradient.view(-1)[k].item(), rel=1e-5, abs=1e-7
            )


@pytest.mark.parametrize("name", SURROGATES)
def test_each_surrogate_is_the_derivative_of_its_step(name):
    value, derivative = SURROGATES[name]
    u = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.013
    difference = (value(u + 1e-6, 2.5) - value(u - 1e-6, 2.5)) / 2e-6
    torch.testing.assert_close(derivative(u, 2.5), difference, rtol=1e-5, atol=1e-6)
    far = torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64)
    torch.testing.assert_close(
        value(far, 2.5), torch.tensor([0, 0.5, 1.0]).double(), atol=1e-6, rtol=0
    )


def test_a_membrane_exactly_at_threshold_spikes():
    # no-fitb: h = 0.5 v + 0.5 x and theta = 1
    x = torch.tensor([2.0, 1.9999999]).view(1, 1, 2)
    spikes, _ = gpn(x, None, None, None, variant="no-fitb")
    assert spikes.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rows", [1, 24, 10**9])
def test_chunk_length_changes_nothing(rows, monkeypatch):
    inputs = random_case("full", T=11)
    expected = gpn(*[t.clone() for t in inputs], backend="torch")
    monkeypatch.setattr(reference, "CHUNK_ROWS", rows)
    for t in inputs[:4]:
        t.requires_grad_()
    spikes, v_final = gpn(*inputs, backend="torch", checkpoint_every=4)
    assert torch.equal(spikes, expected[0])
    torch.testing.assert_close(v_final, expected[1], rtol=0, atol=1e-12)
    (spikes.sum() + v_final.sum()).backward()
    by_hand = [t.grad for t in inputs[:4]]
    for t in inputs[:4]:
        t.grad = None
    spikes, v_final = reference.gpn_loop(*inputs)
    (spikes.sum() + v_final.sum()).backward()
    for got, t in zip(by_hand, inputs, strict=False):
        torch.testing.assert_close(got, t.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 16, 31, 32, 33, 70])
def test_packed_spikes_are_the_spikes(T, dtype, mean):
    x, *rest = random_case("full", T=T)
    rest = [t if dtype == torch.float64 else t.float() for t in rest]
    spikes, _, _, bits = reference.gpn_forward(x.to(dtype), *rest, "full", 1, mean)
    assert bits.dtype == torch.int32 and len(bits) == -(-T // 32)
    unpacked = reference.unpack_spikes(bits, 0, T, dtype)
    assert unpacked.any() and not unpacked.all()
    if mean:
        torch.testing.assert_close(unpacked.to(spikes.dtype).mean(0), spikes)
    else:
        assert torch.equal(unpacked, spikes)
    # no bit beyond the last step, and any stretch of steps reads alike
    assert torch.equal(reference.unpack_spikes(bits, 0, 32 * len(bits), dtype)[:T], unpacked)
    assert not reference.unpack_spikes(bits, T, 32 * len(bits), dtype).any()
    for start, stop in ((0, 1), (T // 3, T), (max(0, T - 39), T - T // 4)):
        assert torch.equal(reference.unpack_spikes(bits, start, stop, dtype), unpacked[start:stop])


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("T", [1, 32, 70])
def test_mean_output_equals_the_mean_of_the_spikes(T, every):
    inputs = random_case("full", T=T)
    results = []
    for output in ("spikes", "mean"):
        for t in inputs[:4]:
            t.requires_grad_().grad = None
        out, v_final = gpn(*inputs, backend="torch", checkpoint_every=every, output=output)
        rate = out.mean(0) if output == "spikes" else out
        ((rate * torch.arange(5.0)).sum() + v_final.sum()).backward()
        results.append([rate.detach(), *(t.grad for t in inputs[:4])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
