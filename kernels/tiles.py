"""Where strategies, block sizes, warps and stages are chosen: plain functions of the sizes.

No line of this file has been measured on a GPU. What stands behind the choices is the compiler's
output for sm_80 and sm_90 (registers, spills, shared memory, asynchronous copies), which
bench/offline.py reproduces; every plan says `measured=False` until a GPU has spoken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# z of a chunk of time: some passes of a large layer, small enough to stay near the L2 cache of a
# data-centre GPU between the product that writes it and the recurrence that reads it. unmeasured
CHUNK_BYTES = 64 << 20
# a word of packed spikes holds 32 steps, and chunks of whole words keep every slice aligned
WORD = 32
PERSISTENT_N = 128  # more neurons do not fit the shared memory of one multiprocessor
DEFAULT_SMS = 132
DEFAULT_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class Tile:
    """Blocks of one kernel (rows of the batch, neurons, depth of the product), warps, stages."""

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """How one layer runs.

    strategy: persistent (one program per BLOCK_B rows runs the whole chunk of time, weights on
        chip) or stepwise (one launch a time step).
    hoist: weight_x x + bias is one product per chunk of time; otherwise the step takes it in the
        same loop as weight_v v and no [T, B, G N] buffer exists.
    forward_steps, backward_steps: time steps in a chunk.
    precision: of float32 products, "ieee" or "tf32" (half types ignore it).
    measured: whether a GPU chose the tiles.
    """

    strategy: str
    hoist: bool
    forward: Tile
    backward: Tile
    forward_steps: int
    backward_steps: int
    precision: str
    reason: str
    measured: bool = False


def is_half(dtype: torch.dtype) -> bool:
    """Whether the dtype is a 16-bit float."""
    return dtype in (torch.float16, torch.bfloat16)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weight_v, v and z in the forward products for x of the given dtype.

    float16 rather than bfloat16 for both half types: same speed, a seventh of the flipped spikes
    (0.025 % against 0.178 % over T = 100 at N = 128, simulated on a CPU).
    """
    return torch.float16 if is_half(dtype) else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of g_z and of the backward operands; bfloat16 for half types, for its range."""
    return torch.bfloat16 if is_half(dtype) else torch.float32


def block(N: int) -> int:
    """The smallest power of two from 16 on that holds N neurons."""
    return max(16, 1 << (N - 1).bit_length())


def persistent_shared_bytes(N: int, gates: int, dtype: torch.dtype, tile: Tile) -> int:
    """Upper bound on the shared memory of the persistent kernels, in bytes.

    The weights of all gates, num_stages - 1 buffers of everything read in a step, and the operand.
    """
    itemsize = operand_dtype(dtype).itemsize
    rows = tile.BLOCK_B * block(N)
    weights = gates * block(N) ** 2 * itemsize
    # z of every gate, x, v, the spikes (at most a word), g_u and rest
    return weights + (tile.num_stages - 1) * rows * ((gates + 4) * itemsize + 4) + rows * 4


def _steps(T: int, row_bytes: int, multiple: int) -> int:
    """Steps in a chunk of about CHUNK_BYTES: at least one multiple, at most T or 2^14."""
    steps = min(max(1, CHUNK_BYTES // row_bytes), 1 << 14)
    return min(T, max(multiple, steps // multiple * multiple))


def choose(
    T: int,
    B: int,
    N: int,
    dtype: torch.dtype,
    gates: int,
    every: int = 1,
    precision: str = "ieee",
    sm_count: int = DEFAULT_SMS,
    shared_bytes: int = DEFAULT_SHARED_BYTES,
) -> Plan:
    """Choose how a layer runs.

    Args:
        T, B, N: time bins, batch, neurons. dtype: of x. gates: 0 to 4, how many have weights.
        every: the membrane is saved every so many steps (0 counts as 1).
        precision: of float32 products, "ieee" or "tf32".
        sm_count: multiprocessors. shared_bytes: shared memory one program may have. The defaults
            are an H200's.
    Returns:
        The plan; plan.reason says why in one sentence.
    """
    every = max(1, every)
    row_bytes = max(1, gates) * B * N * operand_dtype(dtype).itemsize
    forward_steps = _steps(T, row_bytes, WORD)
    backward_steps = _steps(T, row_bytes, WORD if every == 1 else every)
    half = is_half(dtype)

    if gates == 0:
        # no product couples the neurons: tiles of them run independently for any N. unmeasured
        tile = Tile(16, min(block(N), 128), 0, 4, 3)
        why = "the variant has no gates: every neuron runs by itself"
        return Plan("persistent", True, tile, tile, forward_steps, backward_steps, precision, why)
    if N <= PERSISTENT_N:
        warps = 8 if block(N) >= 64 else 4
        for stages in (3, 2):
            tile = Tile(16, block(N), block(N), warps, stages)
            need = persistent_shared_bytes(N, gates, dtype, tile)
            if need <= shared_bytes and (half or precision == "tf32" or N <= 32):
                why = f"N <= {PERSISTENT_N} and {need // 1024} KiB keep the weights on chip"
                return Plan(
                    "persistent", True, tile, tile, forward_steps, backward_steps, precision, why
                )
        why = f"the weights of {gates} gates at N = {N} in {dtype} do not stay on chip"
    else:
        why = f"N > {PERSISTENT_N}: the weights do not fit one multiprocessor"

    # the largest tile of rows that still gives every multiprocessor a program. unmeasured
    BLOCK_N = 32
    neuron_tiles = -(-N // BLOCK_N)
    BLOCK_B = 16
    while BLOCK_B < 64 and -(-B // (2 * BLOCK_B)) * neuron_tiles >= sm_count:
        BLOCK_B *= 2
    depth = (64 if half else 32) if half or precision == "tf32" else 16
    tile = Tile(BLOCK_B, BLOCK_N, depth, 4, 3)
    # a chunk of a few steps is not worth a product of its own. unmeasured
    hoist = row_bytes * 4 <= CHUNK_BYTES * 4
    return Plan("stepwise", hoist, tile, tile, forward_steps, backward_steps, precision, why)
