"""Ways to run a GPN layer, or something of its size, that ours are compared with.

Loops of our own writing that differ from reference.gpn_loop in where the products stand, and
adapters for layers of other libraries. All take x [T, B, C] and return what the layer puts out
[T, B, N].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpn_triton.neurons import reference
from gpn_triton.neurons.layers import GPN
from gpn_triton.neurons.surrogate import spike


class Unavailable(Exception):
    """Why something cannot take part here."""


def gpn_step(z: Tensor, x: Tensor, v: Tensor, v_reset: Tensor) -> tuple[Tensor, Tensor]:
    """One step of GPN from its gates' inputs: z [B, 4 N], x, v, v_reset [B, N] -> s, next v."""
    f, i, b, theta = z.chunk(4, -1)
    h = torch.sigmoid(f) * v + torch.sigmoid(i) * x
    s = spike(h - torch.sigmoid(theta))
    reset = s.detach()
    return s, h * (1 - reset) + v_reset * reset + torch.tanh(b)


def authors_loop(
    x: Tensor, linear: tuple[Tensor, Tensor] | None, weight_vx: Tensor, bias: Tensor, v_reset
) -> Tensor:
    """GPN as its authors wrote it: every step takes its input product and one product of [v, x].

    Args:
        x [T, B, C]: input. linear: weight [N, C] and bias [N] of the input Linear, or None: x is
            the current already. weight_vx [4 N, 2 N]: columns of v, then of x. bias [4 N].
        v_reset [B, N].
    Returns:
        spikes [T, B, N].
    Source: the structure of the authors' published implementation (arXiv 2412.01087).
    """
    v, spikes = v_reset, []
    for t in range(len(x)):
        current = x[t] if linear is None else F.linear(x[t], *linear)
        z = F.linear(torch.cat([v, current], 1), weight_vx, bias)
        s, v = gpn_step(z, current, v, v_reset)
        spikes.append(s)
    return torch.stack(spikes)


def hoisted_step(
    z: Tensor, x: Tensor, v: Tensor, v_reset: Tensor, weight_v: Tensor
) -> tuple[Tensor, Tensor]:
    """gpn_step from weight_x x + bias, z [B, 4 N]."""
    return gpn_step(torch.addmm(z, v, weight_v.t()), x, v, v_reset)


def hoisted_loop(
    current: Tensor,
    weight_x: Tensor,
    weight_v: Tensor,
    bias: Tensor,
    v_reset: Tensor,
    step: Callable[..., tuple[Tensor, Tensor]] = hoisted_step,
) -> Tensor:
    """GPN with weight_x x for all steps in one product before the loop.

    The product is unbound once: indexing it by t under autograd would cost O(T^2).
    """
    v, spikes = v_reset, []
    for x, z in zip(current.unbind(0), F.linear(current, weight_x, bias).unbind(0), strict=True):
        s, v = step(z, x, v, v_reset, weight_v)
        spikes.append(s)
    return torch.stack(spikes)


def compiled_loop() -> Callable[..., Tensor]:
    """hoisted_loop with torch.compile of its step; compiles at the first call.

    The whole loop unrolled takes minutes to compile at T = 100 and as long again for every other T.
    """
    torch._dynamo.reset()
    return functools.partial(hoisted_loop, step=torch.compile(hoisted_step, dynamic=False))


class LoopGPN(nn.Module):
    """A GPN layer's weights run by reference.gpn_loop under autograd, for whole networks.

    Args:
        layer: holds the weights. mean: put out the mean of the spikes over time.
    """

    def __init__(self, layer: GPN, mean: bool):
        super().__init__()
        self.layer, self.mean = layer, mean

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        spikes = self.spikes(x)
        return spikes.mean(0) if self.mean else spikes, None

    def spikes(self, x: Tensor) -> Tensor:
        """x [T, B, N] -> spikes [T, B, N], whatever the layer puts out."""
        layer = self.layer
        v_reset = torch.zeros(x.shape[1:], device=x.device)
        if self.training:
            v_reset.normal_(0, layer.reset_std)
        weights = layer.weight_x, layer.weight_v, layer.bias
        return reference.gpn_loop(x, *weights, v_reset, v_reset)[0]


def flashrnn_lstm(N: int, device: torch.device):
    """FlashRNN's LSTM as a function of x [T, B, C] and the weights of an nn.LSTM.

    On a CPU only its plain torch loop ("vanilla") runs. On a GPU its Triton kernel for up to 64
    neurons, whose backward does not fit a multiprocessor beyond, and its CUDA kernel above (it is
    compiled by nvcc at the first call).
    Raises:
        Unavailable: it is not installed or does not import.
    """
    try:
        from flashrnn import flashrnn
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # its import looks for a CUDA installation and fails in several ways without one
        raise Unavailable(f"flashrnn: {type(error).__name__}: {error}") from error
    if device.type == "cpu":
        backend = "vanilla"
    else:
        backend = "triton_fused" if N <= 64 else "cuda_fused"

    def run(x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        T, B, _ = x.shape
        wx = F.linear(x, w_ih).view(T, B, 4, 1, N).transpose(0, 1)
        dtype = str(wx.dtype).removeprefix("torch.")
        states, _ = flashrnn(
            wx, w_hh.view(4, 1, N, N), (b_ih + b_hh).view(4, 1, N),
            function="lstm", backend=backend, dtype=dtype,
        )  # fmt: skip
        return states[0].reshape(B, T, N).transpose(0, 1)

    return run


def spikingjelly_lif(device: torch.device) -> nn.Module:
    """SpikingJelly's multi-step LIF with GPN's surrogate; its fastest backend that is here.

    Raises:
        Unavailable: it is not installed or does not import.
    """
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError as error:
        raise Unavailable(f"spikingjelly: {type(error).__name__}: {error}") from error
    node = neuron.LIFNode(
        tau=2.0, detach_reset=True, step_mode="m", surrogate_function=surrogate.ATan(alpha=2.0)
    )
    if device.type == "cuda" and "triton" in getattr(node, "supported_backends", ()):
        node.backend = "triton"
    return node.to(device)
