"""Counts of binned events and their augmentation, against loops over single events."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpn_triton.data import binning as module
from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import DeviceEvents, EventStore
from tests.stores import make_store

f32 = np.float32


def naive_fold(h, word):
    h = ((h ^ (word % 2**32)) + 0x9E3779B9) % 2**32
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) % 2**32
    h = ((h ^ (h >> 15)) * 0x735A2D97) % 2**32
    return h ^ (h >> 15)


def naive_draw(key, stream, sample, number=0):
    h = 0
    for word in (*key, stream, sample, number):
        h = naive_fold(h, word)
    return h


def naive_events(store, k, augmentation, key):
    """Times and units of sample k as augmented, event by event."""
    a = augmentation
    first, last = store.offsets[k], store.offsets[k + 1]
    events = []
    for j in range(last - first):
        t, unit = store.times[first + j], int(store.units[first + j])
        if a.channel_shift:
            wide = 2 * a.channel_shift + 1
            unit += naive_draw(key, 0, k) * wide // 2**32 - a.channel_shift
        if a.time_stretch:
            u = f32(naive_draw(key, 1, k) >> 8) / f32(2**24)
            t = t * (f32(1) + f32(a.time_stretch) * (f32(2) * u - f32(1)))
        if a.time_jitter:
            z = sum(naive_draw(key, 2, k, j).to_bytes(4, "little")) - 510
            t = t + f32(z) * f32(a.time_jitter / math.sqrt((256**2 - 1) / 3))
        dropped = a.drop and naive_draw(key, 3, k, j) < round(a.drop * 2**32)
        if not dropped and 0 <= unit < store.num_channels:
            events.append((t, unit))
    added = (int(last - first) * round(a.noise * 65536) + (naive_draw(key, 4, k) >> 16)) // 65536
    for j in range(added if a.noise else 0):
        u = f32(naive_draw(key, 5, k, j) >> 8) / f32(2**24)
        unit = naive_draw(key, 6, k, j) * store.num_channels // 2**32
        events.append((u * store.times[last - 1], unit))
    return events


def naive_counts(store, indices, config, augmentation=Augmentation(), key=(0, 0)):  # noqa: B008
    T, width = config.time_bins, config.channel_bin
    counts = np.zeros((T, len(indices), -(-store.num_channels // width)), f32)
    for place, k in enumerate(indices):
        for t, unit in naive_events(store, k, augmentation, key):
            if config.style == "authors":
                bins = [i for i in range(T) if np.float16(t) <= np.float16(i * (1 / T))]
                if bins and unit > 0:
                    counts[bins[0], place, store.num_channels - unit] += 1
                continue
            inside = 0 <= t < f32(config.max_time)
            if inside or config.overflow == "clip":
                bin = int(min(max(np.floor(t * f32(T / config.max_time)), 0), T - 1))
                counts[bin, place, unit // width] += 1
    return counts


def assert_as_the_loop(store, indices, config, augmentation=None, key=(0, 0)):
    counts = bin_batch(DeviceEvents(store), torch.tensor(indices), config, augmentation, key)
    assert counts.dtype == config.dtype
    expected = naive_counts(store, indices, config, augmentation or Augmentation(), key)
    np.testing.assert_array_equal(counts.float().numpy(), expected)
    return counts


@pytest.mark.parametrize("overflow", ["drop", "clip"])
@pytest.mark.parametrize("channel_bin", [1, 5, 7, 700, 1000])
@pytest.mark.parametrize(("time_bins", "max_time"), [(1, 1.0), (20, 1.4), (100, 0.7), (33, 2.5)])
def test_counts_are_those_of_a_loop(time_bins, max_time, channel_bin, overflow):
    store = make_store(10, most=60)
    config = BinningConfig(time_bins, max_time, channel_bin, overflow)
    counts = assert_as_the_loop(store, [3, 1, 0, 3, 9], config)
    events = np.diff(store.offsets)[[3, 1, 0, 3, 9]].sum()
    assert counts.sum() == events if overflow == "clip" or max_time > 1.2 else 0 < counts.sum()


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.lists(st.floats(0, 2, width=32), max_size=12), min_size=1, max_size=4),
    time_bins=st.integers(1, 40),
    max_time=st.floats(2**-7, 2, width=32),
    channels=st.integers(1, 12),
    channel_bin=st.integers(1, 13),
    overflow=st.sampled_from(["drop", "clip"]),
    seed=st.integers(0, 2**31),
)
def test_counts_of_any_events_are_those_of_a_loop(
    times, time_bins, max_time, channels, channel_bin, overflow, seed
):
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in times])])
    store = EventStore(
        times=np.array([t for sample in times for t in sorted(sample)], f32),
        units=np.random.default_rng(seed).integers(0, channels, offsets[-1]).astype(np.uint16),
        offsets=offsets,
        labels=np.zeros(len(times), np.int64),
        speakers=None,
        num_channels=channels,
        class_names=("a",),
    )
    config = BinningConfig(time_bins, max_time, channel_bin, overflow)
    assert_as_the_loop(store, [*range(len(times)), 0], config)


def one_sample(times, units):
    return EventStore(
        times=np.array(times, f32),
        units=np.array(units, np.uint16),
        offsets=np.array([0, len(times)]),
        labels=np.zeros(1, np.int64),
        speakers=None,
        num_channels=700,
        class_names=("a",),
    )


def test_the_window_holds_0_but_not_its_end():
    end = f32(1.4)
    store = one_sample([0, np.nextafter(end, f32(0)), end, 1.5], [3, 4, 5, 6])
    counts = assert_as_the_loop(store, [0], BinningConfig(20, 1.4))
    assert counts[0, 0, 3] == 1 and counts[19, 0, 4] == 1 and counts.sum() == 2
    counts = assert_as_the_loop(store, [0], BinningConfig(20, 1.4, overflow="clip"))
    assert counts[19, 0, 4:7].tolist() == [1, 1, 1] and counts.sum() == 4


def test_events_of_one_cell_add_up_and_other_cells_stay_empty():
    store = one_sample([0.11, 0.12, 0.13, 0.91], [7, 7, 7, 699])
    counts = assert_as_the_loop(store, [0], BinningConfig(10, 1.0))
    assert counts[1, 0, 7] == 3 and counts[9, 0, 699] == 1 and counts.count_nonzero() == 2


def test_units_above_32767_are_counted_in_their_place():
    store = dataclasses.replace(one_sample([0.1, 0.2], [40_000, 65_535]), num_channels=65_536)
    counts = assert_as_the_loop(store, [0], BinningConfig(1, 1.0))
    assert counts.nonzero()[:, 2].tolist() == [40_000, 65_535]


def test_samples_without_events_and_batches_without_samples_are_empty():
    store = one_sample([], [])
    config = BinningConfig(4, 1.0)
    everything = Augmentation(5, 0.1, 0.01, 0.1, 0.5)
    for augmentation in (None, everything):
        counts = bin_batch(DeviceEvents(store), torch.tensor([0, 0]), config, augmentation, (1, 2))
        assert counts.shape == (4, 2, 700) and not counts.any()
        none = torch.tensor([], dtype=torch.int64)
        assert bin_batch(DeviceEvents(store), none, config, augmentation, (1, 2)).shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_counts_come_in_the_dtype_asked_for(dtype):
    assert_as_the_loop(make_store(4), [0, 2], BinningConfig(3, dtype=dtype))


def test_a_buffer_handed_in_is_overwritten_and_returned():
    events, config = DeviceEvents(make_store(6)), BinningConfig(5)
    indices = torch.tensor([0, 2, 3])
    out = torch.full((5, 3, 700), torch.nan)
    assert bin_batch(events, indices, config, out=out) is out
    assert torch.equal(out, bin_batch(events, indices, config))
    with pytest.raises(ValueError, match=r"out: expected contiguous float32 \[5, 2, 700\]"):
        bin_batch(events, indices[:2], config, out=out)


def test_batches_larger_than_a_block_are_counted_whole(monkeypatch):
    monkeypatch.setattr(module, "CPU_SAMPLES", 3)
    everything = Augmentation(20, 0.2, 0.02, 0.2, 0.3)
    assert_as_the_loop(make_store(11), [*range(11)], BinningConfig(7, 1.0), everything, (1, 2))


@pytest.mark.parametrize("time_bins", [1, 2, 20, 50, 100, 1000])
def test_the_authors_binning_is_their_loop(time_bins):
    store = make_store(4, most=120)
    half = store.times.astype(np.float16).astype(f32)
    # times on edges, and the units the authors treat apart
    edges = np.float16(np.arange(time_bins)[-20:] / time_bins).astype(f32)
    first = store.offsets[0]
    n = min(len(edges), store.offsets[1])
    half[first : first + n] = edges[:n]
    units = store.units.copy()
    units[:n:3], units[1:n:3] = 0, 699
    store = dataclasses.replace(store, times=half, units=units)
    counts = assert_as_the_loop(store, [0, 2, 1, 3], BinningConfig(time_bins, style="authors"))
    assert not counts[:, :, 0].any()


def test_the_authors_binning_loses_the_end_and_channel_0():
    times = np.float16([0, 0.01, 0.5, 0.9, 0.91, 1.3])
    store = one_sample(times, [1, 2, 699, 3, 4, 5])
    counts = assert_as_the_loop(store, [0], BinningConfig(10, style="authors"))
    assert counts.sum() == 4
    assert counts[0, 0, 699] == counts[1, 0, 698] == counts[5, 0, 1] == counts[9, 0, 697] == 1


AUGMENTATIONS = {
    "shift": Augmentation(channel_shift=30),
    "a shift beyond all channels": Augmentation(channel_shift=5000),
    "stretch": Augmentation(time_stretch=0.3),
    "jitter": Augmentation(time_jitter=0.02),
    "a jitter of seconds": Augmentation(time_jitter=3.0),
    "drop": Augmentation(drop=0.3),
    "noise": Augmentation(noise=0.4),
    "more noise than events": Augmentation(noise=2.5),
    "everything": Augmentation(20, 0.1, 0.005, 0.1, 0.1),
}


@pytest.mark.parametrize("overflow", ["drop", "clip"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_counts_are_those_of_a_loop(name, overflow):
    store, config = make_store(8, most=80), BinningConfig(25, 1.0, overflow=overflow)
    for key in ((0, 0), (7, 3), (2**32 - 1, 2**31)):
        counts = assert_as_the_loop(store, [5, 1, 0, 7], config, AUGMENTATIONS[name], key)
        assert not torch.equal(
            counts, bin_batch(DeviceEvents(store), torch.tensor([5, 1, 0, 7]), config)
        )


def test_the_authors_binning_can_be_augmented():
    store = make_store(3)
    store = dataclasses.replace(store, times=store.times.astype(np.float16).astype(f32))
    config, shift = BinningConfig(20, style="authors"), Augmentation(channel_shift=40)
    assert_as_the_loop(store, [0, 2], config, shift, (1, 1))


def test_a_draw_does_not_depend_on_the_batch_and_changes_with_the_key():
    events, config = DeviceEvents(make_store(9)), BinningConfig(25, 1.0)
    everything = AUGMENTATIONS["everything"]

    def counts(indices, key):
        return bin_batch(events, torch.tensor(indices), config, everything, key)

    together = counts([*range(9)], (3, 5))
    backwards = counts([8, 7, 6, 5, 4, 3, 2, 1, 0], torch.tensor([3, 5]))
    assert torch.equal(together, backwards.flip(1))
    assert torch.equal(together[:, 4:5], counts([4], (3, 5)))
    for key in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(together, counts([*range(9)], key))


def framed(store):
    """Events whose counts are kept."""
    events = DeviceEvents(store)
    events.frames = module.Frames()
    return events


def is_kept(events, *arguments):
    return events.frames.batch(events, *arguments, (7, 3)) is not None


SHIFT = AUGMENTATIONS["shift"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "augmentation"),
    [
        (dict(time_bins=25), None),
        (dict(time_bins=9, max_time=0.7, channel_bin=5, overflow="clip"), None),
        (dict(time_bins=10, style="authors"), None),
        (dict(time_bins=25), SHIFT),
        (dict(time_bins=25), AUGMENTATIONS["a shift beyond all channels"]),
        (dict(time_bins=25), Augmentation()),
    ],
)
def test_kept_counts_are_those_of_the_events(options, augmentation, dtype, monkeypatch):
    store, config = make_store(20, most=60), BinningConfig(**options, dtype=dtype)
    monkeypatch.setattr(module, "FRAMES_SHARE", 1000)
    events, plain = framed(store), DeviceEvents(store)
    for indices in ([3, 1, 0, 3], [3, 4, 5], [*range(20)]):
        arguments = (torch.tensor(indices), config, augmentation)
        for key in ((7, 3), torch.tensor([7, 4])):
            counts = bin_batch(events, *arguments, key)
            expected = bin_batch(plain, *arguments, key)
            assert counts.dtype == dtype and torch.equal(counts, expected)
        assert is_kept(events, *arguments)
    out = torch.full(counts.shape, torch.nan)
    assert torch.equal(bin_batch(events, *arguments, key, out=out), expected)
    assert torch.equal(out.to(dtype), expected)


def test_counts_are_made_once_and_anew_for_another_binning(monkeypatch):
    monkeypatch.setattr(module, "FRAMES_SHARE", 1000)
    store, indices, made = make_store(9, most=60), torch.tensor([2, 5, 2]), []
    events, count = framed(store), module._count
    monkeypatch.setattr(
        module, "_count", lambda e, i, *a: made.append(i.tolist()) or count(e, i, *a)
    )
    for config in (BinningConfig(5), BinningConfig(6), BinningConfig(5)):
        made.clear()
        for augmentation in (None, SHIFT, SHIFT):
            bin_batch(events, indices, config, augmentation, (1, 2))
        bin_batch(events, torch.tensor([5, 6]), config)
        assert made == [[2, 5], [6]]


def test_a_part_of_a_set_keeps_its_counts_by_place_and_draws_by_number(monkeypatch):
    monkeypatch.setattr(module, "FRAMES_SHARE", 1000)
    store, rows = make_store(9, most=60), torch.tensor([4, 2, 8])
    part = DeviceEvents(store.subset(rows.numpy()), numbers=rows)
    part.frames = module.Frames()
    arguments = BinningConfig(25), SHIFT, (1, 2)
    expected = bin_batch(DeviceEvents(store), rows, *arguments)
    assert torch.equal(bin_batch(part, torch.arange(3), *arguments), expected)
    assert is_kept(part, torch.arange(3), *arguments[:2])


def test_counts_that_change_or_take_too_much_memory_are_not_kept(monkeypatch):
    store, indices = make_store(6, most=60), torch.arange(6)
    arguments = (indices, BinningConfig(25), SHIFT)
    assert not is_kept(framed(store), *arguments)
    size, taken = 6 * 25 * 700, 6 * len(store.times)
    monkeypatch.setattr(module, "FRAMES_SHARE", -(-size // taken))
    assert is_kept(framed(store), *arguments)
    monkeypatch.setattr(module, "FRAMES_MIB", 0)
    assert not is_kept(framed(store), *arguments)
    monkeypatch.setattr(module, "FRAMES_MIB", 1)
    for name in ("stretch", "jitter", "drop", "noise", "everything"):
        assert not is_kept(framed(store), indices, BinningConfig(25), AUGMENTATIONS[name])
    for options in (dict(channel_bin=5), dict(style="authors")):
        assert not is_kept(framed(store), indices, BinningConfig(25, **options), SHIFT)


@pytest.mark.parametrize("most", [255, 256])
def test_counts_above_a_byte_are_not_kept(most, monkeypatch):
    monkeypatch.setattr(module, "FRAMES_SHARE", 1000)
    events, config = framed(one_sample([0.1] * most, [3] * most)), BinningConfig(2)
    for _ in range(2):
        assert bin_batch(events, torch.tensor([0]), config)[0, 0, 3] == most
        assert is_kept(events, torch.tensor([0]), config, None) == (most == 255)


def test_an_augmentation_of_nothing_changes_nothing():
    events, indices, config = DeviceEvents(make_store(5)), torch.arange(5), BinningConfig(9)
    plain = bin_batch(events, indices, config)
    assert torch.equal(plain, bin_batch(events, indices, config, Augmentation(), (1, 2)))


def test_draws_are_uniform_and_independent():
    draws, count = module.Draws((1, 2), torch.arange(200)), torch.full((200,), 500)
    h = draws(module.JITTER, count).view(200, 500)
    u = h.double() / 2**32
    # of 100,000 uniform draws, with tolerances of five deviations
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert abs(
        torch.corrcoef(torch.stack([u[:, 1:].ravel(), u[:, :-1].ravel()]))[0, 1]
    ) < 5 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack([u[1:].ravel(), u[:-1].ravel()]))[0, 1]) < 5 / math.sqrt(
        n
    )
    z = module._near_normal(h) / module.BYTES_DEVIATION
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.std() - 1) < 5 / math.sqrt(n)
    assert len(h.unique()) > n - 10
    for bit in range(32):
        assert abs((h >> bit & 1).double().mean() - 0.5) < 2.5 / math.sqrt(n)
    other = draws(module.DROP, count).double() / 2**32
    assert abs(torch.corrcoef(torch.stack([u.ravel(), other]))[0, 1]) < 5 / math.sqrt(n)


def test_augmentations_do_what_they_say_on_average():
    S, n = 200, 200
    store = EventStore(
        times=np.tile((0.2 + 0.8 * (np.arange(n) + 0.5) / n).astype(f32), S),
        units=np.full(S * n, 30, np.uint16),
        offsets=np.arange(S + 1) * n,
        labels=np.zeros(S, np.int64),
        speakers=None,
        num_channels=60,
        class_names=("a",),
    )
    events, indices, config = DeviceEvents(store), torch.arange(S), BinningConfig(400, 2.0)

    def counts(**options):
        return bin_batch(events, indices, config, Augmentation(**options), (0, 0))

    shifted = counts(channel_shift=10).sum((0, 1)).nonzero().ravel()
    assert shifted.tolist() == list(range(20, 41))
    last = 399 - counts(time_stretch=0.2).sum(2).flip(0).gt(0).int().argmax(0)
    assert 159 <= last.min() < 168 and 232 < last.max() <= 240
    kept = counts(drop=0.25).sum() / (S * n)
    assert abs(kept - 0.75) < 5 * math.sqrt(0.25 * 0.75 / (S * n))
    noisy = counts(noise=0.1)
    assert noisy.sum((0, 2)).unique().tolist() == [220]
    # the background begins before the sample's first event and ends with its last
    assert noisy[:38].sum() > 0.15 * 20 * S and noisy[201:].sum() == 0
    assert len(noisy.sum((0, 1)).nonzero()) == 60
    some = counts(noise=0.0125).sum((0, 2)) - n
    assert some.unique().tolist() == [2, 3] and abs(some.mean() - 2.5) < 0.2
    # of a uniform density that starts at 0.2 s, deviation / sqrt(2 pi) crosses the start
    early = counts(time_jitter=0.05)[:40].sum() / (S * n / 0.8)
    assert early == pytest.approx(0.05 / math.sqrt(2 * math.pi), rel=0.05)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(time_bins=0), "time_bins: expected at least 1, got 0"),
        (dict(time_bins=2.0), "time_bins: expected at least 1, got 2.0"),
        (dict(time_bins=4, max_time=0), "max_time: expected seconds above 0, got 0"),
        (dict(time_bins=4, max_time=math.inf), "max_time: expected seconds above 0, got inf"),
        (dict(time_bins=4, channel_bin=0), "channel_bin: expected at least 1, got 0"),
        (dict(time_bins=4, overflow="wrap"), "overflow: expected one of drop, clip, got 'wrap'"),
        (dict(time_bins=4, style="ours"), "style: expected one of counts, authors, got 'ours'"),
        (dict(time_bins=4, dtype=torch.int64), "dtype: expected one of torch.float32"),
        (dict(time_bins=4, style="authors", max_time=1.4), "max_time: the authors' .* only 1.0"),
        (dict(time_bins=4, style="authors", channel_bin=5), "channel_bin: the authors' .* only 1"),
        (
            dict(time_bins=4, style="authors", overflow="clip"),
            "overflow: the authors' .* only drop",
        ),
    ],
)
def test_an_impossible_binning_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        BinningConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(channel_shift=-1),
        dict(time_stretch=1.0),
        dict(time_jitter=-0.1),
        dict(drop=1.0),
        dict(noise=math.nan),
        dict(noise=1e6),
    ],
)
def test_an_impossible_augmentation_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected 0 <= value"):
        Augmentation(**options)


def test_wrong_arguments_of_bin_batch_are_refused():
    events, config = DeviceEvents(make_store(3)), BinningConfig(4)
    with pytest.raises(ValueError, match=r"indices: expected int64 \[B\], got torch.int32 \[2\]"):
        bin_batch(events, torch.tensor([0, 1], dtype=torch.int32), config)
    with pytest.raises(ValueError, match=r"indices: .*got torch.int64 \[1, 1\]"):
        bin_batch(events, torch.tensor([[0]]), config)
    with pytest.raises(ValueError, match="draw_key: expected two integers"):
        bin_batch(events, torch.tensor([0]), config, Augmentation(drop=0.1))


def test_the_windows_by_default_are_the_data_sets_and_the_authors():
    assert BinningConfig(20).max_time == 1.4
    assert BinningConfig(20, style="authors").max_time == 1.0


def test_on_a_cpu_the_events_share_the_stores_memory():
    store = make_store(5)
    events = DeviceEvents(store)
    assert events.times.data_ptr() == store.times.ctypes.data
    assert events.units.data_ptr() == store.units.ctypes.data
    assert len(events) == 5 and torch.equal(events.labels, torch.from_numpy(store.labels))
