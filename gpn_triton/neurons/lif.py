"""lif(), cuba_lif(): the leaky neurons beside GPN as one differentiable operator each.

Checks the tensors, chooses the backend and registers the custom operators gpn_triton::lif and
gpn_triton::cuba_lif, and their backwards, with torch: the kernels for a GPU and for a CPU. For
backward they hold the membrane before the threshold and the spikes in one bit each, no graph of
autograd's. Where no kernel runs, the loops of reference.py run under autograd. The only importer of
these neurons' kernels, which it imports when they are first asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpn_triton.kernels.tiles import WORD, choose_cuba_lif, choose_lif
from gpn_triton.machine import device
from gpn_triton.machine.device import BACKENDS, choose_backend
from gpn_triton.neurons import cost
from gpn_triton.neurons.checks import check_operand, check_sequence, check_state
from gpn_triton.neurons.derivatives import (
    beyond_operators,
    refuse_nothing_saved,
    refuse_second,
    saves_for_backward,
)
from gpn_triton.neurons.gpn_options import check_choice
from gpn_triton.neurons.reference import cuba_lif_loop, lif_loop
from gpn_triton.neurons.surrogate import SURROGATES


def lif(
    x: Tensor,
    v0: Tensor | None = None,
    tau: Tensor | float = 2.0,
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a layer of leaky integrate-and-fire neurons; PLIF where tau is learned.

    Differentiable in x, v0 and tau as gpn() is. The state is float32 (float64 if x is).

    Args:
        x [T, B, N] float: synaptic current. v0 [B, N] float: membrane at t = 0; None: zeros.
        tau: time constant in bins, a number or a tensor of one.
        surrogate, alpha, backend: as gpn().
    Returns:
        spikes [T, B, N] of x's dtype; v_final [B, N] of the state's; the spikes' bits, as
        gpn_packed gives them, or None.
    Raises:
        TypeError, ValueError: a tensor or an option that does not fit.
        RuntimeError: the backend asked for cannot run here.
    Source: Fang et al., ICCV 2021; reference.lif_loop is the definition.
    """
    check_sequence(x)
    state = _check_options(x, surrogate, backend)
    if v0 is not None:
        check_state("v0", v0, x)
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            raise ValueError(f"tau: expected one number, got shape {list(tau.shape)}")
        check_operand("tau", tau, x)
        tau = tau.to(state).reshape(())
    else:
        tau = torch.full((), tau, dtype=state, device=x.device)
    v0 = torch.zeros_like(x[0], dtype=state) if v0 is None else v0.to(state)
    if not _takes_kernels(backend, x, v0, tau):
        spikes, v = lif_loop(x.to(state), v0, tau, surrogate, alpha)
        return spikes.to(x.dtype), v, None
    saves, keeps_bits = saves_for_backward(x, v0, tau)
    spikes, v, _, bits = _lif(x, v0, tau, surrogate, float(alpha), backend, saves)
    return spikes, v, bits if keeps_bits else None


def cuba_lif(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    current_decay: float = 0.5,
    membrane_decay: float = 0.5,
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Run a layer of current-based LIF neurons whose spikes feed back through a weight.

    Differentiable in x, weight, bias and the state as gpn() is. The state is float32 (float64 if x
    is).

    Args:
        x [T, B, N] float: input. weight [N, N], bias [N] float: from the spikes of the step before.
        state: current, membrane and last spikes at t = 0, each [B, N]; None: zeros.
        current_decay, membrane_decay: what a step leaves of each.
        surrogate, alpha, backend: as gpn().
    Returns:
        spikes [T, B, N] of x's dtype; the state after the last step; the spikes' bits, as
        gpn_packed gives them, or None.
    Raises:
        TypeError, ValueError: a tensor or an option that does not fit.
        RuntimeError: the backend asked for cannot run here.
    Source: arXiv 2412.01087; reference.cuba_lif_loop is the definition.
    """
    check_sequence(x)
    dtype = _check_options(x, surrogate, backend)
    N = x.shape[2]
    for name, tensor, shape in (("weight", weight, [N, N]), ("bias", bias, [N])):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
        check_operand(name, tensor, x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if state is None:
        state = (torch.zeros_like(x[0], dtype=dtype),) * 3
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise TypeError(
            "state: expected (current, membrane, last spikes), each [B, N], got "
            f"{type(state).__name__}"
        )
    for name, tensor in zip(("current", "membrane", "last spikes"), state, strict=True):
        check_state(f"state: {name}", tensor, x)
    state = tuple(tensor.to(dtype) for tensor in state)
    decays = float(current_decay), float(membrane_decay)
    if not _takes_kernels(backend, x, weight, bias, *state):
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            spikes, state = cuba_lif_loop(
                x.to(dtype), weight, bias, state, *decays, surrogate, alpha
            )
        return spikes.to(x.dtype), state, None
    saves, keeps_bits = saves_for_backward(x, weight, bias, *state)
    if not torch.compiler.is_compiling():
        cost.tell_flop_counter()
    spikes, current, v, _, bits = _cuba_lif(
        x, weight, bias, *state, *decays, surrogate, float(alpha), backend, saves
    )
    return spikes, (current, v, spikes[-1].to(dtype)), bits if keeps_bits else None


def _check_options(x: Tensor, surrogate: str, backend: str) -> torch.dtype:
    """Refuse options that do not fit; the state's dtype."""
    check_choice("surrogate", surrogate, SURROGATES)
    check_choice("backend", backend, BACKENDS)
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _takes_kernels(backend: str, x: Tensor, *others: Tensor) -> bool:
    """Whether kernels run, or the loop.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run.
    """
    how = choose_backend(backend, x)
    if not beyond_operators(x, *others):
        return how != "torch"
    if backend in ("triton", "cpu"):
        raise RuntimeError(
            f"backend={backend!r} cannot run: the kernels have no forward mode and no rule for "
            "torch.func; with backend='auto' the loop of reference.py runs here"
        )
    return False


def lif_compiles_first(backend: str, x: Tensor) -> bool:
    """Whether a first layer of LIF for x will compile kernels for this CPU."""
    if choose_backend(backend, x) != "cpu":
        return False
    from gpn_triton.kernels import lif_cpu

    return not lif_cpu.lif_is_compiled()


def cuba_lif_compiles_first(backend: str, x: Tensor) -> bool:
    """Whether a first layer of CuBa-LIF for x will compile kernels for this CPU."""
    if choose_backend(backend, x) != "cpu":
        return False
    from gpn_triton.kernels import lif_cpu

    return not lif_cpu.cuba_lif_is_compiled()


def _saved(x: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """h and bits as they look."""
    T, B, N = x.shape
    steps, words = (T, -(-T // WORD)) if save else (0, 0)
    return x.new_empty(steps, B, N), x.new_empty(words, B, N, dtype=torch.int32)


@torch.library.custom_op("gpn_triton::lif", mutates_args=())
def _lif(
    x: Tensor, v0: Tensor, tau: Tensor, surrogate: str, alpha: float, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """spikes, v_final, h, bits: see lif_cpu.lif_forward."""
    if choose_backend(backend, x) == "triton":
        from gpn_triton.kernels.lif import lif_forward

        with torch.cuda.device_of(x):
            return lif_forward(x, v0, tau, save, choose_lif(len(x)))
    from gpn_triton.kernels import lif_cpu

    return lif_cpu.lif_forward(x, v0, tau, save)


@_lif.register_fake
def _(x, v0, tau, surrogate, alpha, backend, save):
    return x.new_empty(x.shape), v0.new_empty(v0.shape), *_saved(x, save)


@torch.library.custom_op("gpn_triton::lif_backward", mutates_args=())
def _lif_backward(
    g_spikes: Tensor | None,
    g_v_final: Tensor | None,
    h: Tensor,
    v0: Tensor,
    tau: Tensor,
    bits: Tensor,
    learns: bool,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, v0 and tau."""
    options = learns, surrogate, alpha
    if choose_backend(backend, h) == "triton":
        from gpn_triton.kernels.lif import lif_backward

        with torch.cuda.device_of(h):
            return lif_backward(g_spikes, g_v_final, h, v0, tau, *options, choose_lif(len(h)))
    from gpn_triton.kernels import lif_cpu

    return lif_cpu.lif_backward(g_spikes, g_v_final, h, v0, tau, bits, *options)


@_lif_backward.register_fake
def _(g_spikes, g_v_final, h, v0, tau, bits, learns, surrogate, alpha, backend):
    return h.new_empty(h.shape), v0.new_empty(v0.shape), tau.new_empty(())


def _lif_setup(ctx, inputs, output):
    _, v0, tau, *ctx.options = inputs
    _, _, h, bits = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, v0, tau, bits)


def _lif_autograd(ctx, g_spikes, g_v_final, _g_h, _g_bits):
    *options, save = ctx.options
    refuse_nothing_saved("lif", save)
    gradients = _lif_backward(
        g_spikes, g_v_final, *ctx.saved_tensors, ctx.needs_input_grad[2], *options
    )
    return *gradients, *[None] * len(ctx.options)


_lif_backward.register_autograd(refuse_second("lif", "reference.lif_loop"))
_lif.register_autograd(_lif_autograd, setup_context=_lif_setup)


def _plan(x: Tensor):
    """How CuBa-LIF over x runs, whose device is current."""
    limits = device.kernel_limits() if x.is_cuda else {}
    return choose_cuba_lif(*x.shape, x.dtype, device.float32_precision(), **limits)


@torch.library.custom_op("gpn_triton::cuba_lif", mutates_args=())
def _cuba_lif(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    current: Tensor,
    v: Tensor,
    last: Tensor,
    current_decay: float,
    membrane_decay: float,
    surrogate: str,
    alpha: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """spikes, current, v, h, bits: see lif_cpu.cuba_lif_forward."""
    arguments = x, weight, bias, current, v, last, current_decay, membrane_decay, save
    if choose_backend(backend, x) == "triton":
        from gpn_triton.kernels.cuba_lif import cuba_lif_forward

        with torch.cuda.device_of(x):
            return cuba_lif_forward(*arguments, _plan(x))
    from gpn_triton.kernels import lif_cpu

    return lif_cpu.cuba_lif_forward(*arguments)


@_cuba_lif.register_fake
def _(
    x, weight, bias, current, v, last, current_decay, membrane_decay,
    surrogate, alpha, backend, save,
):  # fmt: skip
    states = (v.new_empty(v.shape) for _ in range(2))
    return x.new_empty(x.shape), *states, *_saved(x, save)


@torch.library.custom_op("gpn_triton::cuba_lif_backward", mutates_args=())
def _cuba_lif_backward(
    g_spikes: Tensor | None,
    g_current: Tensor | None,
    g_v: Tensor | None,
    h: Tensor,
    bits: Tensor,
    weight: Tensor,
    last: Tensor,
    current_decay: float,
    membrane_decay: float,
    surrogate: str,
    alpha: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, current, v and last."""
    arguments = g_spikes, g_current, g_v, h, bits, weight, last
    options = current_decay, membrane_decay, surrogate, alpha
    if choose_backend(backend, h) == "triton":
        from gpn_triton.kernels.cuba_lif import cuba_lif_backward

        with torch.cuda.device_of(h), torch.autocast(h.device.type, enabled=False):
            return cuba_lif_backward(*arguments, *options, _plan(h))
    from gpn_triton.kernels import lif_cpu

    return lif_cpu.cuba_lif_backward(*arguments, *options)


@_cuba_lif_backward.register_fake
def _(
    g_spikes, g_current, g_v, h, bits, weight, last, current_decay, membrane_decay,
    surrogate, alpha, backend,
):  # fmt: skip
    shapes = (weight.shape, weight.shape[:1], *[last.shape] * 3)
    return h.new_empty(h.shape), *(weight.new_empty(shape) for shape in shapes)


def _cuba_setup(ctx, inputs, output):
    _, weight, _, _, _, last, *ctx.options = inputs
    *_, h, bits = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, bits, weight, last)


def _cuba_autograd(ctx, g_spikes, g_current, g_v, _g_h, _g_bits):
    *options, save = ctx.options
    refuse_nothing_saved("cuba_lif", save)
    gradients = _cuba_lif_backward(g_spikes, g_current, g_v, *ctx.saved_tensors, *options)
    return *gradients, *[None] * len(ctx.options)


_cuba_lif_backward.register_autograd(refuse_second("cuba_lif", "reference.cuba_lif_loop"))
_cuba_lif.register_autograd(_cuba_autograd, setup_context=_cuba_setup)
