"""The examples run as they stand, smaller."""

import difflib
import importlib.util
from pathlib import Path

import pytest
import torch

from gpn_triton import SpikingClassifier
from tests.test_sensors import touched_places

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_lstm_becomes_gpn_in_three_lines_with_the_same_shapes():
    files = [(EXAMPLES / f"tagger_{name}.py").read_text().splitlines() for name in ("lstm", "gpn")]
    changes = [line for line in difflib.ndiff(*files) if line[0] in "+-" and line[1:].strip()]
    assert [line[0] for line in changes] == ["+", "-", "+", "-", "+"]
    lstm, gpn = (example(f"tagger_{name}") for name in ("lstm", "gpn"))
    sentences, tags = lstm.make_sentences(7)
    assert len({len(s) for s in sentences}) > 2 and all(map(len, tags))
    torch.manual_seed(0)
    shapes = [[t.shape for t in module.Tagger()(sentences)] for module in (lstm, gpn)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 3


def test_the_tagger_of_gpn_learns():
    # a network that knows nothing has 60 % right
    assert example("tagger_gpn").train(steps=60) > 0.85


def test_a_plain_loop_learns_and_keeps_its_network(tmp_path):
    store = touched_places(120, 0)
    assert example("plain_loop").train(store, epochs=4, lr=0.02, folder=tmp_path / "kept") > 0.8
    assert SpikingClassifier.from_pretrained(tmp_path / "kept").hidden == (128,)


def test_a_lightning_module_of_ten_lines_learns(tmp_path):
    pytest.importorskip("lightning", reason="needs the extra lightning")
    module = example("lightning_module")
    lines = (EXAMPLES / "lightning_module.py").read_text().partition("class Classifier")[2]
    body = [line for line in lines.partition("\n\n\n")[0].splitlines() if line.strip()]
    assert len(body) <= 10
    store = touched_places(120, 0)
    quietly = dict(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trained = module.train(store, 6, **quietly)
    counts, labels = module.time_first([module.EventDataset(store, 25)[k] for k in range(40)])
    found = trained.network.eval()(counts)[0].argmax(1)
    assert (found == labels).float().mean() > 0.8
