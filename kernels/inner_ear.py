"""Velocities of the basilar membrane to spikes of the bushy cells, hair cells in between.

Of one channel at one place of the membrane, x[t] its velocity, a sample every 1 / 24,000 s; rates
are those of ear.step_constants, per sample:

    kt      = G (x + A) / (x + A + B) where x + A > 0, else 0       permeability
    q[t+1]  = max(q + (Y - Y q where q < 1) - kt q + X w, 0)        free transmitter
    c[t+1]  = max(c + kt q - LR c, 0)                               transmitter in the cleft
    w[t+1]  = max(w + R c - X w, 0)                                 transmitter that is reprocessed
    p       = H c[t+1]                                              a fibre's probability to fire
    n       ~ Binomial(fibres - (fibres that fired in the last 23 samples), p)
    I       = I DECAY_I + n
    v       = v DECAY_V + WEIGHT I, or 0 for 24 samples after a spike
    spike   = v >= 1, and v = 0 after it

Every fibre of a channel has the same p and weighs the same in I, so how many fire is all that
matters; given how many are not refractory that number is binomial, exactly. One draw takes the
place of 40. It is found by inversion: the least n for which the sum of the first n + 1
probabilities exceeds a uniform number, a hash of the recording's key, the channel and the sample.

Grid: one program per (recording, BLOCK channels); the time loop runs inside it, all state in
registers. What fired in the last 23 samples is a queue of 6 bits each in three int64.
Layout: velocity [R, C, row] float32, of which lengths [R] int32 samples count; keys [R] int32 (the
bits of uint32); rates [14] float32. Out: spikes [R, C, most] int32, the samples at which a channel
fired, counts [R, C] int32 of them valid; each channel has a place of its own, so nothing is atomic
and no order depends on the schedule.
Read: 4 bytes a channel and sample; written: 4 a spike. About 110 operations a channel and sample.
Precision: float32, one rounding an operation (enable_fp_fusion=False, div_rn), so that the bits are
those of the twin for a CPU.

Source: Meddis, J. Acoust. Soc. Am. 79 (1986) 702 and 83 (1988) 1056; Cramer et al., IEEE TNNLS
2020, appendix. Twins: kernels/inner_ear_cpu.py, gpn_triton/audio/reference.py in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels.binning import mix, uniform

# a warp a program: one recording of 700 channels makes 22 of them. unmeasured
BLOCK, NUM_WARPS = 32, 1
SIX = tl.constexpr(63)
TEN_ENTRIES, THREE_ENTRIES = tl.constexpr((1 << 60) - 1), tl.constexpr((1 << 18) - 1)


@triton.jit
def binomial(u, p, trials, BITS: tl.constexpr):
    """int32: how many of so many trials succeed, each with probability p, by inversion at u."""
    none = tl.full(p.shape, 1.0, tl.float32)
    failure = 1.0 - p
    odds = tl.math.div_rn(p, failure)
    power = failure
    for bit in tl.static_range(BITS):
        none = tl.where((trials >> bit) & 1 == 1, none * power, none)
        power = power * power
    n, term, total = tl.zeros(p.shape, tl.int32), none, none
    searching = (u >= total) & (trials > 0)
    k = 0
    while tl.max(searching.to(tl.int32), 0) > 0:
        count = (k + 1) + tl.zeros(p.shape, tl.int32)
        left = (trials - k).to(tl.float32)
        term = term * tl.math.div_rn(left * odds, count.to(tl.float32))
        total = total + term
        n = tl.where(searching, count, n)
        searching = searching & (u >= total) & (count < trials)
        k += 1
    return n


@triton.jit(do_not_specialize=["row", "channels", "first", "most"])
def inner_ear_kernel(
    velocity_ptr, lengths_ptr, keys_ptr, rates_ptr, spikes_ptr, counts_ptr,
    row, channels, first, most,
    FIBRES: tl.constexpr, REFRACTORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (recording, BLOCK channels); channel 0 here is channel `first` of the ear."""
    tl.static_assert(REFRACTORY == 24, "the queue holds 23 samples")
    recording = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    keep = channel < channels
    lane = recording * channels + channel
    x_ptr, spikes_ptr = velocity_ptr + lane * row, spikes_ptr + lane * most
    key = mix(tl.load(keys_ptr + recording).to(tl.uint32) ^ (channel + first).to(tl.uint32))
    A, B = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    G, Y = tl.load(rates_ptr + 2), tl.load(rates_ptr + 3)
    X, R = tl.load(rates_ptr + 4), tl.load(rates_ptr + 5)
    LR, H = tl.load(rates_ptr + 6), tl.load(rates_ptr + 7)
    decay_i, decay_v = tl.load(rates_ptr + 11), tl.load(rates_ptr + 12)
    weight = tl.load(rates_ptr + 13)
    zero, nothing = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    q = zero + tl.load(rates_ptr + 8)
    c = zero + tl.load(rates_ptr + 9)
    w = zero + tl.load(rates_ptr + 10)
    i, v = zero, zero
    wait, fired, count = nothing, nothing, nothing
    newest = nothing.to(tl.int64)
    middle, oldest = newest, newest
    for t in tl.range(0, tl.load(lengths_ptr + recording)):
        now = t + nothing
        drive = tl.load(x_ptr + t, mask=keep, other=0.0) + A
        kt = tl.where(drive > 0, tl.math.div_rn(G * drive, drive + B), 0.0)
        ejected, reprocessed = kt * q, X * w
        filled = tl.where(q < 1.0, Y - Y * q, 0.0)
        w = tl.maximum((w + R * c) - reprocessed, 0.0)
        c = tl.maximum((c + ejected) - LR * c, 0.0)
        q = tl.maximum(((q + filled) - ejected) + reprocessed, 0.0)

        n = binomial(uniform(mix(key ^ now.to(tl.uint32))), H * c, FIBRES - fired, 6)
        fired += n - ((oldest >> 12) & SIX).to(tl.int32)
        oldest = ((oldest << 6) | (middle >> 54)) & THREE_ENTRIES
        middle = ((middle << 6) | (newest >> 54)) & TEN_ENTRIES
        newest = ((newest << 6) | n.to(tl.int64)) & TEN_ENTRIES

        i = i * decay_i + n.to(tl.float32)
        v = tl.where(wait > 0, 0.0, v * decay_v + weight * i)
        spike = v >= 1.0
        tl.store(spikes_ptr + count, now, mask=spike & keep)
        count += spike.to(tl.int32)
        wait = tl.where(spike, REFRACTORY, tl.maximum(wait - 1, 0))
        v = tl.where(spike, 0.0, v)
    tl.store(counts_ptr + lane, count, mask=keep)


def inner_ear(
    velocity: Tensor, lengths: Tensor, keys: Tensor, rates: Tensor, first: int,
    fibres: int, refractory: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spikes of recordings side by side.

    Args:
        velocity [R, C, row] float32, contiguous: of the membrane, in cm/s of a stapes' 1.
        lengths [R] int32: samples of each that count. keys [R] int32: of each one's draws.
        rates [14] float32: ear.step_constants. first: the ear's number of channel 0 here.
        fibres: hair cells' fibres a channel, up to 63. refractory: 24 samples.
    Returns:
        spikes [R, C, most] int32: the samples at which each channel fires; counts [R, C] int32: how
        many of them there are.
    """
    recordings, channels, row = velocity.shape
    most = row // (refractory + 1) + 1
    spikes = lengths.new_empty(recordings, channels, most)
    counts = lengths.new_empty(recordings, channels)
    inner_ear_kernel[(recordings, triton.cdiv(channels, BLOCK))](
        velocity, lengths, keys, rates, spikes, counts, row, channels, first, most,
        FIBRES=fibres, REFRACTORY=refractory, BLOCK=BLOCK, num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return spikes, counts
