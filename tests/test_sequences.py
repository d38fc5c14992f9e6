"""GPN with the surface of nn.LSTM: shapes, states, packed sequences, several layers, directions."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from gpn_triton import GPN
from gpn_triton.neurons.row_linear import row_linear

C, N, T, B = 5, 6, 34, 4
LENGTHS = (34, 1, 7, 33)
FORMS = [
    {}, {"num_layers": 2}, {"bidirectional": True}, {"num_layers": 3, "bidirectional": True}
]  # fmt: skip


def layer(**options):
    """A layer in float64 that spikes."""
    torch.manual_seed(1)
    made = GPN(C, N, **options).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "input" in name:
                parameter.mul_(4)
    return made


def inputs():
    return torch.randn(T, B, C).double()


def h_of(state):
    """An LSTM's h as this library's state: without the first dimension of one layer."""
    return state[0][0] if len(state[0]) == 1 else state[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_an_lstm(form, batch_first):
    lstm = nn.LSTM(C, N, batch_first=batch_first, **form).double()
    gpn = layer(batch_first=batch_first, **form)
    x = inputs().transpose(0, 1) if batch_first else inputs()
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first, enforce_sorted=False)
    for given in (x, x[0] if batch_first else x[:, 0], packed):
        (expected, state), (spikes, v) = lstm(given), gpn(given)
        if given is packed:
            assert [
                a is b or torch.equal(a, b) for a, b in zip(spikes[1:], expected[1:], strict=True)
            ]
            spikes, expected = spikes.data, expected.data
        assert spikes.shape == expected.shape and v.shape == h_of(state).shape
        assert ((spikes == 0) | (spikes == 1)).all() and 0 < spikes.mean() < 1
        # a state goes in as it comes out
        again = gpn(given, v)[1]
        assert again.shape == v.shape and not torch.equal(again, v)


def test_what_comes_first_in_a_batch_and_what_is_alone_changes_no_bit():
    x = inputs()
    for form in FORMS:
        gpn, first = layer(**form), layer(batch_first=True, **form)
        spikes, v = gpn(x)
        for got, expected in zip(
            first(x.transpose(0, 1)), (spikes.transpose(0, 1), v), strict=True
        ):
            assert torch.equal(got, expected)
        alone = gpn(x[:, 2])
        assert torch.equal(alone[0], spikes[:, 2]) and torch.equal(alone[1], v[..., 2, :])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_packed_sequences_are_each_as_if_alone_bit_for_bit(form):
    x, gpn = inputs(), layer(**form)
    own = [x[:n, b] for b, n in enumerate(LENGTHS)]
    v0 = torch.randn(gpn(x)[1].shape).double()
    packed, v = gpn(pack_sequence(own, enforce_sorted=False), v0)
    spikes, lengths = pad_packed_sequence(packed)
    assert lengths.tolist() == list(LENGTHS)
    by_lengths = gpn(x, v0, lengths=torch.tensor(LENGTHS))
    assert torch.equal(by_lengths[0], spikes) and torch.equal(by_lengths[1], v)
    for b, n in enumerate(LENGTHS):
        one, v_one = gpn(own[b], v0[..., b, :])
        assert torch.equal(spikes[:n, b], one) and torch.equal(v[..., b, :], v_one)
        assert not spikes[n:, b].any()
    assert spikes.any()


def test_several_layers_and_directions_are_layers_one_after_the_other():
    x = inputs()
    gpn = layer(num_layers=2, bidirectional=True)
    spikes, v = gpn(x)
    y, states = x, []
    for k in (0, 2):
        forward, backward = gpn.layers[k](y), gpn.layers[k + 1](y.flip(0))
        y = torch.cat([forward[0], backward[0].flip(0)], -1)
        states += [forward[1], backward[1]]
    assert torch.equal(spikes, y) and torch.equal(v, torch.stack(states))
    mean, _ = layer(num_layers=2, bidirectional=True, output="mean")(x)
    torch.testing.assert_close(mean, spikes.mean(0))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_sequences_alone(form):
    x, gpn = inputs(), layer(**form)
    packed = copy.deepcopy(gpn)
    g_v = torch.randn(gpn(x)[1].shape).double()
    rows = [x[:n, b].clone().requires_grad_() for b, n in enumerate(LENGTHS)]
    spikes, v = packed(pack_sequence(rows, enforce_sorted=False))
    (spikes.data.sum() + (v * g_v).sum()).backward()
    for b, row in enumerate(rows):
        leaf = row.detach().clone().requires_grad_()
        spikes, v = gpn(leaf)
        (spikes.sum() + (v * g_v[..., b, :]).sum()).backward()
        torch.testing.assert_close(row.grad, leaf.grad)
    for one, other in zip(packed.parameters(), gpn.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_layer_of_neurons_alone_is_what_it_was():
    plain = GPN(N)
    assert list(plain.state_dict()) == ["weight_x", "weight_v", "bias"] and plain.input_size is None
    assert list(GPN(hidden_size=N).state_dict()) == list(plain.state_dict())
    assert set(GPN(C, N).state_dict()) == {"input.weight", "input.bias", *plain.state_dict()}
    names = GPN(C, N, 2).state_dict()
    assert {"layers.0.input.weight", "layers.1.weight_v"} <= set(names) and len(names) == 10
    assert names["layers.1.input.weight"].shape == (N, N)
    # a Linear before the neurons is a Linear before the neurons
    x, gpn = inputs(), layer()
    torch.testing.assert_close(
        gpn(x)[0], _neurons_of(gpn)(nn.functional.linear(x, *_linear(gpn)))[0]
    )
    assert {"input_size", "hidden_size", "num_layers", "batch_first", "dropout"} <= set(
        inspect.signature(GPN).parameters
    )


def _linear(gpn):
    return gpn.input.weight, gpn.input.bias


def _neurons_of(gpn):
    neurons = GPN(N).double().eval()
    neurons.load_state_dict({k: v for k, v in gpn.state_dict().items() if "input" not in k})
    return neurons


def test_dropout_silences_neurons_of_inner_layers_over_the_whole_sequence():
    gpn = layer(num_layers=2, dropout=0.5, reset_std=0.0).train()
    seen = []
    gpn.layers[1].input.register_forward_pre_hook(lambda m, args: seen.append(args[0].dense()))
    gpn(inputs())
    gpn.eval()(inputs())
    trained, evaluated = (spikes.amax(0) for spikes in seen)
    assert set(trained.unique().tolist()) == {0.0, 2.0} and evaluated.max() == 1
    assert (trained == 0).sum() > (evaluated == 0).sum()


@pytest.mark.parametrize("form", FORMS)
def test_meta_and_fake_tensors_give_shapes(form):
    meta = GPN(C, N, device="meta", dtype=torch.float64, **form)
    assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
    expected = layer(**form)(inputs())
    spikes, v = meta(inputs().to("meta"), lengths=torch.tensor(LENGTHS, device="meta"))
    assert spikes.is_meta and (spikes.shape, v.shape) == tuple(t.shape for t in expected)
    for dtype in (torch.float32, torch.float64):
        with FakeTensorMode():
            spikes, v = GPN(C, N, dtype=dtype, **form)(torch.randn(T, B, C, dtype=dtype))
            assert (spikes.shape, v.shape) == tuple(t.shape for t in expected)


@pytest.mark.parametrize("form", FORMS[::3])
def test_exported_and_compiled_programs_compute_the_same(form):
    gpn, x, lengths = (
        layer(batch_first=True, **form).float(),
        inputs().float(),
        torch.tensor(LENGTHS),
    )
    x = x.transpose(0, 1).contiguous()
    v0 = torch.zeros_like(gpn(x)[1])
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "v0": {v0.ndim - 2: batch}, "v_reset": None, "lengths": {0: batch}}
    given = {"x": x, "v0": v0, "v_reset": None, "lengths": lengths}
    program = torch.export.export(gpn, (), given, dynamic_shapes=shapes)
    compiled = torch.compile(gpn, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x, lengths=lengths), gpn(x, lengths=lengths), strict=True):
        torch.testing.assert_close(got, expected)
    for rows in (B, 3):
        part = {"x": x[:rows], "v0": v0[..., :rows, :], "v_reset": None, "lengths": lengths[:rows]}
        for got, expected in zip(program.module()(**part), gpn(**part), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_steps_product_is_the_same_bits_alone_and_in_any_batch():
    weight, bias = torch.randn(37, 53).double(), torch.randn(37).double()
    x = torch.randn(131, 2, 53).double().requires_grad_()
    y = row_linear(x, weight, bias)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, bias), rtol=1e-13, atol=1e-13)
    for k in (0, 63, 64, 130):
        assert torch.equal(row_linear(x[k, 1], weight, bias), y[k, 1])
    some = x[:3].detach(), weight.clone(), bias.clone()
    torch.library.opcheck(torch.ops.gpn_triton.row_linear, [t.requires_grad_() for t in some])
    parameters = weight.requires_grad_(), bias.requires_grad_()
    got = torch.autograd.grad(row_linear(x, *parameters).sin().sum(), (x, *parameters))
    expected = torch.autograd.grad(
        nn.functional.linear(x, *parameters).sin().sum(), (x, *parameters)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


PACKED = pack_sequence([torch.zeros(3, C), torch.zeros(2, C)])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: GPN(C, 0), ValueError, "hidden_size: expected at least 1, got 0"),
    (lambda: GPN(0, N), ValueError, "input_size: expected at least 1, got 0"),
    (lambda: GPN(C, "no-i"), ValueError, "hidden_size: expected at least 1, got 'no-i'"),
    (lambda: GPN(C, N, 0), ValueError, "num_layers: expected at least 1, got 0"),
    (lambda: GPN(C, N, dropout=0.5), ValueError, "dropout: has no effect with one layer"),
    (lambda: GPN(C, N, 2, dropout=1.0), ValueError, "dropout: expected 0 <= p < 1"),
    (lambda: GPN(C, N)(torch.zeros(3, 2, 4)), ValueError, r"x: expected \[T, B, 5\]"),
    (lambda: GPN(C, N, batch_first=True)(torch.zeros(2, 3, 4)), ValueError, r"\[B, T, 5\]"),
    (lambda: GPN(C, N)(PACKED, lengths=torch.tensor([3, 2])), ValueError, "lengths: expected None"),
    (lambda: GPN(C, N)(torch.zeros(3, C), lengths=torch.tensor([3])), ValueError, "one sequence"),
    (lambda: GPN(4, N)(PACKED), ValueError, r"x: expected \[T, B, 4\]"),
    (lambda: GPN(C, N, 2)(torch.zeros(3, 2, C), torch.zeros(2, N)), ValueError,
     r"v0: expected shape \[2, 2, 6\], got \[2, 6\]"),
    (lambda: GPN(C, N, 2)(torch.zeros(3, 2, C), (torch.zeros(2, N),) * 2), TypeError,
     "v0: expected a tensor, got tuple"),
    (lambda: GPN(C, N, 2).gates(), ValueError, "layers: expected one layer .* got 2"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
