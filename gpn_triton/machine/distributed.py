"""The processes of a run: one, or those torchrun started, with PyTorch's own communication."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that train together; World() is this process alone, where all is the identity.

    Args:
        rank, size: this process's number and how many there are. control: a group for small
            questions between hosts, which must not wait for a GPU.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @classmethod
    @contextmanager
    def join(cls, device: torch.device) -> Iterator[World]:
        """Join the processes that torchrun started, if it did, for as long as the context lasts.

        Args:
            device: of this process. Gradients travel by NCCL between GPUs, by gloo between CPUs;
                a `cuda` without a number becomes the GPU of this process's number on its host.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            yield cls()
            return
        cuda = device.type == "cuda"
        if cuda and device.index is None:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            control = dist.new_group(backend="gloo")
            yield cls(dist.get_rank(), dist.get_world_size(), control)
        finally:
            dist.destroy_process_group()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, once however many processes there are."""
        if self.is_writer:
            print(line)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: with gradients averaged over the processes.

        Every process must call this at the same time, as the weights are compared and sent.
        """
        if self.size == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        return DistributedDataParallel(model)

    def apart(self, trained: nn.Module, yes: bool) -> AbstractContextManager:
        """A context whose gradients stay in this process until a later backward pass, if `yes`."""
        if yes and isinstance(trained, DistributedDataParallel):
            return trained.no_sync()
        return nullcontext()

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
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

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
