"""A GPN layer on the Triton kernels by a plan that is given, not chosen by the operator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.competitors import Unavailable
from bench.measure import Call
from gpn_triton.kernels import tiles
from gpn_triton.machine import device as machine
from gpn_triton.neurons.reference import GATES

if TYPE_CHECKING:
    from bench.subjects import Problem

STRATEGIES = ("persistent", "stepwise")


def choose_plan(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, strategy: str,
    swept: dict[str, tiles.Tile] | None = None,
) -> tiles.Plan:  # fmt: skip
    """The plan of a layer (T, B, N) of the full neuron.

    Args:
        swept: tiles of forward or backward instead of those chosen, by these names.

    Raises:
        Unavailable: the layer cannot run by the strategy.
    """
    limits = machine.kernel_limits() if device.type == "cuda" else {}
    limits["precision"] = machine.float32_precision()
    try:
        plan = tiles.choose(*sizes, dtype, GATES["full"], strategy=strategy, **limits)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    return replace(plan, **(swept or {}))


class KernelCall(Call):
    """The launches of a layer, forward or forward and backward, without autograd around them.

    Args:
        problem: the numbers, without an input Linear. strategy: one of STRATEGIES.
        backward: forward and backward. swept: as for choose_plan.
    Raises:
        Unavailable: the kernels cannot run here, or not by the strategy.
    """

    def __init__(
        self, problem: Problem, strategy: str, backward: bool,
        swept: dict[str, tiles.Tile] | None = None,
    ):  # fmt: skip
        if reason := machine.triton_unavailable(problem.x):
            raise Unavailable(reason)
        # here, since bench is read where triton is not installed
        from gpn_triton.kernels.gpn_backward import gpn_backward
        from gpn_triton.kernels.gpn_forward import gpn_forward

        plan = choose_plan(problem.x.shape, problem.dtype, problem.device, strategy, swept)
        gates, names = GATES["full"], ("weight_x", "weight_v", "bias")
        leaves = {"x": problem.x, **{name: problem.weights[name] for name in names}}
        tensors = (*leaves.values(), problem.v_reset)
        cotangent = problem.cotangent if backward else None
        super().__init__(
            lambda: gpn_forward(*tensors, problem.v_reset, gates, int(backward), False, plan),
            leaves, cotangent,
        )  # fmt: skip
        # gradients of x, weight_x, weight_v, bias, v0
        self._backward = lambda v_saved, bits: gpn_backward(
            cotangent, None, *tensors, bits, v_saved, gates, "atan", 2.0, 1, False, plan
        )
        self._gradients: dict[str, Tensor] = {}

    def __call__(self) -> None:
        self.clear()
        self.out, _, *saved = self.forward()
        if self.cotangent is not None:
            self._gradients = dict(zip(self.leaves, self._backward(*saved), strict=False))

    def clear(self) -> None:
        """Let go of the last call's result and gradients."""
        self.out, self._gradients = None, {}

    def gradients(self) -> dict[str, Tensor]:
        """The last call's gradients by leaf."""
        return self._gradients
