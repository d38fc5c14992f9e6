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

from gpn_triton.kernels.tiles import WORD


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


def saves_for_backward(x: Tensor, *others: Tensor | None) -> tuple[bool, bool]:
    """Whether a recurrence over x [T, B, N] saves anything for backward, and whether the packed
    spikes among it are fit for the next layer to share."""
    # a tensor under vmap does not say whether what it stands for requires a gradient
    mapped = torch._C._are_functorch_transforms_active()
    saves = torch.is_grad_enabled() and (
        mapped or any(t is not None and t.requires_grad for t in (x, *others))
    )
    if torch.compiler.is_exporting():
        saves = saves and _has_side(x.shape[0])
    return saves, saves and not mapped


def _has_side(T: int) -> bool:
    """Whether a T that torch.export sees is known to lie within a word of spikes, or beyond it.

    Else it would be fixed to one of both, since a first size of 1 or more is another layout to
    torch; then nothing is saved, and the exported program has no backward.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(T > WORD) or statically_known_true(T <= WORD)


def refuse_nothing_saved(name: str, saved: int | bool) -> None:
    """Raise RuntimeError in the backward pass of a recurrence that has saved nothing for it."""
    if not saved:
        raise RuntimeError(
            f"{name}: exported with a T that may be below and above {WORD}, it saves nothing for "
            f"backward: export with T fixed, or from {WORD + 1} on (Dim('T', min={WORD + 1}))"
        )
