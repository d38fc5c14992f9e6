"""The analyses: what they say is what the networks' own equations give."""

import csv
import dataclasses
import json
import math
import re

import pytest
import torch

from gpn_triton import SpikingClassifier, analyze, train
from gpn_triton.analysis import distributions, energy, gradients, heterogeneity, tasks
from gpn_triton.analysis.replay import replay
from gpn_triton.analysis.subject import bin_samples
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.neurons import cost
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run_folder
from gpn_triton.training.options import TrainConfig
from tests.stores import make_store

pytest.importorskip("matplotlib")
STEPWISE = [name for name, row in NEURONS.items() if not row.needs_time_bins]
FILES = dict(least=60, most=60, end=1.0, empty=False, band=(100, 200))


def network(neuron, hidden=(9, 6), readout="last", inputs=12):
    torch.manual_seed(1)
    return SpikingClassifier(hidden, neuron, inputs, 3, readout=readout, backend="torch").eval()


def counts(T=12, B=5, C=12):
    return torch.poisson(torch.full((T, B, C), 1.5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("neuron", STEPWISE)
def test_a_replay_gives_the_network_s_own_logits(neuron):
    for readout in ("last", "mean"):
        model = network(neuron, readout=readout)
        torch.testing.assert_close(replay(model, counts()), model(counts())[0], rtol=0, atol=1e-6)


def test_gradients_are_those_of_finite_differences_and_the_diagonal_is_lif_s():
    # LIF that never spikes is linear: dL/dv halves with every step back
    model = network("lif", (7,))
    with torch.no_grad():
        model.inputs[0].weight *= 0.01
        model.inputs[0].bias.zero_()
    (decay,) = gradients.decays(model, counts(30), torch.arange(5) % 3)
    halves = 0.5 ** torch.arange(28, -1, -1.0, dtype=torch.float64)
    torch.testing.assert_close(decay.factor, halves)
    torch.testing.assert_close(decay.v / decay.v[-1], halves, rtol=1e-4, atol=0)
    assert (decay.half_life(), decay.gone()) == (1, math.ceil(math.log2(1e6)))
    assert decay.kept() == pytest.approx(0.5**28, rel=1e-4)
    # every other neuron's reach is finite, and the loss at the mean reaches all steps
    for neuron in ("gpn", "gpn-no-fitb", "plif", "cuba-lif", "lstm", "gru", "rnn"):
        for found in gradients.decays(
            network(neuron, readout="mean"), counts(), torch.arange(5) % 3
        ):
            assert found.h.shape == found.v.shape == found.factor.shape == (11,)
            assert (found.v > 0).all() and found.factor[-1] == 1


def test_gpn_s_diagonal_is_that_of_its_equations():
    # one neuron and one sample: the product of dv[t+1]/dv[t] is all of the gradient
    model = network("gpn", (1,))
    with torch.no_grad():
        model.neurons[0].weight_v.copy_(torch.tensor([[0.5], [-0.3], [0.2], [0.1]]))
        model.inputs[0].weight *= 0.1
    (decay,) = gradients.decays(model, counts(10, 1), torch.tensor([1]))
    torch.testing.assert_close(decay.v / decay.v[-1], decay.factor, rtol=1e-4, atol=0)


def test_variances_add_up_and_means_are_the_gates():
    model, x = network("gpn-no-i"), [counts(B=4), counts(T=12, B=3)]
    spreads = distributions.spread(model, x)
    assert list(spreads[0]) == ["f", "i", "theta", "b"]
    for name in ("f", "i", "theta", "b"):
        traces = [
            distributions.trace(model, batch[:, [k]])[0].gates[name]
            for batch in x for k in range(batch.shape[1])
        ]  # fmt: skip
        values, of = torch.stack(traces).double(), spreads[0][name]  # [samples, T, N]
        torch.testing.assert_close(of.neuron_means, values.mean((0, 1)), rtol=1e-6, atol=1e-9)
        whole = float(values.var(correction=0))
        assert sum(of.variances().values()) == pytest.approx(whole, rel=1e-5)
        over_time = float(values.var(1, correction=0).mean())
        assert of.variances()["time"] == pytest.approx(over_time, rel=1e-5)
        assert of.histogram.sum() == values.numel()
    assert spreads[0]["i"].neuron_means + spreads[0]["f"].neuron_means == pytest.approx(1.0)


def test_a_leak_is_a_time_constant():
    tau = distributions.time_constants_ms(torch.tensor([math.exp(-1), math.exp(-5)]), 50.0)
    assert tau.tolist() == pytest.approx([50.0, 10.0], rel=1e-5)
    assert distributions.share_inside(tau, distributions.MEMBRANE) == 0.5


def test_frozen_gates_are_constant_as_they_say():
    model, x = network("gpn"), counts()
    spreads = distributions.spread(model, [x])
    for how in heterogeneity.FREEZINGS:
        seen, change = [], heterogeneity.frozen(how, spreads)
        replay(model, x, lambda k, t, s, seen=seen: seen.append(s.gates) if k == 0 else 0, change)
        f = torch.stack([gates.f for gates in seen])  # [T, B, N]
        assert (f.std(0).max() < 1e-6) == (how != "neurons")
        assert (f.std(-1).max() < 1e-6) == (how != "time")
        if how == "time":
            torch.testing.assert_close(f[0, 0].double(), spreads[0]["f"].neuron_means)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_s_classes_differ_in_order_alone_from_two_cues_on(name):
    store = tasks.task_events(name, 60, 0).validate(name)
    assert len(store.class_names) == 6 and set(store.labels) == set(range(6))
    if name != "order-1":
        assert len({frozenset(cues) for cues in store.class_names}) <= 3
    assert 0.1 < store.times.max() < 0.7
    again = tasks.task_events(name, 60, 0)
    assert (again.times == store.times).all() and again.fingerprint() == store.fingerprint()


def test_operations_are_counted_event_by_event():
    # LIF: an addition a weight and event, an update a neuron
    op = cost.operations(NEURONS["lif"].work, 10, 50, 3.0, 0.1)
    assert (op.macs, op.acs) == (10, 30)
    # GPN: two products with its four gates' weights besides
    op = cost.operations(NEURONS["gpn"].work, 10, 50, 3.0, 0.1)
    assert (op.macs, op.acs) == (2 * 4 * 100 + 20, 30)
    # recurrent spikes are additions, real numbers are not
    op = cost.operations(NEURONS["cuba-lif"].work, 10, 50, 3.0, 0.1)
    assert (op.macs, op.acs) == (20, pytest.approx(30 + 10))
    op = cost.operations(NEURONS["lstm"].work, 10, 50, None, 0.0)
    assert (op.macs, op.acs) == (4 * 50 * 10 + 400 + 30, 0)
    assert op.bytes == 4 * 2400 + cost.neuron(NEURONS["lstm"].work, 10, False, 4).bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a trained GPN with kept epochs and of a LIF, and a file of samples."""
    folder = tmp_path_factory.mktemp("runs")
    for name, samples in (("train", 40), ("test", 20)):
        write_events(folder / f"{name}.h5", make_store(samples, 2, **FILES))
    made = []
    for neuron, more in (("gpn", ["--keep-epochs", "0", "1", "--init", "paper"]), ("lif", [])):
        out = folder / neuron
        assert train.main([
            "--train-file", str(folder / "train.h5"), "--test-file", str(folder / "test.h5"),
            "--hidden", "8", "--time-bins", "6", "--epochs", "1", "--neuron", neuron, "--out",
            str(out), *more,
        ]) == 0  # fmt: skip
        made += [str(path) for path in out.iterdir()]
    return (*made, str(folder / "test.h5"))


def test_kept_epochs_are_the_network_s_weights_then(runs):
    kept = run_folder.kept_weights(runs[0])
    assert list(kept) == [0, 1]
    best = run_folder.load_run(runs[0]).model
    for epoch, same in ((0, False), (1, True)):
        model = network("gpn", (8,), "mean", 700)
        model.output = torch.nn.Linear(8, 2)
        run_folder.load_weights(kept[epoch], model)
        assert torch.equal(model.output.weight, best.output.weight) == same


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_gradients_command_draws_runs_and_new_networks(runs, tmp_path, capsys):
    arguments = ["gradients", runs[0], "--neuron", "lstm", "--width", "6", "--depth", "1", "2"]
    assert analyze.main([*arguments, "--time-bins", "5", "8", "--out", str(tmp_path)]) == 0
    found = rows(tmp_path / "gradients.csv")
    subjects = list(dict.fromkeys(row["subject"] for row in found))
    assert [s.rpartition(", ")[2] for s in subjects[:3]] == ["epoch 0", "epoch 1", "best"]
    assert subjects[3:] == ["lstm 6", "lstm 6-6"]
    # layers x steps x readouts of each T
    assert len(found) == (4 + 2) * (4 + 7) * 2
    assert (tmp_path / "gradients.png").exists() and "half-life" in capsys.readouterr().out


def test_parameters_command_tells_constants_beside_published_ones(runs, tmp_path, capsys):
    assert analyze.main(["parameters", runs[0], runs[2], "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "published 3.0 to 16.8 ms" in said and "PMC6623880" in said
    assert len(rows(tmp_path / "parameters.csv")) == 4 * 8
    assert (tmp_path / "parameters.png").exists() and (tmp_path / "traces.png").exists()


def test_cost_command_compares_with_the_first_run(runs, tmp_path, capsys):
    constants = tmp_path / "constants.json"
    constants.write_text(json.dumps({"byte_pj": 0, "mac_pj": 2}))
    command = ["cost", *runs[:2], "--file", runs[2], "--constants", str(constants)]
    assert analyze.main([*command, "--out", str(tmp_path)]) == 0
    gpn, lif = rows(tmp_path / "cost.csv")
    assert float(gpn["events"]) == 60 == float(lif["events"])
    joule = 2 * float(lif["macs"]) + 0.9 * float(lif["acs"])
    assert float(lif["energy_nj"]) == pytest.approx(joule / 1000)
    assert float(lif["acs"]) == 60 * 8 and float(lif["macs"]) == 6 * 8 + 8 * 2
    assert "size" in lif["equal_in"] and "constants.json" in capsys.readouterr().out


def test_heterogeneity_command_trains_and_freezes(tmp_path, capsys):
    command = ["heterogeneity", "gap-100", "--samples", "24", "--epochs", "1", "--hidden", "8"]
    command += ["--time-bins", "5", "--out", str(tmp_path)]
    assert analyze.main(command) == 0
    found = rows(tmp_path / "heterogeneity.csv")
    assert [row["task"] for row in found] == ["gap-100"]
    assert (tmp_path / "heterogeneity.png").exists()
    # once more: nothing is trained again
    assert analyze.main(command) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["gradients"], "gradients: expected a RUN"),
    (["gradients", "--neuron", "cnn"], "neuron: a cnn sees all bins at once"),
    (["gradients", "--neuron", "lif", "--time-bins", "2"], "time_bins: expected at least 3"),
    (["gradients", "RUN", "--epochs", "9"], "epochs: .* kept \\[0, 1\\], got 9"),
    (["parameters", "LIF"], "run: expected GPN with gates, got a run of lif"),
    (["parameters", "nowhere"], "run: nowhere is not a run folder"),
    (["parameters", "RUN", "one.h5"], "one.h5: expected samples of at least 2 classes"),
    (["parameters", "RUN", "--sample", "99"], "sample: expected 0..3, got 99"),
    (["cost", "RUN", "--file", "many.h5"], "many.h5: expected the run's 2 classes, got label 4"),
    (["cost", "RUN", "--constants", "nowhere"], "constants: no such file"),
    (["cost", "RUN", "--constants", "bad.json"], "constants: bad.json: mac_pj: got 'x'"),
    (["heterogeneity", "nowhere.h5"], "nowhere.h5: expected an HDF5 file"),
    (["nothing"], "invalid choice: 'nothing'"),
])  # fmt: skip
def test_a_mistake_is_answered_in_a_line(arguments, message, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_events(tmp_path / "one.h5", make_store(20, 1))
    write_events(tmp_path / "many.h5", make_store(20, 5))
    (tmp_path / "bad.json").write_text('{"mac_pj": "x"}')
    named = {"RUN": runs[0], "LIF": runs[1]}
    assert analyze.main([named.get(word, word) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


def test_only_gated_neurons_have_a_spread_and_only_counted_ones_a_cost():
    with pytest.raises(ValueError, match="expected GPN with gates, got a run of gpn-no-fitb"):
        distributions.check_gated(network("gpn-no-fitb"))
    cfg = TrainConfig(neuron="cnn", hidden=(4,), time_bins=6)
    trained = run_folder.TrainedRun(cfg, network("gpn"), ("a", "b"), 30)
    samples = bin_samples(dataclasses.replace(cfg, neuron="gpn"), make_store(4, 2))
    with pytest.raises(ValueError, match="the work of a cnn is not counted"):
        energy.measure(trained, samples, None, energy.Constants())
