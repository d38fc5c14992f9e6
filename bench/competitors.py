"""Ways to run a GPN layer, or something of its size, that ours are compared with.

Loops of our own writing that differ from reference.gpn_loop in where the products stand, and
adapters for layers of other libraries. All take x [T, B, C] and return what the layer puts out
[T, B, N].
"""

from __future__ import annotations

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


def authors_loop(leaves: dict[str, Tensor], v_reset: Tensor) -> Tensor:
    """GPN as its authors wrote it: every step takes its input product and one product of [v, x].

    Args:
        leaves: x [T, B, C]; linear_weight [N, C] and linear_bias [N] of the input Linear, without
            which x is the current already; weight_vx [4 N, 2 N]: columns of v, then of x; bias
            [4 N].
        v_reset [B, N].
    Returns:
        spikes [T, B, N].
    Source: the structure of the authors' published implementation (arXiv 2412.01087).
    """
    v, spikes = v_reset, []
    for current in leaves["x"]:
        if "linear_weight" in leaves:
            current = F.linear(current, leaves["linear_weight"], leaves["linear_bias"])
        z = F.linear(torch.cat([v, current], 1), leaves["weight_vx"], leaves["bias"])
        s, v = gpn_step(z, current, v, v_reset)
        spikes.append(s)
    return torch.stack(spikes)


def hoisted_loop(compiled: bool):
    """GPN with weight_x x for all steps in one product before the loop, as a function.

    The product is unbound once: indexing it by t under autograd would cost O(T^2). torch.compile is
    given the step alone, at the first call: the whole loop unrolled takes minutes at T = 100 and as
    long again for every other T.
    """

    def step(z, x, v, v_reset, weight_v):
        return gpn_step(torch.addmm(z, v, weight_v.t()), x, v, v_reset)

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, dynamic=False)

    def loop(current, weight_x, weight_v, bias, v_reset):
        v, spikes = v_reset, []
        z = F.linear(current, weight_x, bias).unbind(0)
        for x_t, z_t in zip(current.unbind(0), z, strict=True):
            s, v = step(z_t, x_t, v, v_reset, weight_v)
            spikes.append(s)
        return torch.stack(spikes)

    return loop


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
