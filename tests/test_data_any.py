"""Data of one's own: from arrays, frames, tonic and tables into a store and a file, and back."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gpn_triton.data.__main__ import main
from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import UNKNOWN, EventStore, sensor_events, sensor_units
from gpn_triton.data.loader import EventDataset, frames, time_first
from gpn_triton.data.sources.hdf5 import (
    common_channels,
    likely_channels,
    read_about,
    read_events,
    write_events,
)
from gpn_triton.data.sources.tables import read_table
from tests.stores import make_store
from tests.test_data_hdf5 import assert_same, write_layout

GUIDE = Path(__file__).parent.parent / "docs" / "data.md"
SIZE = (5, 4, 2)


def dvs(samples=6, seed=0):
    """Events [E, 3] of a sensor of SIZE, x, y and polarity, and their times in microseconds."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, samples)
    return [rng.integers(0, SIZE, (n, 3)) for n in counts], [
        rng.integers(0, 10**6, n) for n in counts
    ]


# into a store


def test_arrays_in_memory_become_a_store_sorted_and_with_names():
    store = EventStore.from_arrays(
        [[0.3, 0.1, 0.1], [], np.float16([0.5])], [[2, 7, 1], [], np.uint8([4])],
        ["no", "yes", "no"], ["zoe", "adam", "zoe"],
    )  # fmt: skip
    np.testing.assert_array_equal(store.times, np.float32([0.1, 0.1, 0.3, 0.5]))
    np.testing.assert_array_equal(store.units, [7, 1, 2, 4])
    np.testing.assert_array_equal(store.offsets, [0, 3, 3, 4])
    assert store.class_names == ("no", "yes") and store.labels.tolist() == [0, 1, 0]
    assert store.speakers.tolist() == [1, 0, 1] and store.num_channels == 8
    numbered = EventStore.from_arrays([[0.1]] * 2, [[0]] * 2, [2, 0], num_channels=65_536)
    assert numbered.class_names == ("0", "1", "2") and numbered.num_channels == 65_536
    named = EventStore.from_arrays([[0.1]], [[0]], ["b"], class_names=["c", "b"])
    assert named.labels.tolist() == [1]


@pytest.mark.parametrize(("change", "message"), [
    ({"units": [[1]]}, "units: expected 2 samples as in times, got 1"),
    ({"units": [[1, 2], [3]]}, r"units: sample 0: expected \[1\], got \[2\]"),
    ({"units": [[1.5], [3]]}, "units: sample 0: expected whole numbers, got float64"),
    ({"units": [[1], [-3]]}, r"units: expected 0\.\.1, got -3\.\.1; sample 1 is the first"),
    ({"units": [[70_000], [3]]}, r"num_channels: expected 1\.\.65536, got 70001"),
    ({"times": [[[0.1]], [0.2]]}, r"times: sample 0: expected \[E\], got \[1, 1\]"),
    ({"times": [[0.1], [np.nan]]}, "times: expected .*nan"),
    ({"times": [[0.1], [1e5]]}, r"times: expected 0\.\.600"),
    ({"labels": [0]}, r"labels: expected \[2\], got \[1\]"),
    ({"labels": [0.0, 1.0]}, "labels: expected whole numbers or names, got float64"),
    ({"labels": ["a", "b"], "class_names": ["a"]}, "labels: expected one of class_names, got 'b'"),
    ({"sensor_size": (2, 2, 2), "num_channels": 9}, "sensor_size: expected .* of 9 channels"),
    ({"units": [[[5, 0, 0]], [[0, 0, 0]]], "sensor_size": SIZE}, r"sample 0: x: expected 0\.\.4"),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        EventStore.from_arrays(**{"times": [[0.1], [0.2]], "units": [[1], [0]], **change})


def test_a_sensors_events_become_units_and_back():
    events = np.stack(np.meshgrid(*map(range, SIZE), indexing="ij"), -1).reshape(-1, 3)
    units = sensor_units(events, SIZE)
    assert sorted(units) == list(range(40)) and units[np.all(events == [1, 0, 0], 1)] == 1
    np.testing.assert_array_equal(sensor_events(units, SIZE), events)
    # an image of the counts has a polarity, a row and a column
    store = EventStore.from_arrays([[0.1]], [[[3, 2, 1]]], sensor_size=SIZE)
    image = frames(store, 1).view(1, 1, 2, 4, 5)
    assert image.sum() == 1 == image[0, 0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(3, 7, 6), (2, 5, 2, 4, 3)])
def test_frames_become_a_store_and_the_same_frames_again(shape):
    counts = np.random.default_rng(0).poisson(0.4, shape)
    store = EventStore.from_frames(counts, 0.02, labels=["a", "b", "a"][: shape[0]])
    assert store.sensor_size == (None if len(shape) == 3 else (3, 4, 2))
    back = frames(store, shape[1], 0.02 * shape[1])
    np.testing.assert_array_equal(back.numpy().reshape(shape), counts)
    for wrong, message in (
        (counts - 1, "whole numbers, 0 or more"), (counts + 0.5, "whole"), (counts[0], r"\[S, T"),
    ):  # fmt: skip
        if wrong.ndim == counts.ndim or counts.ndim == 3:
            with pytest.raises(ValueError, match=f"counts: .*{message}"):
                EventStore.from_frames(wrong, 0.02)


def test_datasets_of_tonics_become_stores_in_seconds():
    kinds = [("t", "i8"), ("x", "i2"), ("y", "i2"), ("p", "i1")]
    places, times = dvs()
    records = []
    for place, t in zip(places, times, strict=True):
        events = np.zeros(len(t), kinds)
        events["t"], events["x"], events["y"] = t, place[:, 0], place[:, 1]
        # some sets have -1 for 0
        events["p"] = 2 * place[:, 2] - 1
        records.append(events)

    class Images(list):
        sensor_size, classes = SIZE, ["left", "right"]

    store = EventStore.from_tonic(Images(zip(records, [1, 0] * 3, strict=True)))
    expected = EventStore.from_arrays(
        [t / 1e6 for t in times], places, [1, 0] * 3, class_names=["left", "right"],
        sensor_size=SIZE,
    )  # fmt: skip
    assert_same(store, expected)

    class Sounds(list):
        sensor_size, speaker = (700, 1, 1), np.array([4, 9])

    sound = np.array([(10, 699, 1), (5, 3, 1)], [("t", "f8"), ("x", "i4"), ("p", "i4")])
    store = EventStore.from_tonic(Sounds([(sound, 0), (sound[:0], 2)]))
    assert store.num_channels == 700 and store.sensor_size is None and len(store) == 2
    assert store.units.tolist() == [3, 699] and store.speakers.tolist() == [4, 9]
    with pytest.raises(ValueError, match="dataset: expected the attribute sensor_size"):
        EventStore.from_tonic([])


# to a file and back


@pytest.mark.parametrize("labelled", [True, False])
def test_a_file_keeps_channels_sensor_and_whether_there_are_labels(tmp_path, in_process, labelled):
    places, times = dvs()
    labels = [0, 1] * 3 if labelled else None
    store = EventStore.from_arrays([t / 1e6 for t in times], places, labels, sensor_size=SIZE)
    assert store.labelled == labelled and ("no labels" in store.summary()) != labelled
    write_events(tmp_path / "a.h5", store)
    for _ in range(2):  # parsed, and from the cache
        assert_same(read_events(tmp_path / "a.h5", labelled=labelled), store)
    about = read_about(tmp_path / "a.h5")
    assert about.num_channels == 40 and about.sensor_size == SIZE
    if not labelled:
        assert (store.labels == UNKNOWN).all()
        with pytest.raises(ValueError, match="a.h5: expected a dataset labels"):
            read_events(tmp_path / "a.h5")


@pytest.mark.parametrize(("largest", "channels"), [
    (0, 1), (15, 16), (349, 350), (350, 700), (655, 700), (699, 700), (700, 701), (65_535, 65_536)
])  # fmt: skip
def test_a_file_that_does_not_say_has_the_channels_of_its_units_or_of_shd(
    tmp_path, largest, channels
):
    assert likely_channels(largest) == channels
    if largest in (15, 65_535):
        path = write_layout(tmp_path / "a.h5", units=[[0, largest, 1], [0], []])
        assert read_events(path).num_channels == channels
        assert read_about(path, largest_unit=True).largest_unit == largest


def test_files_of_one_set_have_the_channels_that_one_says_or_the_most(tmp_path, in_process):
    silent = write_layout(tmp_path / "silent.h5")
    said, other = (
        write_layout(tmp_path / f"{n}.h5", attributes={"num_channels": n}) for n in (800, 900)
    )
    assert common_channels({silent: 14, said: 14}) == 14
    assert (
        common_channels({silent: 700, said: 800})
        == 800
        == common_channels({silent: 999, said: 800})
    )
    assert common_channels({silent: 14, tmp_path / "silent.h5": 16}) == 16
    with pytest.raises(ValueError, match="they say 800.h5 800, 900.h5 900"):
        common_channels({said: 800, other: 900, silent: 700})


# out of a store


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_counts_that_training_sees(workers):
    store = make_store(10, channels=30)
    data = EventDataset(store, 6, 1.1, channel_bin=2, overflow="clip", scale="log")
    loader = DataLoader(data, 4, num_workers=workers, collate_fn=time_first)
    got = list(loader)
    everything = torch.cat([counts for counts, _ in got], 1)
    config = BinningConfig(6, 1.1, 2, "clip", scale="log")
    expected = bin_batch(store.on("cpu"), torch.arange(10), config, backend="torch")
    assert torch.equal(everything, expected) and everything.shape == (6, 10, 15)
    assert torch.cat([labels for _, labels in got]).tolist() == store.labels.tolist()
    counts, label = data[-1]
    assert torch.equal(counts, expected[:, 9]) and label == store.labels[9]
    with pytest.raises(IndexError, match="one of 10 samples, got 10"):
        data[10]


# tables and the command


def write_csv(path, places, times):
    lines = ["sample,time,x,y,polarity,label,speaker"]
    for k, (place, t) in enumerate(zip(places, times, strict=True)):
        lines += [
            f"{k},{at},{x},{y},{p},{'no' if k % 2 else 'yes'},{k // 2}"
            for (x, y, p), at in zip(place.tolist(), t.tolist(), strict=True)
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tables_frames_and_files_in_other_units_are_converted(tmp_path, capsys, in_process):
    places, times = dvs(seed=3)
    assert min(map(len, times)) > 0
    expected = EventStore.from_arrays(
        [t / 1e6 for t in times], places, ["yes", "no"] * 3, [0, 0, 1, 1, 2, 2], sensor_size=SIZE
    )
    out = tmp_path / "out.h5"
    write_csv(tmp_path / "a.csv", places, times)
    argv = ["convert", str(tmp_path / "a.csv"), str(out), "--time-unit", "us"]
    assert main([*argv, "--sensor-size", *map(str, SIZE)]) == 0
    assert "6 samples, 2 classes, 3 speakers, 40 channels (5 x 4 x 2)" in capsys.readouterr().out
    assert_same(read_events(out, use_cache=False), expected)
    # frames
    counts = np.random.default_rng(0).poisson(0.4, (3, 7, 6))
    np.savez(tmp_path / "a.npz", counts=counts, labels=[0, 1, 0])
    assert main(["convert", str(tmp_path / "a.npz"), str(out), "--bin-seconds", "0.1"]) == 0
    np.testing.assert_array_equal(frames(read_events(out, use_cache=False), 7, 0.7), counts)
    # arrays of events, in milliseconds
    np.savez(tmp_path / "b.npz", sample=[1, 0, 1], time=[100, 5, 50], unit=[3, 0, 1])
    store = read_table(tmp_path / "b.npz", time_unit="ms", num_channels=9)
    assert store.times.tolist() == np.float32([0.005, 0.05, 0.1]).tolist() and not store.labelled
    # SHD's layout whose times are no seconds, with an empty sample
    path = write_layout(tmp_path / "c.h5", [[100.0, 250.0, 1300.0], [5.0], []], t="f4")
    assert main(["convert", str(path), str(out), "--time-unit", "ms", "--channels", "700"]) == 0
    store = read_events(out, use_cache=False)
    assert store.offsets.tolist() == [0, 3, 4, 4] and store.times.max() == np.float32(1.3)


@pytest.mark.parametrize(("text", "more", "message"), [
    ("sample,time\n0,1\n", "", "expected a column unit, got sample, time"),
    ("sample,time,unit\n", "", "expected a head line and events, got 1 lines"),
    ("sample,time,unit\n0,1\n", "", "line 2: expected 3 columns, got 2"),
    ("sample,time,unit\n0,a,1\n", "", "time: could not convert string to float: 'a'"),
    ("sample,time,unit,label\n0,1,1,a\n0,2,1,b\n", "", "one in all lines of sample 0, got 'a' and"),
    ("sample,time,unit\n0,1,9\n", "--channels 4", r"units: expected 0..3, got 9"),
    ("sample,time,unit\n0,1,9\n", "--bin-seconds 1", "bin_seconds: expected beside counts"),
    ("sample,time,unit\n0,1,9\n", "--time-unti ms", "unknown option --time-unti"),
])  # fmt: skip
def test_a_table_that_does_not_fit_is_one_line_and_nothing_is_written(
    tmp_path, text, more, message, capsys
):
    (tmp_path / "a.csv").write_text(text)
    argv = ["convert", str(tmp_path / "a.csv"), str(tmp_path / "out.h5"), *more.split()]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out.h5").exists()


def test_info_tells_what_is_in_a_file_and_check_all_that_is_wrong(tmp_path, capsys, in_process):
    path = tmp_path / "a.h5"
    write_events(path, make_store(channels=16))
    assert main(["info", str(path)]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["samples"] == "12, 3 classes, 4 speakers"
    assert told["classes"] == "word 0: 4, word 1: 4, word 2: 4"
    assert told["channels"] == "16 (as the file says)"
    assert main(["check", str(path), "--max-time", "1.3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["note: 1 samples have no event", f"{path}: nothing wrong"]
    assert main(["check", str(path), "--channels", "17"]) == 1
    assert "wrong: num_channels: expected 17, the file says 16" in capsys.readouterr().out
    # several mistakes at once
    write_layout(
        path, [[0.3, 0.1, -1.0], [900.0], []], [[5, 99, 0], [7], []], [0, 1, 5], t="f4",
        keys=[b"a", b"b"], attributes={"num_channels": 50},
    )  # fmt: skip
    assert main(["check", str(path)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("wrong: ")]
    assert last == f"{path}: 3 wrong" and len(wrong) == 3
    assert wrong[0].startswith("wrong: labels: expected 0..1") and "samples (2)" in wrong[0]
    assert wrong[1].startswith("wrong: spikes/units: expected 0..49") and "samples (0)" in wrong[1]
    assert "2 values of 2 samples (0, 1)" in wrong[2]
    assert any("look like ms" in line for line in lines)
    path.write_text("no HDF5")
    assert main(["check", str(path)]) == 1 and main(["info", str(path)]) == 2


def test_the_layout_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "spikes/units    [S] rows" in text and "num_channels" in text


def test_the_guides_code_runs_as_it_stands(tmp_path, monkeypatch, capsys, in_process):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out == "torch.Size([50, 2, 16])\n"
    assert names["store"].sensor_size == (34, 34, 2)
