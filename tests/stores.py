"""Small event stores for the data tests."""

import numpy as np

from gpn_triton.data.events import EventStore


def make_store(
    samples=12, classes=3, speakers=4, channels=700, most=40, end=1.2, seed=0, empty=True
):
    """Random samples of 0..most events; labels and speakers take turns; sample 1 is empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most + 1, samples)
    if empty and samples > 1:
        lengths[1] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = rng.random(offsets[-1], dtype=np.float32) * np.float32(end)
    for a, b in zip(offsets, offsets[1:], strict=False):
        times[a:b].sort()
    return EventStore(
        times=times,
        units=rng.integers(0, channels, offsets[-1]).astype(np.uint16),
        offsets=offsets.astype(np.int64),
        labels=np.arange(samples) % classes,
        speakers=(np.arange(samples) // classes % speakers).astype(np.int32) if speakers else None,
        num_channels=channels,
        class_names=tuple(f"word {k}" for k in range(classes)),
    )
