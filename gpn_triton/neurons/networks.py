"""The paper's networks: Linear -> neuron -> held dropout, repeated, and a linear readout.

The readout is linear and the dropout mask is held over time, so the mean over time of the logits
is the readout of the mean over time of the last layer's spikes: only that mean is computed. Between
layers of GPN neither spikes nor spikes under their mask are held for backward: see spike_linear.

NEURONS is the table of neurons: a new one is a row here, and a layer in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gpn_triton.machine.device import BACKENDS, autocast_dtype
from gpn_triton.neurons import cost
from gpn_triton.neurons.checks import check_sequence
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.neurons.gpn import compiles_first as gpn_compiles_first
from gpn_triton.neurons.gpn_options import GPNOptions, check_choice
from gpn_triton.neurons.layers import (
    GPN,
    LIF,
    Convolution,
    CubaLIF,
    HeldDropout,
    check_time_constants,
)
from gpn_triton.neurons.lif import cuba_lif_compiles_first, lif_compiles_first
from gpn_triton.neurons.pretrained import Pretrained
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.spike_linear import SpikeLinear, Spikes
from gpn_triton.neurons.states import Draws, StreamState


@dataclass(frozen=True)
class Neuron:
    """A row of the table of neurons.

    build: makes a layer from its inputs, its neurons, GPN's options and the time constants of a
        quiet start. The layer takes a current [T, B, N] (and a state) and returns its output
        [T, B, N] and its state, as nn.LSTM does. If it has a method draw(batch, like), it takes
        what that drew as v_reset.
    work: what cost counts of it; None: nothing.
    compiles_first: whether a first call by a backend on a tensor's device compiles kernels for a
        CPU; None: the layer has neither kernels nor backends.
    backends: those that it has.
    is_gpn: whether it is a variant of GPN, which takes the options and can be exported in the
        authors' layout.
    sparse_input: whether a SpikeLinear makes its current, so that a network's input may be Cells;
        other layers have products of their own.
    needs_time_bins: whether it sees all bins at once, so that their number is fixed.
    membrane: of its state the membrane [B, N], for the readout of that name; None: it has none.
    """

    build: Callable[[int, int, GPNOptions, tuple[float, float] | None], nn.Module]
    work: cost.Work | None = None
    compiles_first: Callable[[str, Tensor], bool] | None = None
    backends: Collection[str] = ("auto",)
    is_gpn: bool = False
    sparse_input: bool = True
    needs_time_bins: bool = False
    membrane: Callable[[Any], Tensor] | None = None

    @property
    def spiking(self) -> bool:
        """Whether its output is spikes."""
        return self.membrane is not None

    def backend(self, asked: str) -> str:
        """The backend asked for, or auto where the layer has none of that name: the command refuses
        one without effect, but an older run may hold it."""
        return asked if asked in self.backends else "auto"


def _itself(state: Tensor) -> Tensor:
    """The membrane of a neuron whose state is nothing else."""
    return state


def _gpn(variant: str) -> Neuron:
    def build(
        inputs: int, N: int, options: GPNOptions, time_constants: tuple[float, float] | None
    ) -> nn.Module:
        own = asdict(replace(options, variant=variant))
        every = own.pop("every")
        return GPN(N, checkpoint_every=every, time_constants=time_constants, **own)

    work = cost.gated_spiking(len(GATES[variant]))
    return Neuron(build, work, gpn_compiles_first, BACKENDS, is_gpn=True, membrane=_itself)


def _leaky(
    layer: Callable[[int, str], nn.Module],
    work: cost.Work,
    compiles_first: Callable[[str, Tensor], bool],
    membrane: Callable[[Any], Tensor] = _itself,
) -> Neuron:
    """A spiking layer made from its neurons and a backend."""

    def build(inputs: int, N: int, options: GPNOptions, *_) -> nn.Module:
        return layer(N, options.backend)

    return Neuron(build, work, compiles_first, BACKENDS, membrane=membrane)


def _twin(layer: type[nn.Module], gates: int) -> Neuron:
    """A layer of torch that is no spiking neuron, of the same sizes."""
    return Neuron(lambda inputs, N, *_: layer(inputs, N), cost.gated(gates), sparse_input=False)


@torch.no_grad()
def _lstm(
    inputs: int, N: int, _: GPNOptions, time_constants: tuple[float, float] | None
) -> nn.Module:
    """nn.LSTM; with time constants its forget and input biases are theirs.

    Source: the chrono initialisation, Tallec and Ollivier, arXiv 1804.11188.
    """
    layer = nn.LSTM(inputs, N)
    if time_constants is not None:
        # torch has the gates in the order i, f, g, o, and two biases that are added
        forget = torch.empty(N).uniform_(*time_constants).log()
        layer.get_parameter("bias_hh_l0")[: 2 * N] = 0
        layer.get_parameter("bias_ih_l0")[: 2 * N] = torch.cat([-forget, forget])
    return layer


NEURONS = {"gpn" if variant == "full" else f"gpn-{variant}": _gpn(variant) for variant in GATES} | {
    "lif": _leaky(lambda N, backend: LIF(N, backend=backend), cost.LEAKY, lif_compiles_first),
    "plif": _leaky(
        lambda N, backend: LIF(N, learn_tau=True, backend=backend), cost.LEAKY, lif_compiles_first
    ),
    "cuba-lif": _leaky(
        CubaLIF, cost.RECURRENT_LEAKY, cuba_lif_compiles_first, lambda state: state[1]
    ),
    "lstm": Neuron(_lstm, cost.gated(4), sparse_input=False),
    "gru": _twin(nn.GRU, 3),
    "rnn": _twin(nn.RNN, 1),
    "cnn": Neuron(
        lambda inputs, N, *_: Convolution(inputs, N), sparse_input=False, needs_time_bins=True
    ),
}
READOUTS = ("mean", "last", "membrane")


class SpikingClassifier(Pretrained):
    """A network of spiking layers that classifies sequences of binned events.

    save_pretrained keeps it in a folder; from_pretrained, from_run and from_authors read one.

    Args:
        hidden: neurons of each hidden layer, input side first.
        neuron: one of NEURONS; lstm, gru, rnn and cnn are the non-spiking twins of the same sizes.
        inputs: input channels C. classes: number of classes.
        dropout: share of each hidden layer silenced in training, the mask held over time.
        readout: mean over time of the logits, or those of the last step; membrane: of the last
            layer's mean and, beside it, its membrane after the last step (spiking neurons alone).
        time_bins: T; needed by cnn alone, whose readout sees every bin.
        surrogate, alpha, checkpoint_every: as gpn(), for the GPN neurons. backend: as gpn().
        time_constants: (shortest, longest) in bins: the network starts quietly, the GPN neurons as
            GPN says, and spiking neurons' currents are normalised (call normalise with data before
            training). None: as the paper's.
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
        time_constants: tuple[float, float] | None = None,
    ):
        super().__init__()
        if not hidden or any(n < 1 for n in hidden):
            raise ValueError(f"hidden: expected one or more sizes of at least 1, got {hidden}")
        check_choice("neuron", neuron, NEURONS)
        check_choice("readout", readout, READOUTS)
        row = NEURONS[neuron]
        if row.needs_time_bins and (time_bins is None or readout != "mean"):
            raise ValueError(
                f"time_bins: the {neuron}'s readout sees every bin: expected time_bins and readout "
                f"'mean', got {time_bins} and {readout!r}"
            )
        if readout == "membrane" and row.membrane is None:
            having = ", ".join(name for name, other in NEURONS.items() if other.membrane)
            raise ValueError(f"readout: expected {having} for readout membrane, got {neuron}")
        options = GPNOptions("full", surrogate, alpha, backend, checkpoint_every)
        check_time_constants(time_constants)
        quiet = time_constants is not None
        self.arguments = {
            "hidden": list(hidden), "neuron": neuron, "inputs": inputs, "classes": classes,
            "dropout": dropout, "readout": readout, "time_bins": time_bins, "surrogate": surrogate,
            "alpha": alpha, "backend": backend, "checkpoint_every": checkpoint_every,
            "time_constants": time_constants,
        }  # fmt: skip
        self.neuron = neuron
        self.hidden = tuple(hidden)
        self.readout = readout
        self.inputs, self.neurons = nn.ModuleList(), nn.ModuleList()
        for layer, (n_in, n) in enumerate(zip([inputs, *hidden], hidden, strict=False), 1):
            feeds_mean = layer == len(hidden) and readout != "last"
            own = replace(options, output="mean") if feeds_mean else options
            linear = SpikeLinear(n_in, n, backend, quiet) if row.sparse_input else nn.Identity()
            self.inputs.append(linear)
            self.neurons.append(row.build(n_in, n, own, time_constants))
        self.dropout = HeldDropout(dropout)
        width = 1 + (readout == "membrane")
        if row.needs_time_bins and time_bins is not None:
            width = time_bins
        self.output = nn.Linear(hidden[-1] * width, classes)

    @torch.no_grad()
    def normalise(self, batches: Callable[[], Iterable[Iterable[Tensor | Cells]]]) -> None:
        """Give the neurons of a network that starts quietly currents of mean 0 and variance 1.

        The statistics are set, layer after layer, so that this holds over all bins and samples of
        some inputs in evaluation; weights, gains and biases learn freely from there.

        Args:
            batches: gives the same inputs each time it is called: of each batch its pieces in the
                order of time, one or more, each as forward takes them.
        Source: in the manner of Mishkin and Matas, arXiv 1511.06422.
        """
        training = self.training
        self.eval()
        for k, linear in enumerate(self.inputs):
            if not isinstance(linear, SpikeLinear) or linear.gain is None:
                continue
            count = 0
            inputs, currents, squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))
            for pieces in batches():
                states = [None] * k
                for x in pieces:
                    for j in range(k):
                        x, states[j] = self.neurons[j](self.inputs[j](x), states[j])
                    current = linear(x).flatten(0, 1).double()
                    count += len(current)
                    inputs = inputs + (
                        x.sums() if isinstance(x, Cells) else x.sum((0, 1), dtype=torch.float64)
                    )
                    currents = currents + current.sum(0)
                    squares = squares + current.square().sum(0)
            linear.set_statistics(inputs / count, squares / count - (currents / count).square())
        self.train(training)

    def fold(self) -> None:
        """Put what normalises a current into its weights, which changes nothing that is computed
        but for rounding."""
        for linear in self.inputs:
            if isinstance(linear, SpikeLinear) and linear.gain is not None:
                linear.fold()

    def draw(self, batch: int) -> list[Draws]:
        """Make a batch's random draws: in training v_reset and the mask of held dropout.

        Splitting a batch, over processes or steps, changes no draw if they are made for the whole.

        Args:
            batch: B.
        Returns:
            of each hidden layer v_reset [B, N] and mask [B, N], in the parameters' dtype.
        """
        # a readout that was quantized has no parameters
        like = next(chain(self.output.parameters(), self.parameters()), torch.empty(0)).detach()
        draws = []
        for neuron, N in zip(self.neurons, self.hidden, strict=True):
            draw = getattr(neuron, "draw", None)
            v_reset = None if draw is None else draw(batch, like)
            draws.append(Draws(v_reset, self.dropout.draw(batch, N, like)))
        return draws

    def forward(
        self, x: Tensor | Cells, draws: Sequence[Draws] | None = None, by_neuron: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Classify a batch.

        Args:
            x [T, B, C] float: events counted in each bin and channel; or the events themselves,
                whose first product then multiplies no zeros (not for lstm, gru, rnn and cnn).
            draws: as draw made them for these B rows; None: made now.
            by_neuron: whether the activity is wanted of every neuron.
        Returns:
            logits [B, classes]; activity [layers] float32: mean output of each hidden layer
            (spikes a neuron and step for spiking neurons), detached; or that of each neuron, those
            of the first layer first [neurons of all layers].
        """
        self._check(x)
        last, states, activity, dtype = self._layers(x, draws, None, by_neuron)
        if NEURONS[self.neuron].needs_time_bins:
            read = last.dense().permute(1, 2, 0).flatten(1)
        elif self.readout == "last":
            read = _masked(last.values[-1], last.mask)
        else:
            read = last.dense()
            read = read.mean(0) if read.ndim == 3 else read
            read = self._beside_membrane(read, states, last.mask)
        return self._logits(read, dtype), activity

    def advance(
        self, x: Tensor | Cells, draws: Sequence[Draws] | None = None,
        state: StreamState | None = None, by_neuron: bool = False,
    ) -> tuple[Tensor, Tensor, StreamState]:  # fmt: skip
        """Classify from the bins that have come so far, in training or evaluation mode.

        Args:
            x: the next bins, as forward. draws: the sequence's, the same for all its bins; None:
                made now. state: of the bins before; None at the start. It is not changed.
                by_neuron: as forward.
        Returns:
            logits [B, classes] after these bins; activity of these bins, as forward; the state
            after them. Gradients go through these bins and into the state that was given.
        Raises:
            ValueError: a cnn, which sees all bins at once; x of another rank or batch than the
                state's.
        """
        if NEURONS[self.neuron].needs_time_bins:
            raise ValueError(f"neuron: a {self.neuron} sees all bins at once and cannot stream")
        self._check(x)
        if state is not None:
            if not isinstance(state, StreamState):
                raise TypeError(f"state: expected stream's own or None, got {type(state).__name__}")
            if len(state.neurons) != len(self.neurons):
                raise ValueError(
                    f"state: expected of {len(self.neurons)} layers, got {len(state.neurons)}"
                )
            if x.shape[1] != len(state.readout):
                rows = len(state.readout)
                raise ValueError(f"x: expected the state's {rows} rows, got {x.shape[1]}")
        last, states, activity, dtype = self._layers(x, draws, state and state.neurons, by_neuron)
        steps, values = x.shape[0], last.values
        if self.readout == "last":
            readout = values[-1]
        elif values.ndim == 3:
            # half types would stop counting at 256 or 2048
            readout = values.sum(0, dtype=torch.promote_types(values.dtype, torch.float32))
        else:
            # GPN gives the mean over these bins of spikes: back to their whole number, exactly
            readout = values * steps
            readout = readout + (readout.round() - readout).detach()
        if state is not None:
            steps += state.steps
            if self.readout != "last":
                readout = readout + state.readout
        read = _masked(readout if self.readout == "last" else readout / steps, last.mask)
        logits = self._logits(self._beside_membrane(read, states, last.mask), dtype)
        return logits, activity, StreamState(tuple(states), readout, steps)

    def _layers(
        self,
        x: Tensor | Cells,
        draws: Sequence[Draws] | None,
        before: Sequence[Any] | None,
        by_neuron: bool,
    ) -> tuple[Spikes, list[Any], Tensor, torch.dtype]:
        """Run the hidden layers from their states `before`, if there are any.

        Returns:
            the last layer's output; each layer's state; activity as forward; the dtype of the last
            layer's current.
        """
        if draws is None:
            draws = self.draw(x.shape[1])
        activity, states = [], []
        before = [None] * len(self.neurons) if before is None else before
        layers = zip(self.inputs, self.neurons, draws, before, strict=True)
        seen: Tensor | Cells | Spikes = x
        for linear, neuron, drawn, old in layers:
            current = linear(seen if isinstance(linear, SpikeLinear) else _dense(seen))
            given = {} if drawn.v_reset is None else {"v_reset": drawn.v_reset}
            result = neuron(current, **given) if old is None else neuron(current, old, **given)
            bits, version = getattr(result, "bits", None), getattr(result, "version", None)
            if torch.compiler.is_compiling() and neuron._forward_hooks:
                # a hook may have changed the spikes in place, which only their version would tell
                bits = None
            seen = out = Spikes(result[0], bits, drawn.mask, version)
            states.append(result[1])
            activity.append(out.values.detach().flatten(0, -2).mean(0, dtype=torch.float32))
        activity = torch.cat(activity) if by_neuron else torch.stack([a.mean() for a in activity])
        return out, states, activity, current.dtype

    def _beside_membrane(self, read: Tensor, states: list[Any], mask: Tensor | None) -> Tensor:
        """What the readout sees: for readout membrane the last layer's membrane, too."""
        of = NEURONS[self.neuron].membrane
        if self.readout != "membrane" or of is None:
            return read
        membrane = of(states[-1])
        return torch.cat([read.to(membrane.dtype), _masked(membrane, mask)], -1)

    def _logits(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The readout of x, which is summed in float32, in a network that computes in dtype."""
        return self.output(x.to(dtype) if autocast_dtype(x) is None else x)

    def _check(self, x: object) -> None:
        """Refuse what is no sequence; a SpikeLinear knows its channels itself."""
        if not isinstance(x, Cells):
            check_sequence(x, getattr(self.neurons[0], "input_size", None), "C")

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
        if self.training:
            raise ValueError("stream: expected evaluation mode, got training: call eval() first")
        logits, _, state = self.advance(x, None, state)
        return logits, state


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x under the mask of held dropout, if there is one."""
    return x if mask is None else x * mask.to(x.dtype)


def _dense(x: Tensor | Cells | Spikes) -> Tensor:
    """What a SpikeLinear takes, for any other module."""
    return x if isinstance(x, Tensor) else x.dense()
