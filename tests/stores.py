"""Small event stores for tests."""

import numpy as np

from gpn_triton.data.events import EventStore


def store_of(*samples, channels=700):
    """A store of these samples, each (times, units), of one class."""
    lengths = [len(times) for times, _ in samples]
    return EventStore(
        times=np.concatenate([np.array(times, np.float32) for times, _ in samples]),
        units=np.concatenate([np.array(units, np.uint16) for _, units in samples]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.zeros(len(samples), np.int64),
        speakers=None,
        num_channels=channels,
        class_names=("a",),
    )


def make_store(
    samples=12, classes=3, speakers=4, channels=700, least=1, most=40, end=1.2, seed=0, empty=True,
    band=None,
):  # fmt: skip
    """Random samples of least..most events; labels and speakers take turns; sample 1 is empty.

    band: (width, step): events of class k fall into so many channels from k * step on; None: all.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, most + 1, samples)
    if empty and samples > 1:
        lengths[1] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = rng.random(offsets[-1], dtype=np.float32) * np.float32(end)
    for a, b in zip(offsets, offsets[1:], strict=False):
        times[a:b].sort()
    labels = np.arange(samples) % classes
    width, step = band or (channels, 0)
    units = rng.integers(0, width, offsets[-1]) + np.repeat(step * labels, lengths)
    return EventStore(
        times=times,
        units=units.astype(np.uint16),
        offsets=offsets.astype(np.int64),
        labels=labels,
        speakers=(np.arange(samples) // classes % speakers).astype(np.int32) if speakers else None,
        num_channels=channels,
        class_names=tuple(f"word {k}" for k in range(classes)),
    )
