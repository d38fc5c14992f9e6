"""Events of a batch of samples to counts, or to a list sorted by bin and sample, on a CPU by Numba.

    cell = (bin(t') B + slot) columns + channel(u')     for every event (t, u) of indices[slot]

where t', u' are the event as augmented (stretches, shift, jitter, drop, gain), and for the noise
events; draws and the order of changes are those of kernels/binning.py.

Grid. A thread takes samples one by one; no two samples share a cell. Counts are written at once. A
list takes two passes: the first writes every event's cell (or -1) and counts the rows, the second,
from the rows' sums, puts each event's channel at its row's place, in the order of the sample's
events.

Layout as in kernels/binning.py; cell [E'] int32 or int64 with room for every event and the noise;
row_start [T B + 1]. Draws are exact in int64, times float32 with one rounding an operation: no
multiplication is fused with its addition, and every count equals the twin's.

Twins: gpn_triton/data/augmentation.py and gpn_triton/data/binning.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gpn_triton.kernels.cpu import EXACT, exact_inner, kernel, run, take

SHIFT, STRETCH, JITTER, DROP, NOISE_COUNT, NOISE_TIME, NOISE_UNIT = range(7)
CHANNEL_STRETCH, GAIN, GAIN_DROP = range(7, 10)
KNOTS = 8
MASK, GOLDEN, MIX_1, MIX_2 = 0xFFFFFFFF, 0x9E3779B9, 0x21F0AAAD, 0x735A2D97
ONE, TWO, UNIT, CENTRE = (np.float32(c) for c in (1, 2, 2.0**-24, 510))


@exact_inner
def mix(h):
    """A hash of 32 bits, held in int64."""
    h = (h + GOLDEN) & MASK
    h = ((h ^ (h >> 16)) * MIX_1) & MASK
    h = ((h ^ (h >> 15)) * MIX_2) & MASK
    return h ^ (h >> 15)


@exact_inner
def draw(key, stream, sample, number):
    """32 random bits for a number of a sample."""
    return mix(mix(mix(key ^ stream) ^ sample) ^ number)


@exact_inner
def uniform(bits):
    """float32 in [0, 1), a multiple of 2^-24."""
    return np.float32(bits >> 8) * UNIT


@exact_inner
def stretch_factor(bits, share):
    """float32 in [1 - share, 1 + share)."""
    return ONE + share * (TWO * uniform(bits) - ONE)


@exact_inner
def near_normal(bits):
    """float32, the centred sum of the four bytes."""
    pairs = (bits & 0xFF00FF) + ((bits >> 8) & 0xFF00FF)
    return np.float32((pairs & 0xFFFF) + (pairs >> 16)) - CENTRE


@exact_inner
def place(t, unit, slot, edges, T, first, steps, B, channels, channel_bin, end, rate, clip):
    """The cell of an event as augmented; -1 if it lies outside the window, -2 in it, but not in its
    bins first.."""
    columns = (channels + channel_bin - 1) // channel_bin
    if len(edges):
        # the authors' style: as many edges below t as bins before it
        bin, last = 0, T
        while bin < last:
            middle = (bin + last) // 2
            if edges[middle] < t:
                bin = middle + 1
            else:
                last = middle
        if bin >= T or unit == 0:
            return -1
        if not (first <= bin < first + steps):
            return -2
        return ((bin - first) * B + slot) * columns + channels - unit
    if not clip and not (0 <= t < end):
        return -1
    at = t * rate
    at = min(max(at, np.float32(0)), np.float32(T - 1))
    bin = np.int64(at)
    if not (first <= bin < first + steps):
        return -2
    return ((bin - first) * B + slot) * columns + unit // channel_bin


@kernel(options=EXACT)
def binning_kernel(
    counter, times, units, offsets, numbers, indices, room, edges, cell, counts, row_count, totals,
    key_0, key_1, T, first_bin, steps, B, channels, channel_bin, end, rate, clip,
    shift_by, channel_stretch_by, stretch_by, jitter_by, drop_below, noise_share, gain_top,
):  # fmt: skip
    """Place the events of the samples this thread takes.

    Of the T bins of the window the `steps` from first_bin on are placed. counts [steps B columns]
    float32 are added to; where they are empty, cell and row_count [steps B] are written instead, a
    sample's from room[slot] on, in order, with -1 behind the last. totals [B] float32 are added to
    by the sample's events in the whole window.
    """
    columns = (channels + channel_bin - 1) // channel_bin
    listed = len(counts) == 0
    levels = np.empty(KNOTS, np.int64)
    key = mix(mix(key_0 & MASK) ^ (key_1 & MASK))
    while True:
        slot = take(counter)
        if slot >= B:
            break
        sample = indices[slot]
        first, count = offsets[sample], offsets[sample + 1] - offsets[sample]
        number = numbers[sample] if len(numbers) else sample
        shift, factor, channel_factor = np.int64(0), ONE, ONE
        if shift_by > 0:
            shift = ((draw(key, SHIFT, number, 0) * (2 * shift_by + 1)) >> 32) - shift_by
        if stretch_by > 0:
            factor = stretch_factor(draw(key, STRETCH, number, 0), stretch_by)
        if channel_stretch_by > 0:
            bits = draw(key, CHANNEL_STRETCH, number, 0)
            channel_factor = stretch_factor(bits, channel_stretch_by)
        if gain_top > 0:
            for k in range(KNOTS):
                levels[k] = (draw(key, GAIN, number, k) * (gain_top + 1)) >> 32
        added = np.int64(0)
        if noise_share > 0:
            # rounded up or down at random
            added = (count * noise_share + (draw(key, NOISE_COUNT, number, 0) >> 16)) >> 16
        at = room[slot]
        for e in range(count + added):
            if e < count:
                t, unit, keep = times[first + e], np.int64(units[first + e]), True
                if channel_stretch_by > 0:
                    unit = np.int64(np.float32(unit) * channel_factor)
                unit += shift
                keep = 0 <= unit < channels
                if stretch_by > 0:
                    t = t * factor
                if jitter_by > 0:
                    t = t + near_normal(draw(key, JITTER, number, e)) * jitter_by
                if drop_below > 0:
                    keep = keep and draw(key, DROP, number, e) >= drop_below
                if keep and gain_top > 0:
                    place_256 = unit * ((KNOTS - 1) * 256) // channels
                    k, beyond = place_256 >> 8, place_256 & 255
                    level = levels[k] + (((levels[k + 1] - levels[k]) * beyond) >> 8)
                    keep = draw(key, GAIN_DROP, number, e) >> 16 >= level
                if not keep:
                    continue
            else:
                t = uniform(draw(key, NOISE_TIME, number, e - count)) * times[first + count - 1]
                unit = (draw(key, NOISE_UNIT, number, e - count) * channels) >> 32
            c = place(
                t, unit, slot, edges, T, first_bin, steps, B, channels, channel_bin, end, rate, clip
            )
            totals[slot] += c != -1
            if c < 0:
                continue
            if listed:
                # sorted by bin and sample later, within them in the order of the events
                cell[at] = c
                row_count[c // columns] += 1
                at += 1
            else:
                counts[c] += ONE
        if listed and at < room[slot + 1]:
            cell[at] = -1


@kernel(options=EXACT)
def listing_kernel(counter, cell, room, place, channel, B, columns):
    """Put the events of the samples this thread takes where place [T B], which moves on, says."""
    while True:
        slot = take(counter)
        if slot >= B:
            break
        for e in range(room[slot], room[slot + 1]):
            c = cell[e]
            if c < 0:
                break
            r = c // columns
            channel[place[r]] = c - r * columns
            place[r] += 1


def _place(
    events, indices, config, augmentation, key, steps, cell, counts, row_count, room
) -> Tensor:
    """Run binning_kernel; returns each sample's events in the window [B] float32."""
    totals = torch.zeros(len(indices))
    shift_by, channel_by, stretch_by, jitter_by, drop_below, noise_share = 0, 0.0, 0.0, 0.0, 0, 0
    gain_top = 0
    key_0, key_1 = 0, 0
    if augmentation is not None:
        shift_by, stretch_by = augmentation.channel_shift, augmentation.time_stretch
        channel_by = augmentation.channel_stretch
        gain_top = round(augmentation.channel_gain * 65536)
        # the sum of four uniform bytes has this deviation
        jitter_by = augmentation.time_jitter / math.sqrt(4 * (256**2 - 1) / 12)
        drop_below = round(augmentation.drop * 2**32)
        noise_share = round(augmentation.noise * 65536)
        key_0, key_1 = key.tolist() if isinstance(key, Tensor) else key
    T, B = config.time_bins, len(indices)
    first, last = steps or (0, T)
    edges = np.empty(0, np.float32)
    if config.style == "authors":
        edges = (np.arange(T) * (1 / T)).astype(np.float16).astype(np.float32)
    numbers = np.empty(0, np.int64) if events.numbers is None else events.numbers.numpy()
    run(
        binning_kernel, torch.get_num_threads(), B, events.times.numpy(),
        events.units.numpy().view(np.uint16), events.offsets.numpy(), numbers,
        indices.contiguous().numpy(), room, edges, cell, counts, row_count, totals.numpy(), key_0,
        key_1, T, first, last - first, B, events.num_channels, config.channel_bin,
        np.float32(config.max_time), np.float32(T / config.max_time), config.overflow == "clip",
        shift_by, np.float32(channel_by), np.float32(stretch_by), np.float32(jitter_by), drop_below,
        noise_share, gain_top,
    )  # fmt: skip
    return totals


def binning_count(
    events, indices: Tensor, config, augmentation, key, steps=None
) -> tuple[Tensor, Tensor]:
    """Count the events of some samples.

    Args:
        events: a DeviceEvents on a CPU. indices [B] int64. config: a BinningConfig. augmentation:
            an Augmentation, or None; key: its two numbers. steps: first and last + 1 of the time
            bins that are wanted; None: all.
    Returns:
        counts [T, B, columns] float32, T being the number of bins wanted; each sample's events in
        the whole window [B] float32.
    """
    counts = torch.zeros(config.shape(events, indices, steps))
    none = np.empty(0, np.int32)
    room = np.zeros(len(indices) + 1, np.int64)
    totals = _place(
        events, indices, config, augmentation, key, steps, none, counts.view(-1).numpy(), none, room
    )  # fmt: skip
    return counts, totals


def binning_list(
    events, indices: Tensor, config, augmentation, key, steps=None
) -> tuple[Tensor, Tensor]:
    """List the events of some samples by time bin and sample.

    Args:
        As binning_count.
    Returns:
        channel [E] int32: of each event; row_start [T B + 1] int64: where each bin and sample's
        events begin in it.
    """
    T, B, columns = config.shape(events, indices, steps)
    offsets = events.offsets.numpy()
    samples = indices.numpy()
    most = offsets[samples + 1] - offsets[samples]
    if augmentation is not None:
        most = most + ((most * round(augmentation.noise * 65536) + 65535) >> 16)
    room = np.concatenate([[0], np.cumsum(most)])
    cell = np.empty(room[-1], np.int32 if T * B * columns < 1 << 31 else np.int64)
    row_count = np.zeros(T * B, np.int64)
    none = np.empty(0, np.float32)
    _place(events, indices, config, augmentation, key, steps, cell, none, row_count, room)
    row_start = np.concatenate([[0], np.cumsum(row_count)])
    channel = np.empty(row_start[-1], np.int32)
    run(
        listing_kernel, torch.get_num_threads(), B, cell, room, row_start[:-1].copy(), channel, B,
        columns,
    )  # fmt: skip
    return torch.from_numpy(channel), torch.from_numpy(row_start)
