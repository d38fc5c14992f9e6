"""Spoken-digit-like spikes made from a seed: the embedded default data set.

Words. A small language of PHONES phones is drawn once and is the same for every seed. A phone is
three formants (bands of channels, each gliding over GLIDE channels at most) and a short, wide burst
at its onset. A word, the class, is SEGMENTS different phones in a row, and words come in families:
the same phones in the orders of ORDERS, where every phone stands once at every place and follows
every other phone once. Spikes summed over time thus tell the family and, but for traces (the voice
falls over the word), not the word: time must matter. The class is named by its phones' letters.

Speakers. A speaker is a number, its traits drawn from that number alone: vocal tract (a shift and
a stretch of all channels), tempo and loudness. synthetic_splits gives training, validation and test
sets speakers of their own, the same for every seed.

Utterances. Each varies its start, the phones' durations, levels and tracks, and the gaps between
phones. Spikes then are drawn one by one: when, denser after the onset as inner ears adapt; and
where, around the track at that moment. Background noise covers all channels until the end. A sample
has about 2,700 spikes (2,000 to 4,000 as a rule) and is 0.45 to 1.1 s long.

The same arguments give the same bits, as long as numpy's generator stays what it is.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from gpn_triton.data.events import EventStore

CHANNELS = 700
PHONES, SEGMENTS = 12, 4
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))
# another number is another language
LANGUAGE = 1

# a phone's tracks, three formants and the burst: where the centre lies, how far it glides at most,
# its deviation (channels), its mean spikes at DURATION, and the share of the phone that it lasts
CENTRE = ((90, 240), (270, 430), (460, 610), (150, 550))
GLIDE = (60, 60, 60, 0)
WIDTH = (10, 14, 18, 45)
SPIKES = (180, 150, 110, 80)
LASTS = (1.0, 1.0, 1.0, 0.2)
# a spike falls at the share r ** ADAPTATION of its track, r uniform: 1 is an even rate
ADAPTATION = 1.6

# means: seconds of a phone and of the gap behind it, range of a word's start in seconds, level of
# a phone relative to the one before it, noise spikes a second and channel
DURATION, GAP = 0.13, 0.04
START = (0.01, 0.08)
FALL = 0.87
NOISE = 2.0

# furthest deviations, all uniform. Speakers: channels, share of the distance from the middle
# channel, share of the time, logarithm of the level. Utterances: channels of each track, share of
# each phone's duration (an inventory's phones differ by PHONE_LENGTH) and of each gap, logarithm of
# the level, once for the word and once for each phone
SPEAKER_SHIFT, SPEAKER_STRETCH, SPEAKER_TEMPO, SPEAKER_LOUDNESS = 30.0, 0.08, 0.15, 0.15
TRACK_SHIFT, PHONE_LENGTH, LENGTH, GAP_LENGTH, LEVEL = 19.0, 0.15, 0.25, 1.0, 0.2

# speaker k's traits are the fractions of k times these: any few speakers in a row are spread evenly
# over all traits (the powers of 1 / g, g ** 5 = g + 1, spread four numbers best)
TRAIT_STEPS = 1.1673039782614187 ** -np.arange(1.0, 5.0)

# samples rendered at once, which bounds the working memory and does not change the result
CHUNK = 512
# times are whole microseconds
TICKS = 1_000_000


class SyntheticSplits(NamedTuple):
    """Three EventStores of which no two share a speaker."""

    train: EventStore
    valid: EventStore
    test: EventStore


def synthetic_splits(samples: int = 2000, seed: int = 0, num_classes: int = 20) -> SyntheticSplits:
    """Make training, validation and test sets with 24, 8 and 8 speakers of their own.

    Args:
        samples: training samples; validation and test get a fifth of it each, at least 200.
        seed: 0 or more; the utterances of different seeds and of the three sets are unrelated.
        num_classes: words, 2 to 1980.
    Returns:
        The three stores; the speakers' numbers are 0-23, 24-31 and 32-39.
    Raises:
        ValueError: an argument out of range.
    """
    held_out = max(200, samples // 5)
    parts = (samples, range(24)), (held_out, range(24, 32)), (held_out, range(32, 40))
    return SyntheticSplits(
        *(synthetic_events(*part, 3 * seed + k, num_classes) for k, part in enumerate(parts))
    )


def synthetic_events(
    samples: int, speakers: Sequence[int], seed: int, num_classes: int = 20
) -> EventStore:
    """Make utterances of the synthetic language, words and speakers in equal shares.

    Args:
        samples: how many, at least 1. speakers: numbers of those who speak, 0 or more.
        seed: of everything that differs from utterance to utterance, 0 or more.
        num_classes: words, 2 to 1980; the words of a smaller number are the first of a larger.
    Returns:
        The store: 700 channels, classes named by their phones' letters.
    Raises:
        ValueError: an argument out of range.
    """
    words, centre, glide, duration = _language()
    speakers = list(speakers)
    for name, value, fits, expected in (
        ("samples", samples, samples >= 1, "at least 1"),
        ("speakers", speakers, min(speakers, default=-1) >= 0, "one or more numbers from 0 on"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("num_classes", num_classes, 2 <= num_classes <= len(words), f"2 to {len(words)}"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {value}")

    # when and where spikes fall have streams of their own, so that chunks do not change them
    rng, clock, place = np.random.default_rng(seed).spawn(3)
    labels = rng.permutation(np.arange(samples) % num_classes)
    speaker = rng.permutation(np.arange(samples) % len(speakers))
    who = np.asarray(speakers, np.int32)[speaker]
    shift, stretch, tempo, loudness = 2 * (np.outer(TRAIT_STEPS, who) % 1)[..., None] - 1  # [S, 1]
    word = words[labels]  # [S, SEGMENTS]

    def vary(extent: float, *shape: int) -> np.ndarray:
        return rng.uniform(-extent, extent, (samples, *shape))

    pace = 1 + SPEAKER_TEMPO * tempo
    lasts = pace * DURATION * duration[word] * (1 + vary(LENGTH, SEGMENTS))
    gap = pace * GAP * (1 + vary(GAP_LENGTH, SEGMENTS))
    begins = rng.uniform(*START, (samples, 1)) + np.cumsum(lasts + gap, 1) - (lasts + gap)
    end = begins[:, -1:] + lasts[:, -1:] + gap[:, -1:]
    level = SPEAKER_LOUDNESS * loudness + vary(LEVEL, 1) + vary(LEVEL, SEGMENTS)
    level = np.exp(level) * FALL ** np.arange(SEGMENTS) * lasts / DURATION
    middle = CHANNELS / 2
    at = centre[word] - middle
    at = middle + at * (1 + SPEAKER_STRETCH * stretch[..., None]) + SPEAKER_SHIFT * shift[..., None]

    # the noise is one more source of spikes: wrapped round the channels, it is even over them
    def sources(tracks: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        tracks = np.broadcast_to(tracks, at.shape).reshape(samples, -1)
        return np.hstack([tracks, np.broadcast_to(noise, (samples, 1))])

    counts = rng.poisson(sources(level[..., None] * np.array(SPIKES), NOISE * CHANNELS * end))
    table = np.stack(
        [
            sources(begins[..., None], 0),
            sources(lasts[..., None] * np.array(LASTS), end),
            sources(np.array(ADAPTATION), 1),
            sources(at + vary(TRACK_SHIFT, *at.shape[1:]), 0),
            sources(glide[word], 0),
            sources(np.array(WIDTH), CHANNELS),
        ]
    ).astype(np.float32)  # [6, S, sources]

    offsets = np.zeros(samples + 1, np.int64)
    np.cumsum(counts.sum(1), out=offsets[1:])
    times = np.empty(offsets[-1], np.float32)
    units = np.empty(offsets[-1], np.uint16)
    for first in range(0, samples, CHUNK):
        part = slice(first, min(first + CHUNK, samples))
        events = slice(offsets[part.start], offsets[part.stop])
        times[events], units[events] = _render(counts[part], table[:, part], clock, place)
    names = tuple("".join(chr(ord("a") + phone) for phone in w) for w in words[:num_classes])
    return EventStore(times, units, offsets, labels, who, CHANNELS, names)


def _language() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """words [W, SEGMENTS] int; of each phone's tracks centre, glide [PHONES, 4]; duration [PHONES].

    Centre and glide are in channels, duration is relative to DURATION.
    """
    rng = np.random.default_rng(LANGUAGE)
    centre = rng.uniform(*np.transpose(CENTRE), (PHONES, len(CENTRE)))
    glide = rng.uniform(-1, 1, centre.shape) * GLIDE
    duration = 1 + rng.uniform(-PHONE_LENGTH, PHONE_LENGTH, PHONES)
    families = rng.permutation(list(combinations(range(PHONES), SEGMENTS)))
    return families[:, ORDERS].reshape(-1, SEGMENTS), centre, glide, duration


def _render(
    counts: np.ndarray, table: np.ndarray, clock: np.random.Generator, place: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Spikes of some samples, sorted by sample and time, from their sources' counts and table."""
    sample = np.repeat(np.arange(len(counts)), counts.sum(1))
    row = np.repeat(table.reshape(len(table), -1), counts.ravel(), axis=1)
    begins, lasts, adaptation, centre, glide, width = row
    share = clock.random(len(sample), np.float32) ** adaptation
    tick = ((begins + lasts * share) * TICKS).astype(np.int64)
    unit = centre + glide * share + width * place.standard_normal(len(sample), np.float32)
    unit = np.floor(unit).astype(np.int64) % CHANNELS
    # one integer of sample, time (22 bits) and channel (10 bits): sorts 1.4 M spikes in 0.2 s,
    # np.lexsort of the three takes 1.1 s (one core)
    key = (sample << 32) | (tick << 10) | unit
    key.sort()
    tick = (key >> 10) & (2**22 - 1)
    return (tick / TICKS).astype(np.float32), (key & 1023).astype(np.uint16)
