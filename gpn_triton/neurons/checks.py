"""Checks of the tensors that layers and networks take, and the sentences that refuse them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gpn_triton.machine.device import autocast_dtype


def check_sequence(
    x: object, size: int | None = None, letter: str = "N", order: str = "T, B"
) -> None:
    """Refuse what is no sequence [T, B, size] of a floating dtype; size None: any, by its letter.

    order: of its first two dimensions.

    Raises:
        TypeError: no tensor. ValueError: another rank, size or dtype.
    """
    if isinstance(x, PackedSequence):
        raise TypeError(
            "x: expected a tensor, got a PackedSequence, which the layer GPN takes, but neither "
            "gpn() nor other layers and networks. Pad it with "
            "torch.nn.utils.rnn.pad_packed_sequence; gpn() takes the lengths"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [{order}, {letter}], got {type(x).__name__}")
    got = list(x.shape)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x: expected [{order}, {letter}], each size at least 1, got {got}")
    if size is not None and x.shape[2] != size:
        raise ValueError(f"x: expected [{order}, {size}], got {got}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}: give x.float()")


def check_state(name: str, state: object, x: Tensor) -> None:
    """Refuse what is no state [B, N] for x [T, B, N]: as check_sequence."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor [B, N], got {type(state).__name__}")
    if state.shape != x.shape[1:]:
        shape = list(x.shape[1:])
        raise ValueError(
            f"{name}: expected shape {shape} for x {list(x.shape)}, got {list(state.shape)}"
        )
    check_operand(name, state, x)


def check_lengths(lengths: object, x: Tensor) -> None:
    """Refuse what are no lengths [B] for x [T, B, N].

    Raises:
        TypeError: no tensor. ValueError: another shape, a dtype that is no int, or another device.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a tensor [B], got {type(lengths).__name__}")
    if list(lengths.shape) != [x.shape[1]] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths: expected int64 [{x.shape[1]}], got {lengths.dtype} {list(lengths.shape)}"
        )
    if lengths.device != x.device:
        raise ValueError(f"lengths: expected on x's device {x.device}, got {lengths.device}")


def check_fits(x: Tensor, weight: Tensor) -> None:
    """Refuse x of another device or, where autocast does not cast, dtype than the weight's."""
    if x.device != weight.device:
        raise ValueError(f"x: expected on the weights' device {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise ValueError(f"x: expected the weights' dtype {weight.dtype}, got {x.dtype}")


def check_operand(name: str, tensor: Tensor, x: Tensor) -> None:
    """Refuse a tensor of no floating dtype, or that lies on another device than x."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on x's device {x.device}, got {tensor.device}")
