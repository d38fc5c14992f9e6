"""What nn.LSTM takes beside [T, B, C]: batches first, one sequence alone, and sequences that end;
and several layers and directions.

`time_first` brings any sequences to x [T, B, C] with lengths [B] or None; the Layout that it
returns gives spikes and states back as they came. `run_layers` computes with what is time first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpn_triton.neurons.checks import check_lengths, check_sequence
from gpn_triton.neurons.spike_linear import PackedPair, Spikes


class Layout(NamedTuple):
    """How sequences came. packed: as they were packed, or None; alone: without a batch."""

    batch_first: bool = False
    alone: bool = False
    packed: PackedSequence | None = None

    @property
    def plain(self) -> bool:
        """Whether they came time first in a batch."""
        return self == Layout()

    def state(self, state: Tensor | None) -> Tensor | None:
        """A caller's state with a batch: [..., N] alone is [..., 1, N]."""
        return state.unsqueeze(-2) if self.alone and isinstance(state, Tensor) else state

    def state_back(self, state: Tensor) -> Tensor:
        """The inverse of state."""
        return state.squeeze(-2) if self.alone else state

    def spikes_back(self, spikes: Tensor) -> Tensor | PackedSequence:
        """Spikes [T, B, N], or their mean [B, N], as the sequences came."""
        if self.alone:
            return spikes.squeeze(-2)
        if spikes.ndim == 2:
            return spikes
        if self.packed is None:
            return spikes.transpose(0, 1) if self.batch_first else spikes
        _, batch_sizes, order, back = self.packed
        if order is not None:
            spikes = spikes.index_select(1, order)
        # steps that are left of each sequence, in the order in which they were packed
        steps = torch.arange(len(spikes[0]))[:, None]
        lengths = (batch_sizes[None] > steps).sum(1)
        data = pack_padded_sequence(spikes, lengths).data
        return PackedSequence(data, batch_sizes, order, back)


def time_first(
    x: Tensor | PackedSequence, lengths: Tensor | None, batch_first: bool, size: int, letter: str
) -> tuple[Tensor, Tensor | None, Layout]:
    """Sequences as a layer computes them.

    Args:
        x [T, B, size], with batch_first [B, T, size]; [T, size] alone; or a PackedSequence.
        lengths [B] int or None. letter: of the size, for errors.
    Returns:
        x [T, B, size]; lengths [B] int64 or None; how they came.
    Raises:
        TypeError: x or lengths that are no tensors. ValueError: another shape or dtype, or lengths
            of what has its own or none.
    """
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: expected None beside a PackedSequence, which has its own")
        padded, own = pad_packed_sequence(x)
        check_sequence(padded, size, letter)
        return padded, own.to(padded.device), Layout(packed=x)
    if isinstance(x, Tensor) and x.ndim == 2:
        if lengths is not None:
            raise ValueError(f"lengths: expected None beside one sequence [T, {letter}] alone")
        x = x.unsqueeze(1)
        check_sequence(x, size, letter)
        return x, None, Layout(alone=True)
    check_sequence(x, size, letter, "B, T" if batch_first else "T, B")
    x = x.transpose(0, 1) if batch_first else x
    if lengths is not None:
        check_lengths(lengths, x)
        lengths = lengths.to(torch.int64)
    return x, lengths, Layout(batch_first=batch_first)


def reversed_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each sequence of x [T, B, N] from its last step to its first; what lies beyond stays."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    place = torch.where(t < lengths, lengths - 1 - t, t)
    return x.gather(0, place[:, :, None].expand_as(x))


def run_layers(
    layers: nn.ModuleList, directions: int, draw: Callable[..., Tensor | None], x: Tensor,
    v0: Tensor | None, v_reset: Tensor | None, lengths: Tensor | None,
) -> PackedPair:  # fmt: skip
    """Run several layers or directions of GPN.

    Args:
        layers: GPN in one direction each, in the order of nn.LSTM's states. directions: 1 or 2.
        draw: HeldDropout's, for what is between two layers. x [T, B, C]. v0, v_reset
            [layers, B, N]; None: as gpn(). lengths [B] or None.
    Returns:
        the last layer's spikes [T, B, directions N] or their mean; v_final [layers, B, N].
    """
    states = (_each(name, s, layers, x) for name, s in (("v0", v0), ("v_reset", v_reset)))
    parts, finals = list(zip(layers, *states, strict=True)), []
    seen: Tensor | Spikes = x
    for first in range(0, len(parts), directions):
        outputs = []
        for backwards, (layer, *given) in enumerate(parts[first : first + directions]):
            if backwards:
                dense = seen if isinstance(seen, Tensor) else seen.dense()
                spikes, v = layer.run(reversed_in_time(dense, lengths), *given, lengths)
                result = PackedPair(
                    reversed_in_time(spikes, lengths) if spikes.ndim == 3 else spikes, v
                )
            else:
                result = layer.run(seen, *given, lengths)
            outputs.append(result)
            finals.append(result[1])
        one, *other = outputs
        values = torch.cat([one[0], other[0][0]], -1) if other else one[0]
        if first + directions < len(parts):
            mask = draw(values.shape[1], values.shape[2], values)
            # two layers' spikes side by side have no bits in common
            packed = (None, None) if other else (one.bits, one.version)
            seen = Spikes(values, packed[0], mask, packed[1])
    return PackedPair(values, torch.stack(finals))


def _each(name: str, state: Tensor | None, layers: nn.ModuleList, x: Tensor) -> list[Tensor | None]:
    """Of each of the layers its part of a state [layers, B, N]; refuses another."""
    if state is None:
        return [None] * len(layers)
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(state).__name__}")
    expected = [len(layers), x.shape[1], layers[0].hidden_size]
    if list(state.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {list(state.shape)}")
    return list(state.unbind())
