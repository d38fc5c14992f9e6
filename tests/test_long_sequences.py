"""The quiet start, currents normalised to the data, and networks at another time step."""

import copy
import math

import pytest
import torch

from gpn_triton import GPN, SpikingClassifier, predict, train
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.neurons.jacobian import step_jacobian, trajectory
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.time_steps import change_time_step
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_model, clip_norm, start_constants
from gpn_triton.training.options import TrainConfig
from tests.small_training import resident, small_engine
from tests.stores import make_store
from tests.test_predict import make_run


def counts(T=40, B=6, C=9, rate=1.0):
    torch.manual_seed(1)
    return torch.poisson(torch.full((T, B, C), rate)).double()


def quiet(neuron="gpn", hidden=(16, 12), time_constants=(1.0, 20.0)):
    torch.manual_seed(0)
    return SpikingClassifier(
        hidden, neuron, inputs=9, classes=4, time_constants=time_constants
    ).double()


@pytest.mark.parametrize("variant", GATES)
def test_a_quiet_layer_begins_as_leaky_integrators_over_its_time_constants(variant):
    torch.manual_seed(0)
    layer, paper = GPN(20, variant=variant, time_constants=(2.0, 200.0)), GPN(20, variant=variant)
    gates = layer.gates()
    assert tuple(gates) == GATES[variant]
    if "f" in gates:
        tau = -1 / gates["f"].bias.double().sigmoid().log()
        steps = tau.log().diff()
        assert 2 < tau.min() < 2.5 and 160 < tau.max() < 200
        torch.testing.assert_close(steps, steps.mean().expand(19), rtol=1e-3, atol=0)
    for name in gates.keys() & {"f", "i"}:
        for weight, other in zip(gates[name][:2], paper.gates()[name][:2], strict=True):
            assert 0.15 < (weight.abs().mean() / other.abs().mean()).item() < 0.25
    assert not any(parameter.any() for parameter in gates.get("b", ()))


def test_the_step_s_jacobian_is_the_derivative_and_quiet_near_the_decays():
    torch.manual_seed(0)
    x, shifts = 2 * torch.randn(12, 3, 8).double(), 1e-6 * torch.eye(8).double()
    for layer in (GPN(8).double().eval(), GPN(8, time_constants=(3.0, 90.0)).double().eval()):
        v = trajectory(layer, x)
        torch.testing.assert_close(v[5], layer(x[:5])[1])
        found = step_jacobian(layer, x[5], v[5])
        differences = [
            layer(x[5:6], v[5] + shift)[1] - layer(x[5:6], v[5] - shift)[1] for shift in shifts
        ]
        torch.testing.assert_close(found, torch.stack(differences, -1) / 2e-6, rtol=1e-6, atol=1e-8)
    rest = step_jacobian(layer, torch.zeros(1, 8).double(), torch.zeros(1, 8).double())[0]
    assert torch.equal(rest, layer.gates()["f"].bias.detach().sigmoid().diag())


@pytest.mark.parametrize("neuron", ["gpn", "gpn-no-fitb", "cuba-lif"])
@torch.no_grad()
def test_normalised_currents_have_mean_0_and_variance_1_and_fold_into_the_weights(neuron):
    model, x = quiet(neuron).eval(), counts()
    places = torch.arange(x[:, :2].numel()).repeat_interleave(x[:, :2].flatten().long())
    # in parts, one of which are events
    parts = [Cells.from_cells(places, x[:, :2].shape), x[:, 2:]]
    model.float().normalise(lambda: [[parts[0]], [parts[1].float()]])
    model.double()
    for linear, layer in zip(model.inputs, model.neurons, strict=True):
        current = linear(x).flatten(0, 1)
        assert current.mean(0).abs().max() < 1e-4
        assert (current.var(0, unbiased=False) - 1).abs().max() < 1e-3
        if linear is not model.inputs[-1]:
            x = layer(linear(x))[0]
    plain, x = copy.deepcopy(model), counts()
    plain.fold()
    assert plain.state_dict().keys() == SpikingClassifier((16, 12), neuron).state_dict().keys()
    torch.testing.assert_close(plain(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)
    state = None
    for piece in x.split(7):
        logits, state = model.stream(piece, state)
    torch.testing.assert_close(logits, model(x)[0], rtol=1e-9, atol=1e-9)


def test_inputs_that_do_not_vary_keep_their_scale_and_all_parameters_learn():
    model = quiet()
    model.normalise(lambda: [[torch.zeros(5, 2, 9).double()]])
    assert all(torch.equal(linear.scale, torch.ones_like(linear.scale)) for linear in model.inputs)
    model.normalise(lambda: [[counts()]])
    (model(counts())[0] * torch.arange(4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(linear.gain.grad.any() for linear in model.inputs)


def test_an_engine_normalises_by_its_first_batch_whatever_its_parts_and_pieces():
    store = make_store(44, 2, None, 100, least=0, most=39, end=1.0, empty=False, band=(50, 40))
    found = []
    for options in ({}, {"accumulate": 3}, {"tbptt": 3}, {"amp": "bf16"}):
        engine = small_engine(**options)
        engine.normalise(resident(store), 3)
        found.append(torch.cat([linear.scale for linear in engine.model.inputs]))
        assert (found[-1] != 1).all()
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[3], found[0], rtol=0.02, atol=0)
    paper = small_engine(init="paper")
    before = copy.deepcopy(paper.model.state_dict())
    paper.normalise(resident(store), 3)
    assert all(torch.equal(before[name], t) for name, t in paper.model.state_dict().items())


@pytest.mark.parametrize(("options", "constants", "norm"), [
    ({"time_bins": 250}, (250 / 80, 125), 0.5),
    ({"time_bins": 20}, (0.5, 10), 0.5),
    ({"time_bins": 250, "max_time": 0.5, "time_constants": (0.01, 0.2)}, (5, 100), 0.5),
    ({"clip_grad": 0.0}, (0.5, 12.5), 0.0),
    ({"init": "paper"}, None, 0.0),
    ({"init": "paper", "clip_grad": 2.0}, None, 2.0),
])  # fmt: skip
def test_options_say_how_a_network_starts(options, constants, norm):
    cfg = TrainConfig(**options)
    assert start_constants(cfg) == (constants and pytest.approx(constants))
    assert clip_norm(cfg) == norm
    linear = build_model(cfg, 9, 4).inputs[0]
    assert (linear.gain is None) == (constants is None)


@pytest.mark.parametrize("neuron", ["gpn", "gpn-no-i"])
@pytest.mark.parametrize("ratio", [0.2, 5.0])
@torch.no_grad()
def test_a_membrane_at_another_time_step_is_where_it_was_at_the_same_time(neuron, ratio):
    model = quiet(neuron, (16,), (10.0, 80.0)).eval()
    model.normalise(lambda: [[counts()]])
    (gates,) = (layer.gates() for layer in model.neurons)
    for gate in gates.values():
        # what is exact is a gate at its bias
        gate.weight_x.zero_()
        gate.weight_v.zero_()
    gates["b"].bias.fill_(0.001)
    if "i" in gates:
        gates["i"].bias.fill_(-4.0)
    model.inputs[0].gain.fill_(0.1)
    fine, states = copy.deepcopy(model), []
    change_time_step(fine, ratio)
    for network, length in ((model, 1.0), (fine, ratio)):
        x = torch.full((round(40 / length), 1, 9), 1.1 * length, dtype=torch.float64)
        spikes, v = network.neurons[0](network.inputs[0](x))
        assert not spikes.any()
        states.append(v)
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)
    assert states[0].abs().max() > 0.01


@torch.no_grad()
def test_there_and_back_is_the_same_network():
    for model in (quiet(), quiet("gpn-no-b", time_constants=None), quiet("gpn-no-t")):
        model.normalise(lambda: [[counts()]])
        back = copy.deepcopy(model)
        change_time_step(back, 0.25)
        assert not torch.equal(back.neurons[0].bias, model.neurons[0].bias)
        change_time_step(back, 4)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_what_has_no_decay_to_change_is_refused():
    for neuron in ("lstm", "lif", "gpn-no-fi"):
        with pytest.raises(ValueError, match=f"expected GPN with a forget gate.* got {neuron}"):
            change_time_step(SpikingClassifier([4], neuron), 0.5)
    with pytest.raises(ValueError, match="ratio: expected more than 0, got 0"):
        change_time_step(quiet(), 0)
    for bad in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (1.0,)):
        with pytest.raises(ValueError, match="time_constants: expected the shortest"):
            GPN(4, time_constants=bad)


def test_predictions_on_other_bins_say_how_they_were_made(tmp_path, capsys):
    run, file = make_run(tmp_path / "run"), tmp_path / "some.h5"
    write_events(file, make_store(samples=11, most=200, end=1.0))
    said, texts = [], []
    for more in ([], ["--time-bins", "9"], ["--time-bins", "36"]):
        assert predict.main([str(run), str(file), "--out", "-", *more]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        said.append(err)
    assert texts[1] == texts[0] != texts[2]
    assert said[0] == "" and said[1] == f"{run}: on bins as long as in training\n"
    assert "trained on bins of 111.1 ms, converted to bins of 27.78 ms: decays" in said[2]
    assert predict.main([str(run), str(file), "--time-bins", "0"]) == 2
    assert "time_bins: expected" in capsys.readouterr().err
    run = make_run(tmp_path / "log", scale="log")
    assert predict.main([str(run), str(file), "--time-bins", "36"]) == 2
    assert "time_bins: expected bins as long as in training with scale log" in (
        capsys.readouterr().err
    )
    assert predict.main([str(run), str(file), "--out", "-"]) == 0
    whole = capsys.readouterr().out
    assert predict.main([str(run), str(file), "--out", "-", "--stream"]) == 0
    assert capsys.readouterr().out == whole


def test_training_goes_on_from_another_run_s_weights_at_finer_bins(tmp_path, capsys):
    store = make_store(60, empty=False)
    write_events(tmp_path / "a.h5", store)
    base = [f"--train-file={tmp_path}/a.h5", f"--test-file={tmp_path}/a.h5", "--device=cpu"]
    small = ["--hidden", "8", "--time-bins", "6", "--epochs", "1", "--readout", "last"]
    assert train.main([*base, *small, f"--out={tmp_path}/coarse"]) == 0
    (coarse,) = (tmp_path / "coarse").iterdir()
    more = [f"--init-from={coarse}", "--time-bins", "24", "--epochs", "1", "--lr", "1e-9"]
    capsys.readouterr()
    assert train.main([*base, *more, f"--out={tmp_path}/fine"]) == 0
    assert f"starts from {coarse}, trained on bins of 166.7 ms" in capsys.readouterr().out
    (fine,) = (tmp_path / "fine").iterdir()
    found, (expected, _) = run_folder.load_run(fine), run_folder.load_run(coarse).at(24, 1.0)
    assert (found.config.hidden, found.config.readout) == ((8,), "last")
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    for wrong, message in (
        (["--hidden", "9"], f"init_from: {coarse} is of another network"),
        (["--init", "quiet"], "init: has no effect beside --init-from"),
    ):
        assert train.main([*base, *more, *wrong, f"--out={tmp_path}/wrong"]) == 2
        assert message in capsys.readouterr().err
    write_events(tmp_path / "a.h5", make_store(60, 2, empty=False))
    assert train.main([*base, *more, f"--out={tmp_path}/wrong"]) == 2
    assert f"init_from: {coarse} knows" in capsys.readouterr().err
