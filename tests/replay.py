"""A stand-in for CUDA graphs on a CPU: operations are recorded, then done again on the same memory.

As in a graph, a replay calls no Python of the work: it repeats the recorded operations on the
tensors they had, writes their results where the results were, and draws new random numbers. What a
graph cannot hold is refused while recording: reading a number back, and numbers from the host.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gpn_triton.machine.graphs import Graphs

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.repeat_interleave,
}  # fmt: skip
FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy}


class Recorded(RuntimeError):
    """A graph could not hold this."""


class Recording(TorchDispatchMode):
    """Records every operation below autograd and autocast."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet in WAITS or packet in FROM_HOST:
            raise Recorded(f"{func}: a graph can neither wait nor take numbers from the host")
        out = func(*args, **kwargs)
        if func.namespace != "profiler" and not func.is_view and packet is not aten.detach:
            self.operations.append((func, args, kwargs, out))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                old, new = (
                    [t for t in tree_flatten(o)[0] if isinstance(t, torch.Tensor)]
                    for o in (out, again)
                )
                for to, t in zip(old, new, strict=True):
                    # an operation in place has given the same memory back
                    if to.data_ptr() != t.data_ptr():
                        to.copy_(t)


class RecordedGraphs(Graphs):
    """Graphs whose captures are recordings; counts them in `captures` and `replays`."""

    def __init__(self, device):
        super().__init__(device, enabled=True)
        self.captures = self.replays = 0

    def _warm(self, work):
        work()

    def _capture(self, work):
        recording, done = Recording(), False
        with recording:
            work()
        self.captures += 1

        def replay():
            nonlocal done
            # recording has run the work already, which a capture does not
            if done:
                self.replays += 1
                recording.replay()
            done = True

        return replay
