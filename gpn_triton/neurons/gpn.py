"""gpn(), gpn_packed(): the GPN recurrence as one differentiable operator, whatever computes it.

Checks the tensors, applies the autocast policy, chooses the backend and registers the custom
operators gpn_triton::recurrence and gpn_triton::recurrence_backward with torch, so that autograd,
torch.compile(fullgraph=True) and CUDA-graph capture see one node each. The only importer of the
recurrence kernels, which it imports when they are first asked for.
"""

import torch
from torch import Tensor

from gpn_triton.kernels.tiles import WORD, own_steps
from gpn_triton.machine import device
from gpn_triton.machine.device import autocast_dtype, choose_backend
from gpn_triton.neurons import cost, recurrence_torch
from gpn_triton.neurons.checks import check_lengths, check_operand, check_sequence, check_state
from gpn_triton.neurons.derivatives import (
    beyond_operators,
    refuse_nothing_saved,
    refuse_second,
    saves_for_backward,
)
from gpn_triton.neurons.gpn_options import GPNOptions
from gpn_triton.neurons.reference import GATES, gpn_loop

__all__ = ["GPNOptions", "gpn", "gpn_packed"]


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
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a layer of Gated Parametric Neurons over a sequence.

    Differentiable in x, weight_x, weight_v, bias and v0, in reverse mode once; a double backward is
    refused. In forward mode and under torch.func's grad and jvp the loop that defines it runs
    instead: slower, with more memory, and differentiable to any order. A program that torch.export
    makes with a T that may be below and above 32 has no backward.

    The state, the gates and all sums are float32 (float64 if x is); under autocast x is cast to its
    dtype, which then is the dtype of the spikes and of the operands of the products on a GPU.

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
        backend: triton (CUDA, or CPU tensors under Triton's interpreter), cpu (kernels for CPU
            tensors, which Numba compiles at a machine's first call), torch (the specification
            itself, on any device: a loop in Python), or auto: cpu for CPU tensors, triton for CUDA
            tensors up to float32 where the kernels can run (device.triton_unavailable says), else
            torch. A backend asked for by name runs or raises.
        checkpoint_every: save the membrane every so many steps for backward and replay the steps
            between; None or 1 saves every step.
        output: spikes, or mean: only their mean over time, so that [T, B, N] is never written.
        lengths [B] int: steps of each sequence, 0..T (not checked). One that has ended keeps its
            membrane, spikes no more and adds nothing to any gradient; its mean is over its own
            steps. Its x must be finite there and does not count. None: T.
    Returns:
        spikes [T, B, N] of x's dtype (under autocast, of autocast's), or their mean [B, N] float32;
        v_final [B, N] float32 (float64 if x is): pass it as v0 to go on.
    Raises:
        TypeError: x or a state that is no tensor, as a PackedSequence.
        ValueError: a shape, dtype, device or option that does not fit.
        RuntimeError: the backend asked for cannot run here.
    Source: arXiv 2412.01087; reference.gpn_loop is the definition.
    """
    options = GPNOptions(variant, surrogate, alpha, backend, checkpoint_every, output)
    return gpn_packed(x, (weight_x, weight_v, bias), v_reset, v0, options, lengths)[:2]


def gpn_packed(
    x: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    v_reset: Tensor | None,
    v0: Tensor | None,
    options: GPNOptions,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """gpn() that also returns the packed spikes it holds for backward, for spike_linear to share.

    Args:
        x, v_reset, v0, lengths: as gpn. weights: its weight_x, weight_v and bias. options: the
            rest.
    Returns:
        spikes (or their mean) and v_final as gpn; bits [ceil(T / 32), B, N] int32, not
        differentiable: bit t % 32 of word t // 32 is the spike at step t. None where nothing needs
        a gradient and nothing is held.
    Raises:
        As gpn.
    """
    check_sequence(x)
    _, B, N = x.shape
    G = len(GATES[options.variant])
    shapes = ([G * N, N], [G * N, N], [G * N]) if G else (None, None, None)
    for name, weight, shape in zip(("weight_x", "weight_v", "bias"), weights, shapes, strict=True):
        _check(name, weight, shape, x, options.variant)
    for name, state in (("v_reset", v_reset), ("v0", v0)):
        if state is not None:
            check_state(name, state, x)
    if lengths is not None:
        check_lengths(lengths, x)
        lengths = lengths.to(torch.int64)

    autocast = autocast_dtype(x)
    x = x if autocast is None else x.to(autocast)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    if v_reset is None:
        v_reset = torch.zeros(B, N, dtype=state, device=x.device)
    v_reset = v_reset.detach().to(state)
    v0 = v_reset if v0 is None else v0.to(state)
    w_x, w_v, bias = (w if w is None else w.to(state) for w in weights)
    if beyond_operators(x, w_x, w_v, bias, v0):
        return *_loop(x, (w_x, w_v, bias), v_reset, v0, options, lengths), None
    needs_grad, keeps_bits = saves_for_backward(x, w_x, w_v, bias, v0)
    if not torch.compiler.is_compiling():
        cost.tell_flop_counter()
    out, v_final, _, bits = _recurrence(
        x, w_x, w_v, bias, v_reset, v0, lengths, *options.flat(save=needs_grad)
    )
    return out, v_final, bits if keeps_bits else None


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
    check_operand(name, tensor, x)


def _loop(
    x: Tensor, weights: tuple[Tensor | None, Tensor | None, Tensor | None], v_reset: Tensor,
    v0: Tensor, options: GPNOptions, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's spikes or their mean and v_final, by the loop that defines them."""
    if options.backend in ("triton", "cpu"):
        raise RuntimeError(
            f"backend={options.backend!r} cannot run: the kernels have no forward mode and no rule "
            "for torch.func; with backend='auto' the loop of reference.py runs here"
        )
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        w_x, w_v, bias = weights
        spikes, v_final = gpn_loop(
            x.to(v0.dtype), w_x, w_v, bias, v_reset, v0, options.variant, options.surrogate,
            options.alpha, lengths=lengths,
        )  # fmt: skip
    if options.output == "mean":
        return spikes.sum(0) / own_steps(len(x), lengths), v_final
    return spikes.to(x.dtype), v_final


def compiles_first(backend: str, x: Tensor) -> bool:
    """Whether the first call for x will compile kernels for this CPU: some 10 s, once a machine."""
    if choose_backend(backend, x) != "cpu":
        return False
    from gpn_triton.kernels import gpn_cpu

    return not gpn_cpu.is_compiled()


def _plan(x: Tensor, variant: str, every: int):
    """tiles.choose for x, whose device is current."""
    from gpn_triton.kernels import tiles

    # the interpreter has no generation's instructions
    limits: device.KernelLimits = device.kernel_limits() if x.is_cuda else {"capability": 0}
    T, B, N = x.shape
    return tiles.choose(
        T, B, N, x.dtype, GATES[variant], every, device.float32_precision(), **limits
    )


@torch.library.custom_op("gpn_triton::recurrence", mutates_args=())
def _recurrence(
    x: Tensor,
    weight_x: Tensor | None,
    weight_v: Tensor | None,
    bias: Tensor | None,
    v_reset: Tensor,
    v0: Tensor,
    lengths: Tensor | None,
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
        how = choose_backend(backend, x)
        if how == "torch":
            return recurrence_torch.gpn_forward(*arguments, variant, every, mean, lengths)
        if how == "cpu":
            from gpn_triton.kernels import gpn_cpu

            return gpn_cpu.gpn_forward(*arguments, GATES[variant], every, mean, lengths)
        from gpn_triton.kernels.gpn_forward import gpn_forward

        with torch.cuda.device_of(x):
            plan = _plan(x, variant, every)
            return gpn_forward(*arguments, GATES[variant], every, mean, plan, lengths)


@_recurrence.register_fake
def _(
    x, weight_x, weight_v, bias, v_reset, v0, lengths,
    variant, surrogate, alpha, backend, every, mean,
):  # fmt: skip
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
    lengths: Tensor | None,
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
        how = choose_backend(backend, x)
        if how == "torch":
            gradients = recurrence_torch.gpn_backward(*arguments, variant, *options, lengths)
        elif how == "cpu":
            from gpn_triton.kernels import gpn_cpu

            gradients = gpn_cpu.gpn_backward(*arguments, GATES[variant], *options, lengths)
        else:
            from gpn_triton.kernels.gpn_backward import gpn_backward

            with torch.cuda.device_of(x):
                plan = _plan(x, variant, every)
                gradients = gpn_backward(*arguments, GATES[variant], *options, plan, lengths)
    g_x, g_w_x, g_w_v, g_bias, g_v0 = (v_reset.new_empty(0) if g is None else g for g in gradients)
    return g_x, g_w_x, g_w_v, g_bias, g_v0


@_recurrence_backward.register_fake
def _(
    g_out, g_v_final, x, weight_x, weight_v, bias, v_reset, bits, v_saved, lengths,
    variant, surrogate, alpha, backend, every, mean,
):  # fmt: skip
    def like(t):
        return v_reset.new_empty(0) if t is None else t.new_empty(t.shape)

    return x.new_empty(x.shape), like(weight_x), like(weight_v), like(bias), like(v_reset)


def _setup_context(ctx, inputs, output):
    x, weight_x, weight_v, bias, v_reset, _, lengths, *options = inputs
    _, _, v_saved, bits = output
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight_x, weight_v, bias, v_reset, bits, v_saved, lengths)


def _autograd_backward(ctx, g_out, g_v_final, _g_v_saved, _g_bits):
    refuse_nothing_saved("gpn", ctx.options[-2])
    # read once: activation checkpointing computes anew what a second reading asks for, and refuses
    saved = ctx.saved_tensors
    g_x, *g_weights, g_v0 = _recurrence_backward(g_out, g_v_final, *saved, *ctx.options)
    g_weights = [None if w is None else g for w, g in zip(saved[1:4], g_weights, strict=True)]
    return g_x, *g_weights, None, g_v0, None, *[None] * len(ctx.options)


_recurrence_backward.register_autograd(refuse_second("gpn", "reference.gpn_loop"))
_recurrence.register_autograd(_autograd_backward, setup_context=_setup_context)
