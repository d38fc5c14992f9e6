"""Files in SHD's layout: what is legal, what is an error, and the cache."""

import contextlib
import dataclasses
import errno
import io
import os
import sys
import time

import h5py
import numpy as np
import pytest

from gpn_triton.data.events import unsorted_samples
from gpn_triton.data.sources import hdf5, hdf5_reader
from gpn_triton.data.sources.hdf5 import read_events, write_events
from tests.stores import make_store, store_of

TIMES = [[0.1, 0.2, 0.3], [0.05], []]
UNITS = [[5, 699, 0], [7], []]


def write_layout(
    path, times=TIMES, units=UNITS, labels=(0, 1, 1), t="f2", u="u2", y="u2", attributes=(), **extra
):  # fmt: skip
    """A file written by h5py alone, as its makers do, with times of type t, units of u and labels
    of y; what is None is left out."""
    with h5py.File(path, "w") as file:
        for name, rows, dtype in (("times", times, t), ("units", units, u)):
            if rows is not None:
                type_ = h5py.vlen_dtype(np.dtype(dtype))
                data = file.create_dataset(f"spikes/{name}", (len(rows),), dtype=type_)
                for k, row in enumerate(rows):
                    data[k] = np.array(row, dtype)
        if labels is not None:
            file["labels"] = np.array(labels, y)
        file.attrs.update(attributes)
        for name, value in extra.items():
            file[f"extra/{name}"] = value
    return path


def assert_same(a, b):
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(one, other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


# legal


def test_the_published_layout_is_read(tmp_path, in_process):
    speaker, keys = np.array([4, 4, 9], np.uint16), np.array([b"null", "fünf".encode()])
    store = read_events(write_layout(tmp_path / "a.h5", speaker=speaker, keys=keys))
    assert store.times.dtype == np.float32 and store.units.dtype == np.uint16
    np.testing.assert_array_equal(store.times, np.float16([0.1, 0.2, 0.3, 0.05]).astype("f4"))
    np.testing.assert_array_equal(store.units, [5, 699, 0, 7])
    np.testing.assert_array_equal(store.offsets, [0, 3, 4, 4])
    np.testing.assert_array_equal(store.speakers, speaker)
    assert store.class_names == ("null", "fünf")


@pytest.mark.filterwarnings("ignore:.*no sample")
@pytest.mark.parametrize("t, u", [("f2", "i4"), ("f4", "u2"), ("f8", "i8"), ("f2", "u8")])
def test_any_number_type_and_order_is_read_and_what_has_no_name_is_numbered(
    tmp_path, in_process, t, u
):
    path = write_layout(
        tmp_path / "a.h5", [[0.3, 0.1, 0.2, 0.1], [0.5], []], [[3, 1, 2, 11], [699], []],
        [0, 3, 3], t, u, ">i8", speaker=[b"zoe", b"adam", b"zoe"],
    )  # fmt: skip
    store = read_events(path)
    times = np.array([0.1, 0.1, 0.2, 0.3, 0.5], t).astype(np.float32)
    np.testing.assert_array_equal(store.times, times)
    np.testing.assert_array_equal(store.units, [1, 11, 2, 3, 699])
    assert store.class_names == ("0", "1", "2", "3")
    np.testing.assert_array_equal(store.speakers, [1, 0, 1])


@pytest.mark.parametrize("events", [3, 0])
def test_samples_that_were_never_written_are_empty(tmp_path, in_process, events):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, dtype in (("times", np.float16), ("units", np.uint16)):
            data = file.create_dataset(f"spikes/{name}", (3,), h5py.vlen_dtype(dtype))
            data[1] = np.arange(events).astype(dtype)
        file["labels"] = np.zeros(3, int)
    store = read_events(tmp_path / "a.h5")
    np.testing.assert_array_equal(store.offsets, [0, 0, events, events])
    assert f"{events // 3} events a sample" in store.summary()


def test_a_class_without_samples_is_legal_with_a_warning(tmp_path, in_process):
    path = write_layout(tmp_path / "a.h5", labels=[0, 2, 2], keys=[b"a", b"b", b"c", b"d"])
    for _ in range(2):  # parsed, and from the cache
        with pytest.warns(UserWarning, match="a.h5: 2 classes have no sample: b, d"):
            assert read_events(path).class_names == ("a", "b", "c", "d")


# errors: one line that names the file, what was expected and what came

BAD = {
    "no spikes": (dict(times=None, units=None), "expected a dataset spikes/times, got a file with"),
    "no units": (dict(units=None), "expected a dataset spikes/units"),
    "no labels": (dict(labels=None), "expected a dataset labels"),
    "another byte order": (dict(t=">f4"), "times: expected this machine's byte order"),
    "no samples": (dict(times=[], units=[], labels=[]), "at least one sample, got none"),
    "whole-number times": (dict(t="i4"), "spikes/times: expected floating-.*, got int32"),
    "fractional units": (dict(u="f4"), "spikes/units: expected whole num.*, got float32"),
    "fractional labels": (dict(y="f4"), "labels: expected whole numbers, got float32"),
    "labels of words": (dict(labels=[b"a"] * 3, y="S1"), "labels: expected whole"),
    "two labels a sample": (dict(labels=[[0, 1]] * 3), r"labels: .* got shape \(3, 2\)"),
    "a label too many": (dict(labels=[0] * 4), r"spikes/times: expected 4 samples.*\(3,\)"),
    "a row too few": (dict(units=UNITS[:2]), r"spikes/units: expected 3 samples.*\(2,\)"),
    "rows of other lengths": (dict(units=[[1, 2, 3], [7, 7], []]), "1 has 2 units and 1 times"),
    "a unit too high": (
        dict(units=[[5, 700, 0], [7], []], attributes={"num_channels": 700}),
        r"spikes/units: expected 0\.\.699",
    ),
    "another number of channels": (dict(attributes={"num_channels": 701}), "says 701 .* 700"),
    "no number of channels": (dict(attributes={"num_channels": 0}), "num_channels: .* got 0"),
    "too many channels": (dict(attributes={"num_channels": 65537}), "to 65536, got 65537"),
    "a sensor of other channels": (
        dict(attributes={"num_channels": 700, "sensor_size": [35, 10, 1]}),
        r"sensor_size: expected the product 700.* got \[35, 10, 1\]",
    ),
    "a flat sensor": (dict(attributes={"sensor_size": [35, 20]}), "sensor_size: expected a width"),
    "a unit below 0": (dict(units=[[5, -1, 0], [7], []], u="i2"), r"units.*got -1\.\."),
    "a huge unit": (dict(units=[[2**40, 1, 0], [7], []], u="i8"), "units.*1099511627776"),
    "a label below 0": (dict(labels=[0, -1, 1], y="i4"), r"labels: .*got -1\.\.1"),
    "a label without a name": (dict(keys=[b"a"]), r"labels: expected 0\.\.0, got 0\.\.1"),
    "a huge label": (dict(labels=[0, 1, 2**40], y="i8"), r"labels: expected 0\.\.65535"),
    "a negative time": (dict(times=[[-0.1, 0.2, 0.3], [0], []]), "spikes/times: .* seconds, got -"),
    "a time that is no number": (dict(times=[[0.1, np.nan, 0.3], [0], []]), "times: .*nan"),
    "an infinite time": (dict(times=[[0.1, np.inf, 0.3], [0], []]), "times: .*inf"),
    "times in ms": (dict(times=[[100, 250, 1300], [0], []]), r"expected 0\.\.600.0 seconds.*1300"),
    "speakers of other samples": (dict(speaker=[1, 2]), r"extra/speaker: expected 3 samples"),
    "names in a table": (dict(keys=[[b"a", b"b"]]), "extra/keys: expected one name a class"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, in_process, case):
    contents, expected = BAD[case]
    path = write_layout(tmp_path / "bad.h5", **contents)
    with pytest.raises(ValueError, match=expected) as caught:
        read_events(path, num_channels=700)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bad.h5"]


def test_a_table_of_equal_rows_and_a_group_are_not_the_layout(tmp_path, in_process):
    path = write_layout(tmp_path / "a.h5", times=None, units=None)
    with h5py.File(path, "a") as file:
        file["spikes/times"] = np.zeros((3, 5))
    with pytest.raises(ValueError, match="spikes/times: expected a variable length per sample"):
        read_events(path)
    with h5py.File(path, "w") as file:
        file["labels/x"] = 1
    with pytest.raises(ValueError, match="labels: expected a dataset, got a group"):
        read_events(path)


def test_what_is_no_hdf5_file_is_refused(tmp_path):
    path = tmp_path / "text.h5"
    for text in ("label,time,unit", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"text.h5: expected an HDF5 file, got .*{text[:5]}"):
            read_events(path)
    with pytest.raises(FileNotFoundError, match="none.h5: .*found nothing there"):
        read_events(tmp_path / "none.h5")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_events(tmp_path)
    with pytest.raises(ValueError, match="num_channels: expected 1..65536, got 0"):
        read_events(path, num_channels=0)


READERS = {
    "crashes": ("import os; os.kill(os.getpid(), 11)", r"the HDF5 library failed on it \(exit -11"),
    "never ends": ("import time; time.sleep(60)", "expected to be read within 1 s"),
    "dies in the middle": (
        """print('{"arrays": [["times", "<f4", 1000]], "names": null}\\nxx', flush=True); 1 / 0""",
        r"failed on it \(exit 1: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", READERS)
def test_a_library_that_fails_is_survived(tmp_path, monkeypatch, case):
    program, expected = READERS[case]
    (tmp_path / "reader.py").write_text(program)
    monkeypatch.setattr(hdf5_reader, "__file__", str(tmp_path / "reader.py"))
    monkeypatch.setattr(hdf5, "READ_SECONDS", 0.7)
    path = write_layout(tmp_path / "a.h5")
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"a.h5: .*{expected}"):
        read_events(path)
    assert time.monotonic() - started < 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold to RLIMIT_AS")
def test_a_file_that_asks_for_much_memory_is_refused(tmp_path):
    path = write_layout(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        # 80 GB of labels that take no place in the file
        del file["labels"]
        file.create_dataset("labels", (10**10,), np.int64, chunks=(1000,))
        for name, dtype in (("times", np.float16), ("units", np.uint16)):
            del file[f"spikes/{name}"]
            file["spikes"].create_dataset(name, (10**10,), h5py.vlen_dtype(dtype), chunks=(1000,))
    with pytest.raises(ValueError, match="a.h5: expected a readable HDF5 file, got: .*alloc"):
        read_events(path)


# the cache


@pytest.fixture
def count_parses(monkeypatch, in_process):
    parses, parse = [], hdf5._parse
    monkeypatch.setattr(hdf5, "_parse", lambda *a: parses.append(a[0].name) or parse(*a))
    return parses


@pytest.fixture
def path(tmp_path, count_parses):
    """A file of STORE."""
    write_events(tmp_path / "a.h5", STORE)
    return tmp_path / "a.h5"


STORE = make_store(200)


def caches(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".cache.npz"))


@pytest.mark.parametrize("times_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("speakers", [4, None])
def test_a_store_written_and_read_is_the_same_and_then_comes_from_the_cache(
    tmp_path, count_parses, times_dtype, speakers
):
    path, store = tmp_path / "a.h5", make_store(speakers=speakers)
    write_events(path, store, times_dtype)
    first, second = read_events(path), read_events(path)
    assert_same(first, second)
    if times_dtype == np.float32:
        assert_same(first, store)
        assert first.fingerprint() == store.fingerprint()
    assert count_parses == ["a.h5"]
    (cache,) = caches(tmp_path)
    assert cache.startswith("a.h5.") and sorted(os.listdir(tmp_path)) == sorted(["a.h5", cache])
    assert np.load(tmp_path / cache)["times"].dtype == times_dtype


def test_a_changed_file_another_channel_count_or_no_cache_is_parsed(path, tmp_path, count_parses):
    status = path.stat()
    for _ in range(2):
        read_events(path, use_cache=False)
    assert len(count_parses) == 2 and os.listdir(tmp_path) == ["a.h5"]
    deep = tmp_path / "deep" / "down"
    for _ in range(2):
        read_events(path, cache_dir=deep)
    assert len(count_parses) == 3 and len(caches(deep)) == 1 and not caches(tmp_path)
    read_events(path)
    os.utime(path, ns=(1, 1))
    read_events(path)
    assert read_events(path, num_channels=700).num_channels == 700
    assert len(count_parses) == 6 and len(caches(tmp_path)) == 3
    # a byte changed behind the clock, which may matter to the library
    for where in (0.02, 0.5, 0.999):
        contents = bytearray(path.read_bytes())
        contents[int(where * len(contents))] ^= 1
        path.write_bytes(contents)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with contextlib.suppress(ValueError):
            read_events(path)
    assert len(count_parses) == 9


def promise_broken(contents):
    """A whole cache with units beyond the channels."""
    arrays, file = dict(np.load(io.BytesIO(contents))), io.BytesIO()
    np.savez(file, **{**arrays, "units": arrays["units"] + np.uint16(700)})
    return file.getvalue()


DAMAGES = {
    "cut": lambda b: b[: len(b) // 2],
    "altered": lambda b: b[:2000] + bytes([b[2000] ^ 255]) + b[2001:],
    "emptied": lambda b: b"",
    "something else": lambda b: b"\x80\x04K\x01.",
    "a broken promise": promise_broken,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_cache_is_made_anew_with_a_warning(path, tmp_path, count_parses, case):
    read_events(path)
    cache = tmp_path / caches(tmp_path)[0]
    cache.write_bytes(DAMAGES[case](cache.read_bytes()))
    with pytest.warns(UserWarning, match=f"{cache.name}: damaged cache, made anew"):
        assert_same(read_events(path), STORE)
    read_events(path)
    assert len(count_parses) == 2


def test_where_no_cache_can_be_written_a_warning_says_so(path, tmp_path, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.warns(UserWarning, match="no cache of a.h5 could be written .File exists"):
        assert_same(read_events(path, cache_dir=path), STORE)
    monkeypatch.setattr(np, "savez", savez)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert_same(read_events(path), STORE)
    assert os.listdir(tmp_path) == ["a.h5"]


def test_a_failed_write_leaves_the_old_file(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        write_events(path, make_store(seed=1))
    assert os.listdir(tmp_path) == ["a.h5"]
    assert_same(read_events(path, use_cache=False), STORE)


# the store


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("times", np.zeros(3), r"times: expected float32 \[3\], got float64"),
    ("units", np.zeros(2, np.uint16), r"units: expected uint16 \[[0-9]+\], got uint16 \[2\]"),
    ("labels", np.array([0, 1]), "offsets: expected int64"),
    ("labels", np.full(12, 3), r"labels: expected 0\.\.2, got 3\.\.3"),
    ("offsets", np.arange(13) * 7, "offsets: expected to rise from 0"),
    ("speakers", np.zeros(11, np.int32), "speakers: expected"),
    ("num_channels", 10, r"units: expected 0\.\.9"),
])  # fmt: skip
def test_validate_names_what_is_wrong(field, value, expected):
    with pytest.raises(ValueError, match=f"^mine: {expected}"):
        dataclasses.replace(make_store(), **{field: value}).validate("mine")


def test_unsorted_samples_are_found_across_blocks_and_named(monkeypatch):
    monkeypatch.setattr("gpn_triton.data.events._BLOCK", 4)
    times = np.array([0, 1, 2, 3, 2, 5, 0, 1, 2, 3, 4, 5, 0, 9, 8], np.float32)
    np.testing.assert_array_equal(unsorted_samples(times, np.array([0, 6, 6, 12, 15])), [0, 3])
    store = store_of(([0.1, 1.3], [1, 1]), ([0.2, 0.3], [1, 1]))
    assert store.validate("mine") is store
    store.times[2] = 0.4
    with pytest.raises(ValueError, match="times: expected sorted, sample 1 is not"):
        store.validate("mine")


def test_a_subset_holds_the_chosen_samples_in_order():
    store = make_store()
    some = store.subset([7, 1, 0, 7]).validate("subset")
    for place, k in enumerate((7, 1, 0, 7)):
        own, new = (slice(s.offsets[i], s.offsets[i + 1]) for s, i in ((store, k), (some, place)))
        np.testing.assert_array_equal(some.times[new], store.times[own])
        np.testing.assert_array_equal(some.units[new], store.units[own])
        assert some.labels[place] == store.labels[k] and some.speakers[place] == store.speakers[k]
    assert len(store.subset([])) == 0


def test_the_fingerprint_changes_with_every_field():
    store = make_store()
    swapped = store.units.copy()
    swapped[-1] ^= 1
    changes = dict(
        units=swapped, times=store.times + np.float32(1e-3), labels=store.labels[::-1].copy(),
        speakers=None, num_channels=701, class_names=("a", "b", "c"),
    )  # fmt: skip
    others = [dataclasses.replace(store, **{name: value}) for name, value in changes.items()]
    assert len({s.fingerprint() for s in (store, *others)}) == 7
    assert make_store().fingerprint() == store.fingerprint()
