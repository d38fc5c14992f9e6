"""How layers run: explain(), what the Triton kernels would do with one and what that costs; and
layers_run(), what computes each layer of a network here, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gpn_triton.machine import device
from gpn_triton.neurons import cost
from gpn_triton.neurons.gpn_options import GPNOptions
from gpn_triton.neurons.layers import GPN, LIF, CubaLIF
from gpn_triton.neurons.reference import GATES

if TYPE_CHECKING:
    from gpn_triton.kernels.tiles import Plan


@dataclass(frozen=True)
class Explanation:
    """What explain() found; print it.

    target: the GPU's name. here: whether it is this machine's. plan: tiles.Plan. kernels:
    offline.Report of each kernel, or None and why_not_compiled. forward_gflop, backward_gflop: of
    products, forward_mib, backward_mib: moved between processor and memory, both at least and as
    cost counts them. saved_mib: kept from forward for backward: x, the saved membranes and the
    spikes in one bit each (a SpikeLinear that follows holds nothing of [T, B, N] more).
    workspace_mib: live within a call, whatever T.
    """

    target: str
    here: bool
    plan: Plan
    kernels: list | None
    why_not_compiled: str
    forward_gflop: float
    backward_gflop: float
    forward_mib: float
    backward_mib: float
    saved_mib: float
    workspace_mib: float

    def __str__(self) -> str:
        plan = self.plan
        measured = "measured" if plan.measured else "unmeasured: no GPU has timed this choice"
        lines = [
            f"{plan.strategy} on {self.target} ({measured})",
            f"because: {plan.reason}",
            f"forward {plan.forward}, {plan.forward_steps} steps a chunk,"
            f" weight_x x {'ahead of the loop' if plan.hoist else 'in the step'}",
            f"backward {plan.backward}, {plan.backward_steps} steps a chunk",
            *["a step begins while the one before it still runs"] * plan.dependent,
            "at least, without the input's Linear:"
            f" {self.forward_gflop:.3g} GFLOP and {self.forward_mib:.3g} MiB moved forward,"
            f" {self.backward_gflop:.3g} and {self.backward_mib:.3g} backward",
            f"memory: {self.saved_mib:.3g} MiB saved, {self.workspace_mib:.3g} MiB of workspace",
        ]
        if not self.here:
            lines.insert(
                0, "there is no GPU here, where torch computes; this is what an H200 would run:"
            )
        if self.kernels is None:
            return "\n".join([*lines, f"registers and shared memory: {self.why_not_compiled}"])
        for k in self.kernels:
            lines.append(
                f"{k.kernel}: {k.registers} registers, {k.shared_bytes / 1024:.3g} KiB shared,"
                f" {k.num_warps} warps, {k.stack_bytes} bytes of stack"
            )
        return "\n".join(lines)


def explain(
    T: int,
    B: int,
    N: int,
    dtype: torch.dtype = torch.float32,
    variant: str = "full",
    checkpoint_every: int | None = None,
    output: str = "spikes",
) -> Explanation:
    """Say how the Triton kernels would run a layer, and what that costs; runs nothing.

    It describes the current GPU, or an H200 where there is none, and then says so. Registers and
    shared memory are the compiler's, which takes some seconds. Work and bytes are counted, not
    measured.

    Args:
        T, B, N: time bins, batch, neurons. dtype: of x, float32 or a half type (under autocast,
            autocast's). variant, checkpoint_every, output: as for gpn.
    Returns:
        An Explanation; str() of it is the report.
    Raises:
        ValueError: a dtype the kernels do not take, or an option that gpn does not take.
        RuntimeError: triton is not installed.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    options = GPNOptions(variant, every=checkpoint_every, output=output)
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("explain needs triton (it exists for Linux: pip install triton)")
    from triton import knobs

    from gpn_triton.kernels import offline, tiles

    gates, every, mean = GATES[variant], options.every or 1, output == "mean"
    limits: device.KernelLimits = {}
    target, capability, here = "an H200", 90, torch.cuda.is_available()
    if here:
        major, minor = torch.cuda.get_device_capability()
        target, capability = torch.cuda.get_device_name(), major * 10 + minor
        limits = device.kernel_limits()
    plan = tiles.choose(T, B, N, dtype, gates, every, device.float32_precision(), **limits)
    kernels, why_not = None, ""
    if knobs.runtime.interpret:
        why_not = "not compiled, since this process interprets kernels (TRITON_INTERPRET)"
    else:
        _, kernels = offline.compile_layer(
            N, dtype, capability, gates, every=every, mean=mean, plan=plan
        )

    G, size, step_bytes = len(gates), dtype.itemsize, B * N * dtype.itemsize
    work = cost.gated_spiking(G)
    forward, both = (cost.neuron(work, N, backward, size) * (T * B) for backward in (False, True))
    bit_bytes = -(-T // tiles.WORD) * B * N * 4
    return Explanation(
        target,
        here,
        plan,
        kernels,
        why_not,
        forward_gflop=forward.flops / 1e9,
        backward_gflop=(both.flops - forward.flops) / 1e9,
        forward_mib=forward.bytes / 2**20,
        backward_mib=(both.bytes - forward.bytes) / 2**20,
        saved_mib=((T + -(-T // every)) * step_bytes + bit_bytes) / 2**20,
        # z, g_u, rest, g_x, and v where it is replayed
        workspace_mib=plan.backward_steps * step_bytes * (G + 3 + (every > 1)) / 2**20,
    )


def _strategy(
    layer: GPN | LIF | CubaLIF, sizes: tuple[int, int, int], dtype: torch.dtype, where: torch.device
) -> tuple[str, str]:
    """How the Triton kernels run a layer, and why."""
    from gpn_triton.kernels import tiles

    limits: device.KernelLimits = {}
    if where.type == "cuda":
        limits = device.kernel_limits()
    precision = device.float32_precision()
    if isinstance(layer, LIF):
        plan = tiles.choose_lif(sizes[0])
    elif isinstance(layer, CubaLIF):
        plan = tiles.choose_cuba_lif(*sizes, dtype, precision, **limits)
    else:
        gates, every = GATES[layer.variant], layer.options.every or 1
        plan = tiles.choose(*sizes, dtype, gates, every, precision, **limits)
    return plan.strategy, plan.reason


def layers_run(
    layers: nn.ModuleList, T: int, B: int, dtype: torch.dtype, where: torch.device
) -> list[dict[str, Any]]:
    """What computes each layer of a network, and why.

    Args:
        layers: SpikingClassifier.neurons. T, B: time bins, batch. dtype: of the layers' currents.
        where: the device that computes.
    Returns:
        of each layer its backend, strategy (None but for the Triton kernels) and the reason.
    Raises:
        RuntimeError: a backend asked for by name cannot run.
    """
    found = []
    for layer in layers:
        if not isinstance(layer, GPN | LIF | CubaLIF):
            kind = type(layer).__name__
            found.append({"backend": "torch", "strategy": None, "reason": f"{kind} has no kernel"})
            continue
        asked = layer.options.backend if isinstance(layer, GPN) else layer.backend
        x = torch.empty(0, dtype=dtype, device=where)
        how, strategy = device.choose_backend(asked, x), None
        if how == "triton":
            strategy, reason = _strategy(layer, (T, B, layer.hidden_size), dtype, where)
        elif asked != "auto":
            reason = "it was asked for by name"
        elif how == "cpu":
            reason = "these are the kernels for a CPU"
        else:
            reason = f"triton cannot run: {device.triton_unavailable(x)}"
        found.append({"backend": how, "strategy": strategy, "reason": reason})
    return found
