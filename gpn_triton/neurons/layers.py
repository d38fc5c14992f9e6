"""Spiking layers as nn.Modules: GPN and the neurons the paper compares it with.

Each takes a synaptic current x [T, B, N] and an optional state, and returns spikes [T, B, N] and
the state after the last step, as nn.LSTM does. GPN also takes what else nn.LSTM takes: inputs of
another size, several layers and directions, batches first, one sequence alone, and sequences of
lengths of their own, packed or padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gpn_triton.machine.device import BACKENDS
from gpn_triton.neurons import reference
from gpn_triton.neurons.checks import check_fits, check_sequence
from gpn_triton.neurons.gpn import gpn_packed
from gpn_triton.neurons.gpn_options import GPNOptions, check_choice, check_size
from gpn_triton.neurons.lif import cuba_lif, lif
from gpn_triton.neurons.sequences import run_layers, time_first
from gpn_triton.neurons.spike_linear import PackedPair, SpikeLinear, Spikes

# the quiet start multiplies the gates' rows by this; see docs/results/long-sequences.md
QUIET = 0.2


class Gate(NamedTuple):
    """A gate's rows of a layer's parameters: weight_x [N, N], weight_v [N, N], bias [N]."""

    weight_x: Tensor
    weight_v: Tensor
    bias: Tensor


class GPN(nn.Module):
    """Gated Parametric Neurons, with the surface of nn.LSTM; see forward for shapes.

    GPN(N) is one layer of N neurons that takes their synaptic current. GPN(C, N) has a Linear from
    C inputs to that current before its neurons, as nn.LSTM(C, N) has within its gates.

    Args:
        input_size: inputs C; None: there is no Linear, and the input is the current of N neurons.
        hidden_size: neurons N of each layer and direction.
        num_layers: layers, each behind a Linear on the spikes of the one before.
        batch_first: whether batches are [B, T, C] and not [T, B, C]; states are not affected.
        dropout: share of the spikes between two layers silenced in training, the mask held over
            time (nn.LSTM draws it at each step).
        bidirectional: whether each layer has a second one that reads from the last step to the
            first; their spikes stand side by side.
        variant, surrogate, alpha, backend, checkpoint_every, output: as gpn(); the mean is that of
            the last layer.
        reset_std: deviation of v_reset, drawn once a sequence in training; 0 in evaluation.
        time_constants: None starts as the paper does; (shortest, longest), in bins, starts
            quietly, see reset_parameters.
        device, dtype: of the parameters, as nn.LSTM.
    Attributes:
        layers: where there are several layers or directions, a GPN for each, in the order of
            nn.LSTM's states: layer by layer, forward first; else None.
    Raises:
        ValueError: an option that does not fit, or that has no effect.
    Source: arXiv 2412.01087; the paper's start is that of the authors' Linear(2 N, G N).
    """

    layers: nn.ModuleList | None
    input: SpikeLinear | None
    # None of a variant without gates; torch's own modules declare such parameters so
    weight_x: Tensor
    weight_v: Tensor
    bias: Tensor

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        variant: str = "full",
        surrogate: str = "atan",
        alpha: float = 2.0,
        backend: str = "auto",
        checkpoint_every: int | None = None,
        output: str = "spikes",
        reset_std: float = 0.05,
        time_constants: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size is None:
            # GPN(N)
            input_size, hidden_size = None, input_size
        N = check_size("hidden_size", hidden_size)
        C = None if input_size is None else check_size("input_size", input_size)
        num_layers = check_size("num_layers", num_layers)
        check_time_constants(time_constants)
        if dropout and num_layers == 1:
            raise ValueError(f"dropout: has no effect with one layer, expected 0, got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = C, N, num_layers
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self.time_constants = time_constants
        self.options = GPNOptions(variant, surrogate, alpha, backend, checkpoint_every, output)
        self.reset_std = reset_std
        self.dropout = HeldDropout(dropout)
        self.layers = self.input = None
        for name in ("weight_x", "weight_v", "bias"):
            self.register_parameter(name, None)
        where = {"device": device, "dtype": dtype}
        if num_layers == 1 and not bidirectional:
            self._make(where)
        else:
            self.layers = nn.ModuleList(self._parts(where))

    def _make(self, where: dict) -> None:
        """Give one layer in one direction its parameters."""
        N, backend = self.hidden_size, self.options.backend
        if self.input_size is not None:
            self.input = SpikeLinear(self.input_size, N, backend, by_row=True, **where)
        rows = len(reference.GATES[self.variant]) * N
        if rows:
            self.weight_x, self.weight_v, self.bias = (
                nn.Parameter(torch.empty(shape, **where)) for shape in ((rows, N), (rows, N), rows)
            )
        self._reset_gates()

    def _parts(self, where: dict) -> Iterator[GPN]:
        """The layers of several, each in one direction."""
        directions = 1 + self.bidirectional
        options = asdict(self.options)
        every, output = options.pop("every"), options.pop("output")
        for layer in range(self.num_layers):
            last = layer == self.num_layers - 1
            inputs = self.input_size if layer == 0 else directions * self.hidden_size
            for _ in range(directions):
                yield GPN(
                    inputs, self.hidden_size, checkpoint_every=every, reset_std=self.reset_std,
                    output=output if last else "spikes", time_constants=self.time_constants,
                    **options, **where,
                )  # fmt: skip

    @property
    def variant(self) -> str:
        """Which of the paper's neurons this is."""
        return self.options.variant

    def reset_parameters(self) -> None:
        """Draw every weight anew: a Linear's as nn.Linear does, the gates' from U(-k, k),
        k = 1 / sqrt(2 N); then, with time_constants, be quiet.

        The quiet start makes leaky integrators of the neurons, so that the step's Jacobian is near
        diag(f): the forget gates' biases give time constants spread evenly over the logarithm of
        the range, the weights of f and i are small, and the bypass is 0.
        """
        if self.layers is not None:
            for layer in cast("Iterable[GPN]", self.layers):
                layer.reset_parameters()
            return
        if self.input is not None:
            self.input.reset_parameters()
        self._reset_gates()

    @torch.no_grad()
    def _reset_gates(self) -> None:
        k = (2 * self.hidden_size) ** -0.5
        for parameter in self._own():
            nn.init.uniform_(parameter, -k, k)
        if self.time_constants is None:
            return
        gates = self.gates()
        for name in gates.keys() & {"f", "i"}:
            gates[name].weight_x.mul_(QUIET)
            gates[name].weight_v.mul_(QUIET)
        for parameter in gates.get("b", ()):
            parameter.zero_()
        if "f" in gates:
            low, high = map(math.log, self.time_constants)
            steps = (torch.arange(self.hidden_size, dtype=torch.float64) + 0.5) / self.hidden_size
            decay = torch.exp(-1 / torch.exp(low + (high - low) * steps))
            gates["f"].bias.copy_(torch.logit(decay))

    def _own(self) -> list[Tensor]:
        """weight_x, weight_v and bias, those that there are; ValueError of several layers."""
        if self.layers is not None:
            raise ValueError(
                f"layers: expected one layer in one direction, got {len(self.layers)}: ask each of "
                "the layers"
            )
        return [p for p in (self.weight_x, self.weight_v, self.bias) if p is not None]

    def gates(self) -> dict[str, Gate]:
        """The parameters of each gate that the variant has, as views; of one layer alone."""
        parts = zip(*(p.split(self.hidden_size) for p in self._own()), strict=True)
        return dict(zip(reference.GATES[self.variant], map(Gate._make, parts), strict=True))

    def forward(
        self, x: Tensor | PackedSequence, v0: Tensor | None = None, v_reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:  # fmt: skip
        """Run the layer, or the layers one after the other.

        Args:
            x [T, B, C], with batch_first [B, T, C]; [T, C]: one sequence alone; or a
                PackedSequence. Without input_size C is N: the synaptic current.
            v0 [B, N]: membrane at t = 0, default v_reset. Of several layers or directions
                [num_layers directions, B, N], as nn.LSTM's h_0. Of one sequence alone without B.
            v_reset: of v0's shape; default: drawn in training, zeros in evaluation.
            lengths [B] int: steps of each sequence, see gpn(); a direction backwards begins at its
                last.
        Returns:
            spikes as x came, in the last dimension N, or 2 N of two directions (or their mean over
            time [B, N], [B, 2 N]); v_final of v0's shape: after the last step, or after the first
            of a direction backwards. Both as a pair, which of a plain [T, B, C] carries the packed
            spikes that gpn_packed gives, for the next layer's SpikeLinear.
        Raises:
            TypeError: x, a state or lengths that are no tensors. ValueError: what does not fit.
        """
        size = self.hidden_size if self.input_size is None else self.input_size
        letter = "N" if self.input_size is None else "C"
        x, lengths, layout = time_first(x, lengths, self.batch_first, size, letter)
        states = layout.state(v0), layout.state(v_reset)
        if self.layers is None:
            result = self.run(x, *states, lengths)
        else:
            result = run_layers(
                self.layers, 1 + self.bidirectional, self.dropout.draw, x, *states, lengths
            )
        if layout.plain:
            return result
        return PackedPair(layout.spikes_back(result[0]), layout.state_back(result[1]))

    def run(
        self, x: Tensor | Spikes, v0: Tensor | None, v_reset: Tensor | None, lengths: Tensor | None
    ) -> PackedPair:
        """As forward, of one layer alone and x [T, B, C] alone; x may be another layer's Spikes."""
        given = x if self.input is None else self.input(x)
        current = given if isinstance(given, Tensor) else given.dense()
        if v_reset is None:
            v_reset = self.draw(current.shape[1], current)
        weights = self.weight_x, self.weight_v, self.bias
        spikes, v_final, bits = gpn_packed(current, weights, v_reset, v0, self.options, lengths)
        return PackedPair(spikes, v_final).carry(bits)

    def gates_at(self, x_t: Tensor, v: Tensor) -> reference.Gates:
        """The gates of one step, of current and membrane [B, N]; of one layer alone."""
        self._own()
        weights = self.weight_x, self.weight_v, self.bias
        return reference.gpn_gates(x_t, v, weights, self.variant)

    def step(
        self, x_t: Tensor, v: Tensor | None = None, gates: reference.Gates | None = None
    ) -> reference.Step:
        """One step of the current x_t [B, N], by the specification and without noise; of one layer
        alone.

        gates: in place of its own.
        """
        v = torch.zeros_like(x_t) if v is None else v
        gates = self.gates_at(x_t, v) if gates is None else gates
        surrogate, alpha = self.options.surrogate, self.options.alpha
        return reference.gpn_step(x_t, v, gates, torch.zeros_like(v), surrogate, alpha)

    def draw(self, batch: int, like: Tensor) -> Tensor | None:
        """A sequence's v_reset [batch, N] on like's device, float64 if `like` is, else float32;
        None in evaluation."""
        if not self.training or self.reset_std == 0:
            return None
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shape = (batch, self.hidden_size)
        return self.reset_std * torch.randn(shape, dtype=dtype, device=like.device)

    @torch.no_grad()
    def load_authors_weights(self, ln_weight: Tensor, ln_bias: Tensor) -> None:
        """Take the weights of the authors' layer.

        Args:
            ln_weight [G N, 2 N]: their `ln.weight`, columns of v, then of x. ln_bias [G N].
        Raises:
            ValueError: shapes that do not fit this layer.
        """
        self._own()
        rows, N = len(reference.GATES[self.variant]) * self.hidden_size, self.hidden_size
        for name, tensor, shape in (
            ("ln_weight", ln_weight, [rows, 2 * N]),
            ("ln_bias", ln_bias, [rows]),
        ):
            if not rows or list(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: expected {shape if rows else 'no weights'} for variant "
                    f"{self.variant} of {N} neurons, got {list(tensor.shape)}"
                )
        self.weight_v.copy_(ln_weight[:, :N])
        self.weight_x.copy_(ln_weight[:, N:])
        self.bias.copy_(ln_bias)

    def authors_weights(self) -> tuple[Tensor, Tensor]:
        """The inverse of load_authors_weights: ln_weight [G N, 2 N], ln_bias [G N]."""
        if not self._own():
            raise ValueError(f"variant: {self.variant} has no weights")
        return torch.cat([self.weight_v, self.weight_x], 1).detach(), self.bias.detach().clone()

    def extra_repr(self) -> str:
        sizes = "" if self.input_size is None else f"{self.input_size}, "
        surface = {"num_layers": 1, "batch_first": False, "bidirectional": False}
        given = {k: getattr(self, k) for k, v in surface.items() if getattr(self, k) != v}
        options = (f"{k}={v!r}" for k, v in (given | asdict(self.options)).items())
        return f"{sizes}{self.hidden_size}, {', '.join(options)}"


def check_time_constants(time_constants: tuple[float, float] | None) -> None:
    """Raise ValueError unless they are None or (shortest, longest), above 0 and finite."""
    if time_constants is None:
        return
    if len(time_constants) != 2 or not 0 < time_constants[0] <= time_constants[1] < math.inf:
        raise ValueError(
            "time_constants: expected the shortest and the longest, above 0, got "
            f"{tuple(time_constants)}"
        )


class LIF(nn.Module):
    """Leaky integrate-and-fire: time constant tau in bins, threshold 1, hard reset to 0."""

    # None where tau is fixed; torch's own modules declare such parameters so
    w: Tensor

    def __init__(
        self, hidden_size: int, tau: float = 2.0, learn_tau: bool = False, backend: str = "auto"
    ):
        super().__init__()
        if not tau > 1:
            raise ValueError(f"tau: expected more than 1 bin, got {tau}")
        check_choice("backend", backend, BACKENDS)
        self.hidden_size = hidden_size
        self.tau, self.backend = tau, backend
        # PLIF learns w with 1 / tau = sigmoid(w), one a layer (Fang et al., ICCV 2021)
        w = -torch.log(torch.tensor(tau - 1.0))
        self.register_parameter("w", nn.Parameter(w) if learn_tau else None)

    def forward(self, x: Tensor, v0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, B, N] -> spikes [T, B, N], v_final [B, N]: a pair as GPN's."""
        check_sequence(x, self.hidden_size)
        spikes, v_final, bits = lif(x, v0, self._tau(x), backend=self.backend)
        return PackedPair(spikes, v_final).carry(bits)

    def _tau(self, x: Tensor) -> Tensor | float:
        if self.w is None:
            return self.tau
        wide = x.dtype == torch.float64
        return 1 / torch.sigmoid(self.w).to(torch.float64 if wide else torch.float32)

    def step(self, x_t: Tensor, v: Tensor | None = None) -> reference.Step:
        """One step of x_t [B, N]."""
        return reference.lif_step(x_t, torch.zeros_like(x_t) if v is None else v, self._tau(x_t))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, tau={self.tau}, learn_tau={self.w is not None}"


class CubaLIF(nn.Module):
    """Current-based LIF with recurrent weights from its spikes; decays 0.5, threshold 1."""

    def __init__(self, hidden_size: int, backend: str = "auto"):
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        self.hidden_size, self.backend = hidden_size, backend
        self.recurrent = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x [T, B, N] -> spikes [T, B, N], (current, membrane, last spikes), each [B, N]: a pair as
        GPN's."""
        check_sequence(x, self.hidden_size)
        check_fits(x, self.recurrent.weight)
        weights = self.recurrent.weight, self.recurrent.bias
        spikes, last, bits = cuba_lif(x, *weights, state, backend=self.backend)
        return PackedPair(spikes, last).carry(bits)

    def step(
        self, x_t: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> reference.Step:
        """One step of x_t [B, N]."""
        if state is None:
            rest = torch.zeros_like(x_t)
            state = rest, rest, rest
        return reference.cuba_lif_step(x_t, self.recurrent.weight, self.recurrent.bias, state)


class HeldDropout(nn.Module):
    """Dropout whose mask is drawn once a sequence and held over time.

    Args:
        p: share of neurons silenced, 0 <= p < 1; the others are scaled by 1 / (1 - p).
    Source: the authors' implementation of arXiv 2412.01087.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {p}")
        self.p = p

    def draw(self, batch: int, neurons: int, like: Tensor) -> Tensor | None:
        """A sequence's mask [batch, neurons] of like's dtype and device; None in evaluation."""
        if not self.training or self.p == 0:
            return None
        # dropout of ones, whose draws these are, in two passes instead of four
        return like.new_empty(batch, neurons).bernoulli_(1 - self.p).div_(1 - self.p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [T, B, N] or [B, N] -> the same shape, under the mask [B, N] or one drawn now."""
        if mask is None:
            B, N = x.shape[-2:]
            mask = self.draw(B, N, x)
        return x if mask is None else x * mask.to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Convolution(nn.Module):
    """Convolution over time (3 bins), batch norm and ReLU: the authors' CNN baseline."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.input_size = inputs
        self.convolution = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [T, B, C] -> [T, B, N], None."""
        check_fits(x, self.convolution.weight)
        y = self.norm(self.convolution(x.permute(1, 2, 0)))
        return torch.relu(y).permute(2, 0, 1), None
