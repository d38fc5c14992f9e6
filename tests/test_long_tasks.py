"""Tasks and images for long sequences, and the real-valued inputs that they bring."""

import dataclasses
import gzip
import hashlib
import json

import numpy as np
import pytest
import torch

from gpn_triton import train
from gpn_triton.data.binning import BinningConfig, batch_input, bin_batch
from gpn_triton.data.datasets import DataSource, load_splits
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import make_feed
from gpn_triton.data.sources import images
from gpn_triton.data.sources.long_tasks import add_pairs, adding, recall
from gpn_triton.training.objective import blank_totals, loss_and_totals, means
from gpn_triton.training.parser import parse
from tests.stores import make_store, store_of

CPU = torch.device("cpu")


def batch(store, T, indices, **more):
    config = BinningConfig(T)
    indices = torch.tensor(indices)
    return batch_input(store.on(CPU), indices, config, None, None, False, **more)


@pytest.mark.parametrize("T", [2, 7, 1000, 100_000])
def test_recall_shows_a_cue_first_and_a_query_last_and_nothing_between(T):
    store = recall(6, T, 1.0, 3, seed=1).validate("recall")
    counts = batch(store, T, range(6))
    at = counts.nonzero().tolist()
    cues = [[0, k, label] for k, label in enumerate(store.labels)]
    assert at == cues + [[T - 1, k, 3] for k in range(6)]
    assert sorted(store.labels) == [0, 0, 1, 1, 2, 2]


def test_adding_marks_one_number_in_each_half_and_learns_their_sum():
    store = adding(500, 11, seed=1)
    x = batch(store, 11, range(500))
    numbers, marks = x.unbind(-1)
    assert torch.equal(marks[:5].sum(0), torch.ones(500))
    assert torch.equal(marks[5:].sum(0), torch.ones(500))
    torch.testing.assert_close((numbers * marks).sum(0), torch.from_numpy(store.labels))
    # chance is a mean squared error of 1 / 6, known to 0.009 from so many samples
    assert abs(np.square(store.labels - 1).mean() - 1 / 6) < 0.03
    assert not np.array_equal(adding(500, 11, seed=2).inputs, store.inputs)


def test_pairs_are_two_samples_in_sequence_with_the_sum_of_their_labels():
    store = make_store(40, 3, end=1.2)
    pairs = add_pairs(store, 2.0, seed=1).validate("pairs")
    assert len(pairs) == 40 and pairs.class_names == tuple("01234")
    whole, half = BinningConfig(8, 2.0), BinningConfig(4, 1.0)
    both = bin_batch(DeviceEvents(pairs), torch.arange(40), whole)
    old = bin_batch(DeviceEvents(store), torch.arange(40), half)
    assert torch.equal(both[:4], old)
    seconds = [int((old == both[4:, k : k + 1]).all(2).all(0).nonzero()[0]) for k in range(40)]
    # sample 1 is empty, and no other is like one more
    assert sorted(seconds) == list(range(40)) != seconds
    assert np.array_equal(pairs.labels, store.labels + store.labels[seconds])


@pytest.mark.parametrize("name", ["synthetic", "adding", "recall"])
def test_made_tasks_have_unrelated_parts_that_the_seed_brings_back(name):
    source = DataSource(name, samples=20, time_bins=9, classes=4)
    one, again, other = (load_splits(source, seed) for seed in (1, 1, 2))
    assert one.train.fingerprint() == again.train.fingerprint() != other.train.fingerprint()
    assert len({part.fingerprint() for part in (one.train, one.valid, one.test)}) == 3
    assert one.learns_number == (name == "adding")


def write_idx(folder, name, array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    (folder / name).write_bytes(data)
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A folder of MNIST's files, with images of noise, and their sums in place of the true ones."""
    rng, sums = np.random.default_rng(0), {}
    for name in images.MNIST_MD5:
        S = 60 if name.startswith("train") else 40
        shape = (S, 28, 28) if "images" in name else (S,)
        array = rng.integers(0, 256, shape) if "images" in name else np.arange(S) % 10
        sums[name] = write_idx(tmp_path, name, array.astype(np.uint8))
    monkeypatch.setattr(images.mnist, "__defaults__", (images.MNIST_HOSTS, sums, 30.0))
    return tmp_path


def test_mnist_comes_pixel_by_pixel_row_by_row_or_permuted(mnist):
    source = DataSource("mnist", time_bins=784, data_dir=mnist)
    splits = load_splits(source)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (50, 10, 40)
    x = batch(splits.test, 784, [3, 1])
    assert x.shape == (784, 2, 1) and 0.99 < x.max() <= 1 and x.min() == 0
    rows = batch(load_splits(dataclasses.replace(source, time_bins=28)).test, 28, [3, 1])
    assert torch.equal(rows.transpose(0, 1).flatten(1), x[..., 0].t())
    mixed = batch(load_splits(dataclasses.replace(source, permuted=True)).test, 784, [3, 1])
    assert torch.equal(mixed.sort(0).values, x.sort(0).values) and not torch.equal(mixed, x)
    # the steps of a piece alone
    assert torch.equal(batch(splits.test, 784, [3, 1], steps=(100, 103)), x[100:103])


def test_mnist_10k_needs_the_test_files_alone_and_keeps_its_parts_apart(mnist):
    for name in images.MNIST_MD5:
        if name.startswith("train"):
            (mnist / name).unlink()
    splits = load_splits(DataSource("mnist-10k", time_bins=784, data_dir=mnist))
    parts = [{row.tobytes() for row in part.inputs} for part in (splits.train, splits.valid)]
    parts.append({row.tobytes() for row in splits.test.inputs})
    assert [len(part) for part in parts] == [20, 10, 10] and len(set.union(*parts)) == 40
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz not found in .* add"):
        load_splits(DataSource("mnist", time_bins=784, data_dir=mnist))


def test_a_damaged_file_and_a_length_that_does_not_divide_are_named(mnist):
    with pytest.raises(ValueError, match="time_bins: expected 784, or a divisor of it, for mnist"):
        load_splits(DataSource("mnist", time_bins=25, data_dir=mnist))
    (mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz: expected md5 .* got"):
        load_splits(DataSource("mnist-10k", time_bins=784, data_dir=mnist))


def test_digits_are_scikit_learns(mnist):
    pytest.importorskip("sklearn")
    splits = load_splits(DataSource("digits", time_bins=64))
    assert len(splits.train) + len(splits.valid) + len(splits.test) == 1797
    assert batch(splits.train, 64, range(50)).max() == 1


def test_real_valued_inputs_lie_whole_on_the_device_or_are_refused():
    store = adding(100, 50, seed=0)
    feed, line = make_feed(store, CPU)
    feed.start(torch.arange(99, -1, -1), 10, 4)
    feed.ahead(4)
    assert feed.batch(4).tolist() == [89, 88, 87, 86] and "resident" in line
    with pytest.raises(ValueError, match="event_mib: expected at least 1 MiB"):
        make_feed(store, CPU, 0.01)


def test_a_number_to_learn_has_its_squared_error_and_the_share_that_is_near():
    labels, said = torch.tensor([1.0, 0.5]), torch.tensor([[1.03], [1.0]])
    loss, totals = loss_and_totals(said, labels, torch.zeros(1), 1)
    assert loss.item() == pytest.approx(0.03**2 + 0.25)
    found = means(blank_totals(1, CPU) + totals, [1])
    assert (found.loss, found.accuracy) == (pytest.approx(loss.item() / 2), 0.5)


@pytest.mark.parametrize(("argv", "message"), [
    ("--dataset adding --channel-shift 3", "channel_shift: has no effect on the real-valued"),
    ("--dataset digits --max-time 2", "max_time: has no effect on the real-valued"),
    ("--permuted", "permuted: expected one of digits, mnist"),
    ("--dataset recall --add-pairs", "add_pairs: expected events"),
    ("--dataset digits --samples 3", "samples: has no effect beside --dataset digits"),
    ("--dataset adding --classes 3", "classes: has no effect beside --dataset adding"),
    ("--dataset adding --download", "download: has no effect beside --dataset adding"),
    ("--checkpoint-every some", "--checkpoint-every: invalid int or auto value: 'some'"),
    ("--tbptt 3 --neuron cnn", "tbptt: expected a neuron that streams, cnn"),
])  # fmt: skip
def test_options_without_effect_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(argv.split())


def test_a_task_brings_its_own_defaults_below_what_is_given():
    found = parse("--dataset adding --dropout 0.1".split())
    assert (found.readout, found.dropout, found.channel_shift) == ("membrane", 0.1, 0)
    assert parse("--dataset adding --neuron lstm".split()).readout == "last"
    assert parse(["--dataset", "mnist"]).time_bins == 784
    assert parse([]).time_bins == 25


def test_training_on_a_number_says_its_squared_error_and_chooses_by_it(tmp_path, capsys):
    argv = "--dataset adding --time-bins 12 --samples 256 --epochs 6 --hidden 12 --lr 0.01"
    assert train.main([*argv.split(), "--out", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    losses = [line["valid_loss"] for line in lines]
    assert result["best_epoch"] == 1 + losses.index(min(losses))
    assert result["test_loss"] < 0.15
    assert f"test squared error {result['test_loss']:.5f}" in capsys.readouterr().out


def test_a_sample_of_one_event_is_a_sample_of_a_pair():
    pairs = add_pairs(store_of(([0.9], [3]), ([], [])), 2.0, seed=0)
    assert len(pairs) == 2 and len(pairs.times) == 2
