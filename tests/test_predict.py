"""Predictions of a trained run, and networks fed bin by bin."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from gpn_triton import SpikingClassifier, predict, train
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import run_folder
from gpn_triton.training.build import build_model
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.run_folder import load_run
from tests.stores import make_store

ROOT = Path(__file__).parent.parent
STREAMING = [n for n in NEURONS if n != "cnn"]
NAMES = ("word 0", "word 1", "word 2")


def make_run(folder, names=NAMES, **options):
    """A run folder with random weights, strong enough for spikes in every layer."""
    options = {"hidden": (24, 13), "time_bins": 9, **options}
    cfg = TrainConfig(**options)
    model = build_model(cfg, -(-700 // cfg.channel_bin), 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "inputs" in name or name.startswith("output"):
                parameter.mul_(5)
    folder.mkdir(parents=True)
    run_folder.write_json(folder / "config.json", cfg.to_dict())
    run_folder.save_weights(folder / "best.safetensors", model)
    if names is not None:
        (folder / "metrics.jsonl").write_text(json.dumps({"class_names": names}) + "\n")
    return folder


@pytest.fixture
def file(tmp_path):
    write_events(tmp_path / "some.h5", make_store(samples=11, most=200, end=1.0))
    return tmp_path / "some.h5"


def random_network(neuron, seed, readout="mean", hidden=(40, 33), dtype=torch.float64):
    """A network and counts for it in which every hidden layer is active."""
    torch.manual_seed(seed)
    model = SpikingClassifier(hidden, neuron, 60, 7, readout=readout, time_bins=30).eval()
    with torch.no_grad():
        for linear in model.inputs:
            for parameter in linear.parameters():
                parameter.mul_(5)
    x = torch.poisson(torch.full((30, 5, 60), 0.3))
    return model.to(dtype), x.to(dtype)


def fed(model, x, sizes):
    """Logits of x fed in pieces of so many bins."""
    state = None
    for piece in x.split(sizes):
        logits, state = model.stream(piece, state)
    assert state.steps == len(x)
    return logits


@pytest.mark.parametrize("readout", ["mean", "last"])
@pytest.mark.parametrize("neuron", STREAMING)
@torch.no_grad()
def test_streamed_logits_are_those_of_the_whole_sequence_bit_for_bit(neuron, readout):
    for seed in range(2):
        model, x = random_network(neuron, seed, readout)
        whole, activity = model(x)
        assert (activity != 0).all()
        for sizes in (1, [7, 1, 22], 30):
            assert torch.equal(fed(model, x, sizes).float(), whole.float())


@torch.no_grad()
def test_a_stream_gives_logits_at_every_bin_of_any_batch_and_can_be_gone_on_from_twice():
    for neuron in ("gpn", "cuba-lif"):
        model, x = random_network(neuron, 1)
        whole = model(x)[0].float()
        logits, state = model.stream(x[:10])
        assert torch.equal(logits.float(), model(x[:10])[0].float())
        first, again = (model.stream(x[10:], state)[0] for _ in range(2))
        assert torch.equal(first, again) and torch.equal(first.float(), whole)
        alone = torch.cat([fed(model, x[:, k : k + 1], 1) for k in range(x.shape[1])])
        assert torch.equal(alone.float(), whole)


@pytest.mark.parametrize(("neuron", "change", "message"), [
    ("cnn", lambda m, x, s: m.stream(x), "neuron: a cnn sees all bins at once"),
    ("gpn", lambda m, x, s: m.train().stream(x), "expected evaluation mode"),
    ("lif", lambda m, x, s: m.stream(x[0]), r"x: expected \[T, B, C\]"),
    ("lif", lambda m, x, s: m.stream(x[:0]), "each size at least 1"),
    ("lif", lambda m, x, s: m.stream(x[:, :2], s), "x: expected the state's 5 rows, got 2"),
])  # fmt: skip
def test_what_cannot_stream_is_named(neuron, change, message):
    model, x = random_network(neuron, 0)
    state = model.stream(x)[1] if neuron == "lif" else None
    with pytest.raises(ValueError, match=message):
        change(model, x, state)


# the command


def read(text):
    head, *rows = csv.reader(io.StringIO(text))
    return head, rows


def test_predictions_name_the_likeliest_class_and_sum_to_one(tmp_path, file, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "out.csv"
    assert predict.main([str(run), str(file), "--out", str(out), "--device", "cpu"]) == 0
    head, rows = read(out.read_text())
    assert head == ["sample", "label", *(f"p({n})" for n in NAMES)]
    assert [row[0] for row in rows] == [str(k) for k in range(11)]
    for _, label, *probabilities in rows:
        p = [float(value) for value in probabilities]
        assert sum(p) == pytest.approx(1, abs=1e-5) and label == NAMES[p.index(max(p))]
    agree = sum(row[1] == NAMES[k % 3] for k, row in enumerate(rows)) / 11
    expected = f"{out}: 11 samples, {100 * agree:.2f} % as the file labels them\n"
    assert capsys.readouterr().out == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "run", "some.h5"]


@pytest.mark.parametrize("options", [
    {"readout": "last"}, {"neuron": "gpn-no-fitb"}, {"neuron": "lstm"},
    {"channel_bin": 5, "amp": "bf16", "backend": "triton"}, {"binning": "authors"},
])  # fmt: skip
def test_neither_streaming_nor_the_batch_size_changes_the_output(tmp_path, file, options, capsys):
    command = [str(make_run(tmp_path / "run", **options)), str(file), "--out", "-"]
    texts = []
    for more in ([], ["--stream"], ["--stream", "--batch-size", "1"], ["--batch-size", "4"]):
        assert predict.main([*command, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert len(texts[0].splitlines()) == 12 and texts == texts[:1] * 4


def test_a_run_that_the_trainer_left_is_read_and_agrees_with_it(tmp_path, capsys):
    write_events(tmp_path / "a.h5", make_store(60, empty=False))
    options = f"--train-file {tmp_path}/a.h5 --test-file {tmp_path}/a.h5 --out {tmp_path}/runs"
    small = "--hidden 8 --time-bins 6 --epochs 2 --device cpu --batch-size 16"
    assert train.main([*options.split(), *small.split(), "--seed", "1", "2"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    trained = load_run(run / "seed-2")
    assert trained.class_names == NAMES and not trained.model.training
    logits = predict.predict(trained, make_store(60, empty=False))
    accuracy = (logits.argmax(1) == torch.arange(60) % 3).double().mean().item()
    result = json.loads((run / "seed-2" / "result.json").read_text())
    assert accuracy == pytest.approx(result["test_accuracy"], abs=1e-6)
    assert predict.main([str(run), str(tmp_path / "a.h5")]) == 2
    assert f"holds 2 seeds: name one, as {run}/seed-1" in capsys.readouterr().err


def test_prediction_leaves_the_run_as_it_was_and_classes_without_names_are_numbers(tmp_path):
    trained = load_run(make_run(tmp_path / "run", None))
    assert trained.class_names == ("0", "1", "2")
    before = [p.clone() for p in trained.model.parameters()]
    predict.predict(trained, make_store())
    after = list(trained.model.parameters())
    assert all(map(torch.equal, after, before)) and {p.dtype for p in after} == {torch.float32}


def weights(hidden=(24, 13), **values):
    """The file of a network's weights, with some parameters filled."""
    model = build_model(TrainConfig(hidden=hidden, time_bins=9), 700, 3)
    for name, value in values.items():
        model.get_parameter(name.replace("__", ".")).data.fill_(value)
    return save(model.state_dict())


HUGE = {"inputs__1__bias": 100, "output__weight": 3e38, "output__bias": 3e38}
CONFIG, METRICS, WEIGHTS = run_folder.CONFIG, run_folder.METRICS, run_folder.WEIGHTS


@pytest.mark.parametrize(("name", "content", "message"), [
    (CONFIG, None, "run is not a run folder: no config.json"),
    (CONFIG, b"{", "config.json is not valid JSON"),
    (CONFIG, b"[]", "config.json: expected an object, got list"),
    (CONFIG, b"[" * 100_000, "config.json is not valid JSON"),
    (CONFIG, b'{"lrr": 1}', "config.json: unknown option 'lrr'; did you mean lr?"),
    (WEIGHTS, None, "has no best.safetensors: no epoch was finished"),
    (WEIGHTS, b"junk", "best.safetensors cannot be read"),
    (WEIGHTS, save({"x": torch.zeros(1)}), "best.safetensors cannot be read: "),
    (WEIGHTS, weights((5,)), "best.safetensors does not fit this network"),
    (WEIGHTS, weights(inputs__0__bias=torch.nan), "inputs.0.bias holds values that are not"),
    (WEIGHTS, weights(**HUGE), "weights: expected finite logits"),
    (METRICS, b"junk", "metrics.jsonl: no header in its first line"),
    (METRICS, b'{"class_names": ["a"]}', "class_names: expected 3 names"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_a_spoiled_run_is_one_line_and_nothing_is_written(
    tmp_path, file, name, content, message, capsys
):
    run = make_run(tmp_path / "run")
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    assert predict.main([str(run), str(file), "--out", str(tmp_path / "out.csv")]) == 2
    assert_one_line(capsys, message, tmp_path)


def assert_one_line(capsys, message, folder):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(p.name for p in folder.iterdir()) == ["run", "some.h5"]


@pytest.mark.parametrize(("more", "message"), [
    ("--device tpu", "device: expected auto, cpu, cuda or cuda:K, got 'tpu'"),
    ("--batch-size 0", "batch_size: expected at least 1, got 0"),
    ("--strem", "unknown option --strem; did you mean --stream?"),
    ("--out /dev/null/out.csv", "Not a directory"),
    ("--stream", "a cnn sees all bins at once and cannot stream"),
    ("none.h5", "found nothing there"),
    ("run/metrics.jsonl", "begins with b'"),
])  # fmt: skip
def test_a_wrong_option_or_file_is_one_line(tmp_path, file, more, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", neuron="cnn" if more == "--stream" else "gpn")
    argv = more.split() if more.endswith((".h5", ".jsonl")) else [str(file), *more.split()]
    assert predict.main(["run", *argv]) == 2
    assert_one_line(capsys, message, tmp_path)


def test_the_module_is_a_command():
    command = [sys.executable, "-m", "gpn_triton.predict", "nowhere", "none.h5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: run: nowhere is not a run folder: no config.json\n"
