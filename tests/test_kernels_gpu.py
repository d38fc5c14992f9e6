"""The kernels at the paper's sizes on a GPU; the same bodies at tiny sizes in the interpreter.

Cases marked gpu skip without one. Long sequences are compared teacher-forced: at every step the
specification gets the kernel's own membrane and spikes, so that rounding which moves one spike
across its threshold does not start another trajectory.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from bench.measure import peak_bytes
from gpn_triton import gpn
from gpn_triton.kernels import tiles
from gpn_triton.kernels.gpn_backward import gpn_backward
from gpn_triton.kernels.gpn_forward import gpn_forward
from gpn_triton.machine import device
from gpn_triton.neurons import reference
from tests import interpreted_bfloat16, leaky
from tests.interpreter import need_interpreter
from tests.recurrence import DEVICE, check_gradients, layer, run_kernels
from tests.tolerances import FLIPS, TOLERANCES

need_interpreter()

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
STATE_BYTES = 1 << 28


def on_gpu(*values):
    """A case that only a GPU can run in a test's time."""
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    if DEVICE == "cpu":
        interpreted_bfloat16.correct(monkeypatch)


def plan_of(x, strategy=None, **changes):
    """The plan that gpn() would choose, or another strategy's."""
    limits = device.kernel_limits() if x.is_cuda else {}
    precision = device.float32_precision()
    plan = tiles.choose(*x.shape, x.dtype, reference.GATES["full"], 1, precision, **limits)
    if strategy not in (None, plan.strategy):
        assert strategy == "stepwise"
        tile = tiles.Tile(32, 32, 16 if x.dtype == FLOAT32 else 64, 4, 2)
        plan = replace(plan, strategy=strategy, forward=tile, backward=tile)
    return replace(plan, **changes)


def check_steps(inputs, spikes, v_final, v_saved, first=0):
    """Hold every step from `first` on against the specification in float64, a step at a time."""
    x, *weights, v_reset, _ = inputs
    T, B, N = x.shape
    tolerance = TOLERANCES[x.dtype]
    weights = [w.double() for w in weights]
    count = max(1, STATE_BYTES // (8 * B * 4 * N))
    for a in range(first, T, count):
        b = min(T, a + count)
        rows = (1, (b - a) * B, N)
        s = spikes[a:b].double().view(rows)
        # time as batch: one step from each of the kernel's own membranes
        soft, v_next = reference.gpn_loop(
            x[a:b].double().view(rows), *weights, v_reset.double().repeat(b - a, 1),
            v_saved[a:b].double().view(rows[1:]), reset_mask=s,
        )  # fmt: skip
        sure = (soft - 0.5).abs() > tolerance.margin
        assert torch.equal(s[sure] > 0, soft[sure] > 0.5)
        assert sure.double().mean() > 0.9
        follows = torch.cat([v_saved[a + 1 : b + 1].double(), v_final[None].double()])[: b - a]
        assert (follows.view(rows[1:]) - v_next).abs().max() < tolerance.state


def expected_gradients(inputs, g_out, v_saved, spikes):
    """The witness's gradients, from the kernel's own membranes and spikes."""
    x, *weights, _, v0 = (t.double() for t in inputs)
    cotangents = g_out.double(), torch.zeros_like(v0)
    return reference.gpn_adjoint(x, weights, v_saved.double(), spikes.double(), cotangents)


@pytest.mark.parametrize(
    "dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=lambda d: str(d).removeprefix("torch.")
)
@pytest.mark.parametrize("T, B, N, strategy", [
    (4, 5, 16, "persistent"),
    (4, 5, 16, "stepwise"),
    on_gpu(100, 256, 128, None),
    on_gpu(100, 256, 128, "stepwise"),
    on_gpu(1000, 64, 128, None),
    on_gpu(100, 256, 512, None),
    on_gpu(1000, 64, 512, None),
    on_gpu(100, 256, 256, None),
    on_gpu(1000, 64, 256, None),
    on_gpu(100, 256, 1024, None),
    on_gpu(1000, 64, 1024, None),
    on_gpu(100, 37, 100, None),
])  # fmt: skip
def test_teacher_forced_steps_and_gradients_equal_the_specification(T, B, N, strategy, dtype):
    inputs = layer(T, B, N, dtype=dtype)
    g_out, plan = torch.randn_like(inputs[0]), plan_of(inputs[0], strategy)
    _, spikes, v_final, v_saved, gradients = run_kernels(inputs, g_out, None, plan)
    assert 0.02 < spikes.double().mean() < 0.98
    check_steps(inputs, spikes, v_final, v_saved)
    expected = expected_gradients(inputs, g_out, v_saved, spikes)
    check_gradients(gradients, expected, TOLERANCES[dtype].gradient)


@pytest.mark.parametrize("T, B, N, every", [
    (4, 5, 16, 2), on_gpu(100, 256, 512, 1), on_gpu(100, 2048, 512, 1), on_gpu(100, 256, 256, 10),
])  # fmt: skip
def test_launches_that_begin_early_leave_the_same_bits_captured_too(T, B, N, every):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    inputs = layer(T, B, N, dtype=BFLOAT16)
    x, *weights, v_reset, _ = inputs
    g_out, gates = torch.randn_like(x), reference.GATES["full"]

    def launches(dependent):
        plan = plan_of(x, "stepwise", dependent=dependent)
        out, v, *saved = gpn_forward(*inputs, gates, every, False, plan)
        gradients = gpn_backward(
            g_out, None, x, *weights, v_reset, *reversed(saved),
            gates, "atan", 2.0, every, False, plan,
        )  # fmt: skip
        return [out, v, *saved, *gradients]

    def hold(found):
        assert all(map(torch.equal, found, expected))

    expected = launches(False)
    if DEVICE == "cpu":
        hold(launches(True))
        return
    # what is read too soon is wrong now and then, not always
    for _ in range(20):
        hold(launches(True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launches(True)
    for _ in range(20):
        graph.replay()
        hold(captured)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("T, B, N", [(100, 2, 32), on_gpu(100, 256, 128), on_gpu(100, 256, 256)])
def test_few_spikes_differ_from_float64_under_autocast(T, B, N, dtype):
    x, *weights, v_reset, _ = layer(T, B, N, gain=0.7)
    with torch.autocast(DEVICE, dtype=dtype):
        spikes, _ = gpn(x, *weights, v_reset, backend="triton")
    assert spikes.dtype == dtype
    exact = [t.double() for t in (x.to(dtype), *weights, v_reset, v_reset)]
    expected, _ = reference.gpn_loop(*exact)
    assert 0.02 < expected.mean() < 0.98
    assert (spikes != expected).double().mean() <= FLIPS


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
@pytest.mark.parametrize("T, B, N", [(9, 3, 16), on_gpu(2100, 8192, 128)])
def test_offsets_beyond_2_to_the_31_reach_the_right_elements(T, B, N, strategy):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GiB of free device memory")
    inputs = layer(T, B, N, dtype=FLOAT16)
    x, *others = inputs
    # weight_x x for all steps at once: T B 4 N elements in one tensor
    plan = plan_of(x, strategy, forward_steps=T)
    g_out = torch.randn_like(x)
    _, spikes, v_final, v_saved, gradients = run_kernels(inputs, g_out, None, plan)
    first = max(0, T - 6)
    check_steps(inputs, spikes, v_final, v_saved, first)
    # the last steps' backward needs nothing of the steps before
    last = [x[first:], *others], g_out[first:], v_saved[first:], spikes[first:]
    expected = expected_gradients(*last)
    check_gradients([gradients[0][first:]], expected[:1], TOLERANCES[FLOAT16].gradient)


def forward_backward(inputs, g_out, dtype=None):
    """spikes, v_final and every gradient, through the operator, under autocast to dtype."""
    x, *weights, v_reset, v0 = (t.detach().requires_grad_() for t in inputs)
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        spikes, v_final = gpn(x, *weights, v_reset, v0, backend="triton")
    gradients = torch.autograd.grad([spikes], [x, *weights, v0], [g_out.to(spikes.dtype)])
    return [spikes.detach(), v_final.detach(), *gradients]


@pytest.mark.parametrize("dtype", [None, BFLOAT16])
@pytest.mark.parametrize("T, B, N", [(3, 5, 16), on_gpu(100, 256, 128), on_gpu(50, 256, 512)])
def test_every_run_gives_the_same_bits(T, B, N, dtype):
    inputs = layer(T, B, N)
    g_out = torch.randn_like(inputs[0])
    first = forward_backward(inputs, g_out, dtype)
    for _ in range(3 if DEVICE == "cuda" else 1):
        again = forward_backward(inputs, g_out, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("T, B, N", [(100, 256, 128), (50, 256, 512), (7, 13, 100)])
def test_replaying_a_captured_graph_equals_running(T, B, N, dtype):
    inputs = layer(T, B, N)
    g_out = torch.randn_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(inputs, g_out, dtype)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = forward_backward(inputs, g_out, dtype)
    # numbers the capture has not seen
    for t in (*inputs, g_out):
        t.mul_(0.9)
    graph.replay()
    expected = forward_backward(inputs, g_out, dtype)
    torch.cuda.synchronize()
    for got, value in zip(replayed, expected, strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got, value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, BFLOAT16])
@pytest.mark.parametrize("T, B, N", [(20, 64, 128), (10, 64, 256)])
def test_compiled_by_inductor_without_graph_breaks_and_agrees(T, B, N, dtype):
    x, *weights, v_reset, v0 = layer(T, B, N)
    leaves = [t.requires_grad_() for t in (x, *weights, v0)]

    def loss(x, wx, wv, bias, v0):
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
            spikes, v = gpn(2 * x, wx, wv, bias, v_reset, v0, backend="triton")
        return (spikes.float() * torch.arange(N, device=x.device)).mean() + v.sin().mean()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    # the same kernels on the same inputs; the cotangent's last digits are the compiler's
    check_gradients(compiled, [g.double() for g in eager], 1e-5 if dtype is None else 1e-2)


@pytest.mark.parametrize("T, B, N", [(64, 4, 16), on_gpu(2000, 256, 128), on_gpu(400, 256, 512)])
def test_peak_memory_grows_with_the_length_by_what_is_saved(T, B, N, monkeypatch):
    # chunks of an eighth of the sequence
    monkeypatch.setattr(tiles, "CHUNK_BYTES", T // 8 * B * 4 * N * 4)
    peaks = []
    for steps in (T, 2 * T):
        inputs = layer(steps, B, N)
        g_out = torch.randn_like(inputs[0])
        run_once = lambda: forward_backward(inputs, g_out)  # noqa: B023, E731
        run_once()
        peaks.append(peak_bytes(run_once, torch.device(DEVICE)))
    # spikes, v saved for backward and the gradient of x, float32 all; a tenth for the allocator and
    # the packed spikes
    assert peaks[1] - peaks[0] < 1.1 * 3 * T * B * N * 4


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("kind", leaky.KINDS)
@pytest.mark.parametrize("T, B, N", [
    (4, 5, 16), on_gpu(100, 256, 128), on_gpu(100, 256, 512), on_gpu(1000, 64, 256),
    on_gpu(100, 37, 100),
])  # fmt: skip
def test_leaky_neurons_equal_the_specification(T, B, N, kind, dtype):
    leaky.check(kind, T, B, N, dtype, "triton", device=DEVICE)


def leaky_results(kind, inputs, g_out):
    """spikes, the state after the last step and every gradient, of fresh leaves."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    spikes, state, _ = leaky.run(kind, leaves, "triton")
    gradients = torch.autograd.grad(spikes, leaves, g_out)
    return [spikes.detach(), *(a.detach() for a in state), *gradients]


@pytest.mark.parametrize("kind", leaky.KINDS)
@pytest.mark.parametrize("T, B, N, dtype", [
    (3, 5, 16, BFLOAT16), on_gpu(100, 256, 128, FLOAT32), on_gpu(100, 256, 256, BFLOAT16),
    on_gpu(50, 256, 512, FLOAT16),
])  # fmt: skip
def test_every_run_of_leaky_neurons_gives_the_same_bits_replayed_or_not(T, B, N, dtype, kind):
    inputs = leaky.layer(kind, T, B, N, dtype, DEVICE)
    g_out = torch.randn(T, B, N, device=DEVICE).to(dtype)
    first = leaky_results(kind, inputs, g_out)
    assert all(map(torch.equal, first, leaky_results(kind, inputs, g_out)))
    if DEVICE == "cpu":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = leaky_results(kind, inputs, g_out)
    # numbers the capture has not seen
    with torch.no_grad():
        for t in (*inputs, g_out):
            t.mul_(0.9)
    graph.replay()
    expected = leaky_results(kind, inputs, g_out)
    torch.cuda.synchronize()
    assert all(map(torch.equal, replayed, expected))


@pytest.mark.parametrize("kind", leaky.KINDS)
@pytest.mark.parametrize("T, B, N", [
    (9, 3, 16), on_gpu(2100, 8192, 128), on_gpu(530, 8192, 512),
])  # fmt: skip
def test_offsets_beyond_2_to_the_31_reach_the_right_elements_of_leaky_neurons(T, B, N, kind):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GiB of free device memory")
    inputs = leaky.layer(kind, T, B, N, FLOAT16, DEVICE)
    # the last steps by themselves are near the start of their memory
    x, *rest = (t.detach() for t in inputs)
    before, state, _ = leaky.run(kind, [x[:-6], *rest], "triton")
    last = [before[-1].to(rest[0].dtype)]
    rest = [state[0], rest[1]] if kind == "lif" else [*rest[:2], *state, *last]
    del before
    expected = leaky_results(kind, [x[-6:], *rest], torch.ones_like(x[-6:]))
    got = leaky_results(kind, inputs, torch.ones_like(x))
    states = 1 + len(state)
    assert torch.equal(got[0][-6:], expected[0])
    assert all(map(torch.equal, got[1:states], expected[1:states]))
    assert torch.equal(got[states][-6:], expected[states])
