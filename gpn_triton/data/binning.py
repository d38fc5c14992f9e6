"""A batch of samples as the input of a network: spike counts [T, B, C], or a list of events.

This is the specification, and the choice of kernels/binning.py on a GPU and kernels/binning_cpu.py
on a CPU. Events are augmented first (see data/augmentation.py) and then fall into a time bin and a
channel. Where the scale is log, a count n becomes

    log(1 + n / m)        m = the sample's events in the window / (T columns)

which loudness does not change; a sample without events stays 0. Times are float32 with one rounding
an operation, so that the kernels, compiled without fused multiply-add, reproduce every count;
logarithms differ in their last bits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpn_triton.data.augmentation import (
    Augmentation,
    Draws,
    change,
    noise_events,
    ranks,
    spread,
)
from gpn_triton.data.dense import DeviceDense
from gpn_triton.data.events import DeviceEvents
from gpn_triton.machine.device import BACKENDS, choose_backend
from gpn_triton.neurons.event_linear import Cells

# of the draws: what they depend on beside the sample and the event
Key = Tensor | tuple[int, int]
# the time bins first..last - 1 of a sequence that is taken in pieces; None: all of them
Steps = tuple[int, int] | None
STYLES = ("counts", "authors")
OVERFLOWS = ("drop", "clip")
SCALES = ("counts", "log")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# events a cell up to which a sorted list of them is faster than dense counts, from binning to the
# weight's gradient (EPYC, 700 channels, 32 and 256 samples: at 0.33 0.8 to 1.0 times as fast with
# one thread and 0.5 to 0.9 with two, at 0.16 1.4 to 1.6 and 0.8 to 1.0, at 0.04 4.8 to 5.8 and 3.6
# to 5.1, 128 to 512 neurons)
CELLS_DENSITY = 0.12


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
        scale: what a count n becomes: n (counts), or log(1 + n / m) as above (log).
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
    scale: str = "counts"

    def __post_init__(self):
        for name, choices in (
            ("style", STYLES), ("overflow", OVERFLOWS), ("dtype", DTYPES), ("scale", SCALES),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, value in (("time_bins", self.time_bins), ("channel_bin", self.channel_bin)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        if not 0 < self.max_time < math.inf:
            raise ValueError(f"max_time: expected seconds above 0, got {self.max_time!r}")
        if self.style == "authors":
            for name, only in (
                ("max_time", 1.0), ("channel_bin", 1), ("overflow", "drop"), ("scale", "counts"),
            ):  # fmt: skip
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

    On a CPU that is a list of events, where the samples have few a cell; else events are counted.
    The numbers are the same in either form. Real-valued inputs are what they are.

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
    return bin_batch(events, indices, config, augmentation, key, steps=steps)


def prefers_cells(events: DeviceEvents, config: BinningConfig) -> bool:
    """Whether bin_cells and event_linear are faster than bin_batch and a Linear; a list of events
    knows counts alone."""
    if config.scale != "counts":
        return False
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
        backend: triton (CUDA, or CPU tensors under Triton's interpreter), cpu, torch, or auto; see
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
    how = choose_backend(backend, events.times)
    if how == "cpu":
        from gpn_triton.kernels import binning_cpu

        counts, totals = binning_cpu.binning_count(
            events, indices, config, augmentation, draw_key, steps
        )
        if config.scale == "log":
            counts.mul_(level(totals, config, events.num_channels)[:, None]).log1p_()
        return counts.to(config.dtype)
    if how == "triton":
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
    cell, weight, slot, inside = _cells(events, indices, config, augmentation, draw_key, steps)
    # sums of ones are exact in float32, in whatever order
    counts.view(-1).scatter_add_(0, cell, weight * inside)
    if config.scale == "log":
        totals = torch.zeros(len(indices), device=indices.device).scatter_add_(0, slot, weight)
        counts.mul_(level(totals, config, events.num_channels)[:, None]).log1p_()
    return counts.to(config.dtype)


def level(totals: Tensor, config: BinningConfig, channels: int) -> Tensor:
    """1 / m [B] float32 of samples with so many events in the window; 0 for a sample without."""
    cells = config.time_bins * config.columns(channels)
    return torch.where(totals > 0, cells / totals, 0.0)


def bin_cells(
    events: DeviceEvents, indices: Tensor, config: BinningConfig,
    augmentation: Augmentation | None = None, draw_key: Key | None = None, steps: Steps = None,
) -> Cells:  # fmt: skip
    """The events that bin_batch counts, as a sorted list for event_linear; on a CPU alone.

    Args:
        events, indices, config, augmentation, draw_key, steps: as bin_batch; config.dtype is not
            used.
    Returns:
        Cells of shape (T, B, ceil(C / channel_bin)); their dense() is bin_batch in float32.
    Raises:
        ValueError: indices of another type or shape, or an augmentation without a key.
    """
    from gpn_triton.kernels import binning_cpu

    _check(indices, augmentation, draw_key)
    listed = binning_cpu.binning_list(events, indices, config, augmentation, draw_key, steps)
    return Cells(config.shape(events, indices, steps), *listed)


def _check(indices: Tensor, augmentation: Augmentation | None, draw_key: Key | None) -> None:
    """Raise ValueError for indices of another type or shape, or an augmentation without a key."""
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"indices: expected int64 [B], got {indices.dtype} {list(indices.shape)}")
    if augmentation is not None and draw_key is None:
        raise ValueError("draw_key: expected two integers beside an augmentation, got None")


def _cells(
    events: DeviceEvents, indices: Tensor, config: BinningConfig, augmentation: Augmentation | None,
    draw_key: Key | None, steps: Steps,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Each event's place in counts.flatten() [E] int64; 1 for an event that stays in the window, 0
    for another [E] float32; its slot [E] int64; and whether its bin is wanted [E] bool."""
    bins, B, columns = config.shape(events, indices, steps)
    first, end = (events.offsets.index_select(0, indices + k) for k in (0, 1))
    count = end - first
    where_from = ranks(count).add_(spread(first, count))
    t = events.times.index_select(0, where_from)
    unit = events.units.index_select(0, where_from).long().bitwise_and_(0xFFFF)
    slots = torch.arange(B, device=t.device)
    slot, weight = spread(slots, count), torch.ones_like(t)
    if augmentation is not None:
        draws = Draws.of(events, indices, draw_key)
        t, unit, weight = change(augmentation, draws, t, unit, count, events.num_channels)
        if augmentation.noise:
            noise = noise_events(augmentation.noise, draws, events, count, end - 1)
            t, unit = torch.cat([t, noise[0]]), torch.cat([unit, noise[1]])
            slot = torch.cat([slot, spread(slots, noise[2])])
            weight = torch.cat([weight, torch.ones_like(noise[0])])
    bin, channel, inside = _place(config, t, unit, events.num_channels)
    bin = bin - (steps or (0, 0))[0]
    wanted = (bin >= 0) & (bin < bins)
    bin = bin.clamp(0, bins - 1)
    return (bin * B + slot) * columns + channel, weight * inside, slot, wanted


def _place(
    config: BinningConfig, t: Tensor, unit: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each event's time bin and column, int64, and whether it lies in the window."""
    T = config.time_bins
    if config.style == "authors":
        edges = torch.arange(T, dtype=torch.float64, device=t.device) * (1 / T)
        bin = torch.bucketize(t, edges.half().float())
        inside = (bin < T) & (unit > 0)
        return bin.clamp(max=T - 1), (channels - unit).clamp(max=channels - 1), inside
    inside = torch.ones_like(unit, dtype=torch.bool)
    if config.overflow == "drop":
        inside = (t < config.max_time) & (t >= 0)
    bin = (t * (T / config.max_time)).clamp(0, T - 1).long()
    return bin, unit // config.channel_bin, inside
