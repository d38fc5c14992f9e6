"""Data sets of growing temporal complexity: what must be told apart is an order, over gaps.

A sample is a row of cues. A cue is a burst of spikes in a band of channels of its own, CUE seconds
long, in noise over all channels. There are six classes in every task, with equal chances:

    order-K      K = 1: six cues, no order needed; 2: three pairs of cues, each in both orders;
                 3 and 4: six orders of the same K cues
    gap-MS       the pairs of order-2 with so many milliseconds of noise between the cues
    length-K     the pairs of order-2 with K other cues, drawn at random, between them
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from gpn_triton.data.events import EventStore

CHANNELS, BAND, CUES = 700, 50, 14
CUE, START = 0.06, 0.05
# mean spikes of a cue, and of the noise in a second
SPIKES, NOISE = 60, 200.0
PAIRS = ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4))
TASKS = (
    "order-1", "order-2", "order-3", "order-4", "gap-0", "gap-100", "gap-200", "gap-400",
    "length-0", "length-2", "length-4", "length-8",
)  # fmt: skip


def parse_task(name: str) -> tuple[str, int] | None:
    """A task's series and its number; None if the name is not one of TASKS."""
    if name not in TASKS:
        return None
    series, _, number = name.partition("-")
    return series, int(number)


def task_events(name: str, samples: int, seed: int) -> EventStore:
    """Make samples of a task, the classes in equal shares.

    Args:
        name: one of TASKS. samples: at least 6. seed: of everything that is drawn.
    Raises:
        ValueError: an unknown task or too few samples.
    """
    found = parse_task(name)
    if found is None:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    if samples < len(PAIRS):
        raise ValueError(f"samples: expected at least {len(PAIRS)}, got {samples}")
    (series, number), rng = found, np.random.default_rng(seed)
    rows = list(PAIRS)
    if series == "order" and number == 1:
        rows = [(k,) for k in range(6)]
    elif series == "order" and number > 2:
        orders = list(permutations(range(number)))
        rows = [orders[k] for k in np.linspace(0, len(orders) - 1, 6).astype(int)]
    gap = number / 1000 if series == "gap" else 0.0
    labels = rng.permutation(np.arange(samples) % len(rows))
    all_times, all_units = [], []
    for label in labels:
        row = list(rows[label])
        if series == "length":
            row[1:1] = rng.integers(6, CUES, number)
        begins = START * rng.random() + np.arange(len(row)) * CUE
        begins[1:] += gap
        times = [begin + CUE * rng.random(rng.poisson(SPIKES)) for begin in begins]
        units = [
            cue * BAND + rng.integers(0, BAND, len(t)) for cue, t in zip(row, times, strict=True)
        ]
        end = begins[-1] + CUE
        noise = rng.poisson(NOISE * end)
        times.append(end * rng.random(noise))
        units.append(rng.integers(0, CHANNELS, noise))
        flat = np.concatenate(times)
        order = np.argsort(flat, kind="stable")
        all_times.append(flat[order])
        all_units.append(np.concatenate(units)[order])
    lengths = [len(times) for times in all_times]
    return EventStore(
        np.concatenate(all_times).astype(np.float32),
        np.concatenate(all_units).astype(np.uint16),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels.astype(np.int64),
        None,
        CHANNELS,
        tuple("".join(chr(ord("a") + cue) for cue in row) for row in rows),
    )
