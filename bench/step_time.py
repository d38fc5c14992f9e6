"""What a time step takes by the machine code: a warp's walk through it, with stated latencies.

Nothing of this is measured: its figures are to be called estimated. The walk issues one line of
code after the other, as a warp does. The control word of a line says for how many cycles the next
one is held back and which scoreboards it waits for; COSTS says when a result is there and for how
long a unit is kept busy. A stretch of code takes as long as the walk of a warp that shares no unit
with another, or as its busiest unit is kept busy by all warps there, whichever is longer.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from gpn_triton.kernels.offline import MMA, SHARED_BYTES, SM_COUNT, Instruction, Report, hot_loop
from gpn_triton.kernels.tiles import L2_BYTES, L2_BYTES_TOGETHER

GUIDE = "CUDA programming guide: results per clock and multiprocessor"
PAPERS = "NVIDIA's white papers of A100 and H100"
# highest clock in GHz: as stated for A100 SXM and H100 SXM, of sm_100 assumed
CLOCK_GHZ = {80: 1.41, 90: 1.98, 100: 1.965}
# microseconds from the end of a launch to the start of the next in a captured graph, and from the
# end of a launch to those that wait for it within the next. assumed
LAUNCH_US, WAIT_US = 1.3, 0.9
# of a multiprocessor, each with a scheduler and a tensor core
QUARTERS = 4


class Cost(NamedTuple):
    """What lines of one kind cost, by compute capability, in cycles.

    pattern: how they begin. unit: what they keep busy. latency: until the result is there.
    interval: for how long one warp keeps the unit of its quarter of a multiprocessor busy, for 4
    bytes a thread where memory is meant. source: of both, or "assumed".
    """

    pattern: str
    unit: str
    latency: dict[int, float]
    interval: dict[int, float]
    source: str


def _alike(value: float) -> dict[int, float]:
    return dict.fromkeys(CLOCK_GHZ, value)


# shared and global memory serve the whole multiprocessor: of shared memory 128 bytes a clock
COSTS = (
    Cost("HMMA", "tensor core", _alike(33), {80: 8, 90: 6.4, 100: 8.2},
         "interval on sm_80: arXiv 2208.11174; on sm_90 63 % of the peak in the white paper, the"
         " share of mma.sync in arXiv 2501.12084; sm_100 and latency assumed"),
    Cost("HGMMA|UTC.?MMA", "tensor core", _alike(33), _alike(0),
         f"interval, by the shape: {PAPERS}; sm_100 and latency assumed"),
    Cost("MUFU|F2F|F2I|I2F", "special function", _alike(24), _alike(8),
         f"interval: {GUIDE}; latency assumed"),
    Cost("FFMA|FADD|FMUL", "float32", _alike(4), {80: 2, 90: 1, 100: 1}, GUIDE),
    Cost("LDS|LDTM", "shared memory", _alike(29), _alike(4),
         "interval: 128 bytes a clock, CUDA programming guide; latency assumed"),
    Cost("STS|STTM|ATOMS", "shared memory", _alike(29), _alike(4), "as loads; assumed"),
    Cost("SHFL|REDUX", "shared memory", _alike(24), _alike(4), "assumed"),
    Cost(r"LDG\.|LDGSTS|LD\.", "global memory", _alike(262), _alike(0),
         "latency, a hit in the L2 cache: A100 in arXiv 2402.13499; of the others assumed"),
    Cost(r"STG|ST\.", "global memory", _alike(0), _alike(0), "nothing waits for a store"),
    Cost("BAR", "barrier", _alike(30), _alike(0), "assumed"),
    Cost("FENCE|MEMBAR|SYNCS", "fence", _alike(30), _alike(0), "assumed"),
    Cost("U?LDCU?|S2U?R|R2UR", "constants", _alike(30), _alike(0), "assumed"),
)  # fmt: skip
OTHER = Cost("", "other", _alike(24), _alike(0), "assumed, where a scoreboard is raised")


@dataclass(frozen=True)
class Estimate:
    """Estimated, not measured: what a time step of one kernel takes.

    chain: cycles of one round of the loop (of a depth tile where there is no loop) for a warp that
    shares no unit with another. step_us: the whole step; of a stepwise launch from the end of the
    one before to its own end. dependent_us: the same where it begins early; None if it does not.
    """

    chain: float
    step_us: float
    dependent_us: float | None


def _bytes(opcode: str) -> int:
    """Bytes that a thread of the instruction moves."""
    if "LDSM" in opcode or "STSM" in opcode:
        return 4 * int(opcode[-1]) if opcode[-1].isdigit() else 4
    return next((k // 8 for k in (128, 64) if f".{k}" in opcode), 4)


def _products(line: Instruction, constants: dict) -> float:
    """Multiply-adds of an instruction, as one warp's share."""
    if shape := re.match(r"HMMA\.(16816|1688|1684)\b", line.text):
        return 128 * {"16816": 16, "1688": 8, "1684": 4}[shape[1]]
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", line.text):
        return math.prod(map(int, shape.groups())) / 4
    if re.match("UTC.?MMA", line.text):
        depth = 16 if constants.get("FAST") else 8
        rows, columns = constants["BLOCK_B"], constants["BLOCK_N"]
        return rows * columns * depth / constants["num_warps"]
    return 32 if line.text.startswith("FFMA") else 0


def _cost(line: Instruction) -> Cost:
    return next((cost for cost in COSTS if re.match(cost.pattern, line.text)), OTHER)


def _interval(line: Instruction, cost: Cost, capability: int, bandwidth: float, constants: dict):
    """For how many cycles a warp's instruction keeps its unit busy, as the unit of a quarter."""
    if cost.unit == "global memory":
        # four quarters share what comes from the L2 cache
        return QUARTERS * 32 * _bytes(line.text.split(" ")[0]) / bandwidth
    if cost.unit == "shared memory":
        return cost.interval[capability] * _bytes(line.text.split(" ")[0]) / 4
    if shape := re.match(r"HGMMA\.\d+x(\d+)", line.text):
        return int(shape[1]) / 2
    if re.match("UTC.?MMA", line.text):
        # one warp issues it for its whole program
        return constants["BLOCK_N"] / 2 * QUARTERS / constants["num_warps"]
    return cost.interval[capability]


def path(code: list[Instruction], rounds: int) -> list[int]:
    """The lines that are executed, with so many rounds of the hot loop.

    Branches that depend on something are not taken, but for those that lead to the loop and back.
    """
    first, last = hot_loop(code)
    always = [re.match("BRA(.U)? `", i.text) is not None and not i.guard for i in code]
    # from a line ahead of the loop to one behind it
    over = {at for at, i in enumerate(code[:first]) if always[at] and (i.target or 0) > last}
    order, at = [], 0
    while at < len(code):
        line = code[at]
        order.append(at)
        if line.text.startswith("EXIT") and not line.guard:
            break
        ahead = line.target is not None and line.target > at
        if at == last and rounds > 1:
            at, rounds = first, rounds - 1
        elif ahead and (always[at] or (at < first and over & set(range(at, line.target)))):
            at = line.target
        else:
            at += 1
    return order


def walk(
    code: list[Instruction], order: list[int], capability: int, constants: dict
) -> list[float]:
    """The cycle at which a lone warp issues each line, and that at which the last one is done.

    Args:
        order: numbers of the lines, as `path` gives them. constants: the kernel's, and num_warps.
    """
    now, clocks, free, busy = 0.0, [], [0.0] * 8, {}
    copied, groups, products, multiplied = 0.0, [], [], 0.0
    for at in order:
        line = code[at]
        opcode, cost = line.text.split(" ")[0], _cost(line)
        now = max([now, *(free[k] for k in range(6) if line.waits >> k & 1)])
        if opcode.endswith("DEPBAR.LE"):
            pending = products if opcode.startswith("WARPGROUP") else groups
            still_open = int(re.search(r", 0x([0-9a-f]+)", line.text)[1], 16)
            now = max([now, *pending[: max(0, len(pending) - still_open)]])
        interval = _interval(line, cost, capability, L2_BYTES, constants)
        start = max(now, busy.get(cost.unit, 0.0))
        busy[cost.unit] = start + interval
        done = start + interval + cost.latency[capability]
        if re.match("HG|UTC.?MMA", line.text):
            multiplied = done
            if "gsb0" in line.text:
                products.append(done)
        elif opcode.startswith("LDGSTS"):
            copied = max(copied, done)
        elif opcode == "LDGDEPBAR":
            groups.append(copied)
        elif opcode.startswith("SYNCS"):
            # the barrier of tcgen05's products
            done = max(done, multiplied)
        elif cost.unit == "barrier":
            now += cost.latency[capability]
        clocks.append(now)
        if line.result < 6:
            free[line.result] = max(free[line.result], done)
        if line.operands < 6:
            free[line.operands] = max(free[line.operands], start + interval)
        if cost.unit in ("tensor core", "float32"):
            # what finds its unit taken is not issued
            now = start
        now += max(1, line.stall)
    return [*clocks, max([now, *free, *busy.values()])]


def busiest(
    code: list[Instruction], order: list[int], capability: int, bandwidth: float, constants: dict
) -> float:
    """For how many cycles a warp keeps the unit of a quarter busy that it keeps busy longest.

    Issuing is a unit, too: one line a cycle.
    """
    busy: dict[str, float] = {"issue": len(order)}
    for at in order:
        cost = _cost(code[at])
        interval = _interval(code[at], cost, capability, bandwidth, constants)
        busy[cost.unit] = busy.get(cost.unit, 0.0) + interval
    return max(busy.values())


def _rounds(report: Report) -> int:
    """How often the hot loop of a stepwise kernel runs, by the products that are to be taken."""
    constants = report.constants | {"num_warps": report.num_warps}
    gates = constants["GATES"].split()
    G = len(gates) if "forward" in report.kernel else sum(gate != "theta" for gate in gates)
    wanted = constants["BLOCK_B"] * constants["BLOCK_N"] * constants["N"] * G / report.num_warps
    kind = MMA if report.mma else "FFMA"
    works = [_products(i, constants) if re.match(kind, i.text) else 0 for i in report.code]
    first, last = hot_loop(report.code)
    loop = sum(works[first : last + 1])
    return max(1, round((wanted - sum(works) + loop) / loop)) if loop else 1


def estimate(report: Report, B: int, capability: int) -> Estimate:
    """A time step of one recurrence kernel at a batch of B, where the GPU does nothing else.

    Args:
        report: of the kernel's launch. capability: of the GPU it was compiled for.
    """
    constants = report.constants | {"num_warps": report.num_warps}
    warps, code, sms = report.num_warps, report.code, SM_COUNT[capability]
    programs = -(-B // constants["BLOCK_B"]) * -(-constants["N"] // constants["BLOCK_N"])
    registers = 32 * warps * -(-report.registers // 8) * 8
    # one KiB of shared memory a program is the system's
    fit = (SHARED_BYTES[capability] + 1024) // (report.shared_bytes + 1024)
    fit = max(1, min(fit, (1 << 16) // registers, 64 // warps))
    beside = min(fit, -(-programs // sms))
    waves = -(-programs // (sms * beside))
    share = warps * beside / QUARTERS
    bandwidth = min(L2_BYTES, L2_BYTES_TOGETHER / min(sms, programs))

    def cycles(order: list[int], lone: float) -> float:
        return max(lone, share * busiest(code, order, capability, bandwidth, constants))

    first, last = hot_loop(code)
    persistent = "persistent" in report.kernel
    rounds = 4 if persistent else _rounds(report)
    order = path(code, rounds)
    clocks = walk(code, order, capability, constants)
    starts = [k for k, at in enumerate(order) if at == first]
    if len(starts) > 1:
        # the last of several rounds, when copies are on their way
        chain = clocks[starts[-1]] - clocks[starts[-2]]
    else:
        chain = clocks[-1] / max(1, constants["N"] / constants.get("BLOCK_K", constants["N"]))
    us = waves / (1e3 * CLOCK_GHZ[capability])
    if persistent:
        return Estimate(chain, us * cycles(order[starts[-2] : starts[-1]], chain), None)
    # a stretch up to the wait, the loop, and what follows
    cuts = [order.index(report.dependence.wait)] if report.dependence else []
    if len(starts) > 1:
        cuts += [starts[0], len(order) - order[::-1].index(last)]
    cuts = [0, *sorted(cuts), len(order)]
    parts = [cycles(order[a:b], clocks[b] - clocks[a]) for a, b in itertools.pairwise(cuts)]
    whole = LAUNCH_US + us * sum(parts)
    early = WAIT_US + us * sum(parts) - parts[0] * us / waves if report.dependence else None
    return Estimate(chain, whole, early)
