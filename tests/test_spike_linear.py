"""spike_linear against F.linear(spikes * mask), and what is held between forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from gpn_triton.neurons import spike_linear as module
from gpn_triton.neurons.gpn import gpn, gpn_packed
from gpn_triton.neurons.gpn_options import GPNOptions
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from gpn_triton.neurons.spike_linear import SpikeLinear, Spikes, spike_linear

# share of the largest gradient: sums of up to 350 terms in another order; bfloat16 rounds weights,
# cotangents and every chunk's sum to 2^-9
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def case(T, B=5, N=13, M=7, dtype=torch.float32):
    """spikes, bits, mask, weight, bias."""
    spikes = torch.rand(T, B, N) < 0.3
    bits = torch.zeros(-(-T // 32), B, N, dtype=torch.int32)
    for t in range(T):
        bits[t // 32] |= spikes[t].int() << t % 32
    mask = F.dropout(torch.ones(B, N), 0.4).to(dtype)
    return spikes.to(dtype), bits, mask, torch.randn(M, N).to(dtype), torch.randn(M).to(dtype)


def values_and_gradients(linear, leaves, g_y):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = linear(*leaves)
    y.backward(g_y)
    return [y.detach(), *(t.grad for t in leaves)]


def check(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and b.any()
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 32, 33, 70])
def test_values_and_gradients_are_those_of_the_dense_product(T, masked, dtype, monkeypatch):
    spikes, bits, mask, *leaves = case(T, dtype=dtype)
    mask, scale = (mask, mask) if masked else (None, 1)
    # the whole sequence at once, 9 steps, one step; the cotangent as it is, expanded, transposed
    g_y = torch.randn(T, 5, 7).to(dtype)
    for steps, g in ((1 << 20, g_y), (9, g_y[:1].expand_as(g_y)), (0, g_y.mT.contiguous().mT)):
        monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": steps * spikes[0].nbytes})
        got, expected = (
            values_and_gradients(linear, (spikes, *leaves), g)
            for linear in (
                lambda s, w, b: spike_linear(s, bits, mask, w, b),
                lambda s, w, b: F.linear(s * scale, w, b),
            )
        )
        check(got, expected, CLOSE[dtype])
        assert torch.equal(got[0], expected[0])


def test_half_gradients_are_summed_in_float32(monkeypatch):
    # each chunk adds 1 to a sum that bfloat16 would stop counting at 256
    T = 600
    bits = torch.full((-(-T // 32), 1, 1), -1, dtype=torch.int32)
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 0})
    weight = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = spike_linear(torch.ones(T, 1, 1), bits, None, weight, None)
    y.backward(torch.ones_like(y))
    assert weight.grad.item() == T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_the_dense_product_does(dtype):
    spikes, bits, mask, weight, bias = case(40)
    g_y = torch.randn(40, 5, 7).to(dtype)

    def run(linear):
        with torch.autocast("cpu", dtype):
            return values_and_gradients(linear, (spikes, weight, bias), g_y)

    expected = run(lambda s, w, b: F.linear(s * mask, w, b))
    got = run(lambda s, w, b: spike_linear(s, bits, mask, w, b))
    assert got[0].dtype == dtype and got[2].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    check(got, expected, 1e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_operator_passes_opcheck(masked):
    spikes, bits, mask, weight, bias = case(33)
    spikes, weight, bias = (t.requires_grad_() for t in (spikes, weight, bias))
    options = (mask, weight, None) if masked else (None, weight, bias)
    torch.library.opcheck(module._spike_linear, (spikes, bits, *options, "torch"))


def test_bits_need_no_gradient_and_are_none_where_nothing_does():
    x, *weights = (
        torch.randn(s).requires_grad_() for s in ((33, 3, 16), (64, 16), (64, 16), (64,))
    )
    arguments = x, tuple(weights), None, None, GPNOptions()
    spikes, v_final, bits = gpn_packed(*arguments)
    assert spikes.requires_grad and v_final.requires_grad and not bits.requires_grad
    assert torch.equal(unpack_spikes(bits, 0, 33, spikes.dtype), spikes)
    with torch.no_grad():
        assert gpn_packed(*arguments)[2] is None
    first, second = gpn(x, *weights)
    assert torch.equal(first, spikes) and torch.equal(second, v_final)


def test_the_layer_takes_spikes_with_and_without_bits_and_plain_tensors():
    spikes, bits, mask, *_ = case(33)
    layer = SpikeLinear(13, 7)
    operand, packed = spikes * mask, Spikes(spikes, bits, mask, spikes._version)
    results = []
    for x in (operand, Spikes(operand), Spikes(spikes, None, mask), packed):
        layer.zero_grad()
        y = layer(x)
        (y * torch.arange(7)).sum().backward()
        results.append([y.detach(), layer.weight.grad, layer.bias.grad])
    for got in results[1:]:
        assert torch.equal(got[0], results[0][0])
        check(got, results[0], 1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": torch.zeros(7, 12)}, r"weight: expected \[M, N\].*got \[7, 12\] for \[33, 5"),
    ({"bits": torch.zeros(1, 5, 13, dtype=torch.int32)}, r"bits: expected \[2, 5, 13\]"),
    ({"bits": torch.zeros(2, 5, 13)}, "bits: expected int32, got torch.float32"),
    ({"mask": torch.ones(13)}, r"mask: expected \[5, 13\], got \[13\]"),
    ({"bias": torch.zeros(3)}, r"bias: expected \[7\], got \[3\]"),
    ({"weight": torch.zeros(7, 13).double()}, "weight: expected spikes' dtype torch.float32"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    names = ("spikes", "bits", "mask", "weight", "bias")
    arguments = dict(zip(names, case(33), strict=True))
    with pytest.raises(ValueError, match=message):
        spike_linear(**{**arguments, **change})
