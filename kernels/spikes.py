"""Packed spikes unpacked, under a mask held over time.

    out[t, b, n] = mask[b, n] if bit t % 32 of bits[t // 32, b, n] is set else 0

Grid: (words of the stretch, row tiles, neuron tiles); a program reads one word and one mask value
for each of its BLOCK_R rows of BLOCK_N neurons and writes their 32 steps.

Layout, all contiguous. bits [ceil(T / 32), B, N] int32; mask [B, N] of out's dtype, not read unless
MASKED (else 1); out [stop - start, B, N] float32, float16 or bfloat16: steps start..stop - 1.

Source: gpn_forward.py packs. Twin: recurrence_torch.unpack_spikes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpn_triton.kernels import tiles
from gpn_triton.kernels.operands import WORD


@triton.jit(do_not_specialize=["start", "stop", "B"])
def spikes_unpack_kernel(
    bits_ptr, mask_ptr, out_ptr, start, stop, B,
    N: tl.constexpr, MASKED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    word_row = start // WORD + tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * BLOCK_R
    rows = tl.arange(0, BLOCK_R)[:, None]
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (first + rows < B) & (n < N)
    offs = rows * N + n  # [BLOCK_R, BLOCK_N]
    rows_per_step = B.to(tl.int64)

    word = tl.load(bits_ptr + (word_row * rows_per_step + first) * N + offs, mask=mask, other=0)
    value = tl.full([BLOCK_R, BLOCK_N], 1.0, tl.float32)
    if MASKED:
        value = tl.load(mask_ptr + first * N + offs, mask=mask, other=0.0).to(tl.float32)
    for k in range(WORD):
        t = word_row * WORD + k
        due = (t >= start) & (t < stop)
        out = tl.where((word >> k) & 1 != 0, value, 0.0).to(out_ptr.dtype.element_ty)
        out_row = (t - start) * rows_per_step + first
        tl.store(out_ptr + out_row * N + offs, out, mask=mask & due)


def spikes_unpack(
    bits: Tensor, mask: Tensor | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Read steps start..stop - 1 of packed spikes, times a mask.

    Args:
        bits [ceil(T / 32), B, N] int32: bit t % 32 of word t // 32 is the spike at step t.
        mask [B, N] float, or None: ones. dtype: float32, float16 or bfloat16.
    Returns:
        [stop - start, B, N] of dtype.
    """
    _, B, N = bits.shape
    bits = bits.contiguous()
    out = torch.empty((stop - start, B, N), dtype=dtype, device=bits.device)
    blocks = tiles.elementwise_blocks(N)
    words = -(-stop // tiles.WORD) - start // tiles.WORD
    grid = (words, triton.cdiv(B, blocks["BLOCK_R"]), triton.cdiv(N, blocks["BLOCK_N"]))
    spikes_unpack_kernel[grid](
        bits, out if mask is None else mask.to(dtype).contiguous(), out, start, stop, B,
        N=N, MASKED=mask is not None, **blocks,
    )  # fmt: skip
    return out
