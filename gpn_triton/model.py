"""The paper's networks: Linear -> neuron -> held dropout, repeated, and a linear readout.

The readout is linear and the dropout mask is held over time, so the mean over time of the logits
is the readout of the mean over time of the last layer's spikes: only that mean is computed. Between
layers of GPN neither spikes nor spikes under their mask are held for backward: see spike_linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpn_triton.event_linear import Cells, event_linear
from gpn_triton.layers import GPN, LIF, CubaLIF, HeldDropout
from gpn_triton.reference import GATES
from gpn_triton.spike_linear import spike_linear

_GPN_VARIANTS = {"gpn" if v == "full" else f"gpn-{v}": v for v in GATES}
_ANN = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
NEURONS = (*_GPN_VARIANTS, "lif", "plif", "cuba-lif", *_ANN, "cnn")
READOUTS = ("mean", "last")


class Draws(NamedTuple):
    """A hidden layer's random draws for a batch; None: it makes none."""

    v_reset: Tensor | None
    mask: Tensor | None

    def part(self, first: int, last: int) -> Draws:
        """Those of the batch's rows first..last - 1."""
        return Draws(*(None if drawn is None else drawn[first:last] for drawn in self))


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: all that SpikingClassifier.stream needs of the bins before.

    neurons: the state of each hidden layer, as that layer returns it. steps: bins seen.
    readout [B, N]: of the last layer's output the sum over those bins, or, for readout last, the
    last bin's.
    """

    neurons: tuple[Any, ...]
    readout: Tensor
    steps: int


class SpikingClassifier(nn.Module):
    """A network of spiking layers that classifies sequences of binned events.

    Args:
        hidden: neurons of each hidden layer, input side first.
        neuron: one of NEURONS; lstm, gru, rnn and cnn are the non-spiking twins of the same sizes.
        inputs: input channels C. classes: number of classes.
        dropout: share of each hidden layer silenced in training, the mask held over time.
        readout: mean over time of the logits, or those of the last step.
        time_bins: T; needed by cnn alone, whose readout sees every bin.
        surrogate, alpha, backend, checkpoint_every: as ops.gpn, for the GPN neurons.
    Raises:
        ValueError: an option that does not fit.
    Source: arXiv 2412.01087; the networks of the authors' two implementations.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128,),
        neuron: str = "gpn",
        inputs: int = 700,
        classes: int = 20,
        dropout: float = 0.5,
        readout: str = "mean",
        time_bins: int | None = None,
        surrogate: str = "atan",
        alpha: float = 2.0,
        backend: str = "auto",
        checkpoint_every: int | None = None,
    ):
        super().__init__()
        if not hidden or any(n < 1 for n in hidden):
            raise ValueError(f"hidden: expected one or more sizes of at least 1, got {hidden}")
        if neuron not in NEURONS:
            raise ValueError(f"neuron: expected one of {', '.join(NEURONS)}, got {neuron!r}")
        if readout not in READOUTS:
            raise ValueError(f"readout: expected one of {', '.join(READOUTS)}, got {readout!r}")
        self.neuron = neuron
        self.hidden = tuple(hidden)
        self.readout = readout
        self.backend = backend
        sizes = [inputs, *hidden]
        self.inputs, self.neurons = nn.ModuleList(), nn.ModuleList()
        for layer, (n_in, n) in enumerate(zip(sizes, hidden, strict=False), 1):
            feeds_mean = layer == len(hidden) and readout == "mean"
            if neuron in _GPN_VARIANTS:
                self.inputs.append(nn.Linear(n_in, n))
                self.neurons.append(
                    GPN(
                        n,
                        _GPN_VARIANTS[neuron],
                        surrogate,
                        alpha,
                        backend,
                        checkpoint_every,
                        output="mean" if feeds_mean else "spikes",
                    )
                )
            elif neuron in ("lif", "plif"):
                self.inputs.append(nn.Linear(n_in, n))
                self.neurons.append(LIF(n, learn_tau=neuron == "plif"))
            elif neuron == "cuba-lif":
                self.inputs.append(nn.Linear(n_in, n))
                self.neurons.append(CubaLIF(n))
            elif neuron == "cnn":
                self.inputs.append(nn.Identity())
                self.neurons.append(_Convolution(n_in, n))
            else:
                self.inputs.append(nn.Identity())
                self.neurons.append(_ANN[neuron](n_in, n))
        self.dropout = HeldDropout(dropout)
        if neuron == "cnn":
            if time_bins is None or readout != "mean":
                raise ValueError(
                    "time_bins: the cnn's readout sees every bin: expected time_bins and readout "
                    f"'mean', got {time_bins} and {readout!r}"
                )
            self.output = nn.Linear(sizes[-1] * time_bins, classes)
        else:
            self.output = nn.Linear(sizes[-1], classes)

    def draw(self, batch: int) -> list[Draws]:
        """Make a batch's random draws: in training v_reset and the mask of held dropout.

        Splitting a batch, over processes or steps, changes no draw if they are made for the whole.

        Args:
            batch: B.
        Returns:
            of each hidden layer v_reset [B, N] and mask [B, N], in the parameters' dtype.
        """
        like, draws = self.output.weight.detach(), []
        for neuron, N in zip(self.neurons, self.hidden, strict=True):
            v_reset = neuron.draw(batch, like) if isinstance(neuron, GPN) else None
            draws.append(Draws(v_reset, self.dropout.draw(batch, N, like)))
        return draws

    def forward(
        self, x: Tensor | Cells, draws: Sequence[Draws] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classify a batch.

        Args:
            x [T, B, C] float: events counted in each bin and channel; or the events themselves,
                whose first product then multiplies no zeros (not for lstm, gru, rnn and cnn).
            draws: as draw made them for these B rows; None: made now.
        Returns:
            logits [B, classes]; activity [layers] float32: mean output of each hidden layer
            (spikes a neuron and step for spiking neurons), detached.
        """
        if draws is None:
            draws = self.draw(x.shape[1])
        # of the layer before, where both go into the product of its spikes
        bits, mask = None, None
        activity = []
        for linear, neuron, drawn in zip(self.inputs, self.neurons, draws, strict=True):
            if isinstance(x, Cells):
                x = event_linear(x, linear.weight, linear.bias)
            elif bits is not None:
                x = spike_linear(x, bits, mask, linear.weight, linear.bias, self.backend)
            else:
                x = linear(x)
            if isinstance(neuron, GPN):
                x, _, bits = neuron(x, v_reset=drawn.v_reset, packed=True)
            else:
                x, bits = neuron(x)[0], None
            activity.append(x.detach().mean(dtype=torch.float32))
            mask = drawn.mask
            if bits is None or neuron is self.neurons[-1]:
                x = self.dropout(x, mask)
        if self.neuron == "cnn":
            x = x.permute(1, 2, 0).flatten(1)
        elif x.ndim == 3:
            x = x.mean(0) if self.readout == "mean" else x[-1]
        return self.output(x), torch.stack(activity)

    def stream(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Classify from the bins that have come so far; in evaluation mode only.

        All bins together give forward's logits but for rounding: products of other shapes may round
        the last bit otherwise, and spikes at the edge flip with it. In float64 nothing of that is
        left once the logits are rounded to float32.

        Args:
            x [T, B, C] float: the next bins, one or more. state: of the bins before; None at the
                start. It is not changed, so that one state can be gone on from twice.
        Returns:
            logits [B, classes] after these bins; the state after them.
        Raises:
            ValueError: a cnn, which sees all bins at once; training mode, whose noise belongs to a
                whole sequence; x of another rank or batch than the state's.
        """
        if self.neuron == "cnn":
            raise ValueError("neuron: a cnn sees all bins at once and cannot stream")
        if self.training:
            raise ValueError("stream: expected evaluation mode, got training: call eval() first")
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"x: expected [T, B, C], each size at least 1, got {list(x.shape)}")
        if state is not None and x.shape[1] != len(state.readout):
            raise ValueError(f"x: expected the state's {len(state.readout)} rows, got {x.shape[1]}")
        neurons, steps = [], len(x)
        before = (None,) * len(self.neurons) if state is None else state.neurons
        for linear, neuron, old in zip(self.inputs, self.neurons, before, strict=True):
            x, new = neuron(linear(x), old)
            neurons.append(new)
        if self.readout == "last":
            readout = x[-1]
        else:
            # GPN gives the mean over these bins of spikes: back to their whole number
            readout = x.sum(0) if x.ndim == 3 else (x * steps).round()
        if state is not None:
            steps += state.steps
            if self.readout == "mean":
                readout = readout + state.readout
        logits = self.output(readout if self.readout == "last" else readout / steps)
        return logits, StreamState(tuple(neurons), readout, steps)


class _Convolution(nn.Module):
    """Convolution over time (3 bins), batch norm and ReLU: the authors' CNN baseline."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [T, B, C] -> [T, B, N], None."""
        y = self.norm(self.convolution(x.permute(1, 2, 0)))
        return torch.relu(y).permute(2, 0, 1), None
