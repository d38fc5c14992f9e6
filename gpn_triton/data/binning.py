"""Batches of samples as spike counts [T, B, C], with augmentation drawn afresh for every epoch.

The specification, what runs on a CPU, and the choice of kernels/binning.py on a GPU. Every random
draw is a hash of where it is used,

    draw(key, stream, sample, event) = mix(.. mix(mix(key[0]) ^ key[1]) .. ^ event)   32 bits

so it needs no generator state and does not depend on the batch's other samples, on their order or
on the number of processes. All arithmetic is exact in uint32, or float32 with one rounding an
operation, so that the kernel, compiled without fused multiply-add, reproduces every count.

Per event, in this order: augmentation (channel shift, stretch, jitter, drop), then the noise
events, which are not themselves augmented, then the bin and the channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.events import EventStore
from gpn_triton.event_linear import Cells
from gpn_triton.ops import BACKENDS, triton_unavailable

STYLES = ("counts", "authors")
OVERFLOWS = ("drop", "clip")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# windows where none is asked for: Heidelberg spikes end before 1.4 s; the authors' clock is 1 s
MAX_TIME = {"counts": 1.4, "authors": 1.0}

# samples counted at once on a CPU: their events then stay in cache (EPYC, 1 thread, 256 samples of
# 4,200 events, T = 50, all augmentations: 49 ms so, 95 ms at once; without any: 13 and 15)
CPU_SAMPLES = 32
# events a cell up to which a sorted list of them is faster than dense counts, from binning to the
# weight's gradient (EPYC, 1 thread, 700 channels, 32 samples, 128 and 512 neurons: at 0.24, T = 50,
# 1.0 and 1.1 times as fast, at 0.12 1.5 and 2.4, at 0.05 2.8 and 5.2, at 0.01, T = 1000, 11 and 6;
# with 2 threads on a busy machine it breaks even near 0.1)
CELLS_DENSITY = 0.05

# what a draw is for: the stream number of its hash
SHIFT, STRETCH, JITTER, DROP, NOISE_COUNT, NOISE_TIME, NOISE_UNIT = range(7)
MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
# both below 2^31, so that a product with 32 bits fits a signed 64-bit integer
MIX_1, MIX_2 = 0x21F0AAAD, 0x735A2D97
# standard deviation of the sum of four uniform bytes
BYTES_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)


@dataclass(frozen=True)
class BinningConfig:
    """How events become counts.

    Args:
        time_bins: number of bins T over the window.
        max_time: the window [0, max_time), seconds. Default: 1.4, or 1.0 for authors.
        channel_bin: input channels summed into one; 5 makes 140 of 700.
        overflow: events outside the window: drop, or clip to the nearest bin.
        style: counts, or authors: as the authors' published pipeline counts. Bin i holds the times
            in ((i - 1) / T, i / T] of a 1 s clock, so that bin 0 holds t <= 0 only and all after
            (T - 1) / T s is lost (edges are rounded to float16, as a comparison with float16 times
            rounds them); unit 0 is lost; unit u counts in column C - u, and column 0 is empty.
        dtype: of the counts: float32, float16 (exact to 2048) or bfloat16 (exact to 256).
    Raises:
        ValueError: a value out of range, or an option that the authors' style does not have.
    """

    time_bins: int
    max_time: float | None = None
    channel_bin: int = 1
    overflow: str = "drop"
    style: str = "counts"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        for name, choices in (("style", STYLES), ("overflow", OVERFLOWS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.max_time is None:
            object.__setattr__(self, "max_time", MAX_TIME[self.style])
        for name in ("time_bins", "channel_bin"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if not 0 < self.max_time < math.inf:
            raise ValueError(f"max_time: expected seconds above 0, got {self.max_time!r}")
        if self.style == "authors":
            for name, value in (("max_time", 1.0), ("channel_bin", 1), ("overflow", "drop")):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name}: the authors' binning knows only {value}, "
                        f"got {getattr(self, name)!r}"
                    )


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
    Raises:
        ValueError: a value out of range.
    """

    channel_shift: int = 0
    time_stretch: float = 0.0
    time_jitter: float = 0.0
    drop: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        top = {"time_stretch": 1, "drop": 1, "noise": 1 << 16}
        for field in fields(self):
            value, below = getattr(self, field.name), top.get(field.name, math.inf)
            if not 0 <= value < below:
                raise ValueError(f"{field.name}: expected 0 <= value < {below}, got {value!r}")


class DeviceEvents:
    """An event store's arrays as tensors on a device, 6 bytes an event.

    Args:
        store: the samples. On a CPU the tensors share its memory.
        device: where the tensors shall be.
        numbers [S] int64, on the device: each sample's number in the whole set, where the store is
            a part of one: draws depend on it. None: the sample's place in the store.
    Attributes:
        times [E] float32, units [E] int16 (the bits of uint16), offsets [S + 1] int64, labels [S]
        int64: as in EventStore. numbers: as given. num_channels: C. longest, mean: events of the
        longest sample, and of a sample on average.
    """

    def __init__(
        self,
        store: EventStore,
        device: torch.device | str = "cpu",
        numbers: Tensor | None = None,
    ):
        self.times = torch.from_numpy(store.times).to(device)
        # few operations know uint16
        self.units = torch.from_numpy(store.units.view("int16")).to(device)
        self.offsets = torch.from_numpy(store.offsets).to(device)
        self.labels = torch.from_numpy(store.labels).to(device)
        self.num_channels = store.num_channels
        self.numbers = numbers
        self.longest = int(np.diff(store.offsets).max(initial=0))
        self.mean = len(store.times) / max(len(store), 1)

    def __len__(self) -> int:
        return len(self.labels)


def bin_batch(
    events: DeviceEvents,
    indices: Tensor,
    config: BinningConfig,
    augmentation: Augmentation | None = None,
    draw_key: Tensor | tuple[int, int] | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Count the events of some samples by time bin and channel.

    With the Triton kernels the host waits for nothing and learns nothing of the data: a CUDA graph
    can hold the call if draw_key is a tensor, and counts anew from the indices and the key that it
    finds in them. In torch on a GPU the host waits for the number of events and of noise events.

    Args:
        events: all samples.
        indices [B] int64: which samples, in which order; on the events' device. The kernels do not
            check that there are such samples.
        config: bins, window, channels and dtype.
        augmentation: what to change; None: nothing.
        draw_key [2] int64: what the draws depend on beside the sample and the event, such as
            (seed, epoch); the low 32 bits of each count. A tensor on the events' device, or two
            integers. Needed with an augmentation.
        out [T, B, ceil(C / channel_bin)] float32, contiguous: where to count, overwritten. Default:
            a new tensor, whose first touch on a CPU costs as much as counting once it is large.
        backend: triton (CUDA, or CPU tensors under Triton's interpreter), torch, or auto: triton
            for CUDA tensors where the kernels can run, else torch. Counts are the same, bit for
            bit. A backend asked for by name runs or raises.
    Returns:
        counts [T, B, ceil(C / channel_bin)] of config.dtype; `out` itself where that is float32.
    Raises:
        ValueError: indices or out of another type or shape, an augmentation without a key, or an
            unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    _check(indices, augmentation, draw_key)
    T, B, C = config.time_bins, len(indices), events.num_channels
    shape = (T, B, -(-C // config.channel_bin))
    if out is not None and (
        out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous()
    ):
        raise ValueError(
            f"out: expected contiguous float32 {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    if _choose_backend(backend, events.times) == "triton":
        from gpn_triton.kernels.binning import binning_count

        key = None
        if augmentation is not None:
            key = torch.as_tensor(draw_key, dtype=torch.int64, device=indices.device).contiguous()
        with torch.cuda.device_of(indices):
            return binning_count(
                events.times, events.units, events.offsets, events.numbers,
                indices.contiguous(), key, C, events.longest, config, augmentation, out,
            )  # fmt: skip

    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=indices.device)
    else:
        out.zero_()
    for cell, keep in _cells(shape, events, indices, config, augmentation, draw_key):
        # sums of ones are exact in float32, in whatever order
        ones = torch.ones_like(cell, dtype=torch.float32) if keep is None else keep.float()
        out.view(-1).scatter_add_(0, cell, ones)
    return out.to(config.dtype)


def bin_cells(
    events: DeviceEvents,
    indices: Tensor,
    config: BinningConfig,
    augmentation: Augmentation | None = None,
    draw_key: Tensor | tuple[int, int] | None = None,
) -> Cells:
    """The events that bin_batch counts, as a sorted list for event_linear; in torch alone.

    Args:
        events, indices, config, augmentation, draw_key: as bin_batch; config.dtype is not used.
    Returns:
        Cells of shape (T, B, ceil(C / channel_bin)); their dense() is bin_batch in float32.
    Raises:
        ValueError: indices of another type or shape, or an augmentation without a key.
    """
    _check(indices, augmentation, draw_key)
    shape = (config.time_bins, len(indices), -(-events.num_channels // config.channel_bin))
    found = [indices.new_empty(0)]
    for cell, keep in _cells(shape, events, indices, config, augmentation, draw_key):
        found.append(cell if keep is None else cell[keep])
    return Cells.from_cells(torch.cat(found), shape)


def prefers_cells(events: DeviceEvents, config: BinningConfig) -> bool:
    """Whether bin_cells and event_linear shall replace bin_batch and a Linear: on a CPU, where the
    samples have few events a cell on average (see CELLS_DENSITY)."""
    cells = config.time_bins * -(-events.num_channels // config.channel_bin)
    return events.times.device.type == "cpu" and events.mean / cells <= CELLS_DENSITY


def _choose_backend(backend: str, times: Tensor) -> str:
    """torch or triton; raises RuntimeError if triton was asked for and cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not times.is_cuda):
        return "torch"
    reason = triton_unavailable(times)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {reason}")
    return "triton" if reason is None else "torch"


def _check(
    indices: Tensor,
    augmentation: Augmentation | None,
    draw_key: Tensor | tuple[int, int] | None,
) -> None:
    """Raise ValueError for indices of another type or shape, or an augmentation without a key."""
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"indices: expected int64 [B], got {indices.dtype} {list(indices.shape)}")
    if augmentation is not None and draw_key is None:
        raise ValueError("draw_key: expected two integers beside an augmentation, got None")


def _cells(
    shape: tuple[int, int, int],
    events: DeviceEvents,
    indices: Tensor,
    config: BinningConfig,
    augmentation: Augmentation | None,
    draw_key: Tensor | tuple[int, int] | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For one block of samples after the other: each event's place in counts.flatten() [E] int64,
    and which events stay [E] bool, None for all."""
    step = CPU_SAMPLES if indices.device.type == "cpu" else max(len(indices), 1)
    for a in range(0, len(indices), step):
        yield _block_cells(shape, a, events, indices[a : a + step], config, augmentation, draw_key)


def _block_cells(
    shape: tuple[int, int, int],
    first_slot: int,
    events: DeviceEvents,
    indices: Tensor,
    config: BinningConfig,
    augmentation: Augmentation | None,
    draw_key: Tensor | tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """What _cells yields, for samples from batch position first_slot on."""
    T, B, columns = shape
    C = events.num_channels
    # half the bytes of int64 is two thirds of the time
    short = torch.int32 if math.prod(shape) < 1 << 31 else torch.int64
    first = events.offsets.index_select(0, indices)
    count = events.offsets.index_select(0, indices + 1) - first
    slot, where = _enumerate(count, first, short)
    t = events.times.index_select(0, where)
    unit = events.units.index_select(0, where).to(short).bitwise_and_(0xFFFF)
    keep = None

    if augmentation is not None:
        numbers = indices if events.numbers is None else events.numbers.index_select(0, indices)
        draws = Draws(torch.as_tensor(draw_key, device=indices.device), numbers)
        t, unit, keep = _change(augmentation, draws, t, unit, slot, where, first, C)
        if augmentation.noise:
            last = first + count - 1
            noise_t, noise_unit, noise_slot = _noise(augmentation.noise, draws, events, count, last)
            t, unit = torch.cat([t, noise_t]), torch.cat([unit, noise_unit.to(short)])
            slot = torch.cat([slot, noise_slot.to(short)])
            if keep is not None:
                keep = torch.cat([keep, torch.ones_like(noise_t, dtype=torch.bool)])

    if config.style == "authors":
        edges = torch.arange(T, dtype=torch.float64, device=t.device) * (1 / T)
        bin = torch.bucketize(t, edges.half().float(), out_int32=True).to(short)
        keep = _also(_also(keep, bin < T), unit > 0)
        bin, channel = bin.clamp_(max=T - 1), (C - unit).clamp_(max=C - 1)
    else:
        if config.overflow == "drop":
            keep = _also(keep, t < config.max_time)
            if augmentation is not None and augmentation.time_jitter:
                keep = _also(keep, t >= 0)
        bin = (t * (T / config.max_time)).clamp_(0, T - 1).to(short)
        channel = unit if config.channel_bin == 1 else unit // config.channel_bin
    return bin.mul_(B).add_(slot.add_(first_slot)).mul_(columns).add_(channel).long(), keep


class Draws:
    """Random 32-bit numbers that are a function of what they are for.

    Args:
        key [2] int64: see bin_batch.
        numbers [B] int64: the samples' numbers in the whole set.
    """

    def __init__(self, key: Tensor, numbers: Tensor):
        self.key = fold(fold(key[0].new_zeros(()), key[0] & MASK), key[1] & MASK)
        self.numbers = numbers

    def __call__(self, stream: int, slot: Tensor | None = None, number: Tensor | int = 0) -> Tensor:
        """One draw a sample, or one an event: `slot` [E] its sample's place, `number` [E]."""
        h = fold(fold(self.key, stream), self.numbers)
        return fold(h if slot is None else h.index_select(0, slot), number)


def fold(h: Tensor, word: Tensor | int) -> Tensor:
    """Mix a word of 32 bits into a hash of 32 bits, both held as int64.

    Source: Chris Wellons' hash prospector, for the form and the constants of the mixing.
    """
    h = (h ^ word).add_(GOLDEN).bitwise_and_(MASK)
    h = h.bitwise_xor_(h >> 16).mul_(MIX_1).bitwise_and_(MASK)
    h = h.bitwise_xor_(h >> 15).mul_(MIX_2).bitwise_and_(MASK)
    return h.bitwise_xor_(h >> 15)


def _uniform(draw: Tensor) -> Tensor:
    """float32 in [0, 1), a multiple of 2^-24."""
    return (draw >> 8).float().mul_(2.0**-24)


def _below(draw: Tensor, n: int) -> Tensor:
    """int64 in 0..n - 1, the high half of the product."""
    return (draw * n) >> 32


def _near_normal(draw: Tensor) -> Tensor:
    """float32, the centred sum of the draw's four bytes: deviation BYTES_DEVIATION."""
    pairs = (draw & 0xFF00FF) + ((draw >> 8) & 0xFF00FF)
    return ((pairs & 0xFFFF) + (pairs >> 16) - 510).float()


def _also(keep: Tensor | None, condition: Tensor) -> Tensor:
    """Which events stay under both; None: all."""
    return condition if keep is None else keep.logical_and_(condition)


def _enumerate(
    count: Tensor, first: Tensor | int = 0, slot_dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """For count [B]: each item's slot in 0..B - 1, and first [B] plus its rank in the slot."""
    slot = torch.repeat_interleave(count.to(slot_dtype))
    shift = first - (count.cumsum(0) - count)
    rank = torch.arange(len(slot), device=count.device).add_(shift.index_select(0, slot))
    return slot, rank


def _change(
    augmentation: Augmentation,
    draws: Draws,
    t: Tensor,
    unit: Tensor,
    slot: Tensor,
    where: Tensor,
    first: Tensor,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Events' times, units and whether they stay, after shift, stretch, jitter and drop."""
    keep = None
    if augmentation.time_jitter or augmentation.drop:
        number = where - first.index_select(0, slot)
    if augmentation.channel_shift:
        reach = augmentation.channel_shift
        shift = _below(draws(SHIFT), 2 * reach + 1) - reach
        unit = unit.add_(shift.to(unit.dtype).index_select(0, slot))
        keep = (unit >= 0) & (unit < channels)
        unit = unit.clamp_(0, channels - 1)
    if augmentation.time_stretch:
        factor = 1 + augmentation.time_stretch * (2 * _uniform(draws(STRETCH)) - 1)
        t = t.mul_(factor.index_select(0, slot))
    if augmentation.time_jitter:
        scale = augmentation.time_jitter / BYTES_DEVIATION
        t = t.add_(_near_normal(draws(JITTER, slot, number)).mul_(scale))
    if augmentation.drop:
        keep = _also(keep, draws(DROP, slot, number) >= round(augmentation.drop * 2**32))
    return t, unit, keep


def _noise(
    share: float, draws: Draws, events: DeviceEvents, count: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Times, units and slots of noise events, for samples of `count` events up to number `last`."""
    # share * count, rounded up or down at random, in 1 / 65536
    added = (count * round(share * 65536) + (draws(NOISE_COUNT) >> 16)) >> 16
    slot, number = _enumerate(added)
    end = events.times.index_select(0, last.index_select(0, slot))
    t = _uniform(draws(NOISE_TIME, slot, number)) * end
    return t, _below(draws(NOISE_UNIT, slot, number), events.num_channels), slot
