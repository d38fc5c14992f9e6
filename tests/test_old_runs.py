"""Run folders written by an older program are resumed, evaluated, predicted from and exported."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpn_triton import export, predict, train
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.data.sources.synthetic import synthetic_splits
from gpn_triton.training import options, run_folder

OLD = Path(__file__).parent / "data" / "old_runs"
# that the program has today, as if it had come after these runs; the runs have the defaults
NEWER = ("alpha", "overflow", "track", "lr_batch_size", "clip_grad")


@pytest.fixture
def run(tmp_path, request):
    """A copy of an old run's folder, on one thread, as it was written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Path(shutil.copytree(OLD / request.param, tmp_path / request.param))
    torch.set_num_threads(threads)


def forget(run, names):
    """Make a run one of a program that does not have these options yet."""
    path = run / run_folder.CONFIG
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in names}))
    for path in run.glob(run_folder.CHECKPOINTS):
        state = torch.load(path, weights_only=True)
        for name in names:
            state["computes"].pop(name, None)
        torch.save(state, path)


@pytest.mark.parametrize("names", [(), NEWER], ids=["as it is", "older still"])
@pytest.mark.parametrize("run", ["interrupted"], indirect=True)
def test_an_interrupted_run_goes_on_to_what_it_would_have_become(run, names, capsys):
    forget(run, names)
    assert train.main(["--resume", str(run)]) == 0
    assert "resumed from" in capsys.readouterr().out
    weights = load_file(run / run_folder.WEIGHTS)
    expected = load_file(OLD / "uninterrupted.safetensors")
    # the kernels of today round otherwise than what ran then, and Adam turns the sign of a gradient
    # near 0 into a step of the learning rate, 0.01; 23 steps were left
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0.1)
        assert (weights[name] - tensor).abs().mean() < 0.01


@pytest.mark.parametrize("run", ["interrupted"], indirect=True)
def test_a_run_that_differs_in_an_option_it_does_not_know_is_refused(run, capsys):
    forget(run, ["alpha"])
    values = json.loads((run / run_folder.CONFIG).read_text())
    (run / run_folder.CONFIG).write_text(json.dumps({**values, "alpha": 3.0}))
    assert train.main(["--resume", str(run)]) == 2
    assert "alpha 2.0 there, 3.0 here" in capsys.readouterr().err


@pytest.mark.parametrize("names", [(), NEWER], ids=["as it is", "older still"])
@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_a_finished_run_is_evaluated_predicted_from_and_exported(run, names, tmp_path, capsys):
    forget(run, names)
    result = json.loads((run / run_folder.RESULT).read_text())
    assert train.main(["--resume", str(run)]) == 0
    assert f"{run} is finished" in capsys.readouterr().out
    assert train.main(["--eval-only", str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = f"test accuracy {100 * result['test_accuracy']:.2f} %  loss {result['test_loss']:.4f}"
    assert last.startswith(said)

    test = synthetic_splits(120).test
    trained = run_folder.load_run(run)
    assert trained.class_names == test.class_names
    labels = torch.from_numpy(test.labels)
    loss = torch.nn.functional.cross_entropy(predict.predict(trained, test), labels)
    assert loss.item() == pytest.approx(result["test_loss"], rel=1e-3)
    write_events(tmp_path / "test.h5", test)
    assert predict.main([str(run), str(tmp_path / "test.h5"), "--out", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(test)

    assert export.main([str(run)]) == 0
    weights, old = (
        load_file(run / name) for name in ("export/model.safetensors", "best.safetensors")
    )
    assert all(torch.equal(weights[name], old[name]) for name in old)
    authors = load_file(run / "export" / "authors.safetensors")
    assert authors["sn1.ln.weight"].shape == (24, 12)


def test_an_option_has_the_value_it_had_before_it_existed():
    tempo = options.option("Run", 3, "Sets the tempo.", before=[1])
    later = dataclasses.fields(dataclasses.make_dataclass("Later", [("tempo", "int", tempo)]))
    assert options.completed({"lr": 0.5}, later) == {"lr": 0.5, "tempo": [1]}
    assert options.completed({"tempo": 2}, later) == {"tempo": 2}
