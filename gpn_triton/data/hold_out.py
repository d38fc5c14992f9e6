"""Validation samples split off a training set: whole speakers, or at random class by class."""

import numpy as np

from gpn_triton.data.events import EventStore

METHODS = ("auto", "speakers", "stratified")
# auto gives up whole speakers where they would take more of the samples than this
MOST_FOR_SPEAKERS = 0.15
# random orders of the speakers that are tried, and how near to the fraction is near enough
_ORDERS, _NEAR = 100, 0.2
# sample numbers of the training and of the held-out part

Halves = tuple[np.ndarray, np.ndarray]


def hold_out_speakers(store: EventStore, fraction: float, seed: int) -> Halves:
    """Split so that nobody who speaks in one part is heard in the other.

    Speakers are held out in a random order, at least one, as long as each brings their samples
    nearer to the fraction; of many orders the first that ends near it counts, else the nearest. A
    class never loses all its training samples.

    Args:
        store: the samples, with speakers. seed: of the random order.
        fraction: share of the samples to hold out, 0 < fraction < 1.
    Returns:
        training and held-out sample numbers, int64, ascending, both at least one.
    Raises:
        ValueError: speakers unknown, fewer than two, or none that can be spared.
    """
    _check_fraction(fraction)
    if store.speakers is None:
        raise ValueError("speakers: expected to be known, the data do not name them")
    speakers, speaker_of = np.unique(store.speakers, return_inverse=True)
    if len(speakers) < 2:
        raise ValueError(f"speakers: expected at least 2, the data have {len(speakers)}")
    # samples by speaker and class
    table = np.zeros((len(speakers), len(store.class_names)), np.int64)
    np.add.at(table, (speaker_of, store.labels), 1)
    sizes, target = table.sum(1), fraction * len(store)
    rng = np.random.default_rng(seed)
    best, best_distance = None, np.inf
    for _ in range(_ORDERS):
        held = np.zeros(len(speakers), bool)
        left, taken = table.sum(0), 0
        for k in rng.permutation(len(speakers)):
            nearer = not taken or abs(target - taken - sizes[k]) < abs(target - taken)
            if nearer and not ((left == table[k]) & (left > 0)).any():
                held[k] = True
                left, taken = left - table[k], taken + sizes[k]
        if taken and abs(target - taken) < best_distance:
            best, best_distance = held, abs(target - taken)
        if best_distance <= _NEAR * target:
            break
    if best is None:
        raise ValueError("speakers: expected one who is not the only one to speak some class")
    return np.flatnonzero(~best[speaker_of]), np.flatnonzero(best[speaker_of])


def one_speaker(store: EventStore, speaker: int) -> Halves:
    """Split so that one speaker, and nobody else, is held out.

    Args:
        store: the samples, with speakers. speaker: the one to hold out.
    Returns:
        training and held-out sample numbers, int64, ascending, both at least one.
    Raises:
        ValueError: speakers unknown, no such speaker, or only this one.
    """
    if store.speakers is None:
        raise ValueError("test_speaker: expected data that name their speakers, these do not")
    held = store.speakers == speaker
    if not held.any() or held.all():
        there = ", ".join(map(str, np.unique(store.speakers)[:20]))
        raise ValueError(f"test_speaker: expected one of several ({there}), got {speaker}")
    return np.flatnonzero(~held), np.flatnonzero(held)


def stratified_split(store: EventStore, fraction: float, seed: int) -> Halves:
    """Split at random, every class in the same proportion.

    Args:
        store: the samples.
        fraction: share of each class's samples to hold out, 0 < fraction < 1; at least one and not
            all of a class with two or more, none of a class with one.
        seed: of the random choice.
    Returns:
        training and held-out sample numbers, int64, ascending, both at least one.
    Raises:
        ValueError: no class has two samples.
    """
    _check_fraction(fraction)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(store), bool)
    for k in range(len(store.class_names)):
        own = rng.permutation(np.flatnonzero(store.labels == k))
        held[own[: min(max(round(fraction * len(own)), 1), len(own) - 1)]] = len(own) > 1
    if not held.any():
        raise ValueError("stratified: expected a class with at least 2 samples, found none")
    return np.flatnonzero(~held), np.flatnonzero(held)


def choose_split(
    store: EventStore, method: str, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Split by the method asked for, or by whole speakers where that is affordable.

    Args:
        store: the samples.
        method: speakers, stratified, or auto: speakers if they are known and some of them make
            between half the fraction and 15 % of the samples, else stratified.
        fraction: share to hold out, 0 < fraction < 1. seed: of the choice.
    Returns:
        training and held-out sample numbers, and in one line which method was used and why.
    Raises:
        ValueError: an unknown method, or one asked for by name that the data do not allow.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    reason = ""
    if method != "stratified":
        try:
            kept, held = hold_out_speakers(store, fraction, seed)
        except ValueError as error:
            if method == "speakers":
                raise
            reason = f" ({error})"
        else:
            share, who = len(held) / len(store), np.unique(store.speakers[held])
            if method == "speakers" or fraction / 2 <= share <= MOST_FOR_SPEAKERS:
                names = ", ".join(map(str, who[:8])) + (", ..." if len(who) > 8 else "")
                return kept, held, f"held-out speakers {names}: {100 * share:.1f} % of the samples"
            reason = f" (whole speakers would take {100 * share:.0f} % of the samples)"
    kept, held = stratified_split(store, fraction, seed)
    share = 100 * len(held) / len(store)
    return kept, held, f"random samples of every class: {share:.1f} %{reason}"


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected 0 < fraction < 1, got {fraction!r}")
