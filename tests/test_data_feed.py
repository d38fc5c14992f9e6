"""Batches of a streamed set against those of the same set on the device."""

import dataclasses
import gc
import threading
import time

import numpy as np
import pytest
import torch

from gpn_triton.data import feed as module
from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, bin_batch, prefers_cells
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed, StreamedFeed, make_feed
from tests.stores import make_store, store_of

EVERYTHING = Augmentation(20, 0.1, 0.005, 0.1, 0.1)
CONFIG = BinningConfig(25, 1.0, channel_bin=5)
KEY = (3, 1)


def resident(store, device="cpu"):
    return Feed(DeviceEvents(store, device))


def mib(store, events=None):
    """What a store's arrays take on a device, or would with so many events."""
    events = len(store.times) if events is None else events
    return (module.EVENT_BYTES * events + module.SAMPLE_BYTES * len(store) + 8) / module.MIB


def streamed(store, events=10_000, device="cpu"):
    """A feed whose shards hold so many events."""
    return StreamedFeed(store, device, 2 * mib(store, events))


def tensors(feed):
    return [getattr(feed.events, n) for n in ("times", "units", "offsets", "labels", "numbers")]


class Labels(np.ndarray):
    """A store's labels that call back with the samples that are gathered."""

    def __getitem__(self, numbers):
        self.call(numbers)
        return np.asarray(self)[numbers]


def watched(store, call):
    labels = store.labels.view(Labels)
    labels.call = call
    return dataclasses.replace(store, labels=labels)


def most(store, batch):
    """Events of the largest batch there can be."""
    return int(np.sort(np.diff(store.offsets))[-batch:].sum())


def next_batch(feed, size):
    """Counts and labels."""
    feed.ahead(size)
    indices = feed.batch(size)
    return bin_batch(feed.events, indices, CONFIG, EVERYTHING, KEY), feed.events.labels[indices]


def walk(feed, order, first, batch):
    """All batches of a pass."""
    feed.start(order, first, batch)
    samples = len(feed)
    return [next_batch(feed, min(batch, samples - a)) for a in range(first, samples, batch)]


def assert_same(batches, expected):
    for (counts, labels), (wanted, wanted_labels) in zip(batches, expected, strict=True):
        assert wanted.any() and torch.equal(counts, wanted)
        assert torch.equal(labels, wanted_labels)


@pytest.mark.parametrize("make", ["resident", "streamed"])
def test_a_pass_has_the_samples_of_its_order_even_if_it_changes_afterwards(make, monkeypatch):
    # some of a shard's samples are gathered at a time
    monkeypatch.setattr(module, "GATHERED", 3)
    store, order = make_store(21), torch.randperm(21)
    feed, events = {"resident": resident, "streamed": streamed}[make](store), DeviceEvents(store)
    for given, numbers in ((order, order.clone()), (None, torch.arange(21))):
        expected = [
            (bin_batch(events, part, CONFIG, EVERYTHING, KEY), events.labels[part])
            for part in numbers[5:].split(8)
        ]
        feed.start(given, 5, 8)
        order.zero_()
        assert_same([next_batch(feed, size) for size in (8, 8)], expected)


@pytest.mark.parametrize("first", [0, 16, 48])
@pytest.mark.parametrize("capacity, samples", [(1.0, 8), (2.0, 16), (4.0, 29), (99.0, 29)])
def test_a_streamed_pass_has_the_batches_of_a_resident_one(capacity, samples, first):
    # 53 samples in batches of 8, the last of 5; sample 1 is empty
    store, asked = make_store(53), []
    stream = watched(store, lambda numbers: asked.append(len(numbers)))
    here, stream = resident(store), streamed(stream, int(capacity * most(store, 8)))
    addresses = [t.data_ptr() for t in tensors(stream)]
    for order in (torch.randperm(53), torch.randperm(53), None):
        asked.clear()
        assert_same(walk(stream, order, first, 8), walk(here, order, first, 8))
        # all once, in whole batches, in shards as large as fits but for the first ones
        assert sum(asked) == 53 - first and not any(n % 8 for n in asked[:-1])
        assert asked[0] == min(8, 53 - first) and (first or max(asked) >= samples)
        assert stream.events.longest == here.events.longest
    assert addresses == [t.data_ptr() for t in tensors(stream)]


@pytest.mark.parametrize("counts, batch, capacity, expected", [
    ([10] * 40, 2, 100, [2, 4, 8, 10, 10, 6]),
    ([10] * 7, 2, 20, [2, 2, 2, 1]),
    ([0] * 9, 2, 0, [2, 4, 3]),
    # a shard that is full to the last event, and one that would have one too many
    ([5, 5, 4, 6, 1, 9], 1, 10, [1, 2, 2, 1]),
])  # fmt: skip
def test_shards_grow_from_one_batch_to_as_many_as_fit(counts, batch, capacity, expected):
    asked, store = [], store_of(*[([0.1] * n, [3] * n) for n in counts])
    stream = streamed(watched(store, lambda numbers: asked.append(len(numbers))), capacity)
    stream.start(None, 0, batch)
    for first in range(0, len(counts), batch):
        stream.ahead(min(batch, len(counts) - first))
    assert asked == expected


def test_a_batch_may_be_asked_for_in_parts():
    store, order = make_store(20), torch.randperm(20)
    stream = streamed(store, most(store, 8))
    stream.start(order, 0, 8)
    halves = [next_batch(stream, size) for size in (4, 4, 4, 4, 2, 2)]
    joined = [
        (torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]]))
        for a, b in zip(halves[::2], halves[1::2], strict=True)
    ]
    assert_same(joined, walk(resident(store), order, 0, 8))


def test_a_shard_is_taken_for_dense_or_sparse_as_the_whole_set():
    store = make_store(40)
    stream, whole = streamed(store, most(store, 4)), DeviceEvents(store)
    stream.start(None, 0, 4)
    stream.ahead(4)
    configs = [BinningConfig(bins, channel_bin=100) for bins in (1, 2, 3, 5, 100)]
    found = [prefers_cells(stream.events, config) for config in configs]
    assert found == [prefers_cells(whole, config) for config in configs]
    assert set(found) == {True, False}


def test_a_batch_larger_than_a_shard_is_refused_with_what_would_do():
    store = make_store(3000, most=2000)
    stream = StreamedFeed(store, "cpu", 2)
    with pytest.raises(ValueError, match="event_mib: expected at least") as error:
        stream.start(None, 0, 1000)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert f"{most(store, 1000)} events" in str(error.value) and "got 2;" in str(error.value)
    with pytest.raises(ValueError, match="event_mib"):
        StreamedFeed(store, "cpu", least - 1).start(None, 0, 1000)
    StreamedFeed(store, "cpu", least).start(None, 0, 1000)
    # less than the samples' numbers take
    with pytest.raises(ValueError, match="event_mib"):
        StreamedFeed(store, "cpu", 0.01).start(None, 0, 1)


@pytest.mark.parametrize("make", [resident, streamed])
def test_passes_that_cannot_be_are_refused(make):
    feed = make(make_store(10))

    def refused(message, call, *arguments):
        with pytest.raises(ValueError, match=message):
            call(*arguments)

    refused("size: expected at most 0", feed.ahead, 1)
    for order in (torch.arange(9), torch.arange(10).int(), torch.zeros(10, 1).long()):
        refused(r"order: expected int64 \[10\], got", feed.start, order, 0, 4)
    for first in (-1, 11):
        refused(f"first: expected 0..10, got {first}", feed.start, None, first, 4)
    refused("batch: expected at least 1, got 0", feed.start, None, 0, 0)
    feed.start(None, 8, 4)
    feed.ahead(2)
    refused("size: expected at most 0, the samples left, got 1", feed.ahead, 1)
    feed.start(None, 10, 4)
    refused("size: expected at most 0", feed.ahead, 1)
    # a batch cannot span two shards
    if make is streamed:
        feed.start(None, 0, 4)
        refused("size: expected at most 4, the samples left, got 6", feed.ahead, 6)


def test_what_the_thread_raises_is_raised_in_ahead_and_the_next_pass_is_whole():
    store, order, calls = make_store(40), torch.randperm(40), []

    def fail(_):
        calls.append(1)
        if len(calls) in (4, 8):
            raise OSError("the disk has gone")

    stream = streamed(watched(store, fail), most(store, 4))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk has gone"):
            walk(stream, order, 0, 4)
        calls += [1] * (4 - len(calls))
    calls += [1] * 8
    assert_same(walk(stream, order, 0, 4), walk(resident(store), order, 0, 4))


def test_a_pass_given_up_midway_leaves_nothing_behind_and_the_thread_ends_with_its_feed():
    store, order = make_store(40), torch.randperm(40)
    expected = walk(resident(store), order, 0, 4)
    stream = streamed(watched(store, lambda _: time.sleep(0.01)), 2 * most(store, 4))
    before = set(threading.enumerate())
    for batches in (0, 1, 3):
        stream.start(torch.randperm(40), 0, 4)
        for _ in range(batches):
            next_batch(stream, 4)
        assert_same(walk(stream, order, 0, 4), expected)
    stream.start(None, 0, 4)
    (thread,) = set(threading.enumerate()) - before
    del stream
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_set_is_resident_where_it_fits_and_else_streamed(monkeypatch):
    store = make_store(2000, most=3000)
    size = mib(store)
    feed, line = make_feed(store, "cpu")
    assert isinstance(feed, Feed) and line == f"events: {size:.0f} MiB, resident on cpu"
    feed, line = make_feed(store, "cpu", int(size) + 1)
    assert isinstance(feed, Feed) and line.endswith(f"resident on cpu (limit {int(size) + 1} MiB)")
    feed, line = make_feed(store, torch.device("cpu"), 10)
    assert isinstance(feed, StreamedFeed) and len(feed) == 2000
    assert line == (
        f"events: {size:.0f} MiB, streamed in shards of up to 5 MiB "
        "(limit 10 MiB: one shard in use, one on its way)"
    )
    # as much as promised, and no more: a shard in use, and one on its way
    taken = 2 * sum(t.nbytes for t in tensors(feed))
    assert 10 * module.MIB - 100 < taken <= 10 * module.MIB
    # by default half of a GPU's free memory is taken
    monkeypatch.setattr(module, "DeviceEvents", lambda *_: None)
    monkeypatch.setattr(module, "Feed", lambda _: "resident")
    monkeypatch.setattr(module, "StreamedFeed", lambda *arguments: "streamed")
    for spare, kind in ((0.1, "resident"), (-0.1, "streamed")):
        free = int(2 * (size + spare) * module.MIB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 4 * free))
        feed, line = make_feed(store, "cuda:0")
        assert feed == kind and f"{kind} " in line


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [1.0, 3.0])
def test_a_captured_graph_counts_a_streamed_pass(capacity):
    store = make_store(4000, most=3000)
    stream = streamed(store, int(capacity * most(store, 64)), "cuda")
    orders = [torch.randperm(4000, device="cuda") for _ in range(3)]
    expected = [walk(resident(store, "cuda"), order, 0, 64)[:-1] for order in orders]
    key = torch.tensor(KEY, device="cuda")

    def step():
        indices = stream.batch(64)
        counts = bin_batch(stream.events, indices, CONFIG, EVERYTHING, key)
        return counts, stream.events.labels[indices]

    stream.start(orders[0], 0, 64)
    stream.ahead(64)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, labels = step()
    for order, wanted in zip(orders, expected, strict=True):
        stream.start(order, 0, 64)
        batches = []
        for _ in wanted:
            stream.ahead(64)
            graph.replay()
            batches.append((counts.clone(), labels.clone()))
        assert_same(batches, wanted)
