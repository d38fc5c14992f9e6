"""What foreign software asks of the layers: derivatives of every kind, export, hooks, counters of
FLOPs, quantisation; and the sentence it gets where the answer is no."""

import subprocess
import sys

import pytest
import torch
from torch import func, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from gpn_triton import GPN, SpikingClassifier, gpn
from gpn_triton.neurons import cost, reference
from gpn_triton.neurons.event_linear import Cells, event_linear
from gpn_triton.neurons.layers import LIF, CubaLIF
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.neurons.spike_linear import spike_linear
from gpn_triton.neurons.surrogate import SURROGATES

COUNTS = torch.poisson(torch.full((40, 3, 9), 0.5), generator=torch.Generator().manual_seed(0))


def case(T=3, B=3, N=5, variant="full"):
    """x and the weights of a spiking layer in float64."""
    rows = len(reference.GATES[variant]) * N
    shapes = [(T, B, N), (rows, N), (rows, N), (rows,)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def network(neuron="gpn", **options):
    """A network of two layers for COUNTS, in evaluation mode."""
    torch.manual_seed(0)
    return SpikingClassifier([8, 6], neuron, inputs=9, classes=4, dropout=0.0, **options).eval()


def raw_jvp(f, primals, tangents):
    """The tangent of f by torch.autograd.forward_ad; a tangent may be None."""
    with forward_ad.dual_level():
        duals = [
            p if t is None else forward_ad.make_dual(p, t)
            for p, t in zip(primals, tangents, strict=True)
        ]
        return forward_ad.unpack_dual(f(*duals)).tangent


def func_jvp(f, primals, tangents):
    return func.jvp(f, tuple(primals), tuple(tangents))[1]


def reverse(f, primals, tangents):
    """The same derivative of a number in reverse mode, which the operator itself has."""
    leaves = [p.detach().requires_grad_() for p in primals]
    gradients = torch.autograd.grad(f(*leaves), leaves)
    return sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))


@pytest.mark.parametrize("jvp", [func_jvp, raw_jvp])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("output", ["spikes", "mean"])
@pytest.mark.parametrize("variant", ["full", "no-i"])
def test_a_tangent_of_every_input_goes_through_the_recurrence(variant, output, surrogate, jvp):
    primals, tangents = case(variant=variant), case(variant=variant)

    def f(*inputs):
        out, v = gpn(*inputs, variant=variant, surrogate=surrogate, output=output)
        return (out.sum(-1) * torch.arange(3)).sum() + v.sum()

    expected = reverse(f, primals, tangents)
    assert expected != 0
    torch.testing.assert_close(jvp(f, primals, tangents), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("neuron", ["gpn", "lif", "plif", "cuba-lif"])
def test_tangents_of_input_or_weights_go_through_a_network(neuron):
    model, x = network(neuron).double(), COUNTS[:7].double()
    names, weights = zip(*model.named_parameters(), strict=True)

    def f(x, *weights):
        logits = func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))[0]
        return (logits * torch.arange(4)).sum()

    primals = [x, *(w.detach() for w in weights)]
    for of in (range(1), range(1, len(primals)), [names.index("inputs.1.weight") + 1]):
        tangents = [torch.randn_like(p) * (k in of) for k, p in enumerate(primals)]
        expected = reverse(f, primals, tangents)
        assert expected != 0
        some = [t if k in of else None for k, t in enumerate(tangents)]
        for found in (func_jvp(f, primals, tangents), raw_jvp(f, primals, some)):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_jacobians_hessians_and_gradients_of_samples_are_those_of_the_loop():
    x, *weights = case()
    zeros = torch.zeros(3, 5, dtype=torch.float64)

    def ours(x):
        return gpn(x, *weights)[1]

    def loop(x):
        return reference.gpn_loop(x, *weights, zeros, zeros)[1]

    expected = torch.autograd.functional.jacobian(loop, x)
    assert expected.any()
    for transform in (func.jacfwd, func.jacrev):
        torch.testing.assert_close(transform(ours)(x), expected)
    hessian = torch.autograd.functional.hessian(lambda x: loop(x).sum(), x)
    for transform in (func.hessian, lambda f: func.jacrev(func.grad(f))):
        torch.testing.assert_close(transform(lambda x: ours(x).sum())(x), hessian)
    of_samples = func.vmap(func.grad(lambda x: gpn(x[:, None], *weights)[1].sum()), 1)(x)
    torch.testing.assert_close(of_samples, func.grad(lambda x: ours(x).sum())(x).transpose(0, 1))


def test_vmap_runs_the_operator_and_its_backward():
    x, *weights = case()
    leaf = torch.stack([x, 2 * x]).requires_grad_()
    gradients = []
    for run in (func.vmap, lambda f: lambda xs: torch.stack([f(x) for x in xs])):
        out = run(lambda x: gpn(x, *weights)[1])(leaf)
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients)


def test_compiled_functions_differentiate_forward():
    x, *weights = case()
    compiled = torch.compile(lambda x: gpn(x, *weights)[1], fullgraph=True, backend="aot_eager")
    compiled(x)
    expected = raw_jvp(lambda x: gpn(x, *weights)[1], [x], [x])
    torch.testing.assert_close(raw_jvp(compiled, [x], [x]), expected)
    whole = torch.compile(
        lambda x: func_jvp(lambda x: gpn(x, *weights)[1], [x], [x]),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(whole(x), expected)


def test_a_backend_asked_for_by_name_does_not_fall_back_to_the_loop():
    x, *weights = case()
    for jvp in (func_jvp, raw_jvp):
        for name in ("triton", "cpu"):
            said = f"backend='{name}' cannot run: .* no forward mode"
            with pytest.raises(RuntimeError, match=said):
                jvp(lambda x, name=name: gpn(x.float(), *weights, backend=name)[0], [x], [x])


def test_a_tangent_under_autocast_has_the_rounded_input():
    model, x = network(), COUNTS[:7]
    with torch.autocast("cpu", torch.bfloat16):
        tangent = func_jvp(lambda x: model(x)[0].float().sum(), [x], [x])
        with torch.enable_grad():
            expected = reverse(lambda x: model(x)[0].float().sum(), [x], [x])
    torch.testing.assert_close(tangent, expected, rtol=0.05, atol=0.05)


def test_linears_on_events_and_on_spikes_differentiate_forward_and_map():
    spikes = (torch.rand(6, 3, 5) < 0.3).double()
    bits = sum(spikes[t].int() << t for t in range(6))[None]
    cells = Cells.from_cells(spikes.flatten().nonzero().flatten(), spikes.shape)
    weight, tangent = torch.randn(2, 4, 5, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    for linear in (
        lambda w: spike_linear(spikes, bits, None, w, bias).sin(),
        lambda w: event_linear(cells, w, bias).sin(),
    ):
        expected = func_jvp(
            lambda w: nn.functional.linear(spikes, w, bias).sin(), [weight], [tangent]
        )
        for jvp in (func_jvp, raw_jvp):
            torch.testing.assert_close(jvp(linear, [weight], [tangent]), expected)
        mapped = func.vmap(linear)(torch.stack([weight, tangent]))
        torch.testing.assert_close(mapped, torch.stack([linear(weight), linear(tangent)]))
    torch.autograd.gradgradcheck(
        lambda w, b: event_linear(cells, w, b).sin(),
        (weight.requires_grad_(), bias.requires_grad_()),
    )


def twice(f, leaf):
    (gradient,) = torch.autograd.grad(
        f(leaf.requires_grad_()).square().sum(), leaf, create_graph=True
    )
    return torch.autograd.grad(gradient.sum(), leaf)


def test_a_double_backward_is_refused_with_what_to_do():
    x, *weights = case()
    with pytest.raises(RuntimeError, match="gpn has first derivatives alone.*reference.gpn_loop"):
        twice(lambda x: gpn(x, *weights)[1], x)
    with pytest.raises(RuntimeError, match="gpn has first derivatives alone.*reference.gpn_loop"):
        twice(lambda x: network()(x)[0], COUNTS.clone())
    spikes, bits = torch.ones(1, 3, 5), torch.ones(1, 3, 5, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"spike_linear has first .*F\.linear\(spikes \* mask"):
        twice(lambda w: spike_linear(spikes, bits, None, w, None), torch.randn(4, 5))


@pytest.mark.parametrize(
    "alpha", [nn.Parameter(torch.ones(())), torch.ones(()), *map(float, ("inf", "nan"))], ids=str
)
def test_an_alpha_that_would_be_constant_or_no_width_is_refused(alpha):
    x, *weights = case()
    for build in (lambda: gpn(x, *weights, alpha=alpha), lambda: network(alpha=alpha)):
        with pytest.raises(ValueError, match="alpha: expected a"):
            build()


@pytest.mark.parametrize("training", [False, True])
def test_layers_recomputed_in_backward_give_the_same_gradients(training):
    results, draws = [], network().train(training).draw(3)
    for wrap in (
        lambda model: model,
        lambda model: lambda *inputs: checkpoint(model, *inputs, use_reentrant=False),
        checkpoint_wrapper,
        lambda model: model.apply(_wrap_layers),
    ):
        model = network().train(training)
        parameters = list(model.parameters())
        (wrap(model)(COUNTS, draws)[0] * torch.arange(4)).sum().backward()
        results.append([p.grad for p in parameters])
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def _wrap_layers(module):
    if isinstance(module, SpikingClassifier):
        for layers in (module.inputs, module.neurons):
            for k, layer in enumerate(layers):
                layers[k] = checkpoint_wrapper(layer)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("before_linear", [False, True])
def test_spikes_that_a_hook_changes_in_place_give_the_gradient_of_what_they_became(
    before_linear, compiled
):
    keep, gradients, draws = torch.tensor([1.0, 0.0] * 4), [], network().train().draw(3)
    for in_place in (True, False):
        model = network().train()

        def neuron_hook(module, inputs, out, in_place=in_place):
            return None if in_place and out[0].mul_(keep) is not None else (out[0] * keep, out[1])

        def linear_hook(module, inputs, in_place=in_place):
            x = inputs[0]
            return None if in_place and x.values.mul_(keep) is not None else (x.values * keep,)

        if before_linear:
            model.inputs[1].register_forward_pre_hook(linear_hook)
        else:
            model.neurons[0].register_forward_hook(neuron_hook)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(COUNTS, draws)[0].square().sum().backward()
        gradients.append(model.inputs[1].weight.grad)
    assert gradients[0][:, ::2].any() and not gradients[0][:, 1::2].any()
    torch.testing.assert_close(*gradients)


PACKED = nn.utils.rnn.pack_padded_sequence(torch.zeros(6, 3, 5), [6, 4, 2])
NETWORKS = ("gpn", "lif", "cuba-lif", "lstm", "gru", "cnn")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(()), ValueError, r"x: expected \[T, B, ., each size at least 1, got \[\]"),
        (torch.zeros(5), ValueError, r"x: expected \[T, B, .\], each size at least 1, got \[5\]"),
        (torch.zeros(6, 5), ValueError, r"x: expected \[T, B, .\].* got \[6, 5\]"),
        (torch.zeros(1, 6, 3, 5), ValueError, r"x: expected \[T, B, .\].* got \[1, 6, 3, 5\]"),
        (torch.zeros(0, 3, 5), ValueError, r"x: expected \[T, B, .\].* got \[0, 3, 5\]"),
        (torch.zeros(6, 3, 4), ValueError, r"(x|weight_x): expected .*\[6, 3, 4\]"),
        (torch.zeros(6, 3, 5).long(), ValueError, r"x: .* floating dtype, got torch.int64: give"),
        (torch.zeros(6, 3, 5).bool(), ValueError, "x: expected a floating dtype, got torch.bool"),
        (PACKED, TypeError, "x: expected a tensor, got a PackedSequence, .* Pad it"),
        ([[1.0]], TypeError, r"x: expected a tensor \[T, B, .\], got list"),
        (torch.zeros(6, 3, 5).numpy(), TypeError, "x: expected a tensor .*, got ndarray"),
        (None, TypeError, "x: expected a tensor .*, got NoneType"),
    ],
    ids="number one-d two-d four-d empty channels integers bool packed list numpy none".split(),
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(x, error, message):
    weights = [torch.zeros(20, 5), torch.zeros(20, 5), torch.zeros(20)]
    layers = [lambda x: gpn(x, *weights), LIF(5), CubaLIF(5)]
    # what nn.LSTM takes, GPN takes: see test_sequences.py
    if x is not PACKED and not (isinstance(x, torch.Tensor) and x.ndim == 2):
        layers += [GPN(5), GPN(5).eval()]
    for name in NETWORKS:
        model = SpikingClassifier([5], name, inputs=5, classes=2, time_bins=6).eval()
        layers += [model] + [model.stream] * (name != "cnn")
    for layer in layers:
        with pytest.raises(error, match=message.replace("., each", ".], each")):
            layer(x)


def test_inputs_of_another_dtype_or_device_than_the_weights_are_named():
    for layer in (network(), network("lif"), network("cnn", time_bins=40), CubaLIF(9)):
        for other, message in (
            (COUNTS.double(), "x: expected the weights' dtype torch.float32, got torch.float64"),
            (COUNTS.to("meta"), "x: expected on the weights' device cpu, got meta"),
        ):
            with pytest.raises(ValueError, match=message):
                layer(other)
    with pytest.raises(ValueError, match="weight_x: expected on x's device meta, got cpu"):
        GPN(9)(COUNTS.to("meta"))


def test_meta_tensors_give_shapes():
    model = network().train().to("meta")
    logits, activity = model(COUNTS.to("meta"))
    assert logits.is_meta and logits.shape == (3, 4) and activity.shape == (2,)
    logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((torch.zeros(3, 5),) * 2, TypeError, "(v0: expected a tensor .*, got tuple|state: )"),
        (torch.zeros(2, 5), (ValueError, TypeError), r"(v0: expected shape \[3, 5\]|state: )"),
        (torch.zeros(3, 5).long(), (ValueError, TypeError), "(v0: expected a floating|state: )"),
    ],
    ids=["tuple", "rows", "integers"],
)  # fmt: skip
def test_states_that_do_not_fit_are_named(state, error, message):
    x = torch.zeros(6, 3, 5)
    for layer in (GPN(5), LIF(5), CubaLIF(5), SpikingClassifier([5], inputs=5).eval().stream):
        with pytest.raises(error, match=message):
            layer(x, state)
    with pytest.raises(ValueError, match=r"state: membrane: expected shape \[3, 5\]"):
        CubaLIF(5)(x, (x[0], x[0, :2], x[0]))
    _, two = network().stream(COUNTS)
    with pytest.raises(ValueError, match="state: expected of 1 layers, got 2"):
        SpikingClassifier([8], inputs=9).eval().stream(COUNTS, two)


@pytest.mark.parametrize("neuron", ["gpn", "gpn-no-i", "gpn-no-fitb", "lif", "cuba-lif"])
def test_flop_counters_see_what_cost_counts(neuron):
    from torch.utils.flop_counter import FlopCounterMode

    T, B, C = COUNTS.shape
    model = network(neuron).train()
    with FlopCounterMode(display=False) as counter:
        logits, _ = model(COUNTS)
    forward = counter.get_total_flops()
    with counter:
        logits.sum().backward()
    work = NEURONS[neuron].work
    for total, backward in ((forward, False), (forward + counter.get_total_flops(), True)):
        layers = cost.layer(work, 8, C, backward, False) + cost.layer(work, 6, 8, backward, True)
        readout = cost.linear(6, 4, backward, True)
        assert total == layers.flops * T * B + readout.flops * B


def test_the_first_call_of_a_process_is_counted_and_importing_stays_light():
    code = """
import sys, torch, gpn_triton
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
x = torch.zeros(2, 3, 5)
with FlopCounterMode(display=False) as counter:
    gpn_triton.gpn(x, torch.zeros(20, 5), torch.zeros(20, 5), torch.zeros(20))
assert counter.get_total_flops() == 2 * 2 * 20 * 5 * 6, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("least", [2, 33])
def test_export_with_a_dynamic_T(least, strict):
    model = network()
    shapes = ({0: Dim("T", min=least, max=1000)}, None)
    program = export(
        model, (COUNTS[: least + 4], None), dynamic_shapes=shapes, strict=strict
    ).module()
    for T in (least, 64, 71):
        x = COUNTS.repeat(2, 1, 1)[:T]
        assert torch.equal(program(x, None)[0], model(x)[0])
    loss = program(COUNTS, None)[0].sum()
    if least == 2:
        with pytest.raises(RuntimeError, match="saves nothing for backward.*min=33"):
            loss.backward()
    else:
        loss.backward()


def test_a_network_whose_readout_was_quantized_classifies():
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no int8 products for a CPU")
    for neuron in ("gpn", "lif", "lstm"):
        model = network(neuron)
        quantized = quantize(model, {nn.Linear, nn.LSTM}, torch.qint8)
        expected = model(COUNTS)[0]
        torch.testing.assert_close(quantized(COUNTS)[0], expected, rtol=0.1, atol=0.05)
