"""Counts of binned events and their augmentation, by torch and by the kernel (interpreted where
there is no GPU), against loops over single events."""

import dataclasses
import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpn_triton.data import augmentation
from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, batch_input, bin_batch
from gpn_triton.data.events import DeviceEvents
from tests import interpreted_bfloat16
from tests.stores import make_store, store_of

f32 = np.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "cpu", *(["triton"] if importlib.util.find_spec("triton") else []))
SHIFT, EVERYTHING = (
    Augmentation(channel_shift=30),
    Augmentation(20, 0.1, 0.005, 0.1, 0.1, 0.2, 0.4),
)
AUGMENTATIONS = {
    "shift": SHIFT,
    "a shift beyond all channels": Augmentation(channel_shift=5000),
    "channel stretch": Augmentation(channel_stretch=0.4),
    "channel gain": Augmentation(channel_gain=0.7),
    "stretch": Augmentation(time_stretch=0.3),
    "jitter": Augmentation(time_jitter=0.02),
    "a jitter of seconds": Augmentation(time_jitter=3.0),
    "drop": Augmentation(drop=0.3),
    "noise": Augmentation(noise=0.4),
    "more noise than events": Augmentation(noise=2.5),
    "nothing": Augmentation(),
    "everything": EVERYTHING,
}
KEYS = ((7, 3), (2**32 - 1, 2**31))


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
        if a.channel_stretch:
            u = f32(naive_draw(key, 7, k) >> 8) / f32(2**24)
            factor = f32(1) + f32(a.channel_stretch) * (f32(2) * u - f32(1))
            unit = int(np.floor(f32(unit) * factor))
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
        if a.channel_gain and 0 <= unit < store.num_channels:
            place = unit * 7 * 256 // store.num_channels
            top = round(a.channel_gain * 2**16) + 1
            low, high = (naive_draw(key, 8, k, place // 256 + m) * top // 2**32 for m in (0, 1))
            level = low + (high - low) * (place % 256) // 256
            dropped = dropped or naive_draw(key, 9, k, j) // 2**16 < level
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
    counts = np.zeros((T, len(indices), math.ceil(store.num_channels / width)), f32)
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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and programs of the kernel a sample, for samples of few events."""
    if len(BACKENDS) > 1:
        from gpn_triton.kernels import binning

        monkeypatch.setattr(binning, "BLOCK", 16)
        monkeypatch.setattr(binning, "SPLIT", 2)
        if DEVICE == "cpu":
            interpreted_bfloat16.correct(monkeypatch)


def assert_as_the_loop(store, indices, config, augmentation=None, key=(0, 0)):
    """Hold the counts of torch and of the kernel against the loop's, to the last bit."""
    expected = naive_counts(store, indices, config, augmentation or Augmentation(), key)
    for backend in BACKENDS:
        device = DEVICE if backend == "triton" else "cpu"
        counts = bin_batch(
            DeviceEvents(store, device), torch.tensor(indices, device=device), config,
            augmentation, torch.tensor(key, device=device), backend=backend,
        )  # fmt: skip
        assert counts.dtype == config.dtype
        np.testing.assert_array_equal(counts.float().cpu().numpy(), expected)
    return counts.cpu()


@settings(max_examples=40, deadline=None)
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
    rng = np.random.default_rng(seed)
    samples = [(sorted(t), rng.integers(0, channels, len(t))) for t in times]
    store = store_of(*samples, channels=channels)
    config = BinningConfig(time_bins, max_time, channel_bin, overflow)
    assert_as_the_loop(store, [*range(len(times)), 0], config)


END = f32(1.4)
WINDOW = store_of(([0, np.nextafter(END, f32(0)), END, 1.5], [3, 4, 5, 6]))
HALVES = store_of((np.float16([0, 0.01, 0.5, 0.9, 0.91, 1.3]), [1, 2, 699, 3, 4, 5]))
# of one sample: how it is binned, and its counts as {(bin, column): count}
EDGES = {
    "the window holds 0 but not its end": (
        WINDOW, BinningConfig(20, 1.4), {(0, 3): 1, (19, 4): 1},
    ),
    "the nearest bins hold what lies outside": (
        WINDOW, BinningConfig(20, 1.4, overflow="clip"),
        {(0, 3): 1, (19, 4): 1, (19, 5): 1, (19, 6): 1},
    ),
    "events of one cell add up": (
        store_of(([0.11, 0.12, 0.13, 0.91], [7, 7, 7, 699])), BinningConfig(10),
        {(1, 7): 3, (9, 699): 1},
    ),
    "units above 32767 have their place": (
        store_of(([0.1, 0.2], [40_000, 65_535]), channels=65_536),
        BinningConfig(1, dtype=torch.float16), {(0, 40_000): 1, (0, 65_535): 1},
    ),
    "the authors' binning loses the end and channel 0": (
        HALVES, BinningConfig(10, style="authors"),
        {(0, 699): 1, (1, 698): 1, (5, 1): 1, (9, 697): 1},
    ),
    "a sample without events is empty": (store_of(([], [])), BinningConfig(4), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", EDGES)
def test_edges_are_as_promised(case):
    store, config, expected = EDGES[case]
    counts = assert_as_the_loop(store, [0, 0], config)
    cells = {tuple(at): int(counts[at[0], 0, at[1]]) for at in counts[:, 0].nonzero().tolist()}
    assert cells == expected
    assert_as_the_loop(store, [0, 0], config, EVERYTHING, (1, 2))
    for backend in BACKENDS:
        events = DeviceEvents(store, DEVICE if backend == "triton" else "cpu")
        none = torch.tensor([], dtype=torch.int64, device=events.times.device)
        assert bin_batch(events, none, config, SHIFT, (1, 2), backend=backend).shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_counts_come_in_the_dtype_asked_for_whatever_the_batch(dtype):
    # sample 1 is empty, sample 3 comes twice
    config = BinningConfig(20, 0.7, channel_bin=7, dtype=dtype)
    assert_as_the_loop(make_store(11), [3, *range(11)], config, EVERYTHING, (1, 2))


def on_edges(time_bins, channels=700):
    """Samples with times on the authors' edges, and the units that they treat apart."""
    store = make_store(4, most=120, channels=channels)
    times, units = store.times.astype(np.float16).astype(f32), store.units.copy()
    edges = np.float16(np.arange(time_bins)[-20:] / time_bins).astype(f32)
    n = min(len(edges), store.offsets[1])
    times[:n], units[1:n:3], units[2:n:3] = edges[:n], 0, channels - 1
    return dataclasses.replace(store, times=times, units=units)


@pytest.mark.parametrize("time_bins", [1, 2, 20, 100, 1000])
def test_the_authors_binning_is_their_loop(time_bins):
    config = BinningConfig(time_bins, style="authors")
    counts = assert_as_the_loop(on_edges(time_bins), [0, 2, 1, 3], config)
    assert not counts[:, :, 0].any()
    assert_as_the_loop(on_edges(time_bins), [0, 2], config, SHIFT, (1, 1))


@pytest.mark.parametrize("overflow", ["drop", "clip"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_counts_are_those_of_a_loop(name, overflow):
    store, config = make_store(8, most=80), BinningConfig(25, 1.0, overflow=overflow)
    plain = bin_batch(DeviceEvents(store), torch.tensor([5, 1, 0, 7]), config)
    for key in KEYS:
        counts = assert_as_the_loop(store, [5, 1, 0, 7], config, AUGMENTATIONS[name], key)
        assert torch.equal(counts, plain) == (name == "nothing")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logarithms_are_of_counts_over_the_samples_mean(backend, dtype):
    samples = [(np.linspace(0, 0.9, n), [7 * k % 30 for k in range(n)]) for n in (90, 0, 9)]
    store = store_of(*samples, channels=30)
    events = DeviceEvents(store, DEVICE if backend == "triton" else "cpu")
    indices = torch.tensor([2, 0, 1], device=events.labels.device)
    options = dict(time_bins=6, channel_bin=4, dtype=dtype)

    def binned(scale, steps=None):
        config = BinningConfig(**options, scale=scale)
        return bin_batch(events, indices, config, EVERYTHING, (3, 1), backend, steps).float().cpu()

    counts, logs = binned("counts"), binned("log")
    mean = counts.mean((0, 2), keepdim=True)
    expected = torch.where(mean > 0, counts / mean, 0).log1p()
    torch.testing.assert_close(
        logs, expected, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0
    )
    assert logs[:, 0].any() and not logs[:, 2].any()
    # the mean is the whole sample's, whatever is taken of it
    pieces = torch.cat([binned("log", (0, 4)), binned("log", (4, 6))])
    assert torch.equal(pieces, logs)


def test_a_draw_does_not_depend_on_the_batch_and_changes_with_the_key():
    events, config = DeviceEvents(make_store(9)), BinningConfig(25, 1.0)

    def counts(indices, key):
        return bin_batch(events, torch.tensor(indices), config, EVERYTHING, key)

    together = counts([*range(9)], (3, 5))
    backwards = counts([8, 7, 6, 5, 4, 3, 2, 1, 0], torch.tensor([3, 5]))
    assert torch.equal(together, backwards.flip(1))
    assert torch.equal(together[:, 4:5], counts([4], (3, 5)))
    for key in ((3, 6), (4, 5), (5, 3)):
        assert not torch.equal(together, counts([*range(9)], key))


def test_draws_are_uniform_and_independent():
    draws, count = augmentation.Draws((1, 2), torch.arange(200)), torch.full((200,), 500)
    h = draws(augmentation.JITTER, count).view(200, 500)
    u = h.double() / 2**32
    other = draws(augmentation.DROP, count).double() / 2**32
    # of 100,000 uniform draws, with tolerances of five deviations
    n, deviation = u.numel(), u.numel() ** -0.5
    assert abs(u.mean() - 0.5) < 5 * deviation / math.sqrt(12)
    assert abs(u.var() - 1 / 12) < 5 * deviation / math.sqrt(180)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, other)):
        assert abs(torch.corrcoef(torch.stack([a.ravel(), b.ravel()]))[0, 1]) < 5 * deviation
    z = augmentation.near_normal(h) / augmentation.BYTES_DEVIATION
    assert abs(z.mean()) < 5 * deviation and abs(z.std() - 1) < 5 * deviation
    assert len(h.unique()) > n - 10
    for bit in range(32):
        assert abs((h >> bit & 1).double().mean() - 0.5) < 2.5 * deviation


def test_augmentations_do_what_they_say_on_average():
    S, n = 200, 200
    times = 0.2 + 0.8 * (np.arange(n) + 0.5) / n
    store = store_of(*[(times, [30] * n)] * S, channels=60)
    events, indices, config = DeviceEvents(store), torch.arange(S), BinningConfig(400, 2.0)

    def counts(**options):
        return bin_batch(events, indices, config, Augmentation(**options), (0, 0))

    shifted = counts(channel_shift=10).sum((0, 1)).nonzero().ravel()
    assert shifted.tolist() == list(range(20, 41))
    stretched = counts(channel_stretch=0.5).sum((0, 1)).nonzero().ravel()
    assert stretched.tolist() == list(range(15, 45))
    # the mean of a probability between 0 and 0.8 is 0.4; samples differ in theirs
    weakened = counts(channel_gain=0.8).sum((0, 2)) / n
    assert abs(weakened.mean() - 0.6) < 0.06 and weakened.min() < 0.3 and weakened.max() > 0.9
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


@pytest.mark.parametrize(("options", "expected"), [
    (dict(time_bins=0), "time_bins: expected at least 1, got 0"),
    (dict(time_bins=2.0), "time_bins: expected at least 1, got 2.0"),
    (dict(max_time=0), "max_time: expected seconds above 0, got 0"),
    (dict(max_time=math.inf), "max_time: expected seconds above 0, got inf"),
    (dict(channel_bin=0), "channel_bin: expected at least 1, got 0"),
    (dict(overflow="wrap"), "overflow: expected one of drop, clip, got 'wrap'"),
    (dict(style="ours"), "style: expected one of counts, authors, got 'ours'"),
    (dict(dtype=torch.int64), "dtype: expected one of torch.float32"),
    (dict(style="authors", max_time=1.4), "max_time: the authors' .* only 1.0"),
    (dict(style="authors", channel_bin=5), "channel_bin: the authors' .* only 1"),
    (dict(style="authors", overflow="clip"), "overflow: the authors' .* only drop"),
    (dict(style="authors", scale="log"), "scale: the authors' .* only counts"),
    (dict(scale="sqrt"), "scale: expected one of counts, log, got 'sqrt'"),
])  # fmt: skip
def test_an_impossible_binning_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        BinningConfig(**{"time_bins": 4, **options})


@pytest.mark.parametrize(("name", "value"), [
    ("channel_shift", -1), ("channel_stretch", 1.0), ("channel_gain", 1.0),
    ("time_stretch", 1.0),
    ("time_jitter", -0.1), ("drop", 1.0), ("noise", math.nan), ("noise", 1e6),
])  # fmt: skip
def test_an_impossible_augmentation_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected 0 <= value"):
        Augmentation(**{name: value})


def test_wrong_arguments_of_bin_batch_are_refused():
    events, config = DeviceEvents(make_store(3)), BinningConfig(4)
    with pytest.raises(ValueError, match=r"indices: expected int64 \[B\], got torch.int32 \[2\]"):
        bin_batch(events, torch.tensor([0, 1], dtype=torch.int32), config)
    with pytest.raises(ValueError, match=r"indices: .*got torch.int64 \[1, 1\]"):
        bin_batch(events, torch.tensor([[0]]), config)
    with pytest.raises(ValueError, match="draw_key: expected two integers"):
        batch_input(events, torch.tensor([0]), config, Augmentation(drop=0.1), None, False)
