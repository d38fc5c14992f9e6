"""Linear on the spikes of the layer before, which holds them for backward in one bit each.

    y[t, b]  = weight (mask[b] s[t, b]) + bias
    g_s      = (g_y weight) mask        g_weight = sum g_y (mask s)^T        g_bias = sum g_y

F.linear(spikes * mask, weight, bias) would hold its operand [T, B, N] between forward and backward.
The bits that the recurrence holds anyway (gpn_packed) serve both: backward rebuilds the operand
from them, one stretch of time after the other. A layer's spikes travel to the next layer's Linear
as Spikes: with their bits and with the mask of dropout, which only the Linear multiplies by.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpn_triton.kernels.tiles import WORD
from gpn_triton.machine.device import BACKENDS, autocast_dtype, choose_backend
from gpn_triton.neurons import cost
from gpn_triton.neurons.checks import check_fits
from gpn_triton.neurons.derivatives import beyond_operators, refuse_second
from gpn_triton.neurons.event_linear import Cells, event_linear
from gpn_triton.neurons.gpn_options import check_choice
from gpn_triton.neurons.recurrence_torch import unpack_spikes
from gpn_triton.neurons.row_linear import row_linear

# of the operand that backward rebuilds at a time. On a GPU it stays in the L2 cache between the
# kernel that writes it and the product that reads it (unmeasured). On a CPU, at T = 100, B = 256,
# 512 -> 256 and 1 thread, any size takes the same in float32; bfloat16 is best at 1 MiB
CHUNK_BYTES = {"cuda": 32 << 20, "cpu": 1 << 20}


class Spikes(NamedTuple):
    """What a hidden layer hands to the next one.

    values [T, B, N] (or their mean over time, [B, N]): the layer's output. bits [ceil(T / 32), B,
    N] int32: the same as packed spikes, or None. mask [B, N]: what the values are still to be
    multiplied by at every step, or None. version: the values' own when they were packed; where it
    is another now, or None, bits may not be theirs and are not used.
    """

    values: Tensor
    bits: Tensor | None = None
    mask: Tensor | None = None
    version: int | None = None

    def dense(self) -> Tensor:
        """values * mask, as any module reads them."""
        return self.values if self.mask is None else self.values * self.mask.to(self.values.dtype)


class PackedPair(namedtuple("Pair", ("spikes", "state"))):
    """The pair that a layer returns, which also carries the spikes in one bit each.

    Whoever unpacks or indexes it finds the pair alone. A hook that puts another pair in its place
    drops the bits, which would not be those of the new spikes; one that changes the spikes in
    place changes their version.
    """

    bits: Tensor | None = None
    version: int | None = None

    def carry(self, bits: Tensor | None) -> PackedPair:
        """Itself, with the bits of its spikes as they are now."""
        self.bits = bits
        # torch.compile cannot compare versions
        if bits is not None and not torch.compiler.is_compiling():
            self.version = self.spikes._version
        return self


class SpikeLinear(nn.Linear):
    """nn.Linear for the current of a layer; it takes whatever comes before one.

    Where it normalises, the current is gain scale (weight (x - centre)) + bias. centre and scale
    are fixed once, from data (set_statistics), and gain is learned, 1 at first. All ride on the
    weights and on the bias, so that no pass over [T, B, out_features] is added, no statistics of a
    batch are taken, and each input's current depends on that input alone.

    Args:
        in_features, out_features: as nn.Linear. backend: as spike_linear. normalises: whether it
            has the parameter gain [out_features] and the buffers centre [in_features] and
            scale [out_features]. by_row: whether, in float64 on a CPU, a step's current is the same
            bits whatever else is in the batch (row_linear). device, dtype: as nn.Linear.
    """

    # these three are None where nothing is normalised; torch's own modules declare such so
    gain: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, backend: str = "auto", normalises: bool = False,
        by_row: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        check_choice("backend", backend, BACKENDS)
        self.backend, self.by_row = backend, by_row
        gain = nn.Parameter(torch.ones(out_features)) if normalises else None
        self.register_parameter("gain", gain)
        self.register_buffer("centre", torch.zeros(in_features) if normalises else None)
        self.register_buffer("scale", torch.ones(out_features) if normalises else None)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """weight [out_features, in_features] and bias [out_features] of the Linear that this is."""
        if self.gain is None:
            return self.weight, self.bias
        weight = self.weight * (self.gain * self.scale)[:, None]
        # a product would round to autocast's dtype
        return weight, self.bias - (weight * self.centre).sum(1)

    @torch.no_grad()
    def fold(self) -> None:
        """Become that Linear: what is computed stays the same, and nothing normalises."""
        weight, bias = self.folded()
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.register_parameter("gain", None)
        self.register_buffer("centre", None)
        self.register_buffer("scale", None)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Normalise by what the inputs are now.

        Args:
            mean [in_features]: of the inputs. variance [out_features]: of the current as it is. A
                neuron whose current does not vary keeps its scale.
        """
        # the factor is chosen without waiting for the device
        factor = torch.where(variance > 1e-12, variance, 1).rsqrt()
        self.scale.mul_(factor)
        self.centre.copy_(mean)
        self.bias.zero_()

    @torch.no_grad()
    def scale_events(self, ratio: float) -> None:
        """Take inputs that are ratio times as large as before for the same."""
        if self.gain is None:
            self.weight.div_(ratio)
        else:
            self.scale.div_(ratio)
            self.centre.mul_(ratio)

    def forward(self, x: Tensor | Cells | Spikes) -> Tensor:
        """x [T, B, in_features], dense, as events or as spikes -> [T, B, out_features]."""
        weight, bias = self.folded()
        if isinstance(x, Cells):
            return event_linear(x, weight, bias)
        if isinstance(x, Spikes):
            exact = self.by_row and x.values.dtype == torch.float64
            if x.bits is not None and not exact and self._unchanged(x):
                return spike_linear(*x[:3], weight, bias, self.backend)
            x = x.dense()
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [T, B, {self.in_features}], got {list(x.shape)}")
        check_fits(x, self.weight)
        return row_linear(x, weight, bias) if self.by_row else F.linear(x, weight, bias)

    def _unchanged(self, x: Spikes) -> bool:
        """Whether no hook has changed the values since they were packed; torch.compile, which
        cannot compare versions, takes it that any hook has."""
        if torch.compiler.is_compiling():
            return not self._forward_pre_hooks
        return x.version == x.values._version


def spike_linear(
    spikes: Tensor,
    bits: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """F.linear(spikes * mask, weight, bias), holding bits, mask and weight alone for backward.

    Differentiable in spikes, weight and bias, in reverse mode once; a double backward is refused,
    and in forward mode and under torch.func F.linear runs instead. Under autocast operands
    and result have its dtype, as F.linear's; the gradient of the weight is summed in float32 and
    not rounded to a half type on its way to a float32 weight.

    Args:
        spikes [T, B, N] float: 0 or 1, from gpn_packed.
        bits [ceil(T / 32), B, N] int32: the same spikes as gpn_packed gave them.
        mask [B, N] float: what the spikes are multiplied by at every step (held dropout), not
            differentiated; None: ones.
        weight [M, N], bias [M] or None: float, of spikes' dtype unless autocast casts.
        backend: of backward: triton, torch or auto, as gpn().
    Returns:
        y [T, B, M] of spikes' dtype, or autocast's.
    Raises:
        ValueError: a shape or dtype that does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    if spikes.ndim != 3 or weight.ndim != 2 or spikes.shape[2] != weight.shape[1]:
        raise ValueError(
            f"weight: expected [M, N] for spikes [T, B, N], got {list(weight.shape)} for "
            f"{list(spikes.shape)}"
        )
    T, B, N = spikes.shape
    for name, tensor, shape in (
        ("bits", bits, [-(-T // WORD), B, N]),
        ("mask", mask, [B, N]),
        ("bias", bias, [weight.shape[0]]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
    if bits.dtype != torch.int32:
        raise ValueError(f"bits: expected int32, got {bits.dtype}")
    autocast = autocast_dtype(spikes)
    if autocast is not None:
        spikes = spikes.to(autocast)
    elif weight.dtype != spikes.dtype:
        raise ValueError(f"weight: expected spikes' dtype {spikes.dtype}, got {weight.dtype}")
    if mask is not None:
        mask = mask.detach().to(spikes.dtype)
    if beyond_operators(spikes, weight, bias):
        return F.linear(spikes if mask is None else spikes * mask, weight, bias)
    if not torch.compiler.is_compiling():
        cost.tell_flop_counter()
    return _spike_linear(spikes, bits, mask, weight, bias, backend)


@torch.library.custom_op("gpn_triton::spike_linear", mutates_args=())
def _spike_linear(
    spikes: Tensor,
    bits: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """y [T, B, M]; bits and backend are backward's."""
    dtype = spikes.dtype
    # a backend that cannot run is named here, not in backward
    choose_backend(backend, spikes)
    with torch.autocast(spikes.device.type, enabled=False):
        operand = spikes if mask is None else spikes * mask
        bias = None if bias is None else bias.to(dtype)
        return F.linear(operand.contiguous(), weight.to(dtype), bias)


@_spike_linear.register_fake
def _(spikes, bits, mask, weight, bias, backend):
    return spikes.new_empty(*spikes.shape[:2], weight.shape[0])


@torch.library.custom_op("gpn_triton::spike_linear_backward", mutates_args=())
def _spike_linear_backward(
    g_y: Tensor, bits: Tensor, mask: Tensor | None, weight: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of spikes, of g_y's dtype, and of weight and bias, of weight's."""
    dtype, (T, B, M), N = g_y.dtype, g_y.shape, weight.shape[1]
    half = dtype in (torch.float16, torch.bfloat16)
    how = choose_backend(backend, g_y)
    with torch.autocast(g_y.device.type, enabled=False):
        g_y = g_y.contiguous()
        g_spikes = g_y @ weight.to(dtype)
        if mask is not None:
            g_spikes *= mask
        total = torch.float32 if half else dtype
        g_weight = None
        for start, stop in _chunks(T, B * N * dtype.itemsize, g_y.device.type):
            rows = g_y[start:stop].view(-1, M).t()
            operand = _operand(bits, mask, start, stop, dtype, how).view(-1, N)
            if g_weight is not None and not half:
                g_weight.addmm_(rows, operand)
                continue
            if half and g_y.is_cuda:
                product = torch.mm(rows, operand, out_dtype=torch.float32)
            else:
                product = (rows @ operand).to(total)
            g_weight = product if g_weight is None else g_weight.add_(product)
        g_bias = g_y.sum((0, 1), dtype=total)
    return g_spikes, g_weight.to(weight.dtype), g_bias.to(weight.dtype)


@_spike_linear_backward.register_fake
def _(g_y, bits, mask, weight, backend):
    M, N = weight.shape
    return g_y.new_empty(*g_y.shape[:2], N), weight.new_empty(M, N), weight.new_empty(M)


def _chunks(T: int, step_bytes: int, kind: str) -> Iterator[tuple[int, int]]:
    """Time ranges of about CHUNK_BYTES, at least a step each."""
    steps = max(1, CHUNK_BYTES["cuda" if kind == "cuda" else "cpu"] // step_bytes)
    for start in range(0, T, steps):
        yield start, min(T, start + steps)


def _operand(
    bits: Tensor, mask: Tensor | None, start: int, stop: int, dtype: torch.dtype, how: str
) -> Tensor:
    """spikes * mask [stop - start, B, N] of steps start..stop - 1; how: torch or triton."""
    if how == "triton":
        from gpn_triton.kernels.spikes import spikes_unpack

        with torch.cuda.device_of(bits):
            return spikes_unpack(bits, mask, start, stop, dtype)
    spikes = unpack_spikes(bits, start, stop, dtype)
    return spikes if mask is None else spikes.mul_(mask)


def _setup_context(ctx, inputs, output):
    _, bits, mask, weight, bias, backend = inputs
    ctx.has_bias, ctx.backend = bias is not None, backend
    ctx.save_for_backward(bits, mask, weight)


def _autograd_backward(ctx, g_y):
    g_spikes, g_weight, g_bias = _spike_linear_backward(g_y, *ctx.saved_tensors, ctx.backend)
    return g_spikes, None, None, g_weight, g_bias if ctx.has_bias else None, None


_spike_linear_backward.register_autograd(
    refuse_second("spike_linear", "F.linear(spikes * mask, weight, bias)")
)
_spike_linear.register_autograd(_autograd_backward, setup_context=_setup_context)
