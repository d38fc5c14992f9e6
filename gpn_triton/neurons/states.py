"""What a network carries beside its weights: a batch's draws, and where a stream stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


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

    def detach(self) -> StreamState:
        """The same numbers, through which no gradient goes."""
        return StreamState(_detached(self.neurons), self.readout.detach(), self.steps)


def _detached(state: Any) -> Any:
    """A state, a tensor or a tuple of such, without its graph."""
    return tuple(map(_detached, state)) if isinstance(state, tuple) else state.detach()
