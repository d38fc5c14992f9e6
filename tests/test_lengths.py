"""Sequences of a batch that have lengths of their own: each as if it were alone."""

import pytest
import torch

from gpn_triton.neurons import reference
from gpn_triton.neurons.gpn import gpn
from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.reference import GATES
from tests.test_reference import random_case, requiring_gradients
from tests.tolerances import REORDERED

# more than a word of packed spikes
T, LENGTHS = 34, (34, 1, 0, 33, 7)


def case(variant):
    """A layer's float64 inputs, and the cotangents of its spikes and v_final."""
    inputs = random_case(variant, T, len(LENGTHS), 6)
    return inputs, (torch.randn(T, len(LENGTHS), 6).double(), torch.randn(len(LENGTHS), 6).double())


def alone(inputs, cotangents, variant, mean):
    """The specification, sequence by sequence: outputs, and the gradients of x, weights and v0."""
    x, *weights, v_reset, v0 = inputs
    g_s, g_v = cotangents
    spikes, v_final, g_x, g_v0 = (torch.zeros_like(t) for t in (x, v0, x, v0))
    g_weights = [torch.zeros_like(w) for w in weights if w is not None]
    for b, n in enumerate(LENGTHS):
        own = [x[:n, b : b + 1], *weights, v_reset[b : b + 1], v0[b : b + 1]]
        if n == 0:
            v_final[b], g_v0[b] = v0[b], g_v[b]
            continue
        leaves = requiring_gradients(own)
        out = reference.gpn_loop(*own, variant)
        g_own = g_s[0, b].expand(n, 1, -1) / n if mean else g_s[:n, b : b + 1]
        found = torch.autograd.grad(out, leaves, (g_own, g_v[b : b + 1]))
        spikes[:n, b], v_final[b] = out[0][:, 0].detach(), out[1][0].detach()
        g_x[:n, b], g_v0[b] = found[0][:, 0], found[-1][0]
        for total, g in zip(g_weights, found[1:-1], strict=True):
            total += g
    own_steps = torch.tensor(LENGTHS).clamp(min=1)[:, None]
    return [spikes.sum(0) / own_steps if mean else spikes, v_final, g_x, *g_weights, g_v0]


@pytest.mark.parametrize("variant", GATES)
@pytest.mark.parametrize("how", ["loop", "adjoint", "torch", "cpu", "cpu, every 3", "cpu, mean"])
def test_each_sequence_is_as_if_it_were_alone(how, variant):
    inputs, (g_s, g_v) = case(variant)
    lengths, mean = torch.tensor(LENGTHS), how.endswith("mean")
    expected = alone(inputs, (g_s, g_v), variant, mean)
    # what stands behind an end does not count
    for b, n in enumerate(LENGTHS):
        inputs[0][n:, b] = 1e3
    leaves = requiring_gradients(inputs)
    if how in ("loop", "adjoint"):
        out = reference.gpn_loop(*inputs, variant, lengths=lengths)
    else:
        out = gpn(
            *inputs, variant, backend=how.split(",")[0], lengths=lengths,
            checkpoint_every=3 if "every" in how else None, output="mean" if mean else "spikes",
        )  # fmt: skip
    if how == "adjoint":
        x, *weights, _, v = (t if t is None else t.detach() for t in inputs)
        membranes = []
        for t in range(T):
            membranes.append(v)
            now = x[t : t + 1], *weights, inputs[4], v
            v = reference.gpn_loop(*now, variant, lengths=lengths - t)[1]
        got = reference.gpn_adjoint(
            x, weights, torch.stack(membranes), out[0].detach(), (g_s, g_v), variant,
            lengths=lengths,
        )  # fmt: skip
        got = [g for g in got if g is not None]
    else:
        got = torch.autograd.grad(out, leaves, (g_s[0] if mean else g_s, g_v))
    for a, b in zip([*out, *got], expected, strict=True):
        torch.testing.assert_close(a, b, **REORDERED)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_layer_streams_sequences_of_their_own_lengths_to_the_same_bits(backend):
    layer = GPN(6, backend=backend).double().eval()
    x, lengths = 4 * torch.randn(T, len(LENGTHS), 6).double(), torch.tensor(LENGTHS)
    with torch.no_grad():
        whole, v_final = layer(x, lengths=lengths)
        v, parts = None, []
        for start in range(0, T, 9):
            spikes, v = layer(x[start : start + 9], v, lengths=(lengths - start).clamp(min=0))
            parts.append(spikes)
    assert whole.any() and torch.equal(torch.cat(parts), whole) and torch.equal(v, v_final)


@pytest.mark.parametrize(("lengths", "error", "message"), [
    ([1, 2], TypeError, "lengths: expected a tensor"),
    (torch.tensor([1]), ValueError, r"lengths: expected int64 \[2\], got torch.int64 \[1\]"),
    (torch.tensor([1.0, 2.0]), ValueError, "got torch.float32"),
])  # fmt: skip
def test_what_are_no_lengths_is_refused(lengths, error, message):
    with pytest.raises(error, match=message):
        GPN(3)(torch.randn(4, 2, 3), lengths=lengths)
