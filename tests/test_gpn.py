"""gpn() as a torch operator: autograd, autocast, compile, odd shapes and clear errors."""

import math

import pytest
import torch

from gpn_triton import GPN, SpikingClassifier
from gpn_triton.neurons import gpn as ops
from gpn_triton.neurons import reference
from gpn_triton.neurons.gpn import gpn


def case(T=6, B=3, N=5, variant="full", dtype=torch.float32):
    """x, weight_x, weight_v, bias of a spiking layer, requiring gradients."""
    torch.manual_seed(T * 100 + B * 10 + N)
    G = len(reference.GATES[variant])
    shapes = [(T, B, N), (G * N, N), (G * N, N), (G * N,)]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("variant", ["full", "no-i", "no-fitb"])
def test_operator_passes_opcheck(variant, mean):
    inputs = case(variant=variant)
    if variant == "no-fitb":
        inputs[1:] = [None] * 3
    state = torch.zeros(3, 5)
    lengths = torch.tensor([1, 0, 2]) if mean else None
    arguments = (*inputs, state, state.clone(), lengths, variant, "atan", 2.0, "torch", 2, mean)
    torch.library.opcheck(ops._recurrence, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_spikes_and_keeps_the_state_float32(dtype):
    x, *weights = case(T=20, B=8, N=16)
    with torch.autocast("cpu", dtype=dtype):
        spikes, v_final = gpn(x, *weights)
        exact, _ = gpn(x.to(dtype).double(), *weights)
    assert spikes.dtype == dtype and v_final.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert (spikes.double() != exact).double().mean() < 0.01
    (spikes.float().sum() + v_final.sum()).backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (x, *weights))


def gradients(run, inputs):
    """Gradients of what run puts out, added up."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(sum(out.sum() for out in run(*leaves)), leaves)


def test_state_carried_between_calls_equals_one_call():
    inputs = case(T=9, dtype=torch.float64)

    def halves(x, *weights):
        first, v = gpn(x[:4], *weights)
        second, v = gpn(x[4:], *weights, v0=v)
        return torch.cat([first, second]), v

    assert torch.equal(halves(*inputs)[0], gpn(*inputs)[0])
    pairs = zip(gradients(halves, inputs), gradients(gpn, inputs), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_non_contiguous_input_and_cotangent_change_nothing():
    x, *weights = case()
    strided = x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    cotangent = torch.randn(3, 5, 6).permute(2, 0, 1)
    for t, g in ((x, cotangent.contiguous()), (strided, cotangent)):
        gpn(t, *weights)[0].backward(g)
    assert not strided.is_contiguous() and torch.equal(x.grad, strided.grad)


def test_a_membrane_beyond_half_range_saturates_instead_of_overflowing():
    x = torch.full((3, 1, 2), -60000.0, dtype=torch.float16, requires_grad=True)
    weights = [torch.zeros(8, 2), torch.zeros(8, 2), torch.full((8,), 20.0)]
    spikes, v_final = gpn(x, *(w.requires_grad_() for w in weights))
    (spikes.float().sum() + v_final.sum()).backward()
    assert v_final.min() < -65504 and v_final.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *weights))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(2, 5)}, r"x: expected \[T, B, N\].*got \[2, 5\]"),
    ({"x": torch.zeros(0, 3, 5)}, r"x: expected .* at least 1, got \[0, 3, 5\]"),
    ({"x": torch.zeros(2, 3, 5, dtype=torch.int64)}, "x: expected a floating dtype"),
    ({"weight_x": torch.zeros(20, 4)}, r"weight_x: expected shape \[20, 5\].*got \[20, 4\]"),
    ({"weight_v": None}, r"weight_v: expected shape \[20, 5\].*got None"),
    ({"bias": torch.zeros(5)}, r"bias: expected shape \[20\].*got \[5\]"),
    ({"v0": torch.zeros(5)}, r"v0: expected shape \[3, 5\].*got \[5\]"),
    ({"v_reset": torch.zeros(3, 5, dtype=torch.int32)}, "v_reset: expected a floating dtype"),
    ({"variant": "no-fitb"}, "weight_x: variant no-fitb has no gates"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    arguments = dict(zip(("x", "weight_x", "weight_v", "bias"), case(), strict=True))
    with pytest.raises(ValueError, match=message):
        gpn(**{**arguments, **change})


@pytest.mark.parametrize(("option", "value", "message"), [
    ("variant", "no-x", "expected one of full.*got 'no-x'"),
    ("surrogate", "step", "expected one of atan.*got 'step'"),
    ("backend", "cuda", "expected one of auto.*got 'cuda'"),
    ("output", "sum", "expected one of spikes, mean, got 'sum'"),
    ("alpha", 0.0, "expected a finite number above 0, got 0.0"),
    ("alpha", math.nan, "expected a finite number above 0, got nan"),
    ("alpha", torch.nn.Parameter(torch.ones(())), "expected a number, got a Parameter"),
    ("checkpoint_every", 0, "expected a whole number from 1 on, got 0"),
])  # fmt: skip
def test_bad_options_are_named_when_a_layer_or_network_is_built(option, value, message):
    builds = [lambda **o: gpn(*case(), **o), lambda **o: GPN(5, **o)]
    if option not in ("variant", "output"):
        builds += [lambda n=n, **o: SpikingClassifier([5], n, **o) for n in ("gpn", "lif")]
    for build in builds:
        with pytest.raises(ValueError, match=f"{option}: {message}"):
            build(**{option: value})
