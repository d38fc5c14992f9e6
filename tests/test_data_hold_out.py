"""Splits of a training set, and data sets put together from files."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from gpn_triton.data import datasets
from gpn_triton.data.datasets import DataSource, load_splits
from gpn_triton.data.hold_out import choose_split, hold_out_speakers, stratified_split
from gpn_triton.data.sources.hdf5 import read_events, write_events
from tests.stores import make_store


def with_speakers(sizes, classes=2):
    """A store in which speaker k has sizes[k] samples, spread over the classes."""
    speakers = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    store = make_store(len(speakers), classes, speakers=None, most=2)
    return dataclasses.replace(store, speakers=10 * speakers)


def assert_parts(store, kept, held):
    assert len(kept) and len(held)
    assert kept.dtype == held.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(store)))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()


@pytest.mark.parametrize(("sizes", "fraction", "low", "high"), [
    ([80, 110, 95, 105, 90, 100, 100, 120, 90, 110], 0.1, 0.08, 0.12),
    ([80, 110, 95, 105, 90, 100, 100, 120, 90, 110], 0.3, 0.24, 0.36),
    ([5] * 200, 0.1, 0.08, 0.12),
    ([450] * 4, 0.1, 0.25, 0.25),
    ([900, 60, 40], 0.1, 0.04, 0.1),
    ([10, 10], 0.01, 0.5, 0.5),
])  # fmt: skip
def test_held_out_speakers_are_whole_and_near_the_fraction_and_the_seed_s(
    sizes, fraction, low, high
):
    store, chosen = with_speakers(sizes), []
    for seed in (*range(10), *range(10)):
        kept, held = hold_out_speakers(store, fraction, seed)
        assert_parts(store, kept, held)
        assert not set(store.speakers[kept]) & set(store.speakers[held])
        assert low <= len(held) / len(store) <= high
        chosen.append(tuple(np.unique(store.speakers[held])))
    assert chosen[:10] == chosen[10:] and len(set(chosen)) > (len(sizes) > 3)


def test_a_speaker_who_alone_speaks_a_class_is_not_held_out():
    store = with_speakers([20, 20, 20])
    labels = store.labels.copy()
    labels[:3] = 2
    store = dataclasses.replace(store, labels=labels, class_names=("a", "b", "c"))
    for seed in range(10):
        assert 0 not in store.speakers[hold_out_speakers(store, 0.3, seed)[1]]


ONE_SPEAKER_A_CLASS = dataclasses.replace(with_speakers([4, 4]), labels=np.repeat([0, 1], 4))


@pytest.mark.parametrize(("store", "method", "fraction", "message"), [
    (make_store(speakers=None), "speakers", 0.1, "the data do not name them"),
    (with_speakers([10]), "speakers", 0.1, "speakers: expected at least 2, the data have 1"),
    (ONE_SPEAKER_A_CLASS, "speakers", 0.1, "not the only one to speak some class"),
    (make_store(3, classes=3), "stratified", 0.5, "stratified: expected a class with at least 2"),
    (make_store(), "rand", 0.1, "method: expected one of auto, speakers, strat.*'rand'"),
    *((make_store(), method, fraction, "fraction: expected 0 < fraction < 1")
      for method in ("speakers", "stratified") for fraction in (0, 1, -0.1, np.nan)),
])  # fmt: skip
def test_a_split_that_cannot_be_is_refused(store, method, fraction, message):
    with pytest.raises(ValueError, match=message):
        choose_split(store, method, fraction, 0)


def test_a_stratified_split_takes_the_same_share_of_every_class():
    store, chosen = make_store(210, classes=7), set()
    for seed in (0, 1, 2, 0):
        kept, held = stratified_split(store, 0.2, seed)
        assert_parts(store, kept, held)
        np.testing.assert_array_equal(np.bincount(store.labels[held]), [6] * 7)
        chosen.add(tuple(held))
    assert len(chosen) == 3
    # small classes keep a training sample and give one where they can
    labels = np.array([0] * 10 + [1] * 2 + [2] * 1)
    store = dataclasses.replace(make_store(13), labels=labels)
    for fraction, most in ((0.01, 1), (0.99, 9)):
        kept, held = stratified_split(store, fraction, 0)
        np.testing.assert_array_equal(np.bincount(labels[held], minlength=3), [most, 1, 0])


@pytest.mark.parametrize(("sizes", "method", "fraction", "expected"), [
    ([100] * 10, "auto", 0.1, r"held-out speakers \d+: 10.0 % of the samples$"),
    ([450] * 4, "auto", 0.1, r"every class: 10.0 % \(whole speakers would take 25 %"),
    ([100] * 10, "auto", 0.3, r"every class: 30.0 % \(whole speakers would take 30 %"),
    ([990, 10], "auto", 0.1, r"every class: 10.0 % \(whole speakers would take 1 %"),
    (None, "auto", 0.1, r"every class: 10.0 % \(speakers: expected to be known"),
    ([450] * 4, "speakers", 0.1, r"held-out speakers \d+: 25.0 %"),
    ([100] * 10, "stratified", 0.1, r"^random samples of every class: 10.0 %$"),
])  # fmt: skip
def test_the_description_says_which_split_was_used_and_why(sizes, method, fraction, expected):
    store = with_speakers(sizes or [100])
    if sizes is None:
        store = dataclasses.replace(store, speakers=None)
    kept, held, description = choose_split(store, method, fraction, 0)
    assert_parts(store, kept, held)
    share = float(description.split(" %")[0].rsplit(" ", 1)[1]) / 100
    assert share == pytest.approx(len(held) / len(store), abs=1e-3)
    assert re.search(expected, description)


# data sets from files


@pytest.fixture
def files(tmp_path):
    """train.h5, valid.h5 and test.h5 of three classes."""
    for seed, name in enumerate(("train", "valid", "test")):
        write_events(tmp_path / f"{name}.h5", make_store(60, speakers=10, seed=seed))
    return {f"{name}_file": tmp_path / f"{name}.h5" for name in ("train", "valid", "test")}


def load(seed=0, **source):
    return load_splits(DataSource(**source), seed)


@pytest.mark.parametrize(("source", "error", "message"), [
    ({"dataset": "sdh"}, ValueError, "dataset: expected synthetic, .*mnist-10k or FILE.h5, got"),
    ({"dataset": "mine.h5"}, FileNotFoundError, "mine.h5: expected an HDF5 file"),
    ({"dataset": "ssc", "data_dir": "."}, FileNotFoundError, "--download"),
    # noticed before the training
    ({"train_file": "train.h5", "test_file": "tset.h5"}, FileNotFoundError, "tset.h5"),
])  # fmt: skip
def test_what_is_no_set_and_no_file_is_named(source, error, message, files, monkeypatch):
    monkeypatch.chdir(files["train_file"].parent)
    with pytest.raises(error, match=message):
        load(**{k: Path(v) if k.endswith(("_file", "_dir")) else v for k, v in source.items()})


def same(store, other):
    return store.fingerprint() == other.fingerprint()


def test_three_files_are_three_parts_and_the_test_file_is_read_once_and_last(files, monkeypatch):
    reads, read = [], datasets.read_events
    monkeypatch.setattr(datasets, "read_events", lambda p, *a: reads.append(p.stem) or read(p, *a))
    splits = load(**files)
    assert reads == ["train", "valid"]
    assert splits.test is splits.test and reads == ["train", "valid", "test"]
    for part in reads:
        assert same(getattr(splits, part), read(files[f"{part}_file"]))
    assert splits.description == (
        "train.h5: 60 training and 60 validation samples (valid.h5); test: test.h5, read at the end"
    )
    # a known set is found by its name, and its counts are compared
    folder = files["test_file"].parent
    for name in ("train", "test"):
        files[f"{name}_file"].rename(folder / f"shd_{name}.h5")
    with pytest.warns(UserWarning, match="shd_train.h5: 60 samples, the published set has 8156"):
        splits = load(dataset="shd", data_dir=folder)
    with pytest.warns(UserWarning, match="shd_test.h5: 60 samples, the published set has 2264"):
        assert len(splits.test) == 60
    assert splits.description.startswith("shd: 54 training and 6 validation samples")


def test_without_a_validation_file_speakers_are_held_out_of_training(files):
    files.pop("valid_file")
    splits, again = load(**files), load(**files)
    assert len(splits.train) == 54 and len(splits.valid) == 6
    assert not set(splits.train.speakers) & set(splits.valid.speakers)
    assert "held-out speakers" in splits.description
    assert same(again.train, splits.train) and same(again.valid, splits.valid)
    assert len(load(**files, valid_split="stratified", valid_fraction=0.5).valid) == 30


@pytest.mark.parametrize("by", ["dataset", "train_file"])
def test_one_file_is_split_three_ways_without_overlap(files, by):
    path = files["train_file"]
    splits = load(**{by: path}, valid_split="stratified", valid_fraction=0.2)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (39, 9, 12)
    assert "test: 12 samples held out, random samples of every class" in splits.description
    events = [
        set(zip(part.times.tolist(), part.units.tolist(), strict=True))
        for part in (splits.train, splits.valid, splits.test)
    ]
    assert sum(map(len, events)) == len(set.union(*events)) == len(read_events(path).times)


@pytest.mark.filterwarnings("ignore:.*no sample")
def test_a_part_with_other_classes_is_refused_and_one_without_names_takes_them(files):
    def write(part, classes, names):
        store = dataclasses.replace(make_store(60, classes=classes), class_names=names)
        write_events(files[part], store)

    write("valid_file", 3, ("a", "b", "c"))
    with pytest.raises(ValueError, match="valid.h5: extra/keys: expected the training data's"):
        load(**files)
    files.pop("valid_file")
    write("test_file", 5, tuple("01234"))
    with pytest.raises(ValueError, match=r"test.h5: labels: expected 0\.\.2, got 0\.\.4"):
        load(**files)
    write("test_file", 2, ("0", "1"))
    assert load(**files).test.class_names == ("word 0", "word 1", "word 2")


def test_the_synthetic_set_is_made_from_its_seed_with_the_words_asked_for():
    one, two, other = (load(samples=70, classes=35, seed=seed) for seed in (3, 3, 4))
    assert len(one.train) == 70 and set(one.train.labels) == set(range(35))
    for part in ("train", "valid", "test"):
        assert same(getattr(one, part), getattr(two, part))
        assert not same(getattr(one, part), getattr(other, part))
        getattr(one, part).validate(part)
