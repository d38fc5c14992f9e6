"""The embedded data set: what it promises about form, determinism and difficulty."""

import numpy as np
import pytest

from gpn_triton.data.sources import synthetic
from gpn_triton.data.sources.synthetic import CHANNELS, synthetic_events, synthetic_splits


@pytest.fixture(scope="module")
def splits():
    return synthetic_splits()


def same(a, b):
    fields = ("times", "units", "offsets", "labels", "speakers")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def features(store, bins, channels):
    """Counts over 1 s in so many bins and channels, a row a sample, with a constant column."""
    sample = np.repeat(np.arange(len(store)), np.diff(store.offsets))
    time = np.minimum((store.times * bins).astype(np.int64), bins - 1)
    unit = store.units.astype(np.int64) * channels // CHANNELS
    index = (sample * bins + time) * channels + unit
    counts = np.bincount(index, minlength=len(store) * bins * channels)
    return np.sqrt(counts.reshape(len(store), -1))


def linear_accuracy(train, test, bins, channels):
    """Test accuracy of least squares to one-hot targets at the ridge that suits the test best."""
    x, y = features(train, bins, channels), features(test, bins, channels)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, y = (np.hstack([(z - mean) / deviation, np.ones((len(z), 1))]) for z in (x, y))
    gram, target = x.T @ x, x.T @ np.eye(len(train.class_names))[train.labels]
    return max(
        (np.argmax(y @ np.linalg.solve(gram + r * np.eye(len(gram)), target), 1) == test.labels)
        .mean()
        for r in (1e1, 1e2, 1e3, 1e4, 1e5)
    )  # fmt: skip


def test_every_split_is_valid_and_has_the_promised_sizes_in_equal_shares(splits):
    for store, size in zip(splits, (2000, 400, 400), strict=True):
        store.validate("synthetic")
        assert len(store) == size and store.speakers.dtype == np.int32
        assert store.num_channels == CHANNELS == 700 and len(set(store.class_names)) == 20
        assert np.array_equal(np.unique(store.units), np.arange(CHANNELS))
        counts, ends = np.diff(store.offsets), store.times[store.offsets[1:] - 1]
        assert 1500 <= counts.min() and counts.max() <= 5000
        assert ((2000 <= counts) & (counts <= 4000)).mean() > 0.9
        assert 0.4 < ends.min() and ends.max() < 1.2 and (ends < 1.0).mean() > 0.99
        assert np.ptp(np.bincount(store.labels, minlength=20)) <= 1
        assert np.ptp(np.unique(store.speakers, return_counts=True)[1]) <= 1


def test_splits_share_no_speaker_whatever_the_seeds(splits):
    for other in (splits, synthetic_splits(50, seed=7)):
        for k, store in enumerate(splits):
            for j, heard in enumerate(other):
                if j != k:
                    assert not set(store.speakers) & set(heard.speakers)


def test_same_arguments_give_the_same_bits_and_others_their_own_utterances():
    stores = [store for seed in (0, 1, 0) for store in synthetic_splits(60, seed)]
    for k, store in enumerate(stores):
        for j, other in enumerate(stores[:k]):
            assert same(store, other) == (j == k - 6)
            assert np.array_equal(store.times, other.times) == (j == k - 6)


def test_the_size_of_a_chunk_does_not_matter(monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 1000)
    whole = synthetic_events(100, range(3), seed=5)
    monkeypatch.setattr(synthetic, "CHUNK", 7)
    assert same(whole, synthetic_events(100, range(3), seed=5))


def test_a_smaller_vocabulary_begins_a_larger_one():
    few, many = (synthetic_events(70, [0], 0, n).class_names for n in (20, 35))
    assert len(many) == len(set(many)) == 35
    assert many[:20] == few


def test_summed_over_time_a_linear_classifier_fails_but_not_on_times(splits):
    train, _, test = splits
    summed = linear_accuracy(train, test, 1, CHANNELS)
    assert 0.1 < summed < 0.45
    assert linear_accuracy(train, test, 16, 35) > summed + 0.2


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, [0], 0, 20), "samples: expected at least 1, got 0"),
    ((5, [], 0, 20), "speakers: .* got \\[\\]"),
    ((5, [-1], 0, 20), "speakers: .* got \\[-1\\]"),
    ((5, [0], -1, 20), "seed: expected 0 or more, got -1"),
    ((5, [0], 0, 1), "num_classes: expected 2 to 1980, got 1"),
    ((5, [0], 0, 1981), "num_classes: expected 2 to 1980, got 1981"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_events(*arguments)
