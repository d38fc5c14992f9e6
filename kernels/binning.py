"""Events of a batch of samples to counts [T, B, columns], augmented on the way.

    counts[bin(t'), slot, channel(u')] += 1    for every event (t, u) of sample indices[slot]

where t', u' are the event as augmented (stretches, shift, jitter, drop, gain), and for the noise
events. Every random number is a hash of what it is for,

    draw(stream, sample, number) = mix(mix(mix(key ^ stream) ^ sample) ^ number)     uint32
    key                          = mix(mix(key[0]) ^ key[1])

so nothing but key [2] changes from epoch to epoch, and a replayed CUDA graph reads it anew.

Grid of the count: one program per (slot, share of the sample's events). It loops over every
SPLIT-th block of BLOCK events, so that the grid depends on B alone and the host never learns how
many events there are. Each event is one atomic addition of 1: work goes with the events, about one
for a hundred cells at T = 1000; needs no order of times, which jitter and noise do not have; and a
sum of ones does not depend on its order. The alternative, a program per tile of time bins that
searches its events in the sorted times and writes each cell once, would hash every noise event once
per tile and run through four dependent loads for a dozen events each. A sequence that is taken in
pieces is counted anew for each, all its events being read, and only the piece's bins are kept.

Layout: times [E] float32, units [E] int16 (the bits of uint16), offsets [S + 1] int64, numbers [S]
int64 (the samples' numbers in the whole set, where these are a part of it), indices [B] int64, key
[2] int64, edges [T] float32 (authors' style only). Counts are float32 [T, B, columns], zeroed by
the caller. For half types two 16-bit counters share an int32 word, in the very memory of
the result, and a second kernel turns each nonzero counter into a float in place: 4 bytes a cell are
moved (zeroed and read), against 10 for float32 counts and a copy, and no second buffer exists. On
the scale of logarithms the same kernel takes them, in any type, of counts over the sample's mean,
for which the count adds up each sample's events: one atomic addition a block.

Precision: draws are exact in uint32, times float32 with one rounding an operation, for which fused
multiply-add is off (enable_fp_fusion=False): every count equals the twin's, bit for bit. Counts are
exact below 2^24, packed ones below 2^16, which the launcher knows from the longest sample.

Twins: gpn_triton/data/augmentation.py and gpn_triton/data/binning.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# events a program takes at a time, and programs that share a sample. unmeasured
BLOCK, SPLIT, NUM_WARPS = 512, 8, 4
# cells a program converts. unmeasured
CONVERT_BLOCK = 1024
# no 16-bit counter of a longer sample could be trusted
PACKED_EVENTS = (1 << 16) - 1

SHIFT, STRETCH, JITTER, DROP, NOISE_COUNT, NOISE_TIME, NOISE_UNIT = map(tl.constexpr, range(7))
CHANNEL_STRETCH, GAIN, GAIN_DROP = map(tl.constexpr, range(7, 10))
KNOTS = tl.constexpr(8)
GOLDEN = tl.constexpr(0x9E3779B9)
MIX_1, MIX_2 = tl.constexpr(0x21F0AAAD), tl.constexpr(0x735A2D97)
UNIT = tl.constexpr(2.0**-24)


@triton.jit
def mix(h):
    """A hash of 32 bits; the twin's fold(h, word) is mix(h ^ word)."""
    h = tl.add(h, GOLDEN, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 16), MIX_1, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), MIX_2, sanitize_overflow=False)
    return h ^ (h >> 15)


@triton.jit
def draw(key, stream: tl.constexpr, sample, number):
    """32 random bits for a number of a sample; key, sample, number uint32."""
    return mix(mix(mix(key ^ stream) ^ sample) ^ number)


@triton.jit
def uniform(bits):
    """float32 in [0, 1), a multiple of 2^-24."""
    return (bits >> 8).to(tl.float32) * UNIT


@triton.jit
def below(bits, n):
    """int32 in 0..n - 1, the high half of the product."""
    return ((bits.to(tl.int64) * n) >> 32).to(tl.int32)


@triton.jit
def stretch_factor(bits, SHARE: tl.constexpr):
    """float32 in [1 - SHARE, 1 + SHARE)."""
    return 1.0 + SHARE * (2.0 * uniform(bits) - 1.0)


@triton.jit
def near_normal(bits):
    """float32, the centred sum of the four bytes."""
    pairs = (bits & 0xFF00FF) + ((bits >> 8) & 0xFF00FF)
    return ((pairs & 0xFFFF) + (pairs >> 16)).to(tl.float32) - 510.0


@triton.jit
def gain_level(key, sample, knot, GAIN_TOP: tl.constexpr):
    """At knots [BLOCK] int32 the probability with which an event is lost, in 2^-16; it is hashed
    anew for each event, which needs no table."""
    return below(draw(key, GAIN, sample, knot.to(tl.uint32)), GAIN_TOP + 1)


@triton.jit
def count_edges_below(t, edges_ptr, T, step):
    """How many of the sorted edges [T] lie below each t: the bin of the authors' style.

    step is the largest power of two in T.
    """
    found = tl.zeros(t.shape, tl.int32)
    while step > 0:
        probe = found + step
        edge = tl.load(edges_ptr + probe - 1, mask=probe <= T, other=float("inf"))
        found = tl.where(edge < t, probe, found)
        step = step >> 1
    return found


@triton.jit
def add_events(
    t, unit, keep, slot, edges_ptr, counts_ptr, totals_ptr, T, T_power, first, steps, B, channels,
    end, rate,
    CHANNEL_BIN: tl.constexpr, AUTHORS: tl.constexpr, CLIP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Count the events of one slot that stay and lie in the window, in its bins first.. alone; add
    to its total those of all bins, where totals are wanted."""
    if AUTHORS:
        bin = count_edges_below(t, edges_ptr, T, T_power)
        keep &= (bin < T) & (unit > 0)
        channel = channels - unit
    else:
        if not CLIP:
            keep &= (t >= 0) & (t < end)
        bin = tl.minimum(tl.maximum(t * rate, 0.0), (T - 1).to(tl.float32)).to(tl.int32)
        channel = unit // CHANNEL_BIN
    if totals_ptr is not None:
        tl.atomic_add(totals_ptr + slot, tl.sum(keep.to(tl.float32), 0), sem="relaxed")
    bin -= first
    keep &= (bin >= 0) & (bin < steps)
    cell = (bin.to(tl.int64) * B + slot) * tl.cdiv(channels, CHANNEL_BIN) + channel
    if PACKED:
        one = tl.where((cell & 1) == 0, 1, 1 << 16)
        tl.atomic_add(counts_ptr + (cell >> 1), one, mask=keep, sem="relaxed")
    else:
        one = tl.full(cell.shape, 1.0, tl.float32)
        tl.atomic_add(counts_ptr + cell, one, mask=keep, sem="relaxed")


@triton.jit(do_not_specialize=["T", "T_power", "first_bin", "steps", "B", "channels"])
def binning_count_kernel(
    times_ptr, units_ptr, offsets_ptr, numbers_ptr, indices_ptr, key_ptr, edges_ptr, counts_ptr,
    totals_ptr, T, T_power, first_bin, steps, B, channels, end, rate,
    CHANNEL_BIN: tl.constexpr, AUTHORS: tl.constexpr, CLIP: tl.constexpr, PACKED: tl.constexpr,
    SHIFT_BY: tl.constexpr, CHANNEL_STRETCH_BY: tl.constexpr, STRETCH_BY: tl.constexpr,
    JITTER_BY: tl.constexpr, DROP_BELOW: tl.constexpr, NOISE_SHARE: tl.constexpr,
    GAIN_TOP: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per (slot, share of its events); each augmentation is off at 0.

    T_power: the largest power of two in T. first_bin, steps: the bins that are counted. end: of the
    window, seconds. rate: bins a second.
    SHIFT_BY: channels. CHANNEL_STRETCH_BY, STRETCH_BY: share. JITTER_BY: seconds a step of
    near_normal. DROP_BELOW: in 2^-32. NOISE_SHARE, GAIN_TOP: in 2^-16. What is
    off leaves no instruction.
    """
    slot = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    sample = tl.load(indices_ptr + slot)
    first = tl.load(offsets_ptr + sample)
    count = (tl.load(offsets_ptr + sample + 1) - first).to(tl.int32)
    if numbers_ptr is not None:
        sample = tl.load(numbers_ptr + sample)
    sample = sample.to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    key = tl.full((), 0, tl.uint32)
    if key_ptr is not None:
        key = mix(tl.load(key_ptr).to(tl.uint32))
        key = mix(key ^ tl.load(key_ptr + 1).to(tl.uint32))
    zero = tl.full((), 0, tl.uint32)

    shift = tl.full((), 0, tl.int32)
    if SHIFT_BY > 0:
        shift = below(draw(key, SHIFT, sample, zero), 2 * SHIFT_BY + 1) - SHIFT_BY
    factor = tl.full((), 1.0, tl.float32)
    if STRETCH_BY > 0:
        factor = stretch_factor(draw(key, STRETCH, sample, zero), STRETCH_BY)
    channel_factor = tl.full((), 1.0, tl.float32)
    if CHANNEL_STRETCH_BY > 0:
        channel_factor = stretch_factor(
            draw(key, CHANNEL_STRETCH, sample, zero), CHANNEL_STRETCH_BY
        )

    for begin in tl.range(start, count, SPLIT * BLOCK):
        number = begin + lane  # [BLOCK]
        keep = number < count
        t = tl.load(times_ptr + first + number, mask=keep, other=0.0)
        unit = tl.load(units_ptr + first + number, mask=keep, other=0).to(tl.int32) & 0xFFFF
        if CHANNEL_STRETCH_BY > 0:
            unit = (unit.to(tl.float32) * channel_factor).to(tl.int32)
        if SHIFT_BY > 0:
            unit += shift
        if SHIFT_BY > 0 or CHANNEL_STRETCH_BY > 0:
            keep &= (unit >= 0) & (unit < channels)
        if STRETCH_BY > 0:
            t = t * factor
        if JITTER_BY > 0:
            t = t + near_normal(draw(key, JITTER, sample, number.to(tl.uint32))) * JITTER_BY
        if DROP_BELOW > 0:
            keep &= draw(key, DROP, sample, number.to(tl.uint32)).to(tl.int64) >= DROP_BELOW
        if GAIN_TOP > 0:
            place = unit * ((KNOTS - 1) * 256) // channels
            knot = place >> 8
            level = gain_level(key, sample, knot, GAIN_TOP)
            rise = gain_level(key, sample, knot + 1, GAIN_TOP) - level
            level += (rise * (place & 255)) >> 8
            keep &= (draw(key, GAIN_DROP, sample, number.to(tl.uint32)) >> 16).to(tl.int32) >= level
        add_events(
            t, unit, keep, slot, edges_ptr, counts_ptr, totals_ptr, T, T_power, first_bin, steps, B,
            channels, end, rate, CHANNEL_BIN, AUTHORS, CLIP, PACKED,
        )  # fmt: skip

    if NOISE_SHARE > 0:
        # rounded up or down at random
        round_up = (draw(key, NOISE_COUNT, sample, zero) >> 16).to(tl.int64)
        added = ((count.to(tl.int64) * NOISE_SHARE + round_up) >> 16).to(tl.int32)
        last = tl.load(times_ptr + first + count - 1, mask=count > 0, other=0.0)
        for begin in tl.range(start, added, SPLIT * BLOCK):
            number = (begin + lane).to(tl.uint32)
            t = uniform(draw(key, NOISE_TIME, sample, number)) * last
            unit = below(draw(key, NOISE_UNIT, sample, number), channels)
            add_events(
                t, unit, begin + lane < added, slot, edges_ptr, counts_ptr, totals_ptr, T, T_power,
                first_bin,
                steps, B, channels, end, rate, CHANNEL_BIN, AUTHORS, CLIP, PACKED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["cells", "B", "columns", "window"])
def binning_convert_kernel(
    counts_ptr, totals_ptr, cells, B, columns, window,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counters of 16 bits to floats of DTYPE, in place; the bits of 0 are those of 0.0.

    Not PACKED: counts are float32. Where there are totals [B], a count n becomes log(1 + n window /
    total), window being the cells of a sample's whole window.
    """
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + cell, mask=cell < cells, other=0)
    if PACKED:
        count = count.to(tl.int32) & 0xFFFF
    value = count.to(tl.float32)
    if totals_ptr is not None:
        slot = (cell // columns) % B
        total = tl.load(totals_ptr + slot, mask=count != 0, other=1.0)
        value = tl.log(1.0 + value * (window / total))
    if PACKED:
        value = value.to(DTYPE).to(tl.int16, bitcast=True)
    tl.store(counts_ptr + cell, value, mask=count != 0)


def binning_count(
    times: Tensor,
    units: Tensor,
    offsets: Tensor,
    numbers: Tensor | None,
    indices: Tensor,
    key: Tensor | None,
    channels: int,
    longest: int,
    config,
    augmentation,
    first: int,
    last: int,
) -> Tensor:
    """Count the events of some samples; launches only, so that a CUDA graph can hold it.

    Args:
        times [E] float32, units [E] int16, offsets [S + 1] int64: all samples. numbers [S] int64:
            what draws know each by; None: its place. indices [B] int64: which of them, each in
            0..S - 1 (not checked). key [2] int64: None without augmentation.
        channels: C. longest: events of the longest sample.
        config: a BinningConfig. augmentation: an Augmentation, or None.
        first, last: the time bins first..last - 1 are counted.
    Returns:
        counts [last - first, B, columns] of config.dtype.
    """
    T, B = config.time_bins, len(indices)
    shape = (last - first, B, config.columns(channels))
    cells = math.prod(shape)
    shift_by, channel_by, stretch_by, jitter_by, drop_below, noise_share = 0, 0.0, 0.0, 0.0, 0, 0
    gain_top = 0
    if augmentation is not None:
        shift_by, stretch_by = augmentation.channel_shift, augmentation.time_stretch
        channel_by = augmentation.channel_stretch
        # the sum of four uniform bytes has this deviation
        jitter_by = augmentation.time_jitter / math.sqrt(4 * (256**2 - 1) / 12)
        drop_below = round(augmentation.drop * 2**32)
        noise_share = round(augmentation.noise * 65536)
        gain_top = round(augmentation.channel_gain * 65536)
    most = longest + (longest * noise_share >> 16) + 1
    packed = config.dtype in TL_DTYPES and most <= PACKED_EVENTS
    if packed:
        # an odd number of counters fills whole words too
        half = torch.zeros(cells + cells % 2, dtype=config.dtype, device=times.device)
        counts, out = half.view(torch.int32), half[:cells].view(shape)
    else:
        counts = out = torch.zeros(shape, dtype=torch.float32, device=times.device)
    if cells == 0:
        return out.to(config.dtype)

    log = config.scale == "log"
    totals = torch.zeros(B, device=times.device) if log else None
    authors, edges = config.style == "authors", None
    if authors:
        edges = torch.arange(T, dtype=torch.float64, device=times.device) * (1 / T)
        edges = edges.half().float()
    binning_count_kernel[(B, SPLIT)](
        times, units, offsets, numbers, indices, key, edges, counts, totals,
        T, 1 << (T.bit_length() - 1), first, last - first, B, channels, float(config.max_time),
        T / config.max_time,
        CHANNEL_BIN=config.channel_bin, AUTHORS=authors, CLIP=config.overflow == "clip",
        PACKED=packed, SHIFT_BY=shift_by, CHANNEL_STRETCH_BY=channel_by, STRETCH_BY=stretch_by,
        JITTER_BY=jitter_by, DROP_BELOW=drop_below, NOISE_SHARE=noise_share,
        GAIN_TOP=gain_top, BLOCK=BLOCK, SPLIT=SPLIT,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if packed or log:
        binning_convert_kernel[(triton.cdiv(cells, CONVERT_BLOCK),)](
            out.view(torch.int16) if packed else out, totals, cells, B, shape[2],
            float(T * shape[2]), PACKED=packed, DTYPE=TL_DTYPES.get(config.dtype, tl.float32),
            BLOCK=CONVERT_BLOCK,
        )  # fmt: skip
    return out.to(config.dtype)
