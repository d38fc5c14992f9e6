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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.events import EventStore
from gpn_triton.device import BACKENDS, triton_unavailable
from gpn_triton.event_linear import Cells

STYLES = ("counts", "authors")
OVERFLOWS = ("drop", "clip")
NUMPY = {torch.int32: np.int32, torch.int64: np.int64}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# windows where none is asked for: Heidelberg spikes end before 1.4 s; the authors' clock is 1 s
MAX_TIME = {"counts": 1.4, "authors": 1.0}

# samples counted at once on a CPU: enough that calls cost little, few enough that their events stay
# in cache (EPYC, 1 thread, 64 samples of 4,200 events, T = 50, all augmentations: 20.2 ms at 16,
# 16.2 at 32, 14.9 at 64; 256 samples: 108, 92, 97, and 108 at 128)
CPU_SAMPLES = 64
# events a cell up to which a sorted list of them is faster than dense counts, from binning to the
# weight's gradient (EPYC, 1 thread, 700 channels, 32 samples, 128 and 512 neurons: at 0.24, T = 50,
# 1.0 and 1.1 times as fast, at 0.12 1.5 and 2.4, at 0.05 2.8 and 5.2, at 0.01, T = 1000, 11 and 6;
# with 2 threads on a busy machine it breaks even near 0.1)
CELLS_DENSITY = 0.05
# bytes of kept counts for a byte of events, and MiB of them, up to which they are kept: they save
# most of a batch's time (see Frames) where memory is not short
FRAMES_SHARE, FRAMES_MIB = 4, 1024

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
    max_time: float = 1.0
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
        longest sample, and of a sample on average. frames: where counts are kept; None: nowhere.
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
        self.frames: Frames | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Frames:
    """Counts of samples as bytes, made when first asked for, for batches on a CPU that are not
    augmented or by a channel shift alone.

    A batch then copies rows instead of counting events. The samples' events must stay as they are.
    Nothing is kept of a set where that would be large (see FRAMES_SHARE) or a count is above 255.
    """

    def __init__(self):
        self._config: BinningConfig | None = None
        self._counts: np.ndarray | None = None

    def batch(
        self,
        events: DeviceEvents,
        indices: Tensor,
        config: BinningConfig,
        augmentation: Augmentation | None,
        draw_key: Tensor | tuple[int, int] | None,
    ) -> Tensor | None:
        """The counts of bin_batch as uint8, or None where they are not kept."""
        config, shifts = replace(config, dtype=torch.float32), [0] * len(indices)
        if augmentation is not None:
            moves = augmentation == Augmentation(augmentation.channel_shift)
            if not moves or config.style != "counts" or config.channel_bin > 1:
                return None
            shift = _shift(augmentation, _draws(events, indices, draw_key))
            # further than all channels is as far
            shifts = shift.clamp(-events.num_channels, events.num_channels).tolist()
        if config != self._config:
            self._start(events, config)
        if self._counts is None or not self._make(events, indices):
            return None
        _, T, columns = self._counts.shape
        counts = np.zeros((T, len(indices), columns), np.uint8)
        for slot, (k, shift) in enumerate(zip(indices.tolist(), shifts, strict=True)):
            a, b = max(shift, 0), columns + min(shift, 0)
            counts[:, slot, a:b] = self._counts[k, :, a - shift : b - shift]
        return torch.from_numpy(counts)

    def _start(self, events: DeviceEvents, config: BinningConfig) -> None:
        """Forget what was kept and make room, if it is not too much, for other counts."""
        shape = (len(events), config.time_bins, -(-events.num_channels // config.channel_bin))
        most = FRAMES_SHARE * (events.times.nbytes + events.units.nbytes)
        fits = math.prod(shape) <= min(most, FRAMES_MIB << 20)
        self._config, self._made = config, np.zeros(len(events), bool)
        # memory is taken when it is first written
        self._counts = np.zeros(shape, np.uint8) if fits else None

    def _make(self, events: DeviceEvents, indices: Tensor) -> bool:
        """Count the samples that were not yet; whether all counts fit a byte."""
        numbers = np.unique(indices.numpy())
        missing = numbers[~self._made[numbers]]
        if len(missing):
            counts = _count(events, torch.from_numpy(missing), self._config)
            if counts.max() > 255:
                self._counts = None
                return False
            self._counts[missing] = counts.transpose(0, 1).numpy()
            self._made[missing] = True
        return True


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
    finds in them. In torch on a GPU the host waits for the key and the number of events.

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

    if events.frames is not None:
        counts = events.frames.batch(events, indices, config, augmentation, draw_key)
        if counts is not None:
            return (counts if out is None else out.copy_(counts)).to(config.dtype)
    return _count(events, indices, config, augmentation, draw_key, out).to(config.dtype)


def _count(
    events: DeviceEvents,
    indices: Tensor,
    config: BinningConfig,
    augmentation: Augmentation | None = None,
    draw_key: Tensor | tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What bin_batch returns, in torch and float32."""
    shape = (config.time_bins, len(indices), -(-events.num_channels // config.channel_bin))
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=indices.device)
    else:
        out.zero_()
    for cell, weight in _cells(shape, events, indices, config, augmentation, draw_key):
        if weight is None:
            weight = torch.ones_like(cell, dtype=torch.float32)
        # sums of ones are exact in float32, in whatever order
        out.view(-1).scatter_add_(0, cell, weight)
    return out


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
    for cell, weight in _cells(shape, events, indices, config, augmentation, draw_key):
        found.append(cell if weight is None else cell[weight > 0])
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
    and 1 for an event that stays, 0 for another [E] float32; None: all stay."""
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
    t, unit, first, count = _collect(events, indices, short)
    slots = torch.arange(first_slot, first_slot + len(indices), dtype=short, device=t.device)
    row = _spread(slots * columns, count)
    weight = None

    if augmentation is not None:
        draws = _draws(events, indices, draw_key)
        t, unit, weight = _change(augmentation, draws, t, unit, count, C)
        if augmentation.noise:
            last = first + count - 1
            noise_t, noise_unit, added = _noise(augmentation.noise, draws, events, count, last)
            t, unit = torch.cat([t, noise_t]), torch.cat([unit, noise_unit.to(short)])
            row = torch.cat([row, _spread(slots * columns, added)])
            if weight is not None:
                weight = torch.cat([weight, torch.ones_like(noise_t)])

    if config.style == "authors":
        edges = torch.arange(T, dtype=torch.float64, device=t.device) * (1 / T)
        bin = torch.bucketize(t, edges.half().float(), out_int32=True).to(short)
        weight = _where(_where(weight, torch.lt, bin, T), torch.gt, unit, 0)
        bin, channel = bin.clamp_(max=T - 1), (C - unit).clamp_(max=C - 1)
    else:
        if config.overflow == "drop":
            weight = _where(weight, torch.lt, t, config.max_time)
            if augmentation is not None and augmentation.time_jitter:
                weight = _where(weight, torch.ge, t, 0)
        bin = t.mul_(T / config.max_time).clamp_(0, T - 1).to(short)
        channel = unit if config.channel_bin == 1 else unit // config.channel_bin
    return bin.mul_(B * columns).add_(row).add_(channel).long(), weight


class Draws:
    """Random 32-bit numbers that are a function of what they are for.

    Args:
        key [2]: integers, see bin_batch.
        numbers [B] int64: the samples' numbers in the whole set.
    """

    def __init__(self, key: Sequence[int], numbers: Tensor):
        self.key = fold(fold(0, key[0] & MASK), key[1] & MASK)
        self.numbers = numbers

    def __call__(self, stream: int, count: Tensor | None = None) -> Tensor:
        """One draw a sample [B] int64, or one for each of count [B] events of the samples."""
        h = fold(fold(self.key, stream), self.numbers)
        return fold(h, 0) if count is None else fold(_spread(h, count), _ranks(count))


def _draws(events: DeviceEvents, indices: Tensor, draw_key: Tensor | tuple[int, int]) -> Draws:
    """The draws of some samples."""
    numbers = indices if events.numbers is None else events.numbers.index_select(0, indices)
    return Draws(draw_key.tolist() if isinstance(draw_key, Tensor) else draw_key, numbers)


def fold(h: Tensor | int, word: Tensor | int) -> Tensor | int:
    """Mix a word of 32 bits into a hash of 32 bits, tensors of both held as int64.

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


def _where(
    weight: Tensor | None, compare: Callable[..., Tensor], a: Tensor, b: Tensor | float
) -> Tensor:
    """weight [E] float32, None for ones, and 0 where the comparison does not hold."""
    # vectorised, as into bool it is not: 22 and 90 us for 172,000 floats (EPYC, 1 thread)
    holds = compare(a, b, out=torch.empty(a.shape, dtype=torch.float32, device=a.device))
    return holds if weight is None else weight.mul_(holds)


def _collect(
    events: DeviceEvents, indices: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times [E] float32 and units [E] of some samples, copies, one sample behind the other; first
    event and number of events of each sample [B] int64."""
    first = events.offsets.index_select(0, indices)
    end = events.offsets.index_select(0, indices + 1)
    count = end - first
    if indices.device.type == "cpu":
        # samples are runs of memory: 0.1 ms for 64 of 2,700 events, by index 1.0 (EPYC, 1 thread)
        spans = [slice(a, b) for a, b in zip(first.tolist(), end.tolist(), strict=True)]
        times, units = events.times.numpy(), events.units.numpy().view("uint16")
        t = np.concatenate([times[span] for span in spans])
        unit = np.concatenate([units[span] for span in spans], dtype=NUMPY[dtype])
        return torch.from_numpy(t), torch.from_numpy(unit), first, count
    where = _ranks(count).add_(_spread(first, count))
    unit = events.units.index_select(0, where).to(dtype).bitwise_and_(0xFFFF)
    return events.times.index_select(0, where), unit, first, count


def _spread(values: Tensor, count: Tensor) -> Tensor:
    """values [B], each as often as count [B] says."""
    if values.device.type == "cpu":
        # a fifth of what torch takes
        return torch.from_numpy(np.repeat(values.numpy(), count.numpy()))
    return values.repeat_interleave(count)


def _ranks(count: Tensor) -> Tensor:
    """0..count - 1 for each of count [B], one behind the other, int64."""
    end = count.cumsum(0)
    before = _spread(end - count, count)
    return torch.arange(len(before), device=count.device).sub_(before)


def _change(
    augmentation: Augmentation, draws: Draws, t: Tensor, unit: Tensor, count: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Events' times, units and weights (see _cells), after shift, stretch, jitter and drop."""
    weight = None
    if augmentation.channel_shift:
        shift = _shift(augmentation, draws).to(unit.dtype)
        moved = unit.add_(_spread(shift, count))
        unit = moved.clamp(0, channels - 1)
        weight = _where(None, torch.eq, unit, moved)
    if augmentation.time_stretch:
        factor = 1 + augmentation.time_stretch * (2 * _uniform(draws(STRETCH)) - 1)
        t = t.mul_(_spread(factor, count))
    if augmentation.time_jitter:
        scale = augmentation.time_jitter / BYTES_DEVIATION
        t = t.add_(_near_normal(draws(JITTER, count)).mul_(scale))
    if augmentation.drop:
        weight = _where(weight, torch.ge, draws(DROP, count), round(augmentation.drop * 2**32))
    return t, unit, weight


def _shift(augmentation: Augmentation, draws: Draws) -> Tensor:
    """How many channels each sample moves, [B] int64."""
    reach = augmentation.channel_shift
    return _below(draws(SHIFT), 2 * reach + 1) - reach


def _noise(
    share: float, draws: Draws, events: DeviceEvents, count: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Times and units of noise events, for samples of `count` events up to number `last`, and how
    many each sample has."""
    # share * count, rounded up or down at random, in 1 / 65536
    added = (count * round(share * 65536) + (draws(NOISE_COUNT) >> 16)) >> 16
    end = events.times.index_select(0, _spread(last, added))
    t = _uniform(draws(NOISE_TIME, added)) * end
    return t, _below(draws(NOISE_UNIT, added), events.num_channels), added
