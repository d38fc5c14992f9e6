"""Where strategies, block sizes, warps and stages are chosen: plain functions of the sizes.

No line of this file has been measured on a GPU. What stands behind the choices is the compiler's
output for sm_80 and sm_90 (registers, spills, shared memory, asynchronous copies), which
bench/offline.py reproduces; a plan says `measured` where tiles_measured.py has a GPU's word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpn_triton.kernels.tiles_measured import fastest

# z of a chunk of time: some passes of a large layer, small enough to stay near the L2 cache of a
# data-centre GPU between the product that writes it and the recurrence that reads it. unmeasured
CHUNK_BYTES = 64 << 20
# steps of packed spikes in a word, an int32; chunks of whole words keep every slice aligned
WORD = 32
# more neurons do not fit the shared memory of one multiprocessor
PERSISTENT_N = 128
PERSISTENT_N_FLOAT32 = 64
PERSISTENT_B = 16
DEFAULT_SMS = 132
DEFAULT_SHARED_BYTES = 227 * 1024
DEFAULT_CAPABILITY = 90
# bytes that come from the L2 cache in a clock: to one multiprocessor, and to all of them together.
# assumed of every GPU, after what NVIDIA states of A100 and H100; unmeasured
L2_BYTES = 64
L2_BYTES_TOGETHER = 5120


@dataclass(frozen=True)
class Tile:
    """Blocks of one kernel (rows of the batch, neurons, depth of the product), warps, stages.

    chained: stepwise backward adds its products up in one sum instead of one a gate, side by side.
    """

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    chained: bool = False


@dataclass(frozen=True)
class Plan:
    """How one layer runs.

    strategy: persistent (one program per BLOCK_B rows runs the whole chunk of time, weights on
        chip) or stepwise (one launch a time step).
    hoist: weight_x x + bias is one product per chunk of time; otherwise the step takes it in the
        same loop as weight_v v and no [T, B, G N] buffer exists.
    forward_steps, backward_steps: time steps in a chunk.
    precision: of float32 products, "ieee" or "tf32" (half types ignore it).
    dependent: a stepwise launch may begin while the one before still runs, and waits for its end
        before it reads what that writes (programmatic dependent launch: sm_90 and later).
    measured: whether a GPU chose one of the tiles.
    """

    strategy: str
    hoist: bool
    forward: Tile
    backward: Tile
    forward_steps: int
    backward_steps: int
    precision: str
    reason: str
    dependent: bool = False
    measured: bool = False


def saturate(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a in the dtype, saturated where float16 would overflow to infinity."""
    if dtype == torch.float16 and a.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        a = a.clamp(-limit, limit)
    return a.to(dtype)


def own_steps(T: int, lengths: torch.Tensor | None) -> torch.Tensor | int:
    """What the spikes of [B, N] are divided by for their mean: T, or each sample's own [B, 1]."""
    return T if lengths is None else lengths.clamp(min=1)[:, None]


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


def padded(N: int, dtype: torch.dtype) -> int:
    """How many neurons the kernels compute for N: rows are made multiples of 16 bytes.

    An odd row of a half type is aligned to 2 bytes, and asynchronous copies take at least 4: the
    compiler then loads within the step, with 14 barriers forward and 24 backward instead of 6 and 8
    (N = 127, sm_90). Narrow copies also spill: N = 100 in half types, 185 in float32. Masks do the
    rest of the padding, up to block(N), at no cost.
    """
    multiple = 16 // operand_dtype(dtype).itemsize
    return -(-N // multiple) * multiple


def persistent_shared_bytes(N: int, gates: tuple[str, ...], dtype: torch.dtype) -> dict:
    """Shared memory of GPN's persistent kernels as {kernel: (fixed, per stage after the first)}.

    Fixed are the weights, the operands of the products and a tile to reorder what is stored, in
    half types two of them forward, and the rows' lengths; a stage holds every tile that a step
    reads. Never less than triton 3.7.1 takes for sm_80 and sm_90. In bytes, for rows of
    PERSISTENT_B.
    """
    size, G = operand_dtype(dtype).itemsize, len(gates)
    serial = G - ("theta" in gates)
    weight, tile = block(N) ** 2, PERSISTENT_B * block(N)
    # one int64 a row, in whole lines of 256 bytes
    lengths = -(-8 * PERSISTENT_B // 256) * 256
    # backward reads z of the serial gates, x, v, g_u, rest and a word of spikes
    return {
        "forward": (
            size * (G * weight + (1 + is_half(dtype)) * tile) + lengths,
            size * (G + 1) * tile,
        ),
        "backward": (
            size * (serial * weight + (serial + 1) * tile) + lengths,
            size * (serial + 4) * tile + 4 * tile,
        ),
    }


def cuba_lif_shared_bytes(N: int, dtype: torch.dtype) -> dict:
    """As persistent_shared_bytes, of CuBa-LIF's: one block of weights, no lengths."""
    size, weight, tile = operand_dtype(dtype).itemsize, block(N) ** 2, PERSISTENT_B * block(N)
    # forward reads x, backward h and the spikes' gradient
    return {
        "forward": (size * (weight + (1 + is_half(dtype)) * tile), size * tile),
        "backward": (size * (weight + 2 * tile), size * 2 * tile),
    }


# elements of a program that casts operands: 8 a thread of 4 warps. unmeasured
CAST_BLOCK = 1024


def elementwise_blocks(N: int) -> dict[str, int]:
    """Blocks of the elementwise kernel: 1024 elements, 8 a thread of 4 warps. unmeasured"""
    BLOCK_N = min(block(N), 128)
    return {"BLOCK_R": 1024 // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}


def _steps(T: int, row_bytes: int, multiple: int) -> int:
    """Steps in a chunk of about CHUNK_BYTES: at least one multiple, at most T or 2^14."""
    steps = min(CHUNK_BYTES // row_bytes, 1 << 14)
    return min(T, max(multiple, steps // multiple * multiple))


def choose(
    T: int,
    B: int,
    N: int,
    dtype: torch.dtype,
    gates: tuple[str, ...],
    every: int = 1,
    precision: str = "ieee",
    sm_count: int = DEFAULT_SMS,
    shared_bytes: int = DEFAULT_SHARED_BYTES,
    capability: int = DEFAULT_CAPABILITY,
    strategy: str | None = None,
) -> Plan:
    """Choose how a layer runs.

    Args:
        T, B, N: time bins, batch, neurons. dtype: of x. gates: reference.GATES[variant].
        every: the membrane is saved every so many steps (0 counts as 1).
        precision: of float32 products, "ieee" or "tf32".
        sm_count: multiprocessors. shared_bytes: shared memory one program may have. capability:
            10 x major + minor of the compute capability. The defaults are an H200's.
        strategy: persistent or stepwise instead of the better one.
    Returns:
        The plan; plan.reason says why in one sentence.
    Raises:
        ValueError: the layer cannot run by the strategy that was asked for.
    """
    size, asked, measured = operand_dtype(dtype).itemsize, strategy, False
    row_bytes = max(1, len(gates)) * B * N * size
    if gates:
        shared = persistent_shared_bytes(N, gates, dtype)
        most = PERSISTENT_N if is_half(dtype) else PERSISTENT_N_FLOAT32
        stepwise = _stepwise_tiles(
            B, N, dtype, gates, precision, sm_count, shared_bytes, capability
        )
        strategy, tiles, reason = _tiles(
            N, dtype, shared, most, shared_bytes, stepwise, asked == "stepwise"
        )
        if is_half(dtype) and len(gates) == 4:
            found = [fastest(capability, strategy, N, way, B) for way in ("forward", "backward")]
            measured = any(found)
            tiles = tuple(
                tile if fields is None else Tile(*fields)
                for tile, fields in zip(tiles, found, strict=True)
            )
    else:
        # unmeasured
        tile = Tile(PERSISTENT_B, min(block(N), 128), 0, 4, 3)
        strategy, tiles = "persistent", (tile, tile)
        reason = "no gates: every neuron runs by itself, for any N"
    if asked not in (None, strategy):
        raise ValueError(f"strategy: expected {strategy} ({reason}), got {asked!r}")
    # without the buffer every step takes a second product: only where not even two steps of it are
    # in proportion. unmeasured
    hoist = strategy == "persistent" or 2 * row_bytes <= CHUNK_BYTES
    return Plan(
        strategy,
        hoist,
        *tiles,
        forward_steps=_steps(T, row_bytes, WORD) if hoist else T,
        # 8 steps keep a slice of v_saved aligned to 16 bytes for any N
        backward_steps=_steps(T, row_bytes, every if every > 1 else 8),
        precision="ieee" if is_half(dtype) else precision,
        reason=reason,
        dependent=strategy == "stepwise" and capability >= 90,
        measured=measured,
    )


def choose_lif(T: int) -> Plan:
    """How a layer of LIF runs, whatever its sizes: its neurons lie in one row, of all samples."""
    # a warp each, of 4 neurons a thread: fewer would leave a step more instructions a neuron, more
    # would leave a small batch fewer warps. A step is 120 to 190 instructions (sm_90), less than
    # memory takes to answer, so that loads start seven steps ahead. unmeasured
    tile = Tile(1, 128, 0, 1, 8)
    reason = "no weights: every neuron runs by itself, for any N"
    return Plan("persistent", False, tile, tile, T, T, "ieee", reason)


def choose_cuba_lif(
    T: int,
    B: int,
    N: int,
    dtype: torch.dtype,
    precision: str = "ieee",
    sm_count: int = DEFAULT_SMS,
    shared_bytes: int = DEFAULT_SHARED_BYTES,
    capability: int = DEFAULT_CAPABILITY,
    strategy: str | None = None,
) -> Plan:
    """Choose how a layer of CuBa-LIF runs; arguments, result and error as choose.

    There is nothing to hoist: x enters as it is. Forward is one chunk.
    """
    shared = cuba_lif_shared_bytes(N, dtype)
    stepwise = _cuba_lif_stepwise_tiles(B, N, dtype, precision, sm_count, shared_bytes, capability)
    chosen, tiles, reason = _tiles(
        N, dtype, shared, N, shared_bytes, stepwise, strategy == "stepwise"
    )
    if strategy not in (None, chosen):
        raise ValueError(f"strategy: expected {chosen} ({reason}), got {strategy!r}")
    return Plan(
        chosen,
        False,
        *tiles,
        forward_steps=T,
        backward_steps=_steps(T, B * N * operand_dtype(dtype).itemsize, 8),
        precision="ieee" if is_half(dtype) else precision,
        reason=reason,
    )


def _tiles(
    N: int, dtype: torch.dtype, shared: dict, most_N: int, limit: int,
    stepwise: tuple[Tile, Tile], asked: bool,
) -> tuple[str, tuple[Tile, Tile], str]:  # fmt: skip
    """strategy, (forward tile, backward tile), reason.

    shared: of the persistent kernels, as persistent_shared_bytes gives it. most_N: neurons that
    they take at most. stepwise: the tiles where they do not fit, or where they are asked for.
    """
    fits = N <= most_N and all(fixed + stage <= limit for fixed, stage in shared.values())
    if fits and not asked:
        # 16 rows are the least a tensor core takes; 4 warps spill at N = 128 and, in float32, at
        # N = 64. three stages where they fit: loads then start two steps ahead. unmeasured
        warps = 8 if N > 32 else 4
        tiles = tuple(
            Tile(PERSISTENT_B, block(N), block(N), warps, 3 if fixed + 2 * stage <= limit else 2)
            for fixed, stage in shared.values()
        )
        return "persistent", tiles, "the weights stay in shared memory for the whole sequence"

    if fits:
        reason = "a launch a step was asked for"
    elif N > most_N:
        reason = f"the weights of more than {most_N} neurons fit no multiprocessor"
    else:
        kib = max(fixed + stage for fixed, stage in shared.values()) >> 10
        reason = (
            f"to keep the weights on chip takes {kib} KiB in {dtype}, {limit >> 10} KiB are there"
        )
    return "stepwise", stepwise, reason


def _cuba_lif_stepwise_tiles(
    B: int, N: int, dtype: torch.dtype, precision: str, sm_count: int, limit: int, capability: int
) -> tuple[Tile, Tile]:
    """The tiles of CuBa-LIF's forward and backward."""
    # every tile of rows reads all weights from the L2 cache once a step, which bounds a step sooner
    # than idle multiprocessors do: the most rows that still occupy two fifths of them. for sm_100
    # only what takes mma.sync has been compiled. unmeasured
    ieee = not is_half(dtype) and precision == "ieee"
    BLOCK_N, BLOCK_B = 32, 16
    most = 32 if ieee or capability >= 100 else 128
    while BLOCK_B < most and 5 * -(-B // (2 * BLOCK_B)) * -(-N // BLOCK_N) >= 2 * sm_count:
        BLOCK_B *= 2
    # as GPN's. unmeasured
    BLOCK_K = 16 if ieee else 32 if BLOCK_B >= 64 and not is_half(dtype) else 64
    warps = 8 if BLOCK_B >= 64 else 4
    stage = (BLOCK_B + BLOCK_N) * BLOCK_K * operand_dtype(dtype).itemsize
    forward = Tile(BLOCK_B, BLOCK_N, BLOCK_K, warps, 3 if 3 * stage <= limit else 2)
    backward = replace(forward, num_warps=8) if ieee else replace(forward, num_stages=2)
    return forward, backward


def _operand_clocks(
    B: int, N: int, rows: int, columns: int, row_bytes: int, column_bytes: int, sm_count: int
) -> float:
    """Clocks until the operands of a step's products have come from the L2 cache, at the least.

    A program reads row_bytes for each of its rows and column_bytes for each of its neurons.
    """
    programs = -(-B // rows) * -(-N // columns)
    size = rows * row_bytes + columns * column_bytes
    return max(-(-programs // sm_count) * size / L2_BYTES, programs * size / L2_BYTES_TOGETHER)


def stepwise_candidates(
    dtype: torch.dtype, precision: str, limit: int, capability: int
) -> dict[str, list[Tile]]:
    """The tiles of forward and of backward whose code is sound: no spill, no load that waits within
    the loop.

    Args:
        dtype, precision, capability: as for choose. limit: shared memory one program may have.
    """
    half, size = is_half(dtype), operand_dtype(dtype).itemsize
    ieee = not half and precision == "ieee"
    # the tensor cores that read shared memory themselves: wgmma, then tcgen05
    wgmma, tcgen05 = 90 <= capability < 100, 100 <= capability < 120

    def tile(rows: int, columns: int, stages: int) -> Tile:
        # without tensor cores (ieee) more depth spills; with them, 4 warps of 64 rows
        depth = 16 if ieee else 32 if rows >= 64 and not half else 64
        # what three stages of backward's operands take, for either: three gates of each
        if 3 * 3 * (rows + columns) * depth * size > limit:
            stages = 2
        return Tile(rows, columns, depth, 8 if rows >= 64 else 4, stages)

    # more rows spill without tensor cores (ieee). from 64 rows on triton takes tcgen05 for sm_100,
    # and then pipelines the loads of one sum alone, which are backward's
    narrow = [(16, 32), (32, 32)] if ieee else [(16, 32), (32, 32), (64, 32), (128, 32)]
    forward = [tile(*shape, stages=3) for shape in (narrow[:2] if tcgen05 else narrow)]
    if ieee:
        # 4 warps spill in backward at N = 256 (sm_80) and 513 (sm_90)
        return {"forward": forward, "backward": [replace(t, num_warps=8) for t in forward]}
    # twice the neurons halve what is read of g_z. 64 x 64 spills on sm_80, 128 x 64 with float32
    # operands and on sm_100
    wide = [(64, 64)] * (wgmma or tcgen05) + [(128, 64)] * (half and not tcgen05)
    # a third stage spills at N = 160 (float16, sm_80)
    backward = [tile(*shape, stages=2) for shape in narrow + wide]
    # side by side the sums of 128 x 64 spill (sm_80, sm_90), and no load is pipelined on sm_100;
    # in one sum 64 rows take 17 barriers instead of 2 on sm_90
    chained = 64 if tcgen05 else 128
    return {
        "forward": forward,
        "backward": [replace(t, chained=t.BLOCK_B >= chained) for t in backward],
    }


def _stepwise_tiles(
    B: int, N: int, dtype: torch.dtype, gates: tuple, precision: str, sm_count: int, limit: int,
    capability: int,
) -> tuple[Tile, Tile]:  # fmt: skip
    """The tiles of forward and backward, each for itself.

    What a step reads from the L2 cache bounds it sooner than tensor cores or idle multiprocessors
    do: of the candidates the one whose operands come soonest. Forward has a row of v and, for a
    neuron, the weights of every gate; backward a row of g_z and a column of weights, both of the
    serial gates. unmeasured
    """
    size = operand_dtype(dtype).itemsize
    serial = sum(gate != "theta" for gate in gates) * N * size
    bytes_read = {"forward": (N * size, len(gates) * N * size), "backward": (serial, serial)}
    found = stepwise_candidates(dtype, precision, limit, capability)
    return tuple(
        min(
            found[way],
            key=lambda t, way=way: _operand_clocks(
                B, N, t.BLOCK_B, t.BLOCK_N, *bytes_read[way], sm_count
            ),
        )
        for way in ("forward", "backward")
    )
