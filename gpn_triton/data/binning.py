"""A batch of samples as the input of a network: spike counts [T, B, C], or a list of events.

This is the specification, what runs on a CPU, and the choice of kernels/binning.py on a GPU. Events
are augmented first (see data/augmentation.py) and then fall into a time bin and a channel. Times
are float32 with one rounding an operation, so that the kernel, compiled without fused multiply-add,
reproduces every count.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.augmentation import (
    Augmentation,
    Draws,
    change,
    draw_shift,
    noise_events,
    ranks,
    spread,
    where,
)
from gpn_triton.data.dense import DeviceDense
from gpn_triton.data.events import DeviceEvents
from gpn_triton.machine.device import choose_backend
from gpn_triton.neurons.event_linear import Cells

# of the draws: what they depend on beside the sample and the event
Key = Tensor | tuple[int, int]
# the time bins first..last - 1 of a sequence that is taken in pieces; None: all of them
Steps = tuple[int, int] | None
STYLES = ("counts", "authors")
# there is no kernel for a CPU
BACKENDS = ("auto", "triton", "torch")
OVERFLOWS = ("drop", "clip")
NUMPY = {torch.int32: np.int32, torch.int64: np.int64}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
# most of a batch's time where memory is not short
KEPT_SHARE, KEPT_MIB = 4, 1024


@dataclass(frozen=True)
class BinningConfig:
    """How events become counts.

    Args:
        time_bins: number of bins T over the window.
        max_time: the window [0, max_time), seconds.
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
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, value in (("time_bins", self.time_bins), ("channel_bin", self.channel_bin)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        if not 0 < self.max_time < math.inf:
            raise ValueError(f"max_time: expected seconds above 0, got {self.max_time!r}")
        if self.style == "authors":
            for name, only in (("max_time", 1.0), ("channel_bin", 1), ("overflow", "drop")):
                if (value := getattr(self, name)) != only:
                    raise ValueError(
                        f"{name}: the authors' binning knows only {only}, got {value!r}"
                    )

    def columns(self, channels: int) -> int:
        """Input channels of the counts: ceil(channels / channel_bin)."""
        return -(-channels // self.channel_bin)

    def shape(
        self, events: DeviceEvents, indices: Tensor, steps: Steps = None
    ) -> tuple[int, int, int]:
        """(bins, B, columns) of the counts of some samples in the bins steps; None: in all."""
        first, last = steps or (0, self.time_bins)
        return last - first, len(indices), self.columns(events.num_channels)


def batch_input(
    events: DeviceEvents | DeviceDense, indices: Tensor, config: BinningConfig,
    augmentation: Augmentation | None, key: Key | None, sparse: bool, steps: Steps = None,
) -> Tensor | Cells:  # fmt: skip
    """Some samples in the form in which the network takes them soonest.

    On a CPU that is a list of events, where the samples have few a cell, or a copy of counts that
    are kept; else events are counted. The numbers are the same in every form. Real-valued inputs
    are what they are.

    Args:
        events, indices, config, augmentation, steps: as in bin_batch. key: its draw_key.
        sparse: whether the network can take a list of events.
    Returns:
        Cells of shape (T, B, columns), or counts [T, B, columns] of config.dtype; of the bins
        `steps` alone, where they are given.
    """
    if isinstance(events, DeviceDense):
        return events.batch(indices, *(steps or (0, config.time_bins)), config.dtype)
    if sparse and prefers_cells(events, config):
        return bin_cells(events, indices, config, augmentation, key, steps)
    _check(indices, augmentation, key)
    if events.kept is not None and steps is None:
        counts = _kept_counts(events, indices, config, augmentation, key)
        if counts is not None:
            return counts
    return bin_batch(events, indices, config, augmentation, key, steps=steps)


def prefers_cells(events: DeviceEvents, config: BinningConfig) -> bool:
    """Whether bin_cells and event_linear are faster than bin_batch and a Linear."""
    cells = config.time_bins * config.columns(events.num_channels)
    return events.times.device.type == "cpu" and events.mean / cells <= CELLS_DENSITY


def bin_batch(
    events: DeviceEvents, indices: Tensor, config: BinningConfig,
    augmentation: Augmentation | None = None, draw_key: Key | None = None, backend: str = "auto",
    steps: Steps = None,
) -> Tensor:  # fmt: skip
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
        draw_key [2] int64: see Key; such as (seed, epoch), of which the low 32 bits count. A tensor
            on the events' device, or two integers. Needed with an augmentation.
        backend: triton (CUDA, or CPU tensors under Triton's interpreter), torch, or auto; see
            device.choose_backend. Counts are the same, bit for bit.
        steps: first and last + 1 of the T time bins that are wanted; None: all.
    Returns:
        counts [T, B, ceil(C / channel_bin)] of config.dtype, T being the number of bins wanted.
    Raises:
        ValueError: indices of another type or shape, an augmentation without a key, or an unknown
            backend.
        RuntimeError: the backend asked for cannot run here.
    """
    _check(indices, augmentation, draw_key)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if choose_backend(backend, events.times) == "triton":
        from gpn_triton.kernels.binning import binning_count

        key = None
        if augmentation is not None:
            key = torch.as_tensor(draw_key, dtype=torch.int64, device=indices.device).contiguous()
        with torch.cuda.device_of(indices):
            return binning_count(
                events.times, events.units, events.offsets, events.numbers,
                indices.contiguous(), key, events.num_channels, events.longest, config,
                augmentation, *(steps or (0, config.time_bins)),
            )  # fmt: skip

    counts = torch.zeros(config.shape(events, indices, steps), device=indices.device)
    for cell, weight in _cells(events, indices, config, augmentation, draw_key, steps):
        if weight is None:
            weight = torch.ones_like(cell, dtype=torch.float32)
        # sums of ones are exact in float32, in whatever order
        counts.view(-1).scatter_add_(0, cell, weight)
    return counts.to(config.dtype)


def bin_cells(
    events: DeviceEvents, indices: Tensor, config: BinningConfig,
    augmentation: Augmentation | None = None, draw_key: Key | None = None, steps: Steps = None,
) -> Cells:  # fmt: skip
    """The events that bin_batch counts, as a sorted list for event_linear; in torch alone.

    Args:
        events, indices, config, augmentation, draw_key, steps: as bin_batch; config.dtype is not
            used.
    Returns:
        Cells of shape (T, B, ceil(C / channel_bin)); their dense() is bin_batch in float32.
    Raises:
        ValueError: indices of another type or shape, or an augmentation without a key.
    """
    _check(indices, augmentation, draw_key)
    found = [indices.new_empty(0)]
    for cell, weight in _cells(events, indices, config, augmentation, draw_key, steps):
        found.append(cell if weight is None else cell[weight > 0])
    return Cells.from_cells(torch.cat(found), config.shape(events, indices, steps))


class KeptCounts:
    """Counts of a set's samples as bytes, each made when it is first asked for.

    A batch then copies rows instead of counting events. The samples' events must stay as they are.
    Nothing is kept of a set where that would be large (see KEPT_SHARE) or a count is above 255.

    Args:
        events: the set, on a CPU. config: how its events are binned.
    """

    def __init__(self, events: DeviceEvents, config: BinningConfig):
        shape = (len(events), config.time_bins, config.columns(events.num_channels))
        most = KEPT_SHARE * (events.times.nbytes + events.units.nbytes)
        fits = math.prod(shape) <= min(most, KEPT_MIB << 20)
        self._config, self._made = config, np.zeros(len(events), bool)
        # memory is taken when it is first written
        self._counts = np.zeros(shape, np.uint8) if fits else None

    def batch(self, events: DeviceEvents, indices: Tensor, shifts: list[int]) -> Tensor | None:
        """Counts [T, B, columns] uint8 of samples moved by so many columns, where they are kept."""
        samples = indices.numpy()
        missing = np.unique(samples[~self._made[samples]])
        if self._counts is not None and len(missing):
            counts = bin_batch(events, torch.from_numpy(missing), self._config, backend="torch")
            if counts.max() > 255:
                self._counts = None
            else:
                self._counts[missing] = counts.transpose(0, 1).to(torch.uint8).numpy()
                self._made[missing] = True
        if self._counts is None:
            return None
        _, T, columns = self._counts.shape
        batch = np.zeros((T, len(samples), columns), np.uint8)
        for slot, (k, shift) in enumerate(zip(samples, shifts, strict=True)):
            a, b = max(shift, 0), columns + min(shift, 0)
            batch[:, slot, a:b] = self._counts[k, :, a - shift : b - shift]
        return torch.from_numpy(batch)


def _kept_counts(
    events: DeviceEvents, indices: Tensor, config: BinningConfig, augmentation: Augmentation | None,
    key: Key | None,
) -> Tensor | None:  # fmt: skip
    """What bin_batch returns, from kept counts; None where these cannot tell."""
    shifts = [0] * len(indices)
    if augmentation is not None:
        moves = augmentation == Augmentation(augmentation.channel_shift)
        if not moves or config.style != "counts" or config.channel_bin > 1:
            return None
        # further than all channels is as far
        reach, draws = events.num_channels, Draws.of(events, indices, key)
        shifts = draw_shift(augmentation, draws).clamp(-reach, reach).tolist()
    if config not in events.kept:
        # one binning at a time bounds the memory
        events.kept.clear()
        events.kept[config] = KeptCounts(events, config)
    counts = events.kept[config].batch(events, indices, shifts)
    return None if counts is None else counts.to(config.dtype)


def _check(indices: Tensor, augmentation: Augmentation | None, draw_key: Key | None) -> None:
    """Raise ValueError for indices of another type or shape, or an augmentation without a key."""
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"indices: expected int64 [B], got {indices.dtype} {list(indices.shape)}")
    if augmentation is not None and draw_key is None:
        raise ValueError("draw_key: expected two integers beside an augmentation, got None")


def _cells(
    events: DeviceEvents, indices: Tensor, config: BinningConfig, augmentation: Augmentation | None,
    draw_key: Key | None, steps: Steps,
) -> Iterator[tuple[Tensor, Tensor | None]]:  # fmt: skip
    """For one block of samples after the other: each event's place in counts.flatten() [E] int64,
    and 1 for an event that stays, 0 for another [E] float32; None: all stay."""
    shape = config.shape(events, indices, steps)
    _, B, columns = shape
    # half the bytes of int64 is two thirds of the time
    short = torch.int32 if math.prod(shape) < 1 << 31 else torch.int64
    step = CPU_SAMPLES if indices.device.type == "cpu" else max(B, 1)
    for a in range(0, B, step):
        block = indices[a : a + step]
        t, unit, first, count = _collect(events, block, short)
        slots = torch.arange(a, a + len(block), dtype=short, device=t.device) * columns
        row, weight = spread(slots, count), None
        if augmentation is not None:
            draws = Draws.of(events, block, draw_key)
            t, unit, weight = change(augmentation, draws, t, unit, count, events.num_channels)
            if augmentation.noise:
                last = first + count - 1
                noise = noise_events(augmentation.noise, draws, events, count, last)
                t, unit = torch.cat([t, noise[0]]), torch.cat([unit, noise[1].to(short)])
                row = torch.cat([row, spread(slots, noise[2])])
                if weight is not None:
                    weight = torch.cat([weight, torch.ones_like(noise[0])])
        jittered = augmentation is not None and augmentation.time_jitter > 0
        bin, channel, weight = _place(config, t, unit, weight, events.num_channels, jittered)
        if steps is not None:
            bin -= steps[0]
            weight = where(where(weight, torch.ge, bin, 0), torch.lt, bin, shape[0])
            bin.clamp_(0, shape[0] - 1)
        yield bin.mul_(B * columns).add_(row).add_(channel).long(), weight


def _place(
    config: BinningConfig, t: Tensor, unit: Tensor, weight: Tensor | None, channels: int,
    jittered: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Each event's time bin and column, of unit's type, and its weight as in _cells.

    jittered: whether times may lie below 0. t is changed in place.
    """
    T = config.time_bins
    if config.style == "authors":
        edges = torch.arange(T, dtype=torch.float64, device=t.device) * (1 / T)
        bin = torch.bucketize(t, edges.half().float(), out_int32=True).to(unit.dtype)
        weight = where(where(weight, torch.lt, bin, T), torch.gt, unit, 0)
        return bin.clamp_(max=T - 1), (channels - unit).clamp_(max=channels - 1), weight
    if config.overflow == "drop":
        weight = where(weight, torch.lt, t, config.max_time)
        if jittered:
            weight = where(weight, torch.ge, t, 0)
    bin = t.mul_(T / config.max_time).clamp_(0, T - 1).to(unit.dtype)
    return bin, unit if config.channel_bin == 1 else unit // config.channel_bin, weight


def _collect(
    events: DeviceEvents, indices: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times [E] float32 and units [E] of some samples, copies, one sample behind the other; first
    event and number of events of each sample [B] int64."""
    first, end = (events.offsets.index_select(0, indices + k) for k in (0, 1))
    count = end - first
    if indices.device.type == "cpu":
        # samples are runs of memory: 0.1 ms for 64 of 2,700 events, by index 1.0 (EPYC, 1 thread)
        spans = list(map(slice, first.tolist(), end.tolist()))
        times, units = events.times.numpy(), events.units.numpy().view("uint16")
        t = np.concatenate([times[span] for span in spans])
        unit = np.concatenate([units[span] for span in spans], dtype=NUMPY[dtype])
        return torch.from_numpy(t), torch.from_numpy(unit), first, count
    where_from = ranks(count).add_(spread(first, count))
    unit = events.units.index_select(0, where_from).to(dtype).bitwise_and_(0xFFFF)
    return events.times.index_select(0, where_from), unit, first, count
