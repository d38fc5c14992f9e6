"""The processes of a run: one, or those torchrun started, with PyTorch's own communication."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class World:
    """The processes that train together; with one process every method is the identity.

    Args:
        device: of this process. Gradients travel by NCCL between GPUs and by gloo between CPUs.
    Attributes:
        rank, size: this process's number and how many there are, from torchrun's environment.
    """

    def __init__(self, device: torch.device):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.control = None
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # small questions between hosts, which must not wait for a GPU
            self.control = dist.new_group(backend="gloo")

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: with gradients averaged over the processes."""
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
            its sample numbers, where in the batch they begin, and how many count: 0 where the batch
            is smaller than the number of processes and one sample stands in, so that every process
            takes part in the communication.
        """
        total = len(indices)
        first, last = (total * k // self.size for k in (self.rank, self.rank + 1))
        if first == last:
            return indices[:1], 0, 0
        return indices[first:last], first, last - first

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

    def share(self, value):
        """The writer's value, on every process; a string or None."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()
