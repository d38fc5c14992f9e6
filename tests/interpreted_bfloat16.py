"""bfloat16 as a GPU computes it, in Triton's interpreter.

The interpreter keeps bfloat16 as bits in uint16: tl.dot multiplies the bits as integers, and the
cast from float32 cuts off instead of rounding to nearest even. No error is raised (triton 3.6 to
3.9). Arithmetic on bfloat16 tiles stays wrong, so kernels cast to float32 right after a load.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def correct(monkeypatch) -> None:
    """Correct tl.dot and the casts until monkeypatch undoes it."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def operand(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_to_float32(handle.data), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, operand(a), operand(b), *rest)

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(source.data), tl.float32)
        return cast(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
