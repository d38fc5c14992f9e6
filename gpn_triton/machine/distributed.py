"""The processes of a run: one, or those torchrun started, with PyTorch's own communication."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpn_triton.machine.device import choose_device

# every process shows a sign of life so often; one without for LOST_SECONDS is taken for lost, and
# one that cannot end by itself after that is ended GRACE_SECONDS later: a minute in all
BEAT_SECONDS, LOST_SECONDS, GRACE_SECONDS = 1.0, 30.0, 10.0


class LostProcess(ConnectionError):
    """Another process of the run ended or is gone; says which and why."""


def several() -> bool:
    """Whether torchrun, or whatever sets its variables, started more than one process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Whether torchrun has started the processes again, after some of them had failed."""
    return _starts() > 0


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def own_device(name: str) -> torch.device:
    """This process's device: choose_device's, or beside others the GPU of its number here.

    That GPU becomes the current one, so this is called before anything is allocated.

    Raises:
        ValueError: as choose_device; or there are more processes than GPUs here, or the name is one
            GPU's, which every process would take.
    """
    if not several():
        return choose_device(name)
    if name != "cuda" and (name != "auto" or not torch.cuda.is_available()):
        device = choose_device(name)
        if device.type == "cuda":
            raise ValueError(
                f"device: {name} would be the GPU of every process; leave --device out, and each "
                "takes its own"
            )
        return device
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("device: expected LOCAL_RANK beside WORLD_SIZE, as torchrun sets it")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local + 1)
    if here > count:
        raise ValueError(
            f"device: {here} processes on this machine and {count} CUDA GPUs: expected at most "
            f"one process a GPU, as torchrun --nproc-per-node {count}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class World:
    """The processes that train together; World() is this process alone, where all is the identity.

    Args:
        rank, size: this process's number and how many there are. control: a group for small
            questions between hosts, which must not wait for a GPU. quiet: whether it says nothing
            but what matters.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    quiet: bool = False

    @classmethod
    @contextmanager
    def join(cls, device: torch.device, quiet: bool = False) -> Iterator[World]:
        """Join the processes that torchrun started, if it did, for as long as the context lasts.

        An error that leaves the context is told to the others, which would wait; where one of them
        has ended without a word, those that wait for it end, too.

        Args:
            device: of this process, as own_device gave it. Tensors travel by NCCL between GPUs, by
                gloo between CPUs. quiet: as World's.
        Raises:
            LostProcess: another process ended, which one and why, within a minute.
        """
        if not several():
            yield cls(quiet=quiet)
            return
        cuda = device.type == "cuda"
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun's store outlives those it starts again
        store = dist.PrefixStore(f"start-{_starts()}", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.PrefixStore("groups", store), rank=rank,
            world_size=size, device_id=device if cuda else None,
        )  # fmt: skip
        control = dist.new_group(backend="gloo")
        watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size)
        watch.start()
        try:
            world = cls(rank, size, control, quiet)
            yield world
            # the store may be in one of the processes
            world.barrier()
            watch.leave()
        except BaseException as error:
            if lost := watch.blame(error):
                raise LostProcess(lost) from None
            raise
        finally:
            dist.destroy_process_group()
            watch.ended.set()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def say(self, line: str, matters: bool = False) -> None:
        """Print a line, once however many processes there are; matters: also where all is quiet."""
        if self.is_writer and (matters or not self.quiet):
            print(line)

    def part(self, indices: Tensor) -> tuple[Tensor, int, int]:
        """This process's share of a batch.

        Args:
            indices [B]: sample numbers of the whole batch.
        Returns:
            its sample numbers, where in the batch they begin, and their weight: 1, or 0 where the
            batch has fewer samples than there are processes. One sample then stands in, so that
            every process takes part in the communication.
        """
        total = len(indices)
        first, last = (total * k // self.size for k in (self.rank, self.rank + 1))
        if first == last:
            return indices[:1], 0, 0
        return indices[first:last], first, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on every one of them."""
        return self.add_up(tensor.clone()) if self.size > 1 else tensor

    def add_up(self, tensor: Tensor) -> Tensor:
        """The tensor itself, of which every process now holds the sum over processes."""
        dist.all_reduce(tensor)
        return tensor

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the writer's values."""
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def any(self, flag: int) -> int:
        """The largest of the processes' flags."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return int(flags)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def share(self, value: str | None) -> str | None:
        """The writer's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]


# the world of a process that trains alone
ALONE = World()


class Exchange:
    """What several processes add up in a training step, in one buffer that stays where it is.

    `gather` and `scatter` are device work that a CUDA graph can hold; between them `add_up` is one
    collective. The buffer holds every gradient, then the buffers of the model that training changes
    (batch norm's running statistics), then the loss.

    Args:
        model: of which every process gets the writer's weights now. world: of more than one.
    """

    def __init__(self, model: nn.Module, world: World):
        self.world = world
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        with torch.no_grad():
            world.align([*self.parameters, *self.buffers])
        like, self.count = self.parameters[0], len(self.parameters)
        shapes = [t.shape for t in (*self.parameters, *self.buffers)] + [torch.Size()]
        self.flat = like.new_zeros(sum(shape.numel() for shape in shapes))
        parts = self.flat.split([shape.numel() for shape in shapes])
        self.parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def gather(self, loss: Tensor) -> None:
        """Take over this process's gradients, buffers and loss."""
        gradients = [p.grad for p in self.parameters]
        torch._foreach_copy_(self.parts, [*gradients, *self.buffers, loss])
        for p in self.parameters:
            p.grad = None

    def add_up(self) -> None:
        """Add all of it up over the processes."""
        self.world.add_up(self.flat)

    @torch.no_grad()
    def scatter(self) -> Tensor:
        """Give the sums to the parameters, the means to the buffers; returns the loss."""
        for p, gradient in zip(self.parameters, self.parts, strict=False):
            p.grad = gradient
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.parts[self.count : -1])
            torch._foreach_div_(self.buffers, self.world.size)
        return self.parts[-1]


class Watch(threading.Thread):
    """Finds out which process of a run ended, and why, for those that would wait for it for ever.

    Args:
        store: of which nobody else uses the connection. rank, size: as World's.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.verdict: str | None = None
        self.found, self.ended = threading.Event(), threading.Event()

    def run(self) -> None:
        """Show a sign of life and look for the others', until one is lost or this one has ended."""
        seen, beat = {}, 0
        while not self.found.is_set():
            beat += 1
            try:
                self.verdict = self._look(beat, seen)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.verdict = f"what holds the processes together is gone: {reason}"
            if self.verdict:
                self.found.set()
            elif self.ended.wait(BEAT_SECONDS):
                return
        # a process that waits in a collective of a GPU cannot be told
        if not self.ended.wait(GRACE_SECONDS):
            print(f"error: {self.verdict}", file=sys.stderr, flush=True)
            os._exit(2)

    def _look(self, beat: int, seen: dict[int, tuple[str, float]]) -> str | None:
        self.store.set(f"beat-{self.rank}", str(beat))
        if self.store.check(["failed"]):
            return self.store.get("failed").decode()
        now = time.monotonic()
        for other in range(self.size):
            name = f"beat-{other}"
            latest = self.store.get(name).decode() if self.store.check([name]) else "none"
            if latest != seen.get(other, (None, 0))[0]:
                seen[other] = latest, now
            elif latest != "left" and now - seen[other][1] > LOST_SECONDS:
                return (
                    f"process {other} of {self.size} has shown no sign of life for "
                    f"{LOST_SECONDS:g} s: it was killed, or its machine is gone; --resume auto "
                    "goes on"
                )
        return None

    def leave(self) -> None:
        """Have nobody wait for this process any more."""
        self.ended.set()
        self.join()
        self.store.set(f"beat-{self.rank}", "left")

    def blame(self, error: BaseException) -> str | None:
        """Which other process is why an error was raised; None: this one, as the others now hear.

        Args:
            error: what ends this process. Of a communication that broke the other end is to blame,
                whose end has to be found first.
        """
        broken = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and broken:
            self.found.wait(LOST_SECONDS + GRACE_SECONDS)
            if self.verdict:
                return self.verdict
        if not self.found.is_set():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            try:
                self.store.set("failed", f"process {self.rank} of {self.size} ended: {reason}")
            except RuntimeError:
                # with the store the others are gone, too
                return None
            # time for the others to read it, in case the store is in this process
            time.sleep(2 * BEAT_SECONDS)
        return None
