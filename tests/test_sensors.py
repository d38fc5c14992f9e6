"""Sensors of other sizes than SHD's ear, made here: trained, predicted, exported and streamed."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_predict import make_run

from gpn_triton import SpikingClassifier, export, predict, train
from gpn_triton.data.events import EventStore
from gpn_triton.data.loader import EventDataset, time_first
from gpn_triton.data.sources.hdf5 import write_events
from gpn_triton.training.run_folder import load_run

DVS = (34, 34, 2)


def moving_bar(samples, seed):
    """A bar that moves to the right or to the left over a DVS: events (x, y, polarity), seconds."""
    rng = np.random.default_rng(seed)
    times, events, labels = [], [], np.arange(samples) % 2
    for label in labels:
        t = np.sort(rng.random(300))
        x = np.floor(34 * (t if label == 0 else 1 - t)).astype(int).clip(0, 33)
        times.append(t)
        events.append(np.stack([x, rng.integers(0, 34, 300), rng.integers(0, 2, 300)], 1))
    return EventStore.from_arrays(
        times, events, labels, class_names=("right", "left"), sensor_size=DVS
    )


def touched_places(samples, seed):
    """16 channels of which a class's four fire."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % 4
    units = [4 * label + rng.integers(0, 4, 25) for label in labels]
    return EventStore.from_arrays(
        rng.random((samples, 25)), units, labels, rng.integers(0, 9, samples), num_channels=16
    )


def unlabelled(store):
    """The same samples, of which nobody says what they are."""
    spans = list(map(slice, store.offsets, store.offsets[1:]))
    return EventStore.from_arrays(
        [store.times[s] for s in spans], [store.units[s] for s in spans],
        num_channels=store.num_channels, sensor_size=store.sensor_size,
    )  # fmt: skip


@pytest.mark.parametrize(("make", "channels", "classes"), [
    (moving_bar, 2 * 34 * 34, ("right", "left")), (touched_places, 16, tuple("0123"))
])  # fmt: skip
def test_a_sensor_is_trained_predicted_exported_and_streamed(
    tmp_path, make, channels, classes, capsys, in_process
):
    write_events(tmp_path / "train.h5", make(60, 0))
    write_events(tmp_path / "test.h5", make(16, 1))
    new = make(12, 2)
    write_events(tmp_path / "new.h5", unlabelled(new))
    command = (
        f"--train-file {tmp_path}/train.h5 --test-file {tmp_path}/test.h5 --out {tmp_path}/runs "
        "--hidden 16 --time-bins 6 --batch-size 8 --epochs 6 --lr 0.02 --dropout 0 --device cpu"
    )
    assert train.main(command.split()) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["test_accuracy"] >= 0.9
    trained = load_run(run)
    assert trained.num_channels == channels and trained.class_names == classes
    assert trained.sensor_size == new.sensor_size
    capsys.readouterr()

    texts = []
    for more in ([], ["--stream"]):
        argv = [str(run), str(tmp_path / "new.h5"), "--out", str(tmp_path / "p.csv"), *more]
        assert predict.main(argv) == 0
        assert capsys.readouterr().out == f"{tmp_path}/p.csv: 12 samples, without labels\n"
        texts.append((tmp_path / "p.csv").read_text())
    assert texts[0] == texts[1]
    _, *rows = csv.reader(io.StringIO(texts[0]))
    assert [row[1] for row in rows] == [classes[label] for label in new.labels]

    export.export(run, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["network"]["inputs"] == about["binning"]["num_channels"] == channels
    assert about.get("sensor_size") == (list(DVS) if make is moving_bar else None)
    model = SpikingClassifier(**about["network"])
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    data = EventDataset(new, about["network"]["time_bins"], about["binning"]["max_time"])
    counts, labels = time_first([data[k] for k in range(12)])
    with torch.no_grad():
        logits, state = model.eval().stream(counts[:2])
        logits, _ = model.stream(counts[2:], state)
    assert torch.equal(logits.argmax(1), labels)


def test_channels_are_said_where_the_file_does_not_and_what_does_not_fit_is_one_line(
    tmp_path, capsys, in_process
):
    write_events(tmp_path / "16.h5", touched_places(40, 0))
    write_events(tmp_path / "2312.h5", moving_bar(8, 0))
    small = f"--hidden 4 --time-bins 3 --epochs 1 --device cpu --out {tmp_path}/runs".split()
    train_on = ["--train-file", str(tmp_path / "16.h5"), *small]
    for more, message in (
        (["--test-file", str(tmp_path / "2312.h5")], "they say 16.h5 16, 2312.h5 2312"),
        (["--channels", "17"], "16.h5: the file says 16 channels, expected 17"),
        (["--channels", "65537"], "channels: expected 1 to 65536, got 65537"),
    ):
        assert train.main([*train_on, *more]) == 2
        assert message in capsys.readouterr().err
    assert train.main(["--channels", "16", *small]) == 2
    assert "channels: has no effect beside --dataset synthetic" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    run = make_run(tmp_path / "run")
    assert predict.main([str(run), str(tmp_path / "2312.h5"), "--out", "-"]) == 2
    assert "2312.h5: the file says 2312 channels, expected 700" in capsys.readouterr().err


@pytest.mark.slow
def test_any_number_of_channels_is_taken_through_every_command(tmp_path, capsys):
    for channels, unit in ((1, 0), (65_536, 65_535)):
        store = EventStore.from_arrays(
            [[0.1, 0.4]] * 12, [[0, unit]] * 12, [0, 1] * 6, num_channels=channels
        )
        write_events(tmp_path / "a.h5", store)
        out = tmp_path / str(channels)
        command = f"--train-file {tmp_path}/a.h5 --hidden 3 --time-bins 2 --epochs 1 --out {out}"
        assert train.main([*command.split(), "--device", "cpu"]) == 0
        (run,) = out.iterdir()
        assert load_run(run).model.inputs[0].weight.shape == (3, channels)
        assert predict.main([str(run), str(tmp_path / "a.h5"), "--out", "-"]) == 0
        assert export.main([str(run)]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 0
