"""The grid: the rate is chosen by validation, cells resume and fail alone, the table compares."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpn_triton import reproduce
from gpn_triton.analysis.grid import Cell, Grid, Outcome
from gpn_triton.analysis.table import interval, rows_of, speakers_table, table
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.run import Interrupted
from tests.stores import make_store

ttest_rel = pytest.importorskip("scipy.stats").ttest_rel
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
# stands for the trainer: leaves what it would leave, by the rate and the seed; LSTMs fail
TRAINER = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[2])
cfg = json.loads((run / "config.json").read_text())
with (run / "starts").open("a") as file:
    file.write("x")
if cfg["neuron"] == "lstm":
    sys.exit("error: no such thing")
if cfg["neuron"] == "gru":
    time.sleep(60)
(run / "metrics.jsonl").write_text("{}\\n" * 3)
(run / "result.json").write_text(json.dumps({
    "valid_accuracy": cfg["lr"], "test_accuracy": 0.5 + cfg["seed"][0] / 10,
    "parameters": 7, "seconds_per_epoch": 2.0, "activity": [0.1, 0.3]}))
"""


def grid(out, neurons, **options):
    file = "some.h5" if "speakers" in options else None
    cfg = TrainConfig(epochs=2, seed=(0, 1, 2), train_file=file)
    return Grid(cfg, neurons, (0.01, 0.1, 0.02), out, command=[sys.executable, "-c", TRAINER],
                **options)  # fmt: skip


def test_the_other_seeds_get_the_rate_of_the_best_validation_and_a_failure_stays_alone(tmp_path):
    made = grid(tmp_path, ["gpn", "lstm"], jobs=3)
    outcomes = made.train()
    done = {cell for cell, outcome in outcomes.items() if outcome.result}
    search = {Cell("gpn", rate, 0) for rate in (0.01, 0.1, 0.02)}
    assert done == search | {Cell("gpn", 0.1, seed) for seed in (1, 2)}
    failed = [outcome.failure for cell, outcome in outcomes.items() if cell.neuron == "lstm"]
    assert failed == ["error: no such thing"] * 3
    # once more: what is finished is not trained again, what failed is
    assert made.train() == outcomes
    starts = {path.parent.name: len(path.read_text()) for path in tmp_path.glob("*/starts")}
    assert starts == {str(cell): 1 if cell in done else 2 for cell in outcomes}
    row, empty = rows_of(made.neurons, outcomes)
    assert (row.lr, row.seeds, row.test) == (0.1, 3, pytest.approx(60))
    assert empty.test is None and "| lstm |" in table([row, empty])


def test_a_folder_of_other_options_is_refused(tmp_path):
    grid(tmp_path, ["gpn"]).train()
    other = Grid(TrainConfig(epochs=3), ["gpn"], (0.01,), tmp_path)
    with pytest.raises(ValueError, match="out: .*other options: epochs 2 there, 3 here"):
        other.train()


def test_a_stopped_grid_ends_its_trainings_and_says_how_to_go_on(tmp_path):
    def stop():
        while not list(tmp_path.glob("*/starts")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted, match="the same command goes on") as stopped:
        grid(tmp_path, ["gru"]).train()
    assert stopped.value.signal == signal.SIGTERM


def outcomes(accuracies):
    """Cells of one rate with these test accuracies, by neuron and seed."""
    return {
        Cell(neuron, 0.1, seed): Outcome({
            "valid_accuracy": 0.5, "test_accuracy": accuracy, "parameters": 1000,
            "seconds_per_epoch": 1.0, "activity": [0.25]})
        for neuron, own in accuracies.items() for seed, accuracy in enumerate(own)
    }  # fmt: skip


def test_neurons_are_compared_with_gpn_seed_by_seed():
    found = outcomes({"gpn": (0.8, 0.9, 0.85), "lif": (0.5, 0.55, 0.52), "lstm": (0.8,)})
    gpn, lif, lstm = rows_of(["gpn", "lif", "lstm"], found)
    assert gpn.difference is None and gpn.test == pytest.approx(85)
    assert lif.difference == pytest.approx(-32.667, abs=1e-3)
    assert lif.p == pytest.approx(ttest_rel((0.5, 0.55, 0.52), (0.8, 0.9, 0.85)).pvalue)
    assert lif.spike_rate == 0.25
    # one pair has no test, an LSTM no spikes
    assert lstm.difference == pytest.approx(0) and lstm.p is None and lstm.spike_rate is None
    assert "85.0 ± 5.0" in table([gpn]) and "-32.7 (0.0" in table([lif])


def test_each_speaker_is_left_out_once_and_the_interval_is_over_speakers(tmp_path):
    made = grid(tmp_path, ["gpn"], speakers=(3, 5, 9))
    outcomes = made.train()
    assert len(outcomes) == 3 * (3 + 2) and all(o.result for o in outcomes.values())
    for cell in outcomes:
        config = json.loads((made.folder(cell) / "config.json").read_text())
        assert config["test_speaker"] == cell.speaker and str(cell).endswith(
            f"-speaker{cell.speaker}"
        )
    (row,) = rows_of(["gpn"], outcomes)
    assert (row.lr, row.seeds, row.test) == (0.1, 3, pytest.approx(60))
    # 50, 60 and 70 % by seed of every speaker: no spread between speakers
    assert "| 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 ± 10.0 | 60.0 (60.0 to 60.0) |" in speakers_table(
        ["gpn"], outcomes
    )
    # the mean of 50, 60, 70 has a standard error of 5.77, and t of 2 degrees is 4.303
    assert interval([50, 60, 70]) == "60.0 (35.2 to 84.8)"


def test_a_grid_starts_as_the_paper_does_unless_a_preset_says_otherwise():
    assert reproduce.parse(["synthetic"]).base.init == "paper"
    assert reproduce.parse(["synthetic", "--init", "quiet"]).base.init == "quiet"
    best = reproduce.parse(["synthetic", "--preset", "best"]).base
    assert (best.init, best.scale, best.channel_shift) == ("quiet", "log", 15)


def test_leaving_speakers_out_trains_on_the_others(tmp_path, capsys):
    write_events(tmp_path / "three.h5", make_store(60, speakers=3))
    write_events(tmp_path / "two.h5", make_store(20, speakers=2))
    protocol = ["--protocol", "leave-one-speaker-out"]
    command = [*protocol, str(tmp_path / "three.h5"), "--neurons", "gpn", "--lr-grid", "0.01"]
    small = ["--hidden", "6", "--time-bins", "4", "--epochs", "1", "--out", str(tmp_path / "grid")]
    assert reproduce.main([*command, *small]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 trainings" in said and "| gpn |" in said
    assert (tmp_path / "grid" / "speakers.md").read_text() in said
    logs = [path.read_text() for path in sorted((tmp_path / "grid").glob("*/log.txt"))]
    assert all(f"all of speaker {who}" in log for who, log in enumerate(logs))
    for arguments, message in (
        ([str(tmp_path / "two.h5")], "protocol: expected at least 3 speakers"),
        (["synthetic"], "protocol: leave-one-speaker-out expects one file"),
    ):
        assert reproduce.main([*protocol, *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing.h5"], "nothing.h5"),
    (["shd", "x.h5"], "data: expected one of synthetic"),
    (["synthetic", "--lr-grid", "0"], "lr-grid: expected more than 0"),
    (["synthetic", "--jobs", "0"], "jobs: expected at least 1"),
    (["synthetic", "--lr", "0.1"], "unknown option --lr; did you mean --lr-grid?"),
    (["synthetic", "--neurons", "izhikevich"], "invalid choice: 'izhikevich'"),
    (["one.h5"], "one.h5: expected samples of at least 2 classes, got 1"),
    (["silent.h5"], "silent.h5: expected events, got"),
])  # fmt: skip
def test_a_mistake_is_answered_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_events(tmp_path / "one.h5", make_store(20, 1))
    write_events(tmp_path / "silent.h5", make_store(20, 2, least=0, most=0))
    assert reproduce.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_the_command_trains_a_grid_and_leaves_its_table(tmp_path):
    for name, samples in (("train", 40), ("test", 20)):
        made = make_store(samples, 2, least=20, most=20, end=1.0, empty=False, band=(100, 200))
        write_events(tmp_path / f"{name}.h5", made)
    command = [
        sys.executable, "-m", "gpn_triton.reproduce", "train.h5", "test.h5", "--quick", "--neurons",
        "gpn", "--epochs", "1", "--seed", "0", "--out", "grid",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    (row,) = csv.DictReader((tmp_path / "grid/table.csv").read_text().splitlines())
    result = json.loads((tmp_path / "grid/gpn-lr0.008-seed0/result.json").read_text())
    assert float(row["test"]) == pytest.approx(100 * result["test_accuracy"])
    assert (tmp_path / "grid/accuracy.png").stat().st_size > 1000
