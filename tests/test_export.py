"""Exported networks, read back by the loader that the documentation gives and as the authors do."""

import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from test_predict import NAMES, make_run

from gpn_triton import SpikingClassifier, export
from gpn_triton.data.binning import BinningConfig
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.neurons.reference import gpn_loop
from gpn_triton.training.run_folder import load_run


def documented_loader():
    """The loader as it stands in the module's head."""
    lines = export.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    assert 5 < len([line for line in code.splitlines() if line]) <= 10
    names = {}
    exec(code, names)
    return names["load"]


@pytest.mark.parametrize("neuron", NEURONS)
@torch.no_grad()
def test_the_documented_loader_reads_back_the_same_network(tmp_path, neuron, capsys):
    run = make_run(tmp_path / "run", neuron=neuron, channel_bin=7)
    assert export.main([str(run)]) == 0
    out = run / "export"
    expected = ["model.json", "model.safetensors"]
    if neuron.startswith("gpn"):
        expected = ["authors.safetensors", *expected]
    assert sorted(p.name for p in out.iterdir()) == expected
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in expected]
    model, about = documented_loader()(out)
    original = load_run(run).model
    x = torch.poisson(torch.full((9, 4, 100), 0.3))
    assert torch.equal(model(x)[0], original(x)[0])
    assert about["class_names"] == list(NAMES)


def test_the_description_tells_how_events_are_binned(tmp_path):
    run = make_run(tmp_path / "run", max_time=0.7, overflow="clip", channel_bin=5)
    export.export(run, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    binning = about["binning"]
    assert binning.pop("num_channels") == 700 and about["network"]["inputs"] == 140
    config = BinningConfig(time_bins=about["network"]["time_bins"], **binning)
    assert config == BinningConfig(9, 0.7, 5, "clip", "counts")


def authors_forward(w, x):
    """Logits of the authors' network by their names, step by step: x [T, B, C]."""
    layer = 1
    while f"sn{layer}.ln.weight" in w:
        x = x @ w[f"fc{layer}.weight"].t() + w[f"fc{layer}.bias"]
        v, spikes = torch.zeros_like(x[0]), []
        for current in x:
            gates = torch.cat([v, current], 1) @ w[f"sn{layer}.ln.weight"].t()
            f, i, b, theta = (gates + w[f"sn{layer}.ln.bias"]).chunk(4, 1)
            h = f.sigmoid() * v + i.sigmoid() * current
            s = (h >= theta.sigmoid()).to(x.dtype)
            v = h * (1 - s) + b.tanh()
            spikes.append(s)
        x, layer = torch.stack(spikes), layer + 1
    return (x @ w[f"fc{layer}.weight"].t() + w[f"fc{layer}.bias"]).mean(0)


@torch.no_grad()
def test_the_authors_layout_computes_the_same_logits(tmp_path):
    run = make_run(tmp_path / "run", hidden=(24, 13, 6))
    export.export(run, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "authors.safetensors")
    shapes = {name: list(t.shape) for name, t in weights.items()}
    assert shapes == {
        "fc1.weight": [24, 700], "fc1.bias": [24], "sn1.ln.weight": [96, 48], "sn1.ln.bias": [96],
        "fc2.weight": [13, 24], "fc2.bias": [13], "sn2.ln.weight": [52, 26], "sn2.ln.bias": [52],
        "fc3.weight": [6, 13], "fc3.bias": [6], "sn3.ln.weight": [24, 12], "sn3.ln.bias": [24],
        "fc4.weight": [3, 6], "fc4.bias": [3],
    }  # fmt: skip
    x = torch.poisson(torch.full((9, 4, 700), 0.05)).double()
    model = load_run(run).model.double()
    logits, activity = model(x)
    assert (activity > 0).all()
    double = {name: t.double() for name, t in weights.items()}
    torch.testing.assert_close(authors_forward(double, x), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["no-fi", "no-i", "no-t", "no-b"])
@torch.no_grad()
def test_a_variants_layout_holds_the_rows_of_its_gates(tmp_path, variant):
    run = make_run(tmp_path / "run", neuron=f"gpn-{variant}", hidden=(6,))
    # a second export replaces the first
    for exported in (make_run(tmp_path / "other"), run):
        export.export(exported, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "authors.safetensors")
    layer = load_run(run).model.neurons[0]
    x, zero = torch.randn(5, 2, 6), torch.zeros(2, 6)
    ln = weights["sn1.ln.weight"]
    expected = gpn_loop(x, ln[:, 6:], ln[:, :6], weights["sn1.ln.bias"], zero, zero, variant)[1]
    torch.testing.assert_close(layer(x)[1], expected)


def test_without_gates_there_are_no_gate_weights_and_other_networks_have_no_authors_layout():
    weights = export.authors_weights(SpikingClassifier([6, 5], "gpn-no-fitb"))
    assert sorted({name.split(".")[0] for name in weights}) == ["fc1", "fc2", "fc3"]
    with pytest.raises(ValueError, match="neuron: expected a GPN network, got lstm"):
        export.authors_weights(SpikingClassifier([6], "lstm"))


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "taken").write_text("a file")
    for argv, message in (
        ([str(tmp_path / "none")], "is not a run folder: no config.json"),
        ([str(run), "--out", str(tmp_path / "taken")], "File exists"),
        ([str(run), "--out", "/dev/null/out"], "Not a directory"),
    ):
        assert export.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "taken"]
    (run / "best.safetensors").write_bytes(b"junk")
    assert export.main([str(run)]) == 2
    assert not (run / "export").exists()
