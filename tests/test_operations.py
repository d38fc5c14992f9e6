"""Operations of a training step, counted by the dispatcher: what a GPU would be told to do.

The step is the training command's, under autocast with the Triton kernels, whose launches are
counted and not run. Left out are views, memory that is only asked for, and binning, which is a
kernel on a GPU; a product of half types with a float32 result, which a CPU takes in three
operations, is one. Launches of the recurrence itself are a step each where it is stepwise.
"""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface

from gpn_triton.kernels import gpn_backward
from gpn_triton.training.build import build_model
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig
from tests.small_training import CPU, resident, store

T = 40
NO_WORK = {
    "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "alias",
    "_unsafe_view", "lift_fresh",
}  # fmt: skip
RECURRENCE = ("gpn_forward", "gpn_backward", "recurrence_gradient")


class Operations(TorchDispatchMode):
    """Names of operations and of kernels launched, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            if func.namespace == "gpn_triton":
                # the project's own operators are counted by what they do inside
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = func._schema.name.split("::")[1]
        if func.namespace != "profiler" and not func.is_view and name not in NO_WORK:
            self.found.append(name)
        return func(*args, **kwargs)


class Unbinned(Engine):
    """An engine whose batches are there: binning is not counted."""

    def _input(self, events, indices, augmentation):
        return self.x[:, : len(indices)]


@torch.library.custom_op("test_operations::float32_product", mutates_args=())
def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.float() @ b.float()


def operations(monkeypatch, hidden, classes, init):
    """Of one training step of eight samples."""
    cfg = TrainConfig(
        hidden=hidden, time_bins=T, batch_size=8, amp="bf16", backend="triton", init=init
    )
    net = Unbinned(cfg, build_model(cfg, 700, classes).train(), CPU)
    # also where this CPU has no arithmetic for it
    net.amp, net.x = torch.bfloat16, torch.zeros(T, 8, 700, dtype=torch.bfloat16)
    feed, mode = resident(store()), Operations()
    net.start_epoch(feed, 0, 0)
    monkeypatch.setattr(gpn_backward, "float32_product", _product)
    monkeypatch.setattr(
        KernelInterface, "__getitem__",
        lambda kernel, grid: lambda *_, **__: mode.found.append(kernel.fn.__name__),
    )  # fmt: skip
    # the first step makes what the optimiser keeps
    net.train_step(feed, 8)
    mode.found.clear()
    with mode:
        net.train_step(feed, 8)
    return [name for name in mode.found if not name.startswith(RECURRENCE)]


# before they were counted: 129 and 253, without the layers' health, which takes 11 and 10. the
# quiet start clips, centres and scales
@pytest.mark.parametrize(("hidden", "classes", "init", "count"), [
    ((128,), 20, "paper", 75),
    ((128,), 20, "quiet", 93),
    ((512, 256, 128), 35, "paper", 133),
    ((512, 256, 128), 35, "quiet", 175),
], ids=["SHD", "SHD, quiet", "SSC", "SSC, quiet"])  # fmt: skip
def test_a_step_takes_these_operations_and_no_more(hidden, classes, init, count, monkeypatch):
    found = operations(monkeypatch, hidden, classes, init)
    assert len(found) == count, sorted(found)
