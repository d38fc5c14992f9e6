"""Batches of a pass over a set: its events lie on the device, or come there a part at a time.

    feed.start(order, first, batch)            a pass, from its sample number `first` on
    feed.ahead(size); batch_input(feed.events, feed.batch(size), ...)             and so on

`ahead` is the host's work and is called before each batch, never while a CUDA graph is captured;
`batch` is the device's and can be held by one: it reads tensors that keep their addresses.

A streamed pass is cut into shards, runs of whole batches. While the device computes on one shard,
a thread gathers the next but one in host memory, and the next is copied on a stream of its own:

    host, pinned, two in turn  --own stream-->  staging  --current stream, in ahead-->  events

The thread makes no CUDA call, which would end a capture that goes on beside it.
"""

from __future__ import annotations

import math
from concurrent import futures
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.events import DeviceEvents, EventStore

# what a store takes on a device: each event a time and a unit, each sample an offset, a label and
# a number
EVENT_BYTES, SAMPLE_BYTES = 4 + 2, 3 * 8
MIB = 1 << 20
# so many samples' events are gathered at once, which bounds the memory of the list of them
GATHERED = 256


def make_feed(
    store: EventStore, device: torch.device | str, limit_mib: float | None = None
) -> tuple[Feed, str]:
    """The whole set on the device where it fits a limit, else streamed.

    Args:
        store: the set. device: where its batches shall be.
        limit_mib: device memory for events. Default: half of what is free on a CUDA device, no
            limit on a CPU.
    Returns:
        the feed, and one line that says what was decided and why.
    """
    device = torch.device(device)
    size = _bytes(len(store.times), len(store)) / MIB
    line, limit = f"events: {size:.0f} MiB", limit_mib
    why = "" if limit is None else f" (limit {limit:.0f} MiB)"
    if limit is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / MIB
        limit, why = free / 2, f" ({free:.0f} MiB free)"
    if limit is None or size <= limit:
        return Feed(DeviceEvents(store, device)), f"{line}, resident on {device}{why}"
    return StreamedFeed(store, device, limit), (
        f"{line}, streamed in shards of up to {limit / 2:.0f} MiB "
        f"(limit {limit:.0f} MiB: one shard in use, one on its way)"
    )


class Feed:
    """A set that lies on the device.

    Attributes:
        events: what `batch` numbers; its tensors keep their addresses.
    """

    def __init__(self, events: DeviceEvents):
        self.events = events
        self._order = torch.arange(len(events), device=events.times.device)
        self._position = self._order.new_zeros(1)
        self._left = 0

    def __len__(self) -> int:
        """Samples of the whole set."""
        return len(self.events)

    def start(self, order: Tensor | None, first: int, batch: int) -> None:
        """Begin a pass.

        Args:
            order [S] int64: the samples' numbers, on the device; copied. None: 0..S - 1.
            first: how many of them are done already.
            batch: samples of every batch but the last, which may be shorter.
        Raises:
            ValueError: an order of another type or shape, or first or batch out of range.
        """
        self._check(order, first, batch)
        if order is None:
            order = torch.arange(len(self), device=self._order.device)
        self._order.copy_(order)
        self._position.fill_(first)
        self._left = len(self) - first

    def ahead(self, size: int) -> None:
        """See that the events of the next batch are on the device, before `batch` numbers them.

        Raises:
            ValueError: the pass has fewer samples left.
        """
        if size > self._left:
            raise ValueError(f"size: expected at most {self._left}, the samples left, got {size}")
        self._left -= size

    def batch(self, size: int) -> Tensor:
        """The next samples' places in `events` [size] int64; launches only."""
        return self._order.index_select(0, self._advance(size))

    def _advance(self, size: int) -> Tensor:
        """The positions of the next samples [size] int64, which are then behind."""
        places = torch.arange(size, device=self._position.device) + self._position
        self._position += size
        return places

    def _check(self, order: Tensor | None, first: int, batch: int) -> None:
        """Raise ValueError for what no pass can be."""
        samples = len(self)
        if order is not None and (order.dtype != torch.int64 or order.shape != (samples,)):
            raise ValueError(
                f"order: expected int64 [{samples}], got {order.dtype} {list(order.shape)}"
            )
        if not 0 <= first <= samples:
            raise ValueError(f"first: expected 0..{samples}, got {first}")
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")


class StreamedFeed(Feed):
    """A set in host memory of which one shard is on the device, and another on its way.

    Args:
        store: the set. device: where its batches shall be. limit_mib: device memory for both
            shards; `events`, the one in use, is as large as half of it allows.
    """

    def __init__(self, store: EventStore, device: torch.device | str, limit_mib: float):
        device = torch.device(device)
        self._store, self._limit = store, limit_mib
        self._counts = np.diff(store.offsets)
        # entry k holds the most events that any batch of k + 1 samples can have
        self._most = np.cumsum(np.sort(self._counts)[::-1])
        S = len(store)
        self._capacity = max(int(limit_mib * MIB / 2 - _bytes(0, S)) // EVENT_BYTES, 0)
        self._capacity = min(self._capacity, len(store.times))
        blank = replace(
            store,
            times=np.zeros(self._capacity, np.float32),
            units=np.zeros(self._capacity, np.uint16),
            offsets=np.zeros(S + 1, np.int64),
            labels=np.zeros(S, np.int64),
        )
        # the position is the shard's, and the order the host's
        super().__init__(
            DeviceEvents(blank, device, torch.zeros(S, dtype=torch.int64, device=device))
        )
        # batch_input chooses a batch's form by these, which must not change from shard to shard
        self.events.longest, self.events.mean = int(self._counts.max()), float(self._counts.mean())

        cuda = device.type == "cuda"
        names = ("times", "units", "offsets", "labels", "numbers")
        self._shard = [getattr(self.events, name) for name in names]
        self._staging = [torch.empty_like(t) for t in self._shard]
        self._hosts = [
            [torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in self._shard]
            for _ in range(2)
        ]
        self._stream = torch.cuda.Stream(device) if cuda else None
        if cuda:
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]
            self._swapped = torch.cuda.current_stream(device).record_event()
            for t in self._staging:
                t.record_stream(self._stream)
        self._thread = futures.ThreadPoolExecutor(1, "events")
        self._gathered: futures.Future | None = None
        self._staged: tuple[int, ...] | None = None

    def start(self, order: Tensor | None, first: int, batch: int) -> None:
        """As Feed's; waits for the order, and for what is left of a pass given up midway.

        Raises:
            ValueError: as Feed's, or event_mib: the largest batch there can be does not fit half of
                the limit.
        """
        S = len(self)
        self._check(order, first, batch)
        need = int(self._most[min(batch, S) - 1])
        if need > self._capacity:
            least = math.ceil(2 * _bytes(need, S) / MIB)
            raise ValueError(
                f"event_mib: expected at least {least} MiB for the largest {batch} of {S} samples, "
                f"{need} events, twice (in use and on its way), got {self._limit:g}; or take a "
                "smaller batch"
            )
        if self._gathered is not None:
            futures.wait([self._gathered])
        self._order = np.arange(S) if order is None else order.to("cpu", copy=True).numpy()
        self._plan = pairwise(
            _cuts(self._counts[self._order[first:]], batch, self._capacity, first)
        )
        self._left, self._gathers, self._staged = 0, 0, None
        self._gather()

    def ahead(self, size: int) -> None:
        """As Feed's, for batches of the size told to `start`; raises what the thread raised."""
        if not self._left and (self._staged or self._gathered):
            if self._staged is None:
                self._stage()
            self._swap()
        super().ahead(size)
        if self._staged is None and self._gathered is not None and self._gathered.done():
            self._stage()

    def batch(self, size: int) -> Tensor:
        """As Feed's; the order is that of the shard."""
        return self._advance(size)

    def _gather(self) -> None:
        """Have the thread gather the pass's next shard, if there is one."""
        self._gathered = None
        if (span := next(self._plan, None)) is None:
            return
        host = self._gathers % 2
        self._gathers += 1
        if self._stream is not None:
            # this buffer held the last shard but one, whose copy must be over
            self._copied[host].synchronize()
        numbers = self._order[slice(*span)]
        self._gathered = self._thread.submit(_gather, self._store, numbers, self._hosts[host])

    def _stage(self) -> None:
        """Copy the gathered shard into staging, once that is free, and gather the next."""
        sizes = self._gathered.result()
        host = (self._gathers - 1) % 2
        with torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(self._swapped)
            for to, t, size in zip(self._staging, self._hosts[host], sizes, strict=True):
                to[:size].copy_(t[:size], non_blocking=True)
            if self._stream is not None:
                self._copied[host].record()
        self._staged, self._last_host = sizes, host
        self._gather()

    def _swap(self) -> None:
        """Make the staged shard the one in use; all on the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._position.device)
            current.wait_event(self._copied[self._last_host])
        for to, t, size in zip(self._shard, self._staging, self._staged, strict=True):
            to[:size].copy_(t[:size])
        self._position.zero_()
        if self._stream is not None:
            self._swapped = current.record_event()
        self._left, self._staged = self._staged[-1], None


def _gather(store: EventStore, numbers: np.ndarray, to: list[Tensor]) -> tuple[int, ...]:
    """Samples of a store, one behind the other, and how much of each tensor they fill."""
    times, units, offsets, labels, shard_numbers = to
    K = len(numbers)
    begin, end = store.offsets[numbers], store.offsets[numbers + 1]
    begins = offsets.numpy()[: K + 1]
    begins[0] = 0
    np.cumsum(end - begin, out=begins[1:])
    labels.numpy()[:K] = store.labels[numbers]
    shard_numbers.numpy()[:K] = numbers
    spans = list(zip(begin.tolist(), end.tolist(), strict=True))
    for array, flat in ((store.times, times), (store.units.view("int16"), units)):
        source = torch.from_numpy(array)
        for a in range(0, K, GATHERED):
            b = min(a + GATHERED, K)
            # in torch, which lets other threads run meanwhile
            torch.cat([source[i:j] for i, j in spans[a:b]], out=flat[begins[a] : begins[b]])
    return int(begins[-1]), int(begins[-1]), K + 1, K, K


def _cuts(counts: np.ndarray, batch: int, capacity: int, first: int) -> list[int]:
    """Where to cut a pass into shards of whole batches: sample numbers from `first` on.

    Args:
        counts [K]: events of the samples still to come. capacity: events of a shard, enough for any
            batch.
    """
    ends = [*range(batch, len(counts), batch), len(counts)] if len(counts) else []
    sums = np.concatenate([[0], np.cumsum(counts)])[[0, *ends]]
    cuts, k, most = [0], 0, 1
    while k < len(ends):
        # the device waits for the first shard, so it is one batch, the next is two, and so on
        k = min(int(np.searchsorted(sums, sums[k] + capacity, side="right")) - 1, k + most)
        cuts.append(ends[k - 1])
        most *= 2
    return [first + cut for cut in cuts]


def _bytes(events: int, samples: int) -> int:
    # there is one offset more than samples
    return EVENT_BYTES * events + SAMPLE_BYTES * samples + 8
