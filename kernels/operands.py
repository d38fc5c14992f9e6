"""What the recurrence kernels share beside the mathematics: a program's tile, where a gate lies in
memory, products, packed spikes; and, on the host, the operands that a launch reads.

A tensor of gates holds their blocks one after the other. GATES names those that a variant has, as
in pointwise.py; a gate that it lacks is neither read nor written nor multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gpn_triton.kernels import tiles
from gpn_triton.kernels.pointwise import has, place

# the interpreter has no inline assembly, hence no tanh.approx
INTERPRETED = triton.knobs.runtime.interpret
TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# the interpreter counts steps in Python's whole numbers, which do not take a constexpr
WORD = tiles.WORD if INTERPRETED else tl.constexpr(tiles.WORD)
COMPILED = False if INTERPRETED else tl.constexpr(True)


@triton.jit
def own_tile(B, N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program of the grid (row tiles, neuron tiles) owns.

    Returns:
        first: its first row of the batch, int64. rows [BLOCK_B, 1]: counted from there.
        n [1, BLOCK_N]: its neurons. mask, offs [BLOCK_B, BLOCK_N]: which of them exist, and where
        they lie in [B, N] from row `first` on.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return first, rows, n, (first + rows < B) & (n < N), rows * N + n


@triton.jit
def to_operand(a, DTYPE: tl.constexpr):
    """a in the dtype of a product's operand, saturated instead of overflowing to infinity."""
    if DTYPE == tl.float16:
        a = tl.clamp(a.to(tl.float32), -65504.0, 65504.0, tl.PropagateNan.ALL)
    return a.to(DTYPE)


@triton.jit
def load_weight_transposed(
    ptr, k, n, mask, gate: tl.constexpr, GATES: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The gate's block of weights [G N, N], transposed: entry [k, n] is row n, column k.

    Nothing if the gate is absent.
    """
    if has(GATES, gate):
        return tl.load(ptr + (place(GATES, gate) * N + n) * N + k, mask=mask, other=0.0)
    else:
        return 0.0


@triton.jit
def load_weight_as_stored(
    ptr, k, n, mask, gate: tl.constexpr, GATES: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The gate's block of weights [G N, N]: entry [k, n] is row k, column n; nothing if absent."""
    if has(GATES, gate):
        return tl.load(ptr + (place(GATES, gate) * N + k) * N + n, mask=mask, other=0.0)
    else:
        return 0.0


@triton.jit
def load_gate(ptr, offs, mask, gate: tl.constexpr, GATES: tl.constexpr, N: tl.constexpr):
    """The gate's tile as float32, zeros if absent; ptr + offs address the first gate's."""
    if has(GATES, gate):
        return tl.load(ptr + place(GATES, gate) * N + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(mask.shape, tl.float32)


@triton.jit
def store_gate(ptr, offs, value, mask, gate: tl.constexpr, GATES: tl.constexpr, N: tl.constexpr):
    """Store the gate's tile, if there is one, where load_gate would read it."""
    if has(GATES, gate):
        ptr += place(GATES, gate) * N
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_product(
    total, a, block, gate: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """total + a block, or total if the gate is absent."""
    if has(GATES, gate):
        return tl.dot(a, block, acc=total, input_precision=PRECISION)
    else:
        return total


@triton.jit
def load_spikes(bits_ptr, t, B, first, offs, mask, N: tl.constexpr):
    """The spikes at step t as 0.0 or 1.0, from bits [ceil(T / WORD), B, N].

    first is the row of the batch (int64) that offs starts from.
    """
    word = tl.load(bits_ptr + ((t // WORD) * B + first) * N + offs, mask=mask, other=0)
    return ((word >> (t % WORD)) & 1).to(tl.float32)


@triton.jit
def pack_spikes(bits_ptr, word, s, t, T, B, first, offs, mask, N: tl.constexpr):
    """Add the spikes (bool) of step t to their word, and store it in bits if they are its last.

    B, first, offs: as load_spikes.
    """
    word = tl.where(t % WORD == 0, 0, word) | (s.to(tl.int32) << (t % WORD))
    due = (t % WORD == WORD - 1) | (t + 1 == T)
    tl.store(bits_ptr + ((t // WORD) * B + first) * N + offs, word, mask=mask & due)
    return word


@triton.jit
def add_spikes(bits_ptr, s, t, B, first, offs, mask, N: tl.constexpr):
    """Add the spikes (bool) of step t to their word in bits, of a program that has one step."""
    at = bits_ptr + ((t // WORD) * B + first) * N
    word = tl.load(at + offs, mask=mask & (t % WORD != 0), other=0)
    tl.store(at + offs, word | (s.to(tl.int32) << (t % WORD)), mask=mask)


@triton.jit
def store_fired(spikes_ptr, h_ptr, offs, s, h, mask, SAVE: tl.constexpr):
    """Store the spikes (bool) of a threshold of 1 and, with SAVE, h on its own side of it.

    Rounded to a half type h could cross the threshold; so backward finds s in it.
    """
    tl.store(spikes_ptr + offs, s.to(spikes_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        DTYPE: tl.constexpr = h_ptr.dtype.element_ty
        # the largest number below 1
        digits: tl.constexpr = 11 if DTYPE == tl.float16 else 8 if DTYPE == tl.bfloat16 else 24
        below = tl.minimum(h, 1.0 - 0.5**digits, tl.PropagateNan.ALL)
        tl.store(h_ptr + offs, to_operand(tl.where(s, h, below), DTYPE), mask=mask)


@triton.jit
def meet_launches():
    """Wait until the launch before has ended and what it wrote is seen, then let the next begin."""
    if COMPILED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["size_a", "size_b", "size_c", "size_d", "second_size"])
def operands_cast_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, second_ptr, size_a, size_b, size_c, size_d, second_size,
    BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a, b, c and d, one behind the other, as out's dtype, saturated; BOTH: the first second_size
    elements as second's, too. A program owns BLOCK elements.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_at, c_at, d_at = at - size_a, at - size_a - size_b, at - size_a - size_b - size_c
    # where three of them are 0 their sum is the fourth
    value = tl.load(a_ptr + at, mask=at < size_a, other=0.0).to(tl.float32)
    mask = (b_at >= 0) & (b_at < size_b)
    value += tl.load(b_ptr + b_at, mask=mask, other=0.0).to(tl.float32)
    mask = (c_at >= 0) & (c_at < size_c)
    value += tl.load(c_ptr + c_at, mask=mask, other=0.0).to(tl.float32)
    mask = (d_at >= 0) & (d_at < size_d)
    value += tl.load(d_ptr + d_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, to_operand(value, out_ptr.dtype.element_ty), mask=d_at < size_d)
    if BOTH:
        value = to_operand(value, second_ptr.dtype.element_ty)
        tl.store(second_ptr + at, value, mask=at < second_size)


def cast_together(tensors: tuple, *dtypes: torch.dtype) -> list[tuple]:
    """Up to four tensors as operands of one or two dtypes, by one launch for all of them.

    Args:
        tensors: float; None stays None. Those that have the second dtype already come last.
        dtypes: saturated, where float16, instead of infinite.
    Returns:
        a tuple of them for each dtype; contiguous, and where nothing is to be cast themselves.
    """
    tensors = [t if t is None else t.contiguous() for t in tensors]
    given = [t for t in tensors if t is not None]
    if all(t.dtype == dtype for t in given for dtype in dtypes):
        return [tuple(tensors) for _ in dtypes]
    sizes = [t.numel() for t in given]
    total = sum(sizes)
    second = sum(t.numel() for t in given if t.dtype != dtypes[-1])
    flat = [
        torch.empty(size, dtype=dtype, device=given[0].device)
        for size, dtype in zip((total, second), dtypes, strict=False)
    ]
    operands_cast_kernel[(triton.cdiv(total, tiles.CAST_BLOCK),)](
        *(given * 4)[:4], flat[0], flat[-1], *(sizes + [0, 0, 0])[:4], second,
        BOTH=len(dtypes) == 2, BLOCK=tiles.CAST_BLOCK, num_warps=4,
    )  # fmt: skip
    results = []
    for k, one in enumerate(flat):
        found, at = [], 0
        for t in tensors:
            if t is None or (k == 1 and t.dtype == dtypes[1]):
                found.append(t)
            else:
                found.append(one[at : at + t.numel()].view(t.shape))
                at += t.numel()
        results.append(tuple(found))
    return results


def cast(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """a, contiguous and in the dtype of a product's operand, saturated instead of infinite."""
    return cast_together((a,), dtype)[0][0]


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b as float32, also for half operands, whose products cuBLAS would round to their dtype."""
    if a.is_cuda and tiles.is_half(a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def resize(a: Tensor | None, N: int) -> Tensor | None:
    """a [..., n] with N neurons: zeros added, or the last ones cut off."""
    return None if a is None else F.pad(a, (0, N - a.shape[-1])).contiguous()


def resize_weights(w: Tensor | None, n: int, N: int) -> Tensor | None:
    """Gate weights [G n, n] or bias [G n] for N neurons, as resize."""
    if w is None:
        return None
    gates = w.reshape(-1, n, *w.shape[1:])
    return F.pad(gates, (0, N - n) * w.ndim).reshape(-1, *[N] * (w.ndim - 1))


def project(x: Tensor, weight_x: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight_x x + bias [steps, B, G N] for x [steps, B, N], all in the operands' dtype.

    Without gates there is nothing to read and x itself stands in for the pointer.
    """
    if weight_x is None:
        return x
    return F.linear(cast(x, weight_x.dtype), weight_x, bias)


def layer_constants(N: int, dtype: torch.dtype, gates: tuple[str, ...]) -> dict:
    """The constexpr arguments that say which layer runs; dtype: of x."""
    return dict(
        N=N,
        GATES=" ".join(gates),
        DEPTH=max(1, len(gates)) * N,
        FAST=tiles.is_half(dtype) and not INTERPRETED,
    )


def tile_constants(tile: tiles.Tile, B: int, N: int) -> tuple[tuple[int, int], dict]:
    """Grid and constexpr arguments of a launch over all rows and neurons."""
    grid = (triton.cdiv(B, tile.BLOCK_B), triton.cdiv(N, tile.BLOCK_N))
    blocks = dict(BLOCK_B=tile.BLOCK_B, BLOCK_N=tile.BLOCK_N)
    return grid, dict(blocks, STAGES=tile.num_stages, num_warps=tile.num_warps)


def dependent_launch(plan: tiles.Plan, behind: bool) -> dict:
    """The arguments by which a stepwise launch may begin while the one before it still runs.

    A chain is the launches of a chunk, one a time step. Why a launch that begins early reads and
    writes nothing too soon:

    - The first launch of a chain (behind is False) is an ordinary one. Whatever ran before the
      chain, products and elementwise kernels, has ended when it begins, and is seen by all that
      begin later. It never lets another begin early but by its end.
    - Each later one begins, at the earliest, when every program of the launch before has passed its
      meet_launches. Ahead of its own it reads only what was there before the chain began and what
      no launch of the chain writes: zx (backward: z of its own step, which none but itself
      overwrites with g_z), x, the saved v and bits, g_u, rest, v_reset, bias, weights.
    - Behind its meet_launches the launch before has ended; so had, behind that one's, the launch
      before it, and so on: reading v, state, words of bits, counts, g_v and g_z finds what any
      earlier launch wrote, and writing into a row that an earlier launch still reads (the pair of
      rows of v, the state in place) cannot happen, since no launch writes ahead of it.
    - No program of a launch leaves before its meet_launches, so a launch's end means all of that.
    - What follows a chain is an ordinary launch again and begins when the last one has ended. A
      captured graph keeps both kinds of order.

    Args:
        behind: whether the launch before belongs to the same chain.
    """
    if not (plan.dependent and behind):
        return dict(DEPENDENT=False)
    # the interpreter runs launch after launch, and knows no such option
    return dict(DEPENDENT=True, **({} if INTERPRETED else dict(launch_pdl=True)))
