"""How a call is timed, and how its memory is counted."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import profiler

from gpn_triton.machine.graphs import WARM_RUNS, Graphs

# a round on a GPU lasts at least so long
STRETCH_SECONDS = 2e-3
# an idle GPU runs at a fifth of its clock, and takes about so long to speed up
WAKE_SECONDS = 0.1


class Call:
    """One call to be timed: forward, or forward and backward, on tensors that stay in place.

    Args:
        forward: takes no argument, reads the leaves, returns a tensor.
        leaves: parameters and inputs whose gradients backward computes.
        cotangent: gradient of the result; None: forward only, without autograd.
        autocast: a half type to compute in, or None.
    Attributes:
        out: the last call's result, detached. dtype: what its products run in.
    """

    def __init__(
        self,
        forward: Callable[[], Tensor],
        leaves: dict[str, Tensor],
        cotangent: Tensor | None,
        autocast: torch.dtype | None = None,
    ):
        self.forward, self.leaves, self.cotangent = forward, leaves, cotangent
        self.device, self.autocast = leaves["x"].device, autocast
        self.dtype = autocast or leaves["x"].dtype
        self.out: Tensor | None = None

    def __call__(self) -> None:
        self.clear()
        with (
            torch.set_grad_enabled(self.cotangent is not None),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            out = self.forward()
        if self.cotangent is not None:
            out.backward(self.cotangent.to(out.dtype))
        self.out = out.detach()

    def clear(self) -> None:
        """Let go of the last call's result and gradients."""
        self.out = None
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The last call's gradients by leaf, of those leaves that have one."""
        return {name: t.grad for name, t in self.leaves.items() if t.grad is not None}


class PieceCall(Call):
    """A call that takes the steps in pieces (--tbptt): of each, forward and backward, then the next
    from its detached state. Only one piece is alive at a time.

    Args:
        layer: takes a piece of x and the state before it, None at first; returns the piece's result
            and the state after it. steps: of a piece. keeps: whether the whole result and the whole
            gradient of x are put together, as a check wants them. The rest as Call.
    """

    def __init__(
        self, layer: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]], steps: int,
        leaves: dict[str, Tensor], cotangent: Tensor, keeps: bool = False,
    ):  # fmt: skip
        super().__init__(lambda: None, leaves, cotangent)
        self.layer, self.steps, self.keeps = layer, steps, keeps

    def __call__(self) -> None:
        self.clear()
        state, kept, x = None, [], self.leaves["x"].detach()
        for start in range(0, len(x), self.steps):
            part = slice(start, start + self.steps)
            # what is left of a piece, its gradient too, goes with it
            piece, cotangent = x[part].requires_grad_(), self.cotangent[part]
            out, state = self.layer(piece, state)
            out.backward(cotangent)
            state = state.detach()
            if self.keeps:
                kept.append((out.detach(), piece.grad))
        if self.keeps:
            outs, gradients = zip(*kept, strict=True)
            self.out, self.leaves["x"].grad = torch.cat(outs), torch.cat(gradients)


class GraphedCall:
    """A call captured once as a CUDA graph; calling replays it.

    Attributes:
        call: what was captured; its result and gradients are in the same memory every time.
        peak_bytes: memory the graph holds, counted while it was captured (a replay allocates none).
    """

    def __init__(self, call: Call, device: torch.device):
        self.call, self.graphs = call, Graphs(device, True)
        self.gradients = call.gradients
        for _ in range(WARM_RUNS):
            self()
        call.clear()
        # the next run captures, then replays
        self.peak_bytes = _allocated(self, device)

    def __call__(self) -> None:
        self.graphs.run("call", self.call)

    @property
    def out(self) -> Tensor:
        """The last replay's result."""
        return self.call.out


def wake(device: torch.device, seconds: float = WAKE_SECONDS) -> None:
    """Have a GPU multiply until its clock is up; nothing on a CPU."""
    if device.type != "cuda":
        return
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    product, end = torch.empty_like(a), time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a, out=product)
        torch.cuda.synchronize()


def clocks_mhz(device: torch.device) -> dict[str, int] | None:
    """Clocks of a GPU's multiprocessors and memory as its driver tells them, or None."""
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return None
    command = [tool, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
    command.append(f"--id={torch.cuda.get_device_properties(device).uuid}")
    told = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(",")
    return dict(zip(("sm", "memory"), map(int, told), strict=True)) if len(told) == 2 else None


def longest_kernels(call: Callable[[], object], device: torch.device, count: int = 3) -> list[str]:
    """Names of the kernels in which a call spends most of its time on a GPU, the longest first.

    Of cuDNN's LSTM and GRU they tell which of its algorithms ran.
    """
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize(device)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return [row.key for row in rows[:count] if row.self_device_time_total]


@dataclass
class Times:
    """Seconds of each round: on the wall clock, and between device events on a GPU."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def timed(call: Callable[[], object], device: torch.device, times: Times, repeats: int = 1) -> None:
    """Add one round, the mean of so many calls: the device is idle before and done at its end."""
    cuda = device.type == "cuda"
    if cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
    start = time.perf_counter()
    if cuda:
        first.record()
    for _ in range(repeats):
        call()
    if cuda:
        last.record()
        torch.cuda.synchronize()
        times.device.append(first.elapsed_time(last) / 1e3 / repeats)
    times.wall.append((time.perf_counter() - start) / repeats)


def race(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, Times]:
    """Time calls in turns, A B C B C A C A B ..., so that a noisy machine is noisy for all.

    Args:
        calls: what to time, by name, warmed up.
        rounds: so many of each, but 3 of what alone has taken 2 x `seconds` by then. On a GPU a
            round of a short call is several calls, so that starting it does not show.
        seconds: go on to 5 times as many rounds within this time.
    Returns:
        Every round's times by name; round k of one and of another were taken next to each other.
    """
    results, repeats = {name: Times() for name in calls}, dict.fromkeys(calls, 1)
    if device.type == "cuda":
        for name, call in calls.items():
            timed(call, device, warm := Times())
            repeats[name] = max(1, int(STRETCH_SECONDS / warm.device[0]))
    names, start = list(calls), time.perf_counter()
    for turn in range(5 * rounds):
        if turn >= rounds and time.perf_counter() - start > seconds:
            break
        k = turn % len(names)
        wake(device)
        for name in names[k:] + names[:k]:
            wall = results[name].wall
            if len(wall) < 3 or sum(wall) * repeats[name] < 2 * seconds:
                timed(calls[name], device, results[name], repeats[name])
    return results


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch held at once during a call, beyond what it held before.

    On a GPU by torch's allocator; on a CPU by the allocations that the profiler reports, which are
    those of tensors: a library's own scratch memory is not among them. There one thread computes,
    since what another frees is not always reported.
    """
    if isinstance(call, Call):
        # else the last result and gradients are freed during the call and hide as much
        call.clear()
    if device.type == "cuda":
        return _allocated(call, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profiler.profile(profile_memory=True) as profile:
            call()
    finally:
        torch.set_num_threads(threads)
    held = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _allocated(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that the CUDA allocator gave out during a call, beyond what it had before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def held_bytes(call: Call) -> tuple[int, int]:
    """Bytes a call keeps between forward and backward, each storage once, parameters left out.

    Returns:
        All of them; and those beyond the call's own input and result, which exist anyway.
    """
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # the tensor itself would hold its own graph alive where it is the result
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for name, leaf in call.leaves.items():
        if name != "x":
            held.pop(leaf.untyped_storage().data_ptr(), None)
    whole = sum(held.values())
    for tensor in (call.leaves["x"], call.out):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return whole, sum(held.values())


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of rounds, in ms."""
    ms = sorted(1e3 * s for s in seconds)
    low, _, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
    return {"median_ms": statistics.median(ms), "low_ms": low, "high_ms": high}
