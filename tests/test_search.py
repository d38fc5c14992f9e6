"""The search: what it may choose from, that it goes on where it stopped, and never sees a test."""

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules import module

from gpn_triton import SpikingClassifier, search
from gpn_triton.analysis import search as searching
from gpn_triton.analysis.search import Search
from gpn_triton.analysis.space import DEFAULT, SEARCHABLE, read_searched, read_space
from gpn_triton.analysis.subject import load_data
from gpn_triton.analysis.trials import FAILED, PRUNED, UNFINISHED, rows_of, toml_of
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.parser import configuration, parse
from gpn_triton.training.run import Interrupted
from tests.stores import make_store

pytest.importorskip("matplotlib")
optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# torch's loop needs no compiler
SMALL = {
    "hidden": (6,), "time_bins": 4, "batch_size": 16, "epochs": 2, "device": "cpu",
    "backend": "torch",
}  # fmt: skip
FLAGS = "--hidden 6 --time-bins 4 --batch-size 16 --device cpu --backend torch".split()
SPACE = ("lr=1e-3..1e-1:log", "dropout=0..0.5", "hidden=6,4-3")
AGES = 1e6


@pytest.fixture
def file(tmp_path):
    """A file of 60 samples of two classes that fire in different channels."""
    made = make_store(60, 2, least=20, most=20, end=1.0, empty=False, band=(100, 200))
    write_events(tmp_path / "mine.h5", made)
    return str(tmp_path / "mine.h5")


def opened(file, out, texts=SPACE, **options):
    """A search of a file, with small networks unless the space holds them."""
    free = {text.partition("=")[0] for text in texts}
    given = {name: value for name, value in SMALL.items() if name not in free}
    given |= {"train_file": file, **options}
    splits = load_data(configuration(given), test=False)
    return Search(given, read_space(texts, given), splits, CPU, Path(out))


def outcomes(found):
    """What became of a search's trials, without how long they took."""
    return [dataclasses.replace(row, seconds=None) for row in rows_of(found)]


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


class at_training_step:
    """Calls act once a network has been called in training for the step-th time."""

    def __init__(self, step, act):
        self.left, self.act = step, act

    def _hook(self, called, inputs, output):
        if isinstance(called, SpikingClassifier) and called.training:
            self.left -= 1
            if self.left == 0:
                return self.act(output)

    def __enter__(self):
        self.handle = module.register_module_forward_hook(self._hook)

    def __exit__(self, *_):
        self.handle.remove()


def test_the_default_space_holds_the_defaults_and_only_what_has_an_effect(tmp_path):
    base = TrainConfig()
    space = read_space([], {})
    assert [searched.name for searched in space] == list(DEFAULT) and {*DEFAULT} <= {*SEARCHABLE}
    assert all(searched.text_of(getattr(base, searched.name)) is not None for searched in space)
    # real-valued inputs have neither bins nor channels, and what is given is fixed
    names = {s.name for s in read_space([], {"dataset": "adding", "dropout": 0.1})}
    assert names == {"lr", "batch_size", "weight_decay"}
    # other bins would make another task of these
    names = {s.name for s in read_space([], {"dataset": "recall"})}
    assert "time_bins" not in names and "noise" in names
    # what --config gives is as fixed as a flag
    (tmp_path / "mine.toml").write_text("lr = 0.01\n")
    asked = search.parse(["synthetic", "--budget", "1", "--config", str(tmp_path / "mine.toml")])
    assert {*DEFAULT} - {s.name for s in asked.space} == {"lr"} and asked.given["lr"] == 0.01


def test_ranges_and_lists_are_read_by_the_type_of_the_option():
    rate, sizes = read_searched("lr=1e-4..1e-2:log"), read_searched("hidden = 64, 128-64")
    assert rate.is_range and rate.is_log and list(rate.values.values()) == [1e-4, 1e-2]
    assert sizes.values == {"64": (64,), "128-64": (128, 64)} and not sizes.is_range
    assert sizes.text_of((128, 64)) == "128-64" and sizes.text_of((32,)) is None
    constants = read_searched("time-constants=1e-3-0.5,0.02-1")
    assert list(constants.values.values()) == [(1e-3, 0.5), (0.02, 1.0)]
    bins = read_searched("time_bins")
    assert list(bins.values.values()) == [10, 100] and bins.text_of(101) is None


@pytest.mark.parametrize(("arguments", "message"), [
    ("--budget 0", "budget: expected minutes above 0, got 0"),
    ("--budget inf", "budget: expected minutes above 0, got inf"),
    ("", "the following arguments are required: --budget"),
    ("--budget 1 --trials 0", "trials: expected at least 1"),
    ("--budget 1 --search lrr=1,2", "search: unknown option 'lrr'; did you mean lr?"),
    ("--budget 1 --search seed=1,2", "search: expected an option of Binning, Augmentation"),
    ("--budget 1 --search lr=1e-2..1e-3", "search: lr: expected LOW..HIGH with LOW < HIGH"),
    ("--budget 1 --search lr=1..1", "search: lr: expected two values or more that differ"),
    ("--budget 1 --search lr=0.1", "search: lr: expected two values or more that differ"),
    ("--budget 1 --search lr=0.1,0.10", "search: lr: expected two values or more that differ"),
    ("--budget 1 --search dropout=0..0.5:log", "search: dropout: expected LOW above 0 for :log"),
    ("--budget 1 --search lr=1,2:log", "search: lr: expected LOW..HIGH before :log"),
    ("--budget 1 --search lr=fast,slow", "search: lr: expected float, got fast,slow"),
    ("--budget 1 --search hidden=8..16", "search: hidden: expected a list of values"),
    ("--budget 1 --search hidden", "search: hidden: expected a range or a list"),
    ("--budget 1 --search dropout=0..1", "search: dropout: expected 0 <= value < 1, got 1.0"),
    ("--budget 1 --search neuron=gpn,glif", "search: neuron: expected one of gpn"),
    ("--budget 1 --search lr lr=1,2", "search: lr is named 2 times"),
    ("--budget 1 --search lr --search dropout lr", "search: lr is named 2 times"),
    ("--budget 1 --search lr --lr 0.1", "search: lr is fixed, too"),
    ("--budget 1 --search warmup_epochs=0,5 epochs=5,9", "warmup_epochs=5 and epochs=5: warmup"),
    ("--budget 1 --search alpha=1,2 --neuron lif", "alpha: has no effect beside --neuron lif"),
    ("--budget 1 --quick", "unknown option --quick"),
    ("--budget 1 --resume auto", "unknown option --resume"),
    ("--budget 1 --config out.toml", "out: has no effect in a search: remove it from out.toml"),
])  # fmt: skip
def test_a_mistake_is_answered_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out.toml").write_text('out = "elsewhere"\n')
    assert search.main(["synthetic", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.toml"]


def test_data_that_a_search_cannot_take_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["nothing.h5"], "nothing.h5"),
        (["."], "data: expected one of synthetic"),
        (["recall", "--search", "time_bins=50,100"], "time_bins makes another task of these data"),
    ):
        assert search.main([*arguments, "--budget", "1"]) == 2
        assert message in capsys.readouterr().err


def test_the_command_searches_and_never_opens_the_test_file(file, tmp_path, capsys):
    out = tmp_path / "found"
    # a test file that is not there, so that whoever opens it fails
    command = [file, "--test-file", str(tmp_path / "test.h5"), *FLAGS[2:], "--epochs", "1"]
    command += ["--seed", "3", "--out", str(out), "--search", *SPACE, "--trials", "3"]
    assert search.main([*command, "--budget", "60"]) == 0
    said = capsys.readouterr().out
    assert "test: test.h5, not opened" in said and "trials: 3 finished" in said
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() in said
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    values = [float(row["valid"]) for row in rows]
    assert len(rows) == 3 and values == sorted(values, reverse=True)
    # the file has the best trial's options, and its training the same result
    best = out / f"trial-{int(rows[0]['trial']):04d}"
    cfg = parse(["--config", str(out / "best.toml")])
    trained = json.loads((best / "config.json").read_text())
    assert cfg.to_dict() == {**trained, "config": str(out / "best.toml")}
    assert f"{cfg.lr}" == rows[0]["lr"] and "-".join(map(str, cfg.hidden)) == rows[0]["hidden"]
    line = json.loads((best / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * line["valid_accuracy"] == pytest.approx(values[0])
    # the others' checkpoints are gone
    assert {path.parent for path in out.rglob("checkpoint-*.pt")} == {best}
    # a training with the same options does open the test file, before its first step
    with pytest.raises(FileNotFoundError, match="test.h5"):
        load_data(cfg)
    # once more: all trials are there, and none is trained
    assert search.main([*command, "--budget", "60"]) == 0
    assert capsys.readouterr().out.endswith(said[said.index("| trial") :])


def test_the_data_of_a_search_have_no_test_part(file):
    given = {"train_file": file, **SMALL}
    whole, splits = load_data(configuration(given)), load_data(configuration(given), test=False)
    assert splits.train.fingerprint() == whole.train.fingerprint()
    assert splits.valid.fingerprint() == whole.valid.fingerprint()
    with pytest.raises(RuntimeError, match="loaded without a test part"):
        _ = splits.test


def test_stopped_after_every_epoch_it_comes_to_the_same(file, tmp_path, monkeypatch):
    with opened(file, tmp_path / "whole", SPACE[:2], seed=(1, 2)) as whole:
        assert [trial.number for trial in whole.run(AGES, 2)] == [0, 1]
        expected = outcomes(whole)
    calls, ticks = 0, itertools.count()
    # a second passes whenever the time is read: the budget is over before an epoch is, but not
    # before one is begun, however slow the machine is
    monkeypatch.setattr(searching, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    while calls < 20:
        calls += 1
        with opened(file, tmp_path / "parts", SPACE[:2], seed=(1, 2)) as parts:
            over = list(parts.run(1.5, 2))
            if len(parts.ended()) == 2:
                break
            assert sum(row.outcome == UNFINISHED for row in rows_of(parts)) == 1 - len(over)
    # two epochs of two seeds, of two trials; the last epoch ends a trial
    assert calls == 8 and outcomes(parts) == expected
    # the first trial is of the options as they stand
    first = next(row for row in expected if row.trial == 0)
    assert first.options == {"lr": 1e-3, "dropout": 0.5}


@pytest.mark.parametrize("how", ["killed", "told to stop"])
def test_what_was_stopped_in_an_epoch_goes_on_from_its_checkpoint(how, file, tmp_path):
    def stop(_):
        if how == "killed":
            raise Killed
        os.kill(os.getpid(), signal.SIGTERM)

    with opened(file, tmp_path / "whole") as whole:
        list(whole.run(AGES, 2))
        expected = outcomes(whole)
    steps = -(-len(whole.splits.train) // 16)
    # in the second epoch of the second trial
    error = Killed if how == "killed" else Interrupted
    with at_training_step(3 * steps + 2, stop), pytest.raises(error) as stopped:
        with opened(file, tmp_path / "cut") as cut:
            list(cut.run(AGES, 2))
    if how == "told to stop":
        assert stopped.value.signal == signal.SIGTERM
        assert "the same command goes on" in str(stopped.value)
    begun = []
    with opened(file, tmp_path / "cut") as cut:
        (unfinished,) = [row for row in rows_of(cut) if row.outcome == UNFINISHED]
        assert (unfinished.trial, unfinished.epochs) == (1, 1)
        with at_training_step(steps + 1, lambda _: begun.append("another epoch")):
            list(cut.run(AGES, 2))
        assert outcomes(cut) == expected
    assert not begun


def test_a_trial_behind_the_median_is_pruned_and_a_diverged_one_is_told_why(file, tmp_path):
    with opened(file, tmp_path / "found") as found:
        names = {s.name: s for s in found.space}
        drawn = {"lr": 0.01, "dropout": 0.1, "hidden": "6"}
        distributions = {
            "lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True),
            "dropout": optuna.distributions.FloatDistribution(0, 0.5),
            "hidden": optuna.distributions.CategoricalDistribution(list(names["hidden"].values)),
        }
        # five that nobody can come near to
        for _ in range(5):
            found.study.add_trial(optuna.trial.create_trial(
                params=drawn, distributions=distributions, value=2.0,
                intermediate_values={1: 2.0, 2: 2.0},
            ))  # fmt: skip
        (pruned,) = found.run(AGES, 6)
        row = next(row for row in rows_of(found) if row.trial == pruned.number)
        assert (row.outcome, row.epochs) == (PRUNED, 1) and row.value <= 100
        with at_training_step(1, lambda output: (output[0] * torch.nan, output[1])):
            list(found.run(AGES, 7))
        row = rows_of(found)[-1]
        assert (row.outcome, row.epochs, row.value) == (PRUNED, 0, None)
        assert "not finite" in row.reason or "nan" in row.reason
        assert not list(found.trial_folder(row.trial).glob("checkpoint-*"))

        def full(_):
            raise RuntimeError("CUDA out of memory")

        with at_training_step(1, full):
            list(found.run(AGES, 8))
        row = rows_of(found)[-1]
        assert row.outcome == FAILED and "out of memory" in row.reason


def test_a_folder_of_another_search_is_refused(file, tmp_path, capsys):
    out = tmp_path / "found"
    with opened(file, out):
        # another process may not come in between
        with pytest.raises(ValueError, match="out: another process searches in .*found now"):
            opened(file, out)
    with pytest.raises(ValueError, match="out: .*other options: epochs 2 there, 3 here"):
        opened(file, out, epochs=3)
    with pytest.raises(ValueError, match=r"another space: lr=1e-3..1e-1:log dropout=0..0.5"):
        opened(file, out, [*SPACE[:1], "dropout=0..0.6", SPACE[2]])
    other = make_store(60, 2, least=20, most=20, end=1.0, empty=False, band=(100, 200), seed=1)
    write_events(tmp_path / "other.h5", other)
    with pytest.raises(ValueError, match="out: the data have changed"):
        opened(str(tmp_path / "other.h5"), out)
    with opened(file, out) as same:
        assert rows_of(same) == []
    # a budget that no epoch fits into leaves no best options, and says so
    assert search.main([file, *FLAGS, "--epochs", "2", "--search", "lr", "--budget", "1e-7",
                        "--out", str(tmp_path / "none")]) == 1  # fmt: skip
    assert "no trial has finished: the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "none" / "best.toml").exists()


def test_of_numbers_the_smallest_squared_error_is_the_best(tmp_path, capsys):
    out = tmp_path / "found"
    command = ["adding", "--time-bins", "6", "--samples", "40", *FLAGS[:2], *FLAGS[4:]]
    command += ["--epochs", "1", "--search", "lr", "--trials", "2", "--budget", "60"]
    command += ["--out", str(out)]
    with at_training_step(1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        assert search.main(command) == 128 + signal.SIGTERM
    told = capsys.readouterr()
    assert "trials: 1 unfinished" in told.out and told.err.endswith("same command goes on\n")
    assert search.main(command) == 0
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    first, second = (float(row["error"]) for row in rows)
    assert first < second and first == pytest.approx(float(rows[0]["loss"]))
    assert parse(["--config", str(out / "best.toml")]).lr == float(rows[0]["lr"])
    assert "squared error after 1 epoch " in capsys.readouterr().out


def test_a_trial_whose_validation_is_not_finite_is_no_result(tmp_path):
    given = {**SMALL, "dataset": "adding", "samples": 40, "epochs": 1}
    splits = load_data(configuration(given), test=False)

    def spoil(called, inputs, output):
        if isinstance(called, SpikingClassifier) and not called.training:
            return output[0] * torch.nan, output[1]

    with Search(given, read_space(["lr"], given), splits, CPU, tmp_path / "found") as found:
        handle = module.register_module_forward_hook(spoil)
        try:
            list(found.run(AGES, 1))
        finally:
            handle.remove()
        assert found.best() is None
        (row,) = rows_of(found)
        assert (row.outcome, row.value) == (PRUNED, None) and "error is nan" in row.reason


def test_options_come_back_from_toml(tmp_path):
    given = {
        "train_file": 'a "b"\\ü.h5', "lr": 1e-05, "hidden": (4, 3), "no_graph": True,
        "time_constants": (0.01, 0.5), "seed": (1,), "readout": "last",
    }  # fmt: skip
    (tmp_path / "all.toml").write_text(toml_of(given), encoding="utf-8")
    found = parse(["--config", str(tmp_path / "all.toml")])
    assert found.to_dict() == {**configuration(given).to_dict(), "config": found.config}


def test_optuna_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gpn-triton\[search\]'"):
        searching.load_optuna()


@pytest.mark.slow
def test_a_killed_process_s_search_goes_on(file, tmp_path):
    command = [sys.executable, "-m", "gpn_triton.search", file, *FLAGS, "--epochs", "4000"]
    command += ["--search", "lr", "--budget", "60", "--trials", "1", "--out", "found"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    metrics = tmp_path / "found" / "trial-0000" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 8000):
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = metrics.read_text().splitlines()
    given = {**SMALL, "epochs": 4000, "train_file": file}
    splits = load_data(configuration(given), test=False)
    with Search(given, read_space(["lr"], given), splits, CPU, tmp_path / "found") as found:
        list(found.run(1e-3))
        (row,) = rows_of(found)
    after = metrics.read_text().splitlines()
    # the line of the epoch whose checkpoint was not written yet may be another
    assert row.outcome == UNFINISHED and row.epochs == len(after) - 1 > len(before) - 3
    assert after[1 : len(before) - 1] == before[1:-1]
