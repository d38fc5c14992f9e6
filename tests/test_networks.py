"""Layers and networks: the paper's sizes, held dropout, the way of spikes between layers."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gpn_triton import GPN, SpikingClassifier
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.neurons.layers import LIF, HeldDropout
from gpn_triton.neurons.networks import NEURONS


def network(**options):
    """A network of three hidden layers, counts for it, and a loss that every weight changes."""
    torch.manual_seed(0)
    model = SpikingClassifier([16, 12, 8], inputs=9, classes=4, **options)
    x = torch.poisson(torch.full((37, 5, 9), 1.0))

    def loss(*draws, run=model):
        return (run(x.to(model.output.weight.dtype), *draws)[0] * torch.arange(4)).sum()

    return model, x, loss


def trained(loss, model, *draws, run=None):
    """The loss by another run of a model, and the gradients of its weights."""
    model.zero_grad()
    value = loss(*draws, run=model if run is None else run)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("neuron", NEURONS)
def test_every_neuron_trains_a_two_layer_network(neuron):
    torch.manual_seed(0)
    model = SpikingClassifier([12, 7], neuron, inputs=9, classes=4, time_bins=6)
    logits, activity = model(torch.poisson(torch.full((6, 3, 9), 1.0)))
    assert logits.shape == (3, 4) and activity.shape == (2,)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("hidden", "classes", "neuron", "parameters"), [
    ([128], 20, "gpn", 223_892),
    ([512, 256, 128], 35, "gpn", 3_283_747),
    ([1024], 20, "gpn", 9_131_028),
    ([1024] * 3, 35, "gpn", 28_031_011),
    ([128], 20, "lif", 92_308),
])  # fmt: skip
def test_the_papers_networks_have_their_parameter_counts(hidden, classes, neuron, parameters):
    with torch.device("meta"):
        model = SpikingClassifier(hidden, neuron, classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_readout_is_the_mean_of_the_logits_or_the_last_step_s(readout):
    torch.manual_seed(1)
    model = SpikingClassifier([16], inputs=9, classes=4, readout=readout).eval().double()
    x = torch.poisson(torch.full((11, 3, 9), 1.0)).double()
    logits, layer = model(x)[0], model.neurons[0]
    layer.options = replace(layer.options, output="spikes")
    every = model.output(layer(model.inputs[0](x))[0])
    expected = every.mean(0) if readout == "mean" else every[-1]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_draws_nothing_and_training_draws_v_reset_once_a_sequence():
    layer = GPN(8)
    x = torch.randn(5, 3, 8)
    layer.eval()
    assert torch.equal(layer(x)[1], layer(x)[1])
    layer.train()
    assert not torch.equal(layer(x)[1], layer(x)[1])
    torch.manual_seed(3)
    drawn = layer(x)[1]
    torch.manual_seed(3)
    v_reset = 0.05 * torch.randn(3, 8)
    assert torch.equal(layer(x, v_reset=v_reset)[1], drawn)


def test_held_dropout_keeps_one_mask_over_time_and_the_mean():
    torch.manual_seed(0)
    dropout = HeldDropout(0.25)
    y = dropout(torch.ones(7, 100, 50))
    assert torch.equal(y[0].expand_as(y), y)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    dropout.eval()
    assert torch.equal(dropout(y), y)


def test_a_split_batch_draws_what_the_whole_would():
    model, x, _ = network()
    torch.manual_seed(1)
    whole, _ = model(x)
    torch.manual_seed(1)
    draws = model.draw(5)
    parts = [
        model(x[:, first:last], [drawn.part(first, last) for drawn in draws])[0]
        for first, last in ((0, 3), (3, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(model(x)[0], whole)


@pytest.mark.parametrize(("dtype", "amp", "share"), [
    (torch.float64, None, 1e-12),
    (torch.float32, None, 1e-5),
    # gradients of weights are summed without rounding them to 2^-9 on the way
    (torch.float32, torch.bfloat16, 2e-2),
])  # fmt: skip
@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_network_trains_as_its_layers_compose(dropout, readout, dtype, amp, share):
    model, _, loss = network(readout=readout, dropout=dropout)
    model.to(dtype)

    def plainly(x, draws):
        """SpikingClassifier.forward as its layers compose, every operand held by autograd."""
        for linear, neuron, drawn in zip(model.inputs, model.neurons, draws, strict=True):
            x = model.dropout(neuron(linear(x), v_reset=drawn.v_reset)[0], drawn.mask)
        return (model.output(x[-1] if readout == "last" else x),)

    draws = model.draw(5)
    with torch.autocast("cpu", amp, enabled=amp is not None):
        got, expected = (trained(loss, model, draws, run=run) for run in (model, plainly))
    assert torch.equal(got[0], expected[0])
    for g, e in zip(got, expected, strict=True):
        assert e.any() and (g - e).abs().max() <= share * e.abs().max()


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_network_holds_two_floats_and_a_bit_a_neuron_and_step(amp):
    B, C, hidden = 3, 9, [16, 12, 8]
    model = SpikingClassifier(hidden, inputs=C, classes=4)

    def held(T):
        storages, x = {}, torch.ones(T, B, C)

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", amp, enabled=amp is not None),
        ):
            logits, _ = model(x)
        assert logits.requires_grad
        return sum(storages.values())

    element = 4 if amp is None else 2
    # the input, x and v of every neuron; and a word of spikes
    sequence = element * (C + 2 * sum(hidden)) * 64 * B + 4 * sum(hidden) * 2 * B
    assert held(128) - held(64) == sequence


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_every_layer_fire_and_a_changed_output_is_what_goes_on(training):
    model, x, loss = network(dropout=0.0)
    model.train(training)
    seen = []
    for layer in [*model.inputs, *model.neurons]:
        layer.register_forward_hook(lambda m, inputs, out: seen.append(m))
    loss().backward()
    assert len(seen) == 6
    # silenced spikes leave the next Linear its bias, and its weight no gradient
    model.neurons[0].register_forward_hook(lambda m, inputs, out: (0 * out[0], out[1]))
    currents = []
    model.inputs[1].register_forward_hook(lambda m, inputs, out: currents.append(out))
    model.zero_grad()
    loss().backward()
    linear = model.inputs[1]
    assert torch.equal(currents[0], linear.bias.expand_as(currents[0]))
    assert not linear.weight.grad.any() and linear.bias.grad.any()


class Adapter(nn.Module):
    """A Linear with a low-rank addition, as LoRA puts in its place."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        assert type(x) is torch.Tensor
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("place", [0, 1])
def test_another_module_in_a_linear_s_place_gets_dense_spikes_and_trains(place):
    model, x, loss = network(dropout=0.3)
    draws = model.draw(5)
    expected = model(x, draws)[0]
    linear = model.inputs[place]
    model.inputs[place] = plain = nn.Linear(linear.in_features, linear.out_features)
    plain.load_state_dict(linear.state_dict())
    assert torch.equal(model(x, draws)[0], expected)
    model.inputs[place] = adapter = Adapter(plain)
    nn.init.zeros_(adapter.up.weight)
    assert torch.equal(model(x, draws)[0], expected)
    loss(draws).backward()
    assert adapter.up.weight.grad.any() and plain.weight.grad.any()
    cell = torch.arange(x.numel()).repeat_interleave(x.flatten().long())
    assert torch.equal(model(Cells.from_cells(cell, x.shape), draws)[0], expected)


@pytest.mark.parametrize("change", [
    lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    nn.utils.weight_norm,
    nn.utils.parametrizations.weight_norm,
])  # fmt: skip
def test_pruned_and_normalised_weights_train_step_after_step(change):
    model, x, loss = network(dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for linear in model.inputs:
            change(linear)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_network_compiles_without_graph_breaks_and_agrees():
    model, _, loss = network(dropout=0.3)
    draws = model.draw(5)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, trained(loss, model, draws), trained(loss, model, draws, run=run)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("neuron", "readout"), [("gpn", "mean"), ("lif", "last"), ("gru", "mean")])
def test_a_network_in_a_half_type_classifies_trains_and_streams(neuron, readout, dtype):
    model, x, loss = network(neuron=neuron, readout=readout)
    model, x = model.to(dtype), x.to(dtype)
    assert all(g.isfinite().all() for g in trained(loss, model))
    logits = model.eval()(x)[0]
    _, state = model.stream(x[:20])
    streamed, _ = model.stream(x[20:], state)
    assert logits.dtype == streamed.dtype == dtype
    torch.testing.assert_close(streamed, logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("variant", ["full", "no-fi", "no-t"])
def test_authors_weights_round_trip(variant):
    torch.manual_seed(0)
    layer, other = GPN(6, variant=variant).eval(), GPN(6, variant=variant).eval()
    other.load_authors_weights(*layer.authors_weights())
    x = torch.randn(4, 2, 6)
    assert torch.equal(layer(x)[1], other(x)[1])
    ln_weight, _ = layer.authors_weights()
    assert torch.equal(ln_weight[:, :6], layer.weight_v)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: GPN(0), "hidden_size: expected at least 1, got 0"),
    (lambda: GPN(4)(torch.zeros(2, 1, 5)), r"x: expected \[T, B, 4\], got \[2, 1, 5\]"),
    (lambda: GPN(4).load_authors_weights(torch.zeros(16, 4), torch.zeros(16)), "ln_weight"),
    (lambda: LIF(4, tau=1.0), "tau: expected more than 1 bin, got 1.0"),
    (lambda: HeldDropout(1.0), "dropout: expected 0 <= p < 1, got 1.0"),
    (lambda: SpikingClassifier([]), "hidden: expected one or more sizes"),
    (lambda: SpikingClassifier([4], "glif"), "neuron: expected one of gpn"),
    (lambda: SpikingClassifier([4], readout="max"), "readout: expected one of mean, last"),
    (lambda: SpikingClassifier([4], "cnn"), "time_bins: the cnn's readout"),
])  # fmt: skip
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
