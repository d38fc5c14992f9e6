"""The recurrence kernels against the specification in float64: in Triton's interpreter where there
is no GPU, on the GPU where there is one."""

import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from gpn_triton.kernels import tiles
from gpn_triton.kernels.cuba_lif import cuba_lif_backward, cuba_lif_forward
from gpn_triton.kernels.gpn_forward import gpn_forward
from gpn_triton.kernels.spikes import spikes_unpack
from gpn_triton.machine import device as machine
from gpn_triton.neurons import gpn as ops
from gpn_triton.neurons.lif import lif
from gpn_triton.neurons.networks import SpikingClassifier
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from gpn_triton.neurons.reference import GATES, gpn_loop
from gpn_triton.neurons.spike_linear import spike_linear
from gpn_triton.neurons.surrogate import SURROGATES
from tests import interpreted_bfloat16, leaky
from tests.interpreter import need_interpreter
from tests.recurrence import DEVICE, check_gradients, layer, run_kernels
from tests.tolerances import BACKENDS, MEAN, TOLERANCES

need_interpreter()

pytestmark = pytest.mark.usefixtures("poisoned_memory", "bfloat16_as_on_a_gpu")


@pytest.fixture
def bfloat16_as_on_a_gpu(monkeypatch):
    if DEVICE == "cpu":
        interpreted_bfloat16.correct(monkeypatch)


def plan(strategy, T, B, N, dtype, variant, every, **changes):
    """A plan of the given strategy with tiles smaller than the layer.

    Persistent chunks forward are whole words of packed spikes, as tiles.choose makes them.
    """
    chosen = tiles.choose(T, B, N, dtype, GATES[variant], every)
    tile = tiles.Tile(16, tiles.block(N) if N <= 128 else 64, 0, 8, 3)
    if strategy == "stepwise":
        tile = tiles.Tile(32, 64, 64, 4, 2)
    usual = {"forward": tile, "backward": tile, "dependent": False}
    return replace(chosen, strategy=strategy, **{**usual, **changes})


def beyond_the_gpu(how, shared, cuda):
    """Why a plan that tiles.choose would not make cannot run on the GPU that is here, if so.

    shared: as tiles.persistent_shared_bytes gives it.
    """
    if how.strategy == "stepwise" or not cuda:
        return None
    tiles_of = how.forward.num_stages, how.backward.num_stages
    most = max(a + (k - 1) * b for (a, b), k in zip(shared.values(), tiles_of, strict=True))
    limit = machine.kernel_limits()["shared_bytes"]
    return f"takes {most} bytes of shared memory of {limit}" if most > limit else None


def check(strategy, T, B, N, variant="full", dtype=torch.float32, mean=False, every=1,
          surrogate="atan", alpha=2.0, lengths=None, **changes):  # fmt: skip
    """Hold forward and every gradient of the kernels against autograd of the specification."""
    how = plan(strategy, T, B, N, dtype, variant, every, **changes)
    shared = tiles.persistent_shared_bytes(N, GATES[variant], dtype)
    if GATES[variant] and (reason := beyond_the_gpu(how, shared, DEVICE == "cuda")):
        pytest.skip(reason)
    inputs = layer(T, B, N, variant, dtype)
    g_out = torch.randn((B, N) if mean else (T, B, N), device=DEVICE)
    g_v_final = torch.randn(B, N, device=DEVICE)
    out, spikes, v_final, _, gradients = run_kernels(
        inputs, g_out, g_v_final, how, variant, surrogate, alpha, every, lengths
    )

    # the smooth step's value shows |h - theta|, its gradient is the surrogate's, and neurons reset
    # where the kernel spiked
    exact = [t if t is None else t.double() for t in inputs]
    leaves = [t.requires_grad_() for t in (*exact[:4], exact[5]) if t is not None]
    soft, v_exact = gpn_loop(*exact, variant, surrogate, alpha, spikes.double(), lengths)
    tolerance = TOLERANCES[dtype]
    sure = (soft - 0.5).abs() > tolerance.margin * alpha / 2
    assert sure.double().mean() > 0.9
    assert torch.equal(spikes[sure] > 0, soft[sure] > 0.5)
    assert 0.02 < spikes.double().mean() < 0.98 or spikes.numel() < 100
    if mean:
        own = tiles.own_steps(T, lengths)
        torch.testing.assert_close(out, spikes.float().sum(0) / own, **MEAN)
    assert (v_final.double() - v_exact).abs().max() < tolerance.state
    expected = torch.autograd.grad(
        [soft.sum(0) / own if mean else soft, v_exact],
        leaves,
        [g_out.to(out.dtype).double(), g_v_final.double()],
    )
    assert [g.dtype for g in gradients] == [dtype, *[torch.float32] * (len(leaves) - 1)]
    check_gradients(gradients, expected, tolerance.gradient)


@pytest.mark.parametrize("strategy, T, B, N, options", [
    ("stepwise", 1, 1, 1, {}),
    ("stepwise", 7, 13, 37, {"forward_steps": 3, "backward_steps": 2}),
    ("stepwise", 2, 33, 160, {"hoist": False, "dependent": True}),
    ("stepwise", 7, 40, 16, {"mean": True, "every": 3, "backward_steps": 6, "dependent": True}),
    ("stepwise", 2, 1, 128, {"every": 2}),
    ("stepwise", 5, 1, 64, {"mean": True, "every": 5}),
    ("stepwise", 2, 13, 100, {"backward": tiles.Tile(32, 64, 64, 4, 2, chained=True)}),
    ("persistent", 1, 1, 1, {}),
    ("persistent", 9, 33, 64, {"backward_steps": 4}),
    ("persistent", 36, 5, 16, {"forward_steps": 32, "backward_steps": 7}),
    ("persistent", 7, 13, 37, {"every": 3, "backward_steps": 6}),
    ("persistent", 4, 33, 100, {"mean": True, "every": 3}),
    ("persistent", 5, 13, 16, {"mean": True, "every": 5}),
    ("persistent", 2, 1, 128, {}),
    ("persistent", 40, 1, 16, {"mean": True, "forward_steps": 32, "backward_steps": 8}),
    ("persistent", 7, 33, 160, {"variant": "no-fitb", "every": 3}),
])  # fmt: skip
def test_both_strategies_equal_the_specification(strategy, T, B, N, options):
    check(strategy, T, B, N, **options)


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
@pytest.mark.parametrize("variant", [v for v in GATES if GATES[v]])
def test_every_variant_equals_the_specification(variant, strategy):
    check(strategy, 4, 5, 16, variant, every=2)


@pytest.mark.parametrize("strategy, variant, options", [
    ("persistent", "full", {"mean": True, "backward_steps": 4}),
    ("persistent", "no-i", {"every": 3, "backward_steps": 3}),
    ("stepwise", "full", {"every": 2, "backward_steps": 4, "dependent": True}),
    ("stepwise", "no-b", {"mean": True}),
])  # fmt: skip
def test_sequences_that_end_earlier_equal_the_specification(strategy, variant, options):
    lengths = torch.tensor([0, 7, 1, 4, 9], device=DEVICE)
    check(strategy, 9, 5, 16, variant, lengths=lengths, **options)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_every_surrogate_equals_the_specification(surrogate, alpha):
    check("persistent", 3, 3, 16, surrogate=surrogate, alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy, T, B, N, options", [
    ("stepwise", 7, 13, 37, {"every": 3}),
    ("stepwise", 2, 33, 160, {"hoist": False, "mean": True}),
    ("persistent", 6, 13, 64, {}),
    ("persistent", 4, 33, 100, {"mean": True, "every": 3}),
    ("persistent", 2, 1, 128, {"variant": "no-i"}),
    ("persistent", 3, 5, 37, {"mean": True, "every": 2}),
])  # fmt: skip
def test_half_types_stay_near_the_specification(strategy, T, B, N, options, dtype):
    check(strategy, T, B, N, dtype=dtype, **options)


def check_cuba_lif(strategy, T, B, N, dtype=torch.float32, **changes):
    """Hold CuBa-LIF's kernels against the specification, by a plan as `plan` makes it."""
    how = tiles.choose_cuba_lif(T, B, N, dtype)
    tile = tiles.Tile(16, tiles.block(N), 0, 8, 3)
    if strategy == "stepwise":
        tile = tiles.Tile(32, 64, 64, 4, 2)
    how = replace(how, strategy=strategy, **{"forward": tile, "backward": tile, **changes})
    if reason := beyond_the_gpu(how, tiles.cuba_lif_shared_bytes(N, dtype), DEVICE == "cuda"):
        pytest.skip(reason)
    inputs = leaky.layer("cuba-lif", T, B, N, dtype, DEVICE)
    x, weight, bias, *state = (t.detach() for t in inputs)
    forward = (x, weight, bias, *state, *leaky.DECAYS)
    spikes, *ends, h, bits = cuba_lif_forward(*forward, True, how)
    assert torch.equal(unpack_spikes(bits, 0, T, dtype), spikes)
    # without anything saved for backward the same comes out
    again = cuba_lif_forward(*forward, False, how)
    assert all(map(torch.equal, (spikes, *ends), again)) and again[3].numel() == 0
    cotangents = [torch.randn_like(a) for a in (spikes, *ends)]
    gradients = cuba_lif_backward(
        *cotangents, h, bits, weight, state[2], *leaky.DECAYS, "atan", 2.0, how
    )
    leaky.hold("cuba-lif", inputs, spikes, ends, gradients, cotangents)


@pytest.mark.parametrize("strategy, T, B, N, options", [
    ("stepwise", 1, 1, 1, {}),
    ("stepwise", 5, 13, 37, {"backward_steps": 2}),
    ("stepwise", 2, 33, 70, {}),
    ("persistent", 1, 3, 5, {}),
    ("persistent", 34, 5, 16, {"backward_steps": 15}),
    ("persistent", 3, 17, 100, {}),
])  # fmt: skip
def test_both_strategies_of_cuba_lif_equal_the_specification(strategy, T, B, N, options):
    check_cuba_lif(strategy, T, B, N, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_half_types_of_cuba_lif_stay_near_the_specification(strategy, dtype):
    check_cuba_lif(strategy, 3, 13, 37, dtype, backward_steps=2)


@pytest.mark.parametrize("dtype, T, B, N", [
    (torch.float32, 1, 1, 1), (torch.float32, 34, 7, 21), (torch.float32, 3, 16, 40),
    (torch.float16, 5, 13, 37), (torch.bfloat16, 9, 4, 4),
])  # fmt: skip
def test_lif_equals_the_specification(dtype, T, B, N):
    leaky.check("lif", T, B, N, dtype, "triton", device=DEVICE)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("kind", leaky.KINDS)
def test_every_surrogate_of_the_leaky_neurons_equals_the_specification(kind, surrogate):
    leaky.check(kind, 2, 3, 16, torch.float32, "triton", surrogate, 1.5, DEVICE)


@pytest.mark.parametrize("kind", leaky.KINDS)
def test_leaky_neurons_do_not_mind_strides_absent_gradients_or_a_nan_elsewhere(kind):
    inputs = leaky.layer(kind, 4, 3, 8, torch.float32, DEVICE)
    strange = [t.detach().mT.contiguous().mT if t.ndim > 1 else t.detach() for t in inputs]
    strange = [t.requires_grad_() for t in strange]
    g = torch.randn(4, 8, 3, device=DEVICE).mT
    zero, results = torch.zeros(3, 8, device=DEVICE), []
    for given, cotangent in ((inputs, g.contiguous()), (strange, g)):
        spikes, state, _ = leaky.run(kind, given, "triton")
        results.append(torch.autograd.grad(spikes, given, cotangent, retain_graph=True))
        cotangents = [cotangent, *[zero] * len(state)]
        results.append(torch.autograd.grad([spikes, *state], given, cotangents))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])
    # spikes may have none either, and a sample stays by itself
    with torch.no_grad():
        inputs[0][1, 2] = float("nan")
    spikes, state, _ = leaky.run(kind, inputs, "triton")
    g_x, *_ = torch.autograd.grad(state[-1].sum(), inputs)
    assert state[-1][2].isnan().all() and g_x[1, 2].isnan().all()
    assert state[-1][:2].isfinite().all() and g_x[:, :2].isfinite().all()


def test_a_network_of_leaky_neurons_compiles_whole_and_equals_itself():
    x = torch.poisson(torch.full((5, 3, 9), 2.0, device=DEVICE))
    model = SpikingClassifier([16], "plif", inputs=9, classes=4, backend="triton").to(DEVICE)
    with torch.no_grad():
        model.inputs[0].weight *= 8
    draws = model.draw(3)

    def gradients(run):
        model.zero_grad()
        run(x, draws)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model)
    assert all(g.any() for g in expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")
        compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(map(torch.equal, expected, compiled))
    # and what has no kernel is refused by name
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .* no forward mode"):
        current = torch.zeros(5, 3, 16, device=DEVICE)
        torch.func.jvp(lambda x: model.neurons[0](x)[0], (current,), (current,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_membrane_rounded_to_a_half_type_stays_on_its_side_of_the_threshold(dtype):
    x = torch.tensor([[[1.0, 1.5]]], dtype=dtype, device=DEVICE, requires_grad=True)
    # h is x / tau: 1 - 2^-20, which a half type rounds to 1, and above 1
    spikes, v, _ = lif(x, tau=1 + 2**-20, backend="triton")
    assert spikes.flatten().tolist() == [0, 1]
    assert v.flatten().tolist() == pytest.approx([1 - 2**-20, 0], abs=1e-6)
    # what was not reset hands its gradient on
    (g_x,) = torch.autograd.grad(v.sum(), x)
    assert g_x.flatten().tolist() == pytest.approx([1, 0], abs=1e-5)


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
@pytest.mark.parametrize("mean", [False, True])
def test_inference_saves_nothing_and_gives_the_same_output(strategy, mean):
    inputs, gates = layer(5, 3, 16), GATES["full"]
    before = [t.clone() for t in inputs]
    how = plan(strategy, 5, 3, 16, torch.float32, "full", 1)
    trained = gpn_forward(*inputs, gates, 1, mean, how)
    out, v_final, v_saved, bits = gpn_forward(*inputs, gates, 0, mean, how)
    assert torch.equal(out, trained[0]) and torch.equal(v_final, trained[1])
    assert v_saved.numel() == 0 and bits.numel() == 0
    assert all(map(torch.equal, before, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "T, B, N, start, stop",
    [(1, 1, 1, 0, 1), (70, 3, 37, 0, 70), (70, 9, 16, 31, 33), (64, 17, 160, 32, 64)],
)
def test_unpacked_spikes_equal_the_twin(T, B, N, start, stop, masked, dtype):
    words = torch.randint(-(2**31), 2**31, (-(-T // 32), B, N))
    bits = words.to(DEVICE, torch.int32)
    mask = torch.randn(B, N, device=DEVICE).to(dtype) if masked else None
    expected = unpack_spikes(bits, start, stop, dtype)
    expected = expected * mask if masked else expected
    got = spikes_unpack(bits, mask, start, stop, dtype)
    assert got.dtype == dtype and torch.equal(got, expected)


def test_linear_layer_on_spikes_is_the_same_on_both_backends():
    bits = torch.randint(-(2**31), 2**31, (2, 3, 16)).to(DEVICE, torch.int32)
    spikes = unpack_spikes(bits, 0, 40, torch.float32)
    mask = torch.nn.functional.dropout(torch.ones(3, 16, device=DEVICE))
    results = []
    for backend in ("torch", "triton"):
        weight = torch.linspace(-1, 1, 80, device=DEVICE).view(5, 16).requires_grad_()
        y = spike_linear(spikes, bits, mask, weight, None, backend)
        (y * torch.arange(5.0, device=DEVICE)).sum().backward()
        results.append((y.detach(), weight.grad))
    assert all(map(torch.equal, *results))


def run(backend, loss, dtype=None, strange=False, **options):
    """Value and gradients of loss(out, v_final), of inputs that are transposed where strange."""
    x, *weights, _, v0 = layer(5, 3, 16)
    inputs = [x, *weights, v0]
    if strange:
        inputs = [t.mT.contiguous().mT if t.ndim > 1 else t for t in inputs]
    x, *weights, v0 = (t.requires_grad_() for t in inputs)
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        out, v_final = ops.gpn(x, *weights, v0=v0, backend=backend, **options)
    gradients = torch.autograd.grad(loss(out, v_final), (x, *weights, v0))
    return [out.detach(), v_final.detach(), *gradients]


@pytest.mark.parametrize("loss", [
    lambda out, v: (out * torch.arange(16.0, device=out.device)).sum() + v.sin().sum(),
    lambda out, v: out.mT.mean(),  # an expanded cotangent, strides 0
    lambda out, v: v.t().sin().sum(),  # no cotangent of the spikes, a transposed one of v
])  # fmt: skip
@pytest.mark.parametrize("output", ["spikes", "mean"])
def test_triton_and_torch_backends_agree_whatever_the_strides(output, loss):
    expected = run("torch", loss, output=output)
    results = [run("triton", loss, strange=strange, output=output) for strange in (False, True)]
    for value, plain, strange in zip(expected, *results, strict=True):
        torch.testing.assert_close(plain, value, **BACKENDS)
        assert torch.equal(plain, strange)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_spikes_of_its_dtype_and_float32_gradients(dtype):
    spikes, *got = run("triton", lambda out, v: out.float().sum() + v.sum(), dtype)
    assert spikes.dtype == dtype and all(t.dtype == torch.float32 for t in got)
    x, *weights, _, v0 = layer(5, 3, 16)
    # what autocast rounds, rounded alike
    exact = [t.double() for t in (x.to(dtype), *weights, torch.zeros_like(v0), v0)]
    leaves = [t.requires_grad_() for t in (*exact[:4], exact[5])]
    soft, v_exact = gpn_loop(*exact, reset_mask=spikes.double())
    sure = (soft - 0.5).abs() > TOLERANCES[dtype].margin
    assert sure.double().mean() > 0.9 and torch.equal(spikes[sure] > 0, soft[sure] > 0.5)
    expected = torch.autograd.grad(soft.sum() + v_exact.sum(), leaves)
    check_gradients(got[1:], expected, TOLERANCES[dtype].gradient)


def test_a_plan_beyond_the_gpu_s_shared_memory_is_left_out_there_with_the_reason(monkeypatch):
    monkeypatch.setattr(machine, "kernel_limits", lambda: {"shared_bytes": 227 << 10})
    how = plan("persistent", 2, 1, 128, torch.float32, "full", 1)
    shared = tiles.persistent_shared_bytes(128, GATES["full"], torch.float32)
    reason = beyond_the_gpu(how, shared, cuda=True)
    # 3 stages of float32, backward
    assert reason == "takes 360704 bytes of shared memory of 232448"
    half = plan("persistent", 2, 1, 128, torch.float16, "full", 1)
    halved = tiles.persistent_shared_bytes(128, GATES["full"], torch.float16)
    assert beyond_the_gpu(half, halved, cuda=True) is None
    assert beyond_the_gpu(how, shared, cuda=False) is None


def test_a_backend_is_refused_with_the_reason_or_chosen():
    x, *weights, _, _ = layer(2, 2, 4)
    with pytest.raises(RuntimeError, match="float64"):
        ops.gpn(x.double(), *weights, backend="triton")
    assert machine.choose_backend("auto", torch.zeros(1)) == "cpu"
