"""Which derivatives the operators have: one, backward. Who asks for others is told or led aside.

An operator without a rule for forward mode would drop a tangent and give a derivative of zero. So
each asks `beyond_operators` first, and where that says yes, plain torch operators compute it: the
loop of reference.py, a dense product, the surrogate's smooth step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def beyond_operators(*tensors: Tensor | None) -> bool:
    """Whether a derivative is asked for that is not reverse mode, once: a tensor has a tangent, or
    torch.func differentiates. vmap alone is not."""
    transformed = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0:
        return (
            transformed
            or torch.compiler.is_compiling()
            or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
        )
    if not transformed:
        return False
    # torch.compile knows whether a transform is active, not which
    return torch.compiler.is_compiling() or any(
        level.key() != _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack()
    )


def refuse_second(name: str, instead: str) -> Callable:
    """What stands for the backward of an operator's backward: it raises RuntimeError."""

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f"{name} has first derivatives alone, and a second one was asked for: compute {instead}"
            " in its place, or ask torch.func (grad, jvp, hessian), for which it does so itself"
        )

    return refuse
