"""Training piece by piece: the same numbers as whole, bounded memory, and resumed to the bit."""

import json
import signal

import pytest
import torch

from bench.measure import peak_bytes
from gpn_triton import train
from gpn_triton.data.binning import BinningConfig, bin_batch, bin_cells
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.sources.long_tasks import recall
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier
from gpn_triton.training import run as run_module
from gpn_triton.training.run_folder import load_checkpoint, load_weights
from tests.interpreter import need_interpreter
from tests.small_training import CPU, SMALL, resident, small_engine, store
from tests.test_data_feed import EVERYTHING

STREAMING = [name for name, row in NEURONS.items() if not row.needs_time_bins]
FULL = dict(time_bins=7, batch_size=44)


@pytest.mark.parametrize(("options", "augmentation"), [
    ({}, None),
    ({"overflow": "clip"}, EVERYTHING),
    ({"style": "authors"}, None),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "cells"])
def test_the_bins_of_a_piece_are_those_of_the_whole(backend, options, augmentation):
    if backend == "triton":
        need_interpreter()
    events, config = DeviceEvents(store()), BinningConfig(9, **options)
    indices, key = torch.tensor([3, 0, 41]), torch.tensor([1, 2])

    def counts(steps=None):
        if backend == "cells":
            return bin_cells(events, indices, config, augmentation, key, steps).dense()
        return bin_batch(events, indices, config, augmentation, key, backend, steps)

    pieces = [counts((a, min(a + 4, 9))) for a in range(0, 9, 4)]
    assert torch.equal(torch.cat(pieces), counts()) and counts().any()


@pytest.mark.parametrize("readout", ["mean", "last", "membrane"])
@pytest.mark.parametrize("neuron", STREAMING)
def test_a_network_in_pieces_says_what_it_says_at_once(neuron, readout):
    if readout == "membrane" and NEURONS[neuron].membrane is None:
        with pytest.raises(ValueError, match="readout: expected gpn, .* got " + neuron):
            SpikingClassifier([6], neuron, readout=readout)
        return
    torch.manual_seed(0)
    model = SpikingClassifier([6, 5], neuron, 4, 3, readout=readout).double()
    x = 6 * torch.rand(11, 3, 4).double()
    draws = model.draw(3)
    logits, activity = model(x, draws)
    state, seen = None, 0
    for piece in x.split(4):
        said, active, state = model.advance(piece, draws, state)
        seen = seen + active * len(piece) / len(x)
    torch.testing.assert_close(said, logits)
    torch.testing.assert_close(seen, activity)
    # gradients through the states are those of the whole, and none passes a detached one
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    pieces = torch.autograd.grad(said.square().sum(), parameters, allow_unused=True)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b)
    assert state.detach().readout.grad_fn is None


def gradients(net, feed, size):
    """The gradients and the loss of an engine's next step, whose update is left out."""
    found, net._update = [], lambda loss: None
    net.train_step(feed, size)
    for parameter in net.model.parameters():
        found.append(parameter.grad.clone())
        parameter.grad = None
    return found


@pytest.mark.parametrize("K", [7, 100])
def test_pieces_as_long_as_the_sequence_give_its_gradients(K):
    nets = [small_engine(**FULL, tbptt=tbptt) for tbptt in (None, K)]
    found = []
    for net in nets:
        feed = resident(store())
        net.start_epoch(feed, 3, 0)
        torch.manual_seed(1)
        found.append(gradients(net, feed, 44))
    assert all(map(torch.equal, *found))


def test_a_piece_has_the_gradient_that_stops_at_its_state():
    net, feed = small_engine(**FULL, tbptt=3, accumulate=2), resident(store())
    net.start_epoch(feed, 3, 0)
    state, order = None, None
    for first in (0, 3, 6):
        torch.manual_seed(first)
        if net.sequences is None:
            rng = torch.get_rng_state()
            draws = net.model.draw(44)
            torch.set_rng_state(rng)
        got = gradients(net, feed, 44)
        if order is None:
            order = net.sequences.indices
        steps = (first, min(first + 3, 7))
        x = net._input(feed.events, order, net.augmentation, steps)
        logits, _, state = net.model.advance(x, draws, state)
        state = state.detach()
        loss = torch.nn.functional.cross_entropy(logits, feed.events.labels[order])
        expected = torch.autograd.grad(loss, list(net.model.parameters()))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # what is logged is what the network said at the end, over all samples
    assert net.sequences is None and net.totals[2] == 44
    assert net.totals[0] / 44 == pytest.approx(loss.item(), rel=1e-4)


def test_evaluation_in_pieces_is_evaluation():
    whole, pieces = (small_engine(tbptt=K).evaluate(resident(store())) for K in (None, 2))
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
    assert pieces.accuracy == whole.accuracy
    assert pieces.activity == pytest.approx(whole.activity, rel=1e-5)


def peak(T, K):
    """Most bytes that one training step of tensors takes."""
    net = small_engine(time_bins=T, tbptt=K, channel_shift=0, batch_size=2, hidden=(32,))
    events = resident(recall(2, T, 1.0, 99, 0))
    net.start_epoch(events, 0, 0)
    return peak_bytes(lambda: [net.train_step(events, 2) for _ in net.pieces], CPU)


def test_memory_goes_with_the_piece_and_not_with_the_sequence():
    short, long, whole = peak(200, 50), peak(800, 50), peak(800, None)
    assert long < 1.1 * short and whole > 3 * long


def test_several_processes_are_refused():
    from gpn_triton.machine.distributed import World
    from gpn_triton.training.engine import Engine
    from gpn_triton.training.options import TrainConfig

    net = small_engine()
    with pytest.raises(ValueError, match="tbptt: expected one process, got 2"):
        Engine(TrainConfig(**SMALL, tbptt=2), net.model, CPU, World(0, 2))


def test_a_run_stopped_in_the_middle_of_a_sequence_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    options = "--dataset adding --time-bins 20 --tbptt 6 --samples 40 --epochs 2 --batch-size 16"
    argv = [*options.split(), "--hidden", "7", "5", "--accumulate", "3", "--seed", "3"]
    argv += ["--dropout", "0.3"]
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    assert train.main([*argv, "--out", str(runs[0])]) == 0
    step, done = run_module.Run._step, []

    def stops(self, size):
        step(self, size)
        done.append(size)
        if len(done) == 6:
            # after the second piece of the second batch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_module.Run, "_step", stops)
    assert train.main([*argv, "--out", str(runs[1])]) == 128 + signal.SIGTERM
    (folder,) = runs[1].iterdir()
    assert load_checkpoint(folder)[0]["engine"]["sequences"]["done"] == 2
    assert train.main(["--resume", str(folder)]) == 0
    results, models = [], []
    for run in runs:
        (folder,) = run.iterdir()
        results.append(json.loads((folder / "result.json").read_text())["test_loss"])
        models.append(SpikingClassifier([7, 5], "gpn", 2, 1, readout="membrane",
                                        time_constants=(1.0, 2.0)))  # fmt: skip
        load_weights(folder / "best.safetensors", models[-1])
    assert results[0] == results[1]
    assert all(map(torch.equal, *(m.state_dict().values() for m in models)))
