"""How a sample's events are changed, drawn afresh for every epoch.

Every random draw is a hash of what it is for,

    draw(key, stream, sample, event) = mix(.. mix(mix(key[0]) ^ key[1]) .. ^ event)   32 bits

so that it needs no generator state and does not depend on the batch's other samples, on their order
or on the number of processes. All arithmetic is exact in uint32, or float32 with one rounding an
operation, so that kernels/binning.py and kernels/binning_cpu.py, compiled without fused
multiply-add, draw the same.

The changes come in this order: channel stretch, channel shift, time stretch, jitter, drop, gain.
Noise events are added after them and are not themselves changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gpn_triton.data.events import DeviceEvents

# what a draw is for: the stream number of its hash
SHIFT, STRETCH, JITTER, DROP, NOISE_COUNT, NOISE_TIME, NOISE_UNIT = range(7)
CHANNEL_STRETCH, GAIN, GAIN_DROP = range(7, 10)
# of the channels' gain, which is drawn at so many places and linear between them
KNOTS = 8
MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
# both lie below 2^31, so that a product with 32 bits fits a signed 64-bit integer
MIX_1, MIX_2 = 0x21F0AAAD, 0x735A2D97
# the standard deviation of the sum of four uniform bytes
BYTES_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)


@dataclass(frozen=True)
class Augmentation:
    """How a sample's events are changed, differently in every epoch; 0 is off.

    Args:
        channel_shift: the sample moves by up to so many channels either way; events that leave the
            range are lost.
        time_stretch: the sample's times are multiplied by 1 +- up to this share.
        time_jitter: deviation of each event's own displacement, seconds: near normal, the sum of
            four uniform draws, within 3.45 deviations.
        drop: probability with which each event is lost.
        noise: events added, as a share of the sample's: uniform over all channels and over the time
            from 0 to the sample's last event.
        channel_stretch: the sample's channels are multiplied by 1 +- up to this share, and rounded
            down: a vocal tract of another length, where channels are places on a membrane.
        channel_gain: the sample loses events with a probability that goes smoothly along the
            channels, drawn between 0 and this at KNOTS places: another microphone or voice.
    Raises:
        ValueError: a value out of range.
    """

    channel_shift: int = 0
    time_stretch: float = 0.0
    time_jitter: float = 0.0
    drop: float = 0.0
    noise: float = 0.0
    channel_stretch: float = 0.0
    channel_gain: float = 0.0

    def __post_init__(self):
        top = {
            "channel_stretch": 1,
            "time_stretch": 1,
            "drop": 1,
            "channel_gain": 1,
            "noise": 1 << 16,
        }
        for field in fields(self):
            value, below = getattr(self, field.name), top.get(field.name, math.inf)
            if not 0 <= value < below:
                raise ValueError(f"{field.name}: expected 0 <= value < {below}, got {value!r}")


class Draws:
    """Random 32-bit numbers that are a function of what they are for.

    Args:
        key [2]: integers of which the low 32 bits count, such as (seed, epoch); a tensor or two
            numbers.
        numbers [B] int64: the samples' numbers in the whole set.
    """

    def __init__(self, key: Tensor | Sequence[int], numbers: Tensor):
        first, second = key.tolist() if isinstance(key, Tensor) else key
        self.key = fold(fold(0, first & MASK), second & MASK)
        self.numbers = numbers

    @classmethod
    def of(cls, events: DeviceEvents, indices: Tensor, key: Tensor | Sequence[int]) -> Draws:
        """The draws of some samples, which know each other by their numbers in the whole set."""
        whole = events.numbers
        return cls(key, indices if whole is None else whole.index_select(0, indices))

    def __call__(self, stream: int, count: Tensor | None = None, number: int = 0) -> Tensor:
        """One draw a sample [B] int64, its `number`-th, or one for each of count [B] events of the
        samples."""
        h = fold(fold(self.key, stream), self.numbers)
        return fold(h, number) if count is None else fold(spread(h, count), ranks(count))


def fold(h: Tensor | int, word: Tensor | int) -> Tensor | int:
    """Mix a word of 32 bits into a hash of 32 bits; tensors of both are int64.

    Source: Chris Wellons' hash prospector, for the form and the constants of the mixing.
    """
    h = h ^ word
    h += GOLDEN
    h &= MASK
    h ^= h >> 16
    h *= MIX_1
    h &= MASK
    h ^= h >> 15
    h *= MIX_2
    h &= MASK
    h ^= h >> 15
    return h


def uniform(draw: Tensor) -> Tensor:
    """float32 in [0, 1), a multiple of 2^-24."""
    return (draw >> 8).float().mul_(2.0**-24)


def below(draw: Tensor, n: int) -> Tensor:
    """int64 in 0..n - 1, the high half of the product."""
    return (draw * n) >> 32


def stretch_factor(draw: Tensor, share: float) -> Tensor:
    """float32 in [1 - share, 1 + share)."""
    return 1 + share * (2 * uniform(draw) - 1)


def near_normal(draw: Tensor) -> Tensor:
    """float32, the centred sum of the draw's four bytes; its deviation is BYTES_DEVIATION."""
    pairs = (draw & 0xFF00FF) + ((draw >> 8) & 0xFF00FF)
    return ((pairs & 0xFFFF) + (pairs >> 16) - 510).float()


def change(
    augmentation: Augmentation, draws: Draws, t: Tensor, unit: Tensor, count: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Events' times and units as augmented, but for noise, and which of them stay.

    Args:
        t [E] float32, unit [E] int64: the events of B samples, one sample behind the other.
        count [B] int64: events of each sample. channels: C.
    Returns:
        times, units, and weights [E] float32: 1 for an event that stays, 0 for another.
    """
    weight = torch.ones_like(t)
    moved = unit
    if augmentation.channel_stretch:
        factor = stretch_factor(draws(CHANNEL_STRETCH), augmentation.channel_stretch)
        moved = (moved.float() * spread(factor, count)).long()
    if augmentation.channel_shift:
        reach = augmentation.channel_shift
        moved = moved + spread(below(draws(SHIFT), 2 * reach + 1) - reach, count)
    if moved is not unit:
        unit = moved.clamp(0, channels - 1)
        weight = weight * (unit == moved)
    if augmentation.time_stretch:
        t = t * spread(stretch_factor(draws(STRETCH), augmentation.time_stretch), count)
    if augmentation.time_jitter:
        scale = augmentation.time_jitter / BYTES_DEVIATION
        t = t + near_normal(draws(JITTER, count)) * scale
    if augmentation.drop:
        weight = weight * (draws(DROP, count) >= round(augmentation.drop * 2**32))
    if augmentation.channel_gain:
        weight = weight * ~_weakened(augmentation.channel_gain, draws, unit, count, channels)
    return t, unit, weight


def _weakened(share: float, draws: Draws, unit: Tensor, count: Tensor, channels: int) -> Tensor:
    """Which events [E] bool the channels' gain takes away; all of it in whole numbers."""
    top = round(share * 65536)
    levels = torch.stack([below(draws(GAIN, number=k), top + 1) for k in range(KNOTS)], 1)
    place = unit * ((KNOTS - 1) * 256) // channels
    knot, beyond = place >> 8, place & 255
    first = torch.arange(len(count), device=unit.device) * KNOTS
    left = spread(first, count) + knot
    level, following = (levels.flatten().index_select(0, left + k) for k in (0, 1))
    level = level + ((following - level) * beyond >> 8)
    return draws(GAIN_DROP, count) >> 16 < level


def noise_events(
    share: float, draws: Draws, events: DeviceEvents, count: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Times and units of noise events, for samples of `count` events up to number `last`, and how
    many each sample has."""
    # share * count is rounded up or down at random, in 1 / 65536
    added = (count * round(share * 65536) + (draws(NOISE_COUNT) >> 16)) >> 16
    end = events.times.index_select(0, spread(last, added))
    t = uniform(draws(NOISE_TIME, added)) * end
    return t, below(draws(NOISE_UNIT, added), events.num_channels), added


def spread(values: Tensor, count: Tensor) -> Tensor:
    """values [B], each as often as count [B] says."""
    return values.repeat_interleave(count)


def ranks(count: Tensor) -> Tensor:
    """0..count - 1 for each of count [B], one behind the other, int64."""
    end = count.cumsum(0)
    before = spread(end - count, count)
    return torch.arange(len(before), device=count.device).sub_(before)
