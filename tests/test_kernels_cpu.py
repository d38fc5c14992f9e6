"""The CPU's kernels against the specification, and that a row's bits are its own."""

import os
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch

from gpn_triton.kernels import cpu
from gpn_triton.kernels.gpn_cpu import choose, gpn_backward, gpn_forward
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from gpn_triton.neurons.reference import GATES, gpn_loop
from gpn_triton.neurons.surrogate import SURROGATES
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def one_thread():
    """One thread unless a test asks for more: these layers are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(T, B, N, variant="full", dtype=torch.float32):
    """x, weight_x, weight_v, bias, v_reset, v0 of a layer that spikes."""
    G = len(GATES[variant])
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(T, B, N, dtype=state).to(dtype)
    shapes = [(G * N, N), (G * N, N), (G * N,)]
    weights = [(torch.rand(s, dtype=state) * 2 - 1) * 1.5 * N**-0.5 if G else None for s in shapes]
    return [
        x, *weights, torch.randn(B, N, dtype=state) * 0.05, torch.rand(B, N, dtype=state) * 0.3
    ]  # fmt: skip


def gradients(inputs, outputs, g_out, g_v_final=None, variant="full", surrogate="atan", alpha=2.0,
              every=1, mean=False):  # fmt: skip
    """Of x, weights and v0."""
    x, wx, wv, bias, v_reset, _ = inputs
    _, _, v_saved, bits = outputs
    return gpn_backward(
        g_out, g_v_final, x, wx, wv, bias, v_reset, bits, v_saved,
        GATES[variant], surrogate, alpha, every, mean,
    )  # fmt: skip


def check(T, B, N, variant="full", dtype=torch.float64, mean=False, every=1, surrogate="atan",
          alpha=2.0):  # fmt: skip
    """Hold forward and every gradient against autograd of the specification in float64."""
    inputs = layer(T, B, N, variant, dtype)
    outputs = gpn_forward(*inputs, GATES[variant], every, mean)
    out, v_final, v_saved, bits = outputs
    spikes = unpack_spikes(bits, 0, T, out.dtype)
    assert out.shape == (inputs[0].shape[1:] if mean else inputs[0].shape)
    assert v_saved.shape == (-(-T // every), B, N)
    assert v_saved.dtype == (torch.float16 if dtype in HALF else dtype)
    assert mean or torch.equal(spikes, out)
    g_out, g_v_final = torch.randn(out.shape).to(out.dtype), torch.randn(B, N, dtype=v_final.dtype)
    got = gradients(
        inputs, outputs, g_out, g_v_final, variant, surrogate, alpha, every, mean
    )  # fmt: skip

    # smooth: the spike's surrogate itself, whose value shows |h - theta| and whose gradient is the
    # surrogate gradient; resetting where the kernel spiked
    exact = [t if t is None else t.double() for t in inputs]
    leaves = [t.requires_grad_() for t in (*exact[:4], exact[5]) if t is not None]
    soft, v_exact = gpn_loop(*exact, variant, surrogate, alpha, reset_mask=spikes.double())
    torch.autograd.backward(
        [soft.mean(0) if mean else soft, v_exact], [g_out.double(), g_v_final.double()]
    )
    if dtype == torch.float64:
        margin, state, gradient = 1e-10, 1e-10, 1e-10
    else:
        margin, state, gradient = TOLERANCES[dtype]
    sure = (soft - 0.5).abs() > margin * alpha / 2
    assert sure.double().mean() > 0.9
    assert torch.equal(spikes[sure] > 0, soft[sure] > 0.5)
    assert 0.02 < spikes.double().mean() < 0.98 or spikes.numel() < 100
    if mean:
        torch.testing.assert_close(out, spikes.to(out.dtype).mean(0), rtol=1e-6, atol=1e-7)
    assert (v_final - v_exact).abs().max() < state
    got = [g for g in got if g is not None]
    others = torch.float64 if dtype == torch.float64 else torch.float32
    assert [g.dtype for g in got] == [dtype, *[others] * (len(got) - 1)]
    for g, leaf in zip(got, leaves, strict=True):
        assert torch.linalg.norm(g - leaf.grad) < gradient * torch.linalg.norm(leaf.grad)


SIZES = [
    (1, 1, 1, {}),
    (1, 3, 5, {"mean": True}),
    (7, 13, 37, {}),
    (40, 1, 16, {}),
    (40, 5, 33, {"every": 7}),
    (33, 9, 64, {"mean": True, "every": 3}),
    (20, 6, 100, {"every": 20}),
    # two chunks of time, the last of one step
    (65, 17, 8, {}),
    (5, 300, 8, {"every": 3}),
]


@pytest.mark.parametrize("T, B, N, options", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_size_equals_the_specification(T, B, N, options, dtype):
    check(T, B, N, dtype=dtype, **options)


def test_more_than_one_chunk_equals_the_specification():
    *_, chunk = choose(600, 8, 1, 1)
    assert chunk < 60
    check(60, 600, 8, dtype=torch.float32)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("variant", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_variant_equals_the_specification(variant, every, dtype):
    check(8, 5, 19, variant, dtype, every=every)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_surrogate_equals_the_specification(surrogate, alpha, dtype):
    check(6, 3, 17, dtype=dtype, surrogate=surrogate, alpha=alpha)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "T, B, N, options",
    [
        (7, 13, 37, {"every": 3}),
        (20, 13, 64, {}),
        (9, 300, 16, {"mean": True}),
        (5, 3, 16, {"variant": "no-i", "mean": True, "every": 2}),
        (6, 3, 16, {"variant": "no-fitb"}),
    ],
)
def test_half_types_stay_near_the_specification(T, B, N, options, dtype):
    check(T, B, N, dtype=dtype, **options)


def test_a_saved_membrane_beyond_float16_saturates():
    x, *rest = layer(2, 1, 4, "no-fitb", torch.bfloat16)
    x[0], rest[-1][:] = -1e6, 0.0
    _, _, v_saved, _ = gpn_forward(x, *rest, (), 1, False)
    assert torch.equal(v_saved[1], torch.full((1, 4), -65504.0, dtype=torch.float16))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inference_saves_nothing_and_gives_the_same_output(mean, dtype):
    inputs = layer(5, 3, 16, dtype=dtype)
    trained = gpn_forward(*inputs, GATES["full"], 1, mean)
    out, v_final, v_saved, bits = gpn_forward(*inputs, GATES["full"], 0, mean)
    assert torch.equal(out, trained[0]) and torch.equal(v_final, trained[1])
    assert v_saved.shape == bits.shape == (0, 3, 16)


@pytest.mark.parametrize("mean", [False, True])
def test_gradients_that_are_not_given_are_zero(mean):
    inputs = layer(5, 3, 16)
    outputs = gpn_forward(*inputs, GATES["full"], 1, mean)
    g_out, g_v = torch.zeros_like(outputs[0]), torch.randn(3, 16)
    pairs = (
        [gradients(inputs, outputs, g, v, mean=mean) for g, v in pair]
        for pair in (((None, g_v), (g_out, g_v)), ((g_out, None), (g_out, 0 * g_v)))
    )
    for first, second in pairs:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_left_as_they_were_and_may_have_any_strides():
    inputs = layer(5, 3, 16)
    strange = [t.mT.contiguous().mT if t.ndim > 1 else t for t in inputs]
    results = []
    for given in (inputs, strange):
        before = [t.clone() for t in given]
        outputs = gpn_forward(*given, GATES["full"], 1, False)
        g_v = torch.ones(16, 3).t()
        got = gradients(given, outputs, torch.ones(3, 16).expand(5, 3, 16), g_v)
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
        assert torch.equal(g_v, torch.ones(3, 16))
        results.append((*outputs, *got))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("N", [37, 200])
def test_the_bits_are_the_same_whatever_the_number_of_threads(N, every):
    inputs = layer(9, 70, N)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = gpn_forward(*inputs, GATES["full"], every, False)
        got = gradients(inputs, outputs, outputs[0] - 0.5, outputs[1], every=every)
        results.append((*outputs, *got))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("every", [1, 3])
def test_a_rows_bits_are_the_same_whatever_else_is_in_the_batch(every):
    inputs = layer(9, 70, 37)

    def run(rows):
        x, *weights, v_reset, v0 = inputs
        part = [x[:, rows], *weights, v_reset[rows], v0[rows]]
        outputs = gpn_forward(*part, GATES["full"], every, False)
        got = gradients(part, outputs, outputs[0] - 0.5, outputs[1], every=every)
        return [*outputs, got[0], got[-1]]

    together = run(slice(None))
    for rows in (slice(0, 1), slice(5, 12), slice(69, 70)):
        for whole, part in zip(together, run(rows), strict=True):
            assert torch.equal(whole[..., rows, :], part)


def test_a_sequence_in_parts_gives_the_same_bits():
    x, *weights, v_reset, v0 = layer(50, 5, 37)
    whole = gpn_forward(x, *weights, v_reset, v0, GATES["full"], 0, False)
    first = gpn_forward(x[:13], *weights, v_reset, v0, GATES["full"], 0, False)
    second = gpn_forward(x[13:], *weights, v_reset, first[1], GATES["full"], 0, False)
    assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
    assert torch.equal(whole[1], second[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", ["full", "no-i", "no-fitb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_visible_and_within_its_sample(value, variant, dtype):
    inputs = layer(9, 7, 19, variant, dtype)
    results = []
    for poisoned in (False, True):
        x, *rest = (t if t is None else t.clone() for t in inputs)
        if poisoned:
            x[4, 2] = value
        outputs = gpn_forward(x, *rest, GATES[variant], 1, False)
        g_out = torch.ones_like(outputs[0])
        got = gradients([x, *rest], outputs, g_out, torch.ones_like(rest[-1]), variant)
        results.append((outputs, got))
    (outputs, got), (outputs_nan, got_nan) = results
    others = [0, 1, 3, 4, 5, 6]
    for a, b in zip((*outputs, got[0], got[-1]), (*outputs_nan, got_nan[0], got_nan[-1]),
                    strict=True):  # fmt: skip
        assert torch.equal(a[..., others, :], b[..., others, :])
    if value != value:
        assert outputs_nan[1][2].isnan().all()
        assert got_nan[0][4, 2].isnan().all()
    if GATES[variant]:
        assert not got_nan[1].isfinite().all()


def test_sigmoid_and_tanh_are_exact_to_rounding():
    from gpn_triton.kernels import pointwise_cpu

    @numba.njit(**cpu.OPTIONS)
    def functions(z, s, t):
        for j in range(len(z)):
            s[j], t[j] = pointwise_cpu.sigmoid(z[j]), pointwise_cpu.tanh(z[j])

    z = torch.cat([torch.linspace(-100, 100, 4001), torch.randn(4000), 10 ** -torch.rand(999) * 9])
    s, t = torch.empty_like(z), torch.empty_like(z)
    functions(z.numpy(), s.numpy(), t.numpy())
    exact = torch.sigmoid(z.double())
    # float32's smallest normal number ends the sigmoid's range at -87
    normal = z > -87
    assert ((s - exact).abs() / exact)[normal].max() < 4e-7
    assert s[~normal].max() < 1.7e-38
    exact = torch.tanh(z.double())
    assert ((t - exact).abs() / exact.abs().clamp(1e-30)).max() < 4e-7
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    s, t = torch.empty_like(odd), torch.empty_like(odd)
    functions(odd.numpy(), s.numpy(), t.numpy())
    assert s[0].isnan() and t[0].isnan()
    torch.testing.assert_close(s[1:], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(t[1:], torch.tensor([1.0, -1.0]))


def test_calls_from_several_threads_at_once_do_not_disturb_each_other():
    torch.set_num_threads(2)
    inputs = layer(30, 40, 37)
    expected = gpn_forward(*inputs, GATES["full"], 1, False)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(gpn_forward, *inputs, GATES["full"], 1, False) for _ in range(16)]
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(call.result(), expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, and this system has none")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_runs_its_own_threads():
    torch.set_num_threads(2)
    inputs = layer(5, 40, 16)
    expected = gpn_forward(*inputs, GATES["full"], 1, False)
    child = os.fork()
    if child == 0:
        got = gpn_forward(*inputs, GATES["full"], 1, False)
        os._exit(0 if all(map(torch.equal, got, expected)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_folder_for_the_cache_is_no_error(monkeypatch):
    from numba.core import caching

    monkeypatch.setattr(caching.FunctionCache, "_impl_class", _NoFolder)

    @cpu.kernel()
    def three():
        return 3

    assert three() == 3


class _NoFolder:
    def __init__(self, function):
        raise RuntimeError("cannot cache function: no locator available")
