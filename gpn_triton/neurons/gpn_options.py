"""The options of a layer of GPN: one value that travels from the command to the operator."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from gpn_triton.machine.device import BACKENDS
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.surrogate import SURROGATES

OUTPUTS = ("spikes", "mean")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError, with the argument's name, unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def check_size(name: str, value: object) -> int:
    """A number of neurons, inputs or layers; ValueError, with its name, for what is none."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class GPNOptions:
    """What gpn() takes beside tensors; it refuses values that do not fit when it is made.

    Args:
        variant, surrogate, alpha, backend, output: as gpn(), in the order of its arguments.
        every: gpn()'s checkpoint_every; None is 1.
    Raises:
        ValueError: an option that does not fit, named as gpn() names it.
    """

    variant: str = "full"
    surrogate: str = "atan"
    alpha: float = 2.0
    backend: str = "auto"
    every: int | None = 1
    output: str = "spikes"

    def __post_init__(self):
        check_choice("variant", self.variant, GATES)
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("output", self.output, OUTPUTS)
        if isinstance(self.alpha, Tensor):
            raise ValueError(
                f"alpha: expected a number, got a {type(self.alpha).__name__}, which would be a "
                "constant without a gradient: give its value, alpha.item()"
            )
        if not isinstance(self.alpha, numbers.Real) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number above 0, got {self.alpha!r}")
        if self.every is None:
            object.__setattr__(self, "every", 1)
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"checkpoint_every: expected a whole number from 1 on, got {self.every!r}"
            )

    def flat(self, save: bool) -> tuple[str, str, float, str, int, bool]:
        """The operator's own arguments, which torch wants flat: variant, surrogate, alpha, backend,
        every (0 where nothing is saved for backward) and whether the output is the mean."""
        every = (self.every or 1) if save else 0
        mean = self.output == "mean"
        return self.variant, self.surrogate, float(self.alpha), self.backend, every, mean
