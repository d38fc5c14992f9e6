"""LIF, PLIF and CuBa-LIF as operators: every backend against the loops that define them."""

import pytest
import torch

from gpn_triton.machine.device import BACKENDS
from gpn_triton.neurons import lif as ops
from gpn_triton.neurons import reference
from gpn_triton.neurons.layers import LIF, CubaLIF
from gpn_triton.neurons.lif import cuba_lif, lif
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier
from gpn_triton.neurons.surrogate import SURROGATES
from tests.leaky import KINDS, check, layer, run

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


@pytest.mark.parametrize("T, B, N", [
    (1, 1, 1), (1, 3, 5), (7, 13, 37), (40, 1, 16), (33, 40, 33), (65, 17, 8), (5, 300, 8),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_size_equals_the_definition(kind, T, B, N, dtype):
    check(kind, T, B, N, dtype)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_surrogate_and_backend_equals_the_definition(kind, backend, surrogate):
    check(kind, 6, 3, 17, backend=backend, surrogate=surrogate, alpha=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_types_stay_near_the_definition(kind, backend, dtype):
    check(kind, 20, 13, 37, dtype, backend)


def test_more_than_one_chunk_equals_the_definition():
    # half types are cast a chunk at a time; CuBa-LIF's backward always works so
    check("cuba-lif", 60, 600, 8, torch.float32)
    check("lif", 45, 200, 40, torch.bfloat16)


def test_the_operators_equal_the_loops_themselves():
    x, v0, tau = layer("lif", 40, 5, 19)
    g = torch.randn(40, 5, 19, dtype=x.dtype)
    pairs = [(lif(x, v0, tau), reference.lif_loop(x, v0, tau), (x, v0, tau))]
    x, weight, bias, *state = layer("cuba-lif", 40, 5, 19)
    pairs.append((
        cuba_lif(x, weight, bias, state),
        reference.cuba_lif_loop(x, weight, bias, state), (x, weight, bias, *state),
    ))  # fmt: skip
    for got, expected, leaves in pairs:
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-10)
        a, b = (torch.autograd.grad(out[0], leaves, g) for out in (got, expected))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_neither_on_threads_nor_on_the_rest_of_the_batch(kind):
    inputs = layer(kind, 9, 70, 37, torch.float32)
    # what is one row's: all but the weights and tau
    own = [k for k, t in enumerate(inputs) if t.shape[-2:] == (70, 37)]

    def results(inputs):
        spikes, state, bits = run(kind, inputs)
        gradients = torch.autograd.grad([(spikes * 0.3).sum(), state[0].square().sum()], inputs)
        return [spikes, *state, bits, *(gradients[k] for k in own)], gradients

    whole, gradients = results(inputs)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        again = results(inputs)
        assert all(map(torch.equal, (*whole, *gradients), (*again[0], *again[1])))
    for rows in (slice(0, 1), slice(5, 12), slice(69, 70)):
        part = [
            (t[..., rows, :] if k in own else t).detach().requires_grad_()
            for k, t in enumerate(inputs)
        ]
        for a, b in zip(whole, results(part)[0], strict=True):
            assert torch.equal(a[..., rows, :], b)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_visible_and_within_its_sample(kind):
    inputs = layer(kind, 9, 7, 19, torch.float32)
    with torch.no_grad():
        inputs[0][4, 2] = float("nan")
    spikes, state, _ = run(kind, inputs)
    g_x, *others = torch.autograd.grad([spikes, *state], inputs, [torch.ones_like(spikes), *state])
    rest = [0, 1, 3, 4, 5, 6]
    assert all(a[2].isnan().all() and a[rest].isfinite().all() for a in state)
    assert g_x[4, 2].isnan().all() and g_x[:, rest].isfinite().all()
    # tau's, or the weight's
    assert not others[1 if kind == "lif" else 0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_absent_gradients_change_nothing(kind):
    inputs = layer(kind, 5, 3, 16)
    strange = [t.detach().mT.contiguous().mT if t.ndim > 1 else t.detach() for t in inputs]
    strange = [t.requires_grad_() for t in strange]
    g, zero = torch.randn(5, 16, 3, dtype=torch.float64).mT, torch.zeros(3, 16).double()
    results = []
    for given, cotangent in ((inputs, g.contiguous()), (strange, g)):
        spikes, state, _ = run(kind, given)
        results.append(torch.autograd.grad(spikes, given, cotangent, retain_graph=True))
        zeros = [zero] * len(state)
        results.append(torch.autograd.grad([spikes, *state], given, [cotangent, *zeros]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    # spikes may have none either
    _, state, _ = run(kind, inputs)
    assert all(g.isfinite().all() for g in torch.autograd.grad(state[-1].sum(), inputs[:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_saves_nothing_and_a_sequence_may_come_in_parts(kind):
    inputs = [t.detach() for t in layer(kind, 50, 5, 37, torch.float32)]
    spikes, state, bits = run(kind, inputs)
    assert bits is None
    x, *rest = inputs
    first, middle, _ = run(kind, [x[:13], *rest])
    if kind == "lif":
        rest[0] = middle[0]
    else:
        rest[2:] = *middle, first[-1]
    second, end, _ = run(kind, [x[13:], *rest])
    assert torch.equal(spikes, torch.cat([first, second]))
    assert all(map(torch.equal, state, end))


def test_operators_pass_opcheck():
    x, v0, tau = layer("lif", 5, 3, 4, torch.float32)
    torch.library.opcheck(ops._lif, (x, v0, tau, "atan", 2.0, "cpu", True))
    inputs = layer("cuba-lif", 5, 3, 4, torch.float32)
    torch.library.opcheck(ops._cuba_lif, (*inputs, 0.5, 0.5, "atan", 2.0, "cpu", True))


@pytest.mark.parametrize("neuron", ["lif", "plif", "cuba-lif"])
def test_a_network_shares_its_spikes_in_bits_and_compiles(neuron):
    x = torch.poisson(torch.full((37, 5, 9), 2.0))
    model = SpikingClassifier([16, 8], neuron, inputs=9, classes=4)
    with torch.no_grad():
        # so that the second layer spikes, too
        for linear in model.inputs:
            linear.weight *= 8
    draws = model.draw(5)
    assert model.neurons[0](model.inputs[0](x)).bits.shape == (2, 5, 16)

    def gradients(run):
        model.zero_grad()
        run(x, draws)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model)
    assert all(g.any() for g in expected)
    assert all(map(torch.equal, expected, gradients(compiled)))
    # without bits the dense spikes give the same
    model.neurons[0].register_forward_hook(lambda m, i, out: (out[0] * 1, out[1]))
    for a, b in zip(expected, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_derivatives_beyond_the_first_are_the_loop_s_or_refused():
    x, v0, tau = layer("lif", 5, 2, 3)
    _, tangent = torch.func.jvp(lambda x: lif(x, v0, tau)[0], (x,), (torch.ones_like(x),))
    assert tangent.any()
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: .* no forward mode"):
        torch.func.jvp(lambda x: lif(x, v0, tau, backend="cpu")[0], (x,), (x.detach(),))
    inputs = layer("cuba-lif", 5, 2, 3)
    for kind, leaves in (("lif", [x, v0, tau]), ("cuba-lif", inputs)):
        spikes, *_ = run(kind, leaves)
        (g,) = torch.autograd.grad(spikes.sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives alone.*reference.*lif_loop"):
            g.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"tau": torch.ones(5)}, r"tau: expected one number, got shape \[5\]"),
    ({"v0": torch.zeros(5)}, r"v0: expected shape \[3, 5\]"),
    ({"backend": "cuda"}, "backend: expected one of auto"),
    ({"surrogate": "step"}, "surrogate: expected one of atan"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lif(torch.zeros(2, 3, 5), **change)
    with pytest.raises(ValueError, match=r"weight: expected \[5, 5\], got \[5, 4\]"):
        cuba_lif(torch.zeros(2, 3, 5), torch.zeros(5, 4), torch.zeros(5))


def test_a_backend_that_cannot_run_is_refused():
    assert set(BACKENDS) == {"auto", "triton", "cpu", "torch"}
    for build in (LIF, CubaLIF):
        with pytest.raises(ValueError, match="backend: expected one of auto"):
            build(5, backend="cuda")
        with pytest.raises(RuntimeError, match="backend='triton' cannot run: x is float64"):
            build(5, backend="triton").double()(torch.zeros(2, 3, 5).double())
    for neuron in KINDS:
        assert NEURONS[neuron].compiles_first("torch", torch.empty(1)) is False
        model = SpikingClassifier([5], neuron, inputs=5, classes=2, backend="triton")
        assert model.neurons[0].backend == "triton"
