"""What people who use the commands came upon: Ctrl-C, options without effect, files that differ."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gpn_triton import predict, train
from gpn_triton.data import datasets
from gpn_triton.data.sources.hdf5 import read_events, write_events
from gpn_triton.machine import device, files
from gpn_triton.training import experiment, run, run_folder, trackers
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.parser import parse
from tests.stores import make_store, store_of

ROOT = Path(__file__).parent.parent
SMALL = "--hidden 4 --time-bins 4 --batch-size 8 --device cpu --epochs 2".split()


OWN = ["--train-file", "train.h5", "--test-file", "test.h5"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with train.h5 and test.h5 of three classes."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def write_files(folder):
    for seed, part in enumerate(("train", "test")):
        write_events(folder / f"{part}.h5", make_store(30, empty=False, seed=seed))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder as `here`, and in it a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    write_files(folder)
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(folder)
        assert train.main([*OWN, *SMALL]) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of the finished run, beside its files; its path from there."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (folder,) = Path("runs").iterdir()
    return folder


def error_of(argv, capsys, main=train.main, status=2):
    """The one line with which a command ends."""
    capsys.readouterr()
    assert main(argv) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


# what is asked for by name has an effect


@pytest.mark.parametrize(
    ("argv", "ignored"),
    [
        ("--neuron gru --backend triton", "backend"),
        ("--neuron lstm --surrogate atan", "surrogate"),
        ("--neuron cnn --alpha 3", "alpha"),
        ("--neuron plif --checkpoint-every 4", "checkpoint_every"),
        ("--train-file a.h5 --samples 9", "samples"),
        ("--dataset a.h5 --classes 20", "classes"),
        ("--train-file a.h5 --download", "download"),
        ("--download", "download"),
        ("--preset shd-small --samples 10", "samples"),
        ("--neuron lif --backend triton", None),
        ("--neuron gpn-no-i --backend triton --alpha 3 --surrogate atan", None),
        ("--samples 9 --classes 3", None),
        ("--preset ssc-small --download", None),
        ("--train-file a.h5", None),
    ],
)
def test_an_option_without_effect_is_refused_when_given(argv, ignored, tmp_path):
    flags = argv.split()
    if ignored is None:
        assert isinstance(parse(flags), TrainConfig)
        return
    message = f"{ignored}: has no effect beside .*: remove --{ignored.replace('_', '-')}"
    with pytest.raises(ValueError, match=message):
        parse(flags)
    # a run that holds all options is taken up all the same
    run_folder.write_json(
        tmp_path / "config.json",
        TrainConfig(neuron="gru", backend="triton", train_file="a.h5", download=True).to_dict(),
    )
    assert parse(["--resume", str(tmp_path)]).neuron == "gru"


def test_options_without_effect_are_refused_in_a_file_too(tmp_path):
    (tmp_path / "a.toml").write_text('neuron = "lif"\nalpha = 3.0\n')
    with pytest.raises(ValueError, match="alpha: has no effect beside --neuron lif"):
        parse(["--config", str(tmp_path / "a.toml")])


@pytest.mark.parametrize(
    ("argv", "shift"),
    [
        ("", 10), ("--dataset shd", 10), ("--train-file a.h5", 0), ("--dataset a.h5", 0),
        ("--train-file a.h5 --channel-shift 10", 10), ("--preset shd-small", 0),
        ("--preset shd-small --channel-shift 3", 3), ("--resume old", 10),
        ("--preset best --train-file a.h5", 15),
    ],
)  # fmt: skip
def test_channels_are_shifted_where_they_are_places_on_a_membrane(argv, shift, here):
    (here / "old").mkdir()
    old = TrainConfig(train_file="train.h5", channel_shift=10).to_dict()
    run_folder.write_json(here / "old" / "config.json", old)
    assert parse(argv.split()).channel_shift == shift


def test_a_run_says_by_how_much_channels_are_shifted(trained, capsys):
    shutil.rmtree("runs")
    for more, said in (
        ([], "not shifted"),
        (["--channel-shift", "3"], "shifted by up to 3 channels"),
    ):
        assert train.main([*OWN, *SMALL, *more]) == 0
        line = f"training samples are {said} (--channel-shift)\n"
        assert line in capsys.readouterr().out


# Ctrl-C


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("place", "seeds", "said"),
    [
        # the data are read; the folder is being made; it was made; a checkpoint was written
        ((datasets.DataSource, "files"), ["0"], "nothing was begun"),
        ((run_folder, "write_json"), ["0"], "nothing was begun"),
        ((run, "build_network"), ["0"], "nothing was begun"),
        ((run, "build_network"), ["0", "1"], "nothing was begun"),
        ((run.Run, "train"), ["0"], "--resume {run} begins anew, nothing was saved yet"),
        ((run, "draw_curves"), ["0", "1"], "--resume {run} goes on from the last checkpoint"),
    ],
)
def test_an_interrupted_command_says_what_can_be_gone_on_with(
    place, seeds, said, here, capsys, monkeypatch
):
    with monkeypatch.context() as replaced:
        replaced.setattr(*place, interrupt)
        line = error_of([*OWN, *SMALL, "--seed", *seeds], capsys, status=130)
    left = list(here.glob("runs/*"))
    assert line == "stopped at once: " + said.format(run="".join(f"runs/{p.name}" for p in left))
    assert bool(left) == ("{run}" in said)
    assert not [p for p in here.rglob(".*")]
    if left:
        assert train.main(["--resume", f"runs/{left[0].name}"]) == 0


@pytest.mark.parametrize("command", ["train", "predict", "export"])
def test_an_interruption_while_a_command_imports_is_one_line(command, tmp_path):
    # torch's place is taken by a module that waits for the signal
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-m", f"gpn_triton.{command}"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout.readline() == "importing\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=30)[1] == "stopped while starting: nothing was begun\n"
    assert started.returncode == 130


def test_an_interrupted_prediction_leaves_nothing(trained, capsys, monkeypatch):
    monkeypatch.setattr(predict, "predict", interrupt)
    line = error_of([str(trained), "test.h5"], capsys, predict.main, 130)
    assert line == "stopped at once: nothing was written"
    assert not Path("predictions.csv").exists()


# runs


def test_a_tracker_that_is_missing_is_refused_before_there_is_a_folder(here, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    line = error_of([*OWN, *SMALL, "--track", "wandb"], capsys)
    assert line.startswith("error: track: wandb is not installed: pip install")
    assert not Path("runs").exists()


def test_eval_only_auto_takes_the_newest_finished_run(trained, capsys):
    shutil.copytree(trained, "runs/unfinished")
    Path("runs/unfinished/result.json").unlink()
    shutil.copytree(trained, "runs/newer")
    os.utime("runs/newer/config.json", (2**31, 2**31))
    assert train.main(["--eval-only", "auto"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("  runs/newer")
    line = error_of(["--eval-only", "auto", "--out", "none"], capsys)
    assert line == "error: eval_only: no finished run under none"


# files


def _broken(path):
    """A labels dataset of another type."""
    with h5py.File(path, "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros(30, np.float32)


def _renamed(path):
    write_events(path, dataclasses.replace(read_events(path), class_names=("word 0", "b", "c")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_broken, "test.h5: labels: expected whole numbers, got float32"),
        (_renamed, "expected the training data's 'word 1' as class 1, got 'b' of 3"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "test.h5: expected a readable"),
    ],
)
def test_a_test_file_that_does_not_fit_is_found_before_the_first_step(spoil, message, here, capsys):
    spoil(here / "test.h5")
    assert message in error_of([*OWN, *SMALL], capsys)
    assert not Path("runs").exists()


def test_an_unfinished_run_may_be_given_another_test_file(trained, capsys):
    config = json.loads((trained / "config.json").read_text())
    more = ["--resume", str(trained), "--test-file", "other.h5"]
    write_events("other.h5", make_store(21, empty=False, seed=5))
    assert f"test_file: {trained} was tested already" in error_of(more, capsys)
    (trained / "result.json").unlink()
    Path("test.h5").write_bytes(b"")
    assert "test.h5: expected an HDF5 file" in error_of(more[:2], capsys)
    assert train.main(more) == 0
    assert json.loads((trained / "config.json").read_text()) == {**config, "test_file": "other.h5"}
    assert train.main(["--eval-only", str(trained)]) == 0
    synthetic_run = TrainConfig().to_dict()
    run_folder.write_json(trained / "config.json", synthetic_run)
    assert "test_file: expected a run of --train-file" in error_of(more, capsys)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (OWN, ()),
        (["--train-file", "train.h5", "--test-file", "./train.h5"], [("train", "test")]),
        ([*OWN, "--valid-file", "test.h5"], [("valid", "test")]),
    ],
)
def test_one_file_for_two_parts_is_said(options, parts, here):
    source = {
        k.removeprefix("--").replace("-", "_"): v
        for k, v in zip(options[::2], options[1::2], strict=True)
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        datasets.load_splits(datasets.DataSource(**source))
    said = [str(w.message).split(":")[0] for w in caught]
    assert said == [f"{source['test_file']} holds the {a} and the {b} data" for a, b in parts]


def _at(k, value):
    """The files' samples with one time of sample k replaced."""
    store = make_store(30, empty=False)
    store.times[store.offsets[k + 1] - 1] = value
    return store


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (store_of(([0.1], [1])), "no test part can be held out: .* --test-file"),
        (make_store(2, 2, None), "no test part can be held out: .* --test-file"),
        (_at(7, np.nan), "spikes/times: .* got nan..nan; sample 7 is the first to mend or leave"),
        (_at(8, 1e6), "spikes/times: expected 0..600.0 seconds, .* sample 8 is the first"),
    ],
)
def test_data_that_cannot_be_used_are_named_with_what_to_do(
    store, message, here, capsys, monkeypatch
):
    monkeypatch.setattr(type(store), "validate", lambda self, name: self)
    write_events("train.h5", store)
    line = error_of([*OWN[:2], *SMALL], capsys)
    assert line.startswith("error: train.h5: ")
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("names", "labels", "said"),
    [
        (("word 0", "word 1", "word 2"), None, "{agree} % as the file labels them"),
        # by name, whatever the order
        (("word 2", "word 0", "word 1"), [1, 2, 0], "{agree} % as the file labels them"),
        (("0", "1", "2"), None, "{agree} % as the file labels them"),
        (("word 0", "b", "c"), None, "labels not compared: extra/keys: the run has 'word 1' as"),
        (("word 0", "word 1", "word 2", "d"), None, "the run has no class 3, got 'd' of 4"),
        (("0", "1", "2", "3"), [0, 1, 3], "the run has 3 classes, a label is 3"),
    ],
)
def test_predictions_are_compared_with_labels_by_the_classes_names(
    names, labels, said, trained, capsys
):
    assert predict.main([str(trained), "test.h5"]) == 0
    agree = capsys.readouterr().out.split(" samples, ")[1].split(" %")[0]
    before = Path("predictions.csv").read_text()
    store = make_store(30, empty=False, seed=1)
    if labels:
        store = dataclasses.replace(store, labels=np.array(labels)[store.labels])
    write_events("test.h5", dataclasses.replace(store, class_names=names))
    assert predict.main([str(trained), "test.h5"]) == 0
    printed = capsys.readouterr().out
    assert said.format(agree=agree) in printed and ("%" in printed) == ("%" in said)
    assert Path("predictions.csv").read_text() == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.csv", "No such file or directory: 'none/x.csv'"),
        ("train.h5/x.csv", "Not a directory: 'train.h5/x.csv'"),
        ("runs", "Is a directory: 'runs'"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_before_the_work(out, message, trained, capsys):
    argv = [str(trained), "none.h5", "--out", out]
    assert message in error_of(argv, capsys, predict.main)


def test_a_failed_write_names_the_file_and_not_its_temporary_name(tmp_path):
    def full(file):
        raise OSError(28, "No space left on device", file.name)

    for path, write in ((tmp_path / "a", full), (tmp_path / "none" / "a", full)):
        with pytest.raises(OSError) as error:
            files.write_atomically(path, write)
        assert error.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_threads_that_wait_for_each_other_are_said(here, capsys, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert device.thread_slowdown(rounds=1) > 0 and torch.get_num_threads() == 2
        for slowdown, said in ((6.0, True), (0.6, False)):
            monkeypatch.setattr(experiment, "thread_slowdown", lambda s=slowdown: s)
            assert train.main([*OWN, *SMALL]) == 0
            assert ("2 threads take 6.0 times as long" in capsys.readouterr().out) == said
    finally:
        torch.set_num_threads(threads)
