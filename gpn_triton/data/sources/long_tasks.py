"""Tasks made from a seed, in which a network must keep what it saw over many steps.

recall: a cue, a gap, a query. A volley of spikes in the first bin says which symbol; nothing comes
until the last bin, whose volley asks for it. What the network says is read there.

adding: a stream of numbers in 0..1, two of which are marked, one in each half; their sum is to be
said at the end. Always saying 1 errs by a mean square of 1/6.

add_pairs: of any set of events, two samples one after the other; the sum of their labels is to be
said.

Source: Hochreiter and Schmidhuber, Neural Computation 1997, for adding, with today's usual range.
"""

from typing import NamedTuple

import numpy as np

from gpn_triton.data.dense import DenseStore
from gpn_triton.data.events import EventStore

# spikes of a cue or a query, all on one channel in one bin
VOLLEY = 5


class MadeSplits(NamedTuple):
    """Three stores of one kind, made independently of each other."""

    train: EventStore | DenseStore
    valid: EventStore | DenseStore
    test: EventStore | DenseStore


def long_task_splits(
    name: str, samples: int, seed: int, time_bins: int, max_time: float, symbols: int
) -> MadeSplits:
    """Make training, validation and test sets of a task.

    Args:
        name: recall or adding. samples: training samples; validation and test get a fifth each.
        seed: 0 or more; the samples of different seeds and of the three sets are unrelated.
        time_bins: T. max_time: the window of all bins, seconds, and symbols: of recall.
    Raises:
        ValueError: fewer bins than the task needs.
    """
    parts = (samples, *[-(-samples // 5)] * 2)
    if name == "adding":
        return MadeSplits(*(adding(S, time_bins, 3 * seed + k) for k, S in enumerate(parts)))
    return MadeSplits(
        *(recall(S, time_bins, max_time, symbols, 3 * seed + k) for k, S in enumerate(parts))
    )


def recall(samples: int, time_bins: int, max_time: float, symbols: int, seed: int) -> EventStore:
    """Cues of `symbols` channels in bin 0, a query on one more channel in bin T - 1.

    Raises:
        ValueError: fewer than 2 bins.
    """
    if time_bins < 2:
        raise ValueError(f"time_bins: expected at least 2 for recall, got {time_bins}")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(samples) % symbols)
    units = np.stack([labels, np.full(samples, symbols)], 1).repeat(VOLLEY, 1)
    # in the middle of their bins, where no rounding can move them
    at = (np.array([0.5, time_bins - 0.5]) * (max_time / time_bins)).astype(np.float32)
    return EventStore(
        times=np.tile(at.repeat(VOLLEY), samples),
        units=units.astype(np.uint16).ravel(),
        offsets=np.arange(samples + 1, dtype=np.int64) * (2 * VOLLEY),
        labels=labels.astype(np.int64),
        speakers=None,
        num_channels=symbols + 1,
        class_names=tuple(map(str, range(symbols))),
    )


def adding(samples: int, time_bins: int, seed: int) -> DenseStore:
    """Numbers in 0..1 on channel 0, and on channel 1 a 1 where they count: once in each half.

    Raises:
        ValueError: fewer than 2 bins.
    """
    if time_bins < 2:
        raise ValueError(f"time_bins: expected at least 2 for adding, got {time_bins}")
    rng = np.random.default_rng(seed)
    inputs = np.zeros((samples, time_bins, 2), np.float32)
    inputs[..., 0] = rng.random((samples, time_bins), np.float32)
    labels, half, row = np.zeros(samples, np.float32), time_bins // 2, np.arange(samples)
    for low, high in ((0, half), (half, time_bins)):
        at = rng.integers(low, high, samples)
        inputs[row, at, 1] = 1
        labels += inputs[row, at, 0]
    return DenseStore(inputs, labels, ("sum",))


def add_pairs(store: EventStore, max_time: float, seed: int) -> EventStore:
    """As many samples, each an old one with another behind it, labelled with the sum of theirs.

    Args:
        store: the samples; each is the first of one pair and the second of another.
        max_time: seconds of a pair. Each sample has half of it; what lies beyond is dropped.
        seed: of who meets whom.
    Returns:
        the pairs, without speakers; 2 K - 1 classes of K.
    """
    half = np.float32(max_time / 2)
    stays = store.times < half
    offsets = np.concatenate([[0], np.cumsum(stays)])[store.offsets]
    times, units = store.times[stays], store.units[stays]
    second = np.random.default_rng(seed).permutation(len(store))
    spans = list(map(slice, offsets[:-1], offsets[1:]))
    pairs = [(spans[a], spans[b]) for a, b in enumerate(second)]
    counts = np.diff(offsets)
    return EventStore(
        times=np.concatenate([t for a, b in pairs for t in (times[a], times[b] + half)]),
        units=np.concatenate([units[span] for pair in pairs for span in pair]),
        offsets=np.concatenate([[0], np.cumsum(counts + counts[second])]).astype(np.int64),
        labels=store.labels + store.labels[second],
        speakers=None,
        num_channels=store.num_channels,
        class_names=tuple(map(str, range(2 * len(store.class_names) - 1))),
    )
