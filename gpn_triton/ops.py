"""gpn(), gpn_packed(): the GPN recurrence as one differentiable operator, whatever computes it.

Checks the arguments, applies the autocast policy, chooses the backend and registers the custom
operators gpn_triton::recurrence and gpn_triton::recurrence_backward with torch, so that autograd,
torch.compile(fullgraph=True) and CUDA-graph capture see one node each. The only importer of the
recurrence kernels; they are imported when first asked for.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from gpn_triton import device, recurrence_torch
from gpn_triton.device import BACKENDS, choose_backend
from gpn_triton.kernels.tiles import WORD
from gpn_triton.reference import GATES
from gpn_triton.surrogate import SURROGATES

OUTPUTS = ("spikes", "mean")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def gpn(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor | None = None,
    v0: Tensor | None = None,
    variant: str = "full",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str = "auto",
    checkpoint_every: int | None = None,
    output: str = "spikes",
) -> tuple[Tensor, Tensor]:
    """Run a layer of Gated Parametric Neurons over a sequence.

    Differentiable in x, weight_x, weight_v, bias and v0, once (no double backward). The state, the
    gates and all sums are float32 (float64 if x is); under autocast x is cast to its dtype, which
    then is the dtype of the spikes and of the operands of the products on a GPU.

    Args:
        x [T, B, N] float: synaptic current, the output of a Linear layer. T bins, B samples,
            N neurons; any sizes from 1 on, any strides.
        weight_x, weight_v [G N, N], bias [G N] float: gate weights from the current and from the
            membrane, rows in the order f, i, b, theta; G = 4 for the full neuron, fewer for a
            variant, None for no-fitb.
        v_reset [B, N] float: membrane after a spike, not differentiated. Default: zeros.
        v0 [B, N] float: membrane at t = 0. Default: v_reset.
        variant: full, no-fi, no-i, no-t, no-b or no-fitb (the paper's ablations).
        surrogate: atan, sigmoid, fast-sigmoid or triangle; alpha: its width, larger is narrower.
        backend: triton (CUDA, or CPU tensors under Triton's interpreter), torch, or auto: triton
            for CUDA tensors up to float32 where the kernels can run (device.triton_unavailable
            says), else torch. A backend asked for by name runs or raises.
        checkpoint_every: save the membrane every so many steps for backward and replay the steps
            between; None or 1 saves every step.
        output: spikes, or mean: only their mean over time, so that [T, B, N] is never written.
    Returns:
        spikes [T, B, N] of x's dtype (under autocast, of autocast's), or their mean [B, N] float32;
        v_final [B, N] float32 (float64 if x is): pass it as v0 to go on.
    Raises:
        ValueError: a shape, dtype, device or option that does not fit.
        RuntimeError: the backend asked for cannot run here.
    Source: arXiv 2412.01087; reference.gpn_loop is the definition.
    """
    arguments = (x, weight_x, weight_v, bias, v_reset, v0, variant, surrogate, alpha)
    return gpn_packed(*arguments, backend, checkpoint_every, output)[:2]


def gpn_packed(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor | None = None,
    v0: Tensor | None = None,
    variant: str = "full",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str = "auto",
    checkpoint_every: int | None = None,
    output: str = "spikes",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gpn() that also returns the packed spikes it holds for backward, for spike_linear to share.

    Args:
        As gpn.
    Returns:
        spikes (or their mean) and v_final as gpn; bits [ceil(T / 32), B, N] int32, not
        differentiable: bit t % 32 of word t // 32 is the spike at step t. None where nothing needs
        a gradient and nothing is held.
    Raises:
        As gpn.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x: expected [T, B, N] with every size at least 1, got {list(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    for name, value, allowed in (
        ("variant", variant, GATES),
        ("surrogate", surrogate, SURROGATES),
        ("backend", backend, BACKENDS),
        ("output", output, OUTPUTS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    if not alpha > 0:
        raise ValueError(f"alpha: expected a number above 0, got {alpha!r}")
    every = 1 if checkpoint_every is None else checkpoint_every
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"checkpoint_every: expected a whole number from 1 on, got {every!r}")
    _, B, N = x.shape
    G = len(GATES[variant])
    _check("weight_x", weight_x, [G * N, N] if G else None, x, variant)
    _check("weight_v", weight_v, [G * N, N] if G else None, x, variant)
    _check("bias", bias, [G * N] if G else None, x, variant)
    if v_reset is not None:
        _check("v_reset", v_reset, [B, N], x, variant)
    if v0 is not None:
        _check("v0", v0, [B, N], x, variant)

    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    if v_reset is None:
        v_reset = torch.zeros(B, N, dtype=state, device=x.device)
    v_reset = v_reset.detach().to(state)
    v0 = v_reset if v0 is None else v0.to(state)
    weights = [w if w is None else w.to(state) for w in (weight_x, weight_v, bias)]
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights, v0)
    )
    out, v_final, _, bits = _recurrence(
        x, *weights, v_reset, v0,
        variant, surrogate, float(alpha), backend, every if needs_grad else 0, output == "mean",
    )  # fmt: skip
    return out, v_final, bits if needs_grad else None


def _check(name: str, tensor: Tensor | None, shape: list[int] | None, x: Tensor, variant: str):
    """Raise ValueError unless the tensor has the shape (None: must be absent) and x's device."""
    if shape is None:
        if tensor is not None:
            raise ValueError(f"{name}: variant {variant} has no gates: expected None")
        return
    if tensor is None or list(tensor.shape) != shape:
        got = None if tensor is None else list(tensor.shape)
        raise ValueError(
            f"{name}: expected shape {shape} for x {list(x.shape)} and variant {variant}, got {got}"
        )
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on x's device {x.device}, got {tensor.device}")


def _plan(x: Tensor, variant: str, every: int):
    """tiles.choose for x, whose device is current."""
    from gpn_triton.kernels import tiles

    limits = device.kernel_limits() if x.is_cuda else {}
    return tiles.choose(
        *x.shape, x.dtype, GATES[variant], every, device.float32_precision(), **limits
    )


@dataclass(frozen=True)
class Explanation:
    """What explain() found; print it.

    plan: tiles.Plan. kernels: offline.Report of each kernel, or None and why_not_compiled.
    forward_gflop, backward_gflop: products only. forward_mib, backward_mib: read and written if
    nothing stayed in a cache. saved_mib: kept from forward for backward: x, the saved membranes and
    the spikes in one bit each (a spike_linear that follows holds nothing of [T, B, N] more).
    workspace_mib: live within a call, whatever T.
    """

    target: str
    plan: object
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
            f"work: {self.forward_gflop:.3g} GFLOP forward, {self.backward_gflop:.3g} backward",
            f"traffic: {self.forward_mib:.3g} MiB forward, {self.backward_mib:.3g} backward",
            f"memory: {self.saved_mib:.3g} MiB saved, {self.workspace_mib:.3g} MiB of workspace",
        ]
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

    For the current GPU if there is one, otherwise for an H200. Registers and shared memory are the
    compiler's, which takes some seconds. Work and bytes are counted, not measured.

    Args:
        T, B, N: time bins, batch, neurons. dtype: of x, float32 or a half type (under autocast,
            autocast's). variant, checkpoint_every, output: as for gpn.
    Returns:
        An Explanation; str() of it is the report.
    Raises:
        ValueError: a dtype the kernels do not take.
        RuntimeError: triton is not installed.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("explain needs triton (it exists for Linux: pip install triton)")
    from triton import knobs

    from gpn_triton.kernels import offline, tiles

    gates, every, mean = GATES[variant], checkpoint_every or 1, output == "mean"
    target, capability, limits = "an H200, for want of a GPU", 90, {}
    if torch.cuda.is_available():
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

    G, cells, size = len(gates), T * B * N, dtype.itemsize
    product = 2 * cells * G * N  # one of [T B, N] with [G N, N]
    s_bytes, bit_bytes = 0 if mean else cells * size, -(-T // WORD) * B * N * 4
    v_bytes = cells / every * size
    z_bytes = cells * G * size
    backward_z = plan.backward_steps * B * N * size
    return Explanation(
        target,
        plan,
        kernels,
        why_not,
        forward_gflop=2 * product / 1e9,
        # z again, the products with weight_v and weight_x, their gradients; replay: weight_v once
        backward_gflop=(6 + (every > 1)) * product / 1e9,
        # x once for the product and once in the step, z written and read
        forward_mib=(2 * cells * size + s_bytes + bit_bytes + v_bytes + 2 * z_bytes * plan.hoist)
        / 2**20,
        # z is written, added to, read by two kernels, overwritten and read by four products; x, v,
        # spikes, g_s, g_u, rest and g_x pass by in between
        backward_mib=(9 * z_bytes + 12 * cells * size + s_bytes + bit_bytes + v_bytes) / 2**20,
        saved_mib=(cells * size + bit_bytes + v_bytes) / 2**20,
        # z, g_u, rest, g_x, and v where it is replayed
        workspace_mib=backward_z * (G + 3 + (every > 1)) / 2**20,
    )


@torch.library.custom_op("gpn_triton::recurrence", mutates_args=())
def _recurrence(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    v0: Tensor,
    variant: str,
    surrogate: str,
    alpha: float,
    backend: str,
    every: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """spikes or their mean, v_final, v_saved, spike_bits: see recurrence_torch.gpn_forward."""
    arguments = (x, weight_x, weight_v, bias, v_reset, v0)
    with torch.autocast(x.device.type, enabled=False):
        if choose_backend(backend, x) == "torch":
            return recurrence_torch.gpn_forward(*arguments, variant, every, mean)
        from gpn_triton.kernels.recurrence_forward import recurrence_forward

        with torch.cuda.device_of(x):
            plan = _plan(x, variant, every)
            return recurrence_forward(*arguments, GATES[variant], every, mean, plan)


@_recurrence.register_fake
def _(x, weight_x, weight_v, bias, v_reset, v0, variant, surrogate, alpha, backend, every, mean):
    T, B, N = x.shape
    saved = torch.float16 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return (
        v0.new_empty(B, N) if mean else x.new_empty(x.shape),
        v0.new_empty(B, N),
        x.new_empty(-(-T // every) if every else 0, B, N, dtype=saved),
        x.new_empty(-(-T // WORD) if every else 0, B, N, dtype=torch.int32),
    )


@torch.library.custom_op("gpn_triton::recurrence_backward", mutates_args=())
def _recurrence_backward(
    g_out: Tensor | None,
    g_v_final: Tensor | None,
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    bits: Tensor,
    v_saved: Tensor,
    variant: str,
    surrogate: str,
    alpha: float,
    backend: str,
    every: int,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_x, weight_v, bias (empty without weights), v0."""
    arguments = (g_out, g_v_final, x, weight_x, weight_v, bias, v_reset, bits, v_saved)
    options = (surrogate, alpha, every, mean)
    with torch.autocast(x.device.type, enabled=False):
        if choose_backend(backend, x) == "torch":
            gradients = recurrence_torch.gpn_backward(*arguments, variant, *options)
        else:
            from gpn_triton.kernels.recurrence_backward import recurrence_backward

            with torch.cuda.device_of(x):
                plan = _plan(x, variant, every)
                gradients = recurrence_backward(*arguments, GATES[variant], *options, plan)
    g_x, *g_weights, g_v0 = gradients
    return g_x, *(v_reset.new_empty(0) if g is None else g for g in g_weights), g_v0


@_recurrence_backward.register_fake
def _(
    g_out, g_v_final, x, weight_x, weight_v, bias, v_reset, bits, v_saved,
    variant, surrogate, alpha, backend, every, mean,
):  # fmt: skip
    def like(t):
        return v_reset.new_empty(0) if t is None else t.new_empty(t.shape)

    return x.new_empty(x.shape), like(weight_x), like(weight_v), like(bias), like(v_reset)


def _setup_context(ctx, inputs, output):
    x, weight_x, weight_v, bias, v_reset, _, *options = inputs
    _, _, v_saved, bits = output
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight_x, weight_v, bias, v_reset, bits, v_saved)


def _autograd_backward(ctx, g_out, g_v_final, _g_v_saved, _g_bits):
    weights = ctx.saved_tensors[1:4]
    g_x, *g_weights, g_v0 = _recurrence_backward(g_out, g_v_final, *ctx.saved_tensors, *ctx.options)
    g_weights = [None if w is None else g for w, g in zip(weights, g_weights, strict=True)]
    return g_x, *g_weights, None, g_v0, *[None] * len(ctx.options)


_recurrence.register_autograd(_autograd_backward, setup_context=_setup_context)
