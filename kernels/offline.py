"""Compile the kernels that a layer would launch, for a GPU that need not be there, and read them.

The launchers themselves run, on small CPU tensors, with every launch replaced by its compilation:
what is compiled is what would be launched, argument for argument. Needs the triton wheel, which
brings ptxas and the disassembler, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpn_triton.kernels import tiles
from gpn_triton.kernels.cuba_lif import cuba_lif_backward, cuba_lif_forward
from gpn_triton.kernels.gpn_backward import gpn_backward
from gpn_triton.kernels.gpn_forward import gpn_forward
from gpn_triton.kernels.lif import lif_backward, lif_forward
from gpn_triton.kernels.spikes import spikes_unpack

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# shared memory one program may have, by compute capability, from the CUDA programming guide
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SM_COUNT = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}


class Instruction(NamedTuple):
    """A line of machine code and its control word (whose layout is arXiv 1804.06826's).

    text: without the guard, which is the predicate it runs under, or "". target: the line that a
    branch goes to. stall: cycles until the warp may issue its next line. result, operands: the
    scoreboard (0 to 5; 7: none) that is free again when the result is there, or the operands are
    read. waits: the scoreboards, a bit each, that must be free before it issues.
    """

    text: str
    guard: str = ""
    target: int | None = None
    stall: int = 1
    result: int = 7
    operands: int = 7
    waits: int = 0


class Dependence(NamedTuple):
    """Where a kernel meets the launch before it and lets the next one begin, as lines of its code.

    wait, launch, store: the lines that wait for the launch before, let the next one begin, and
    store first. ahead, behind: the pointer arguments read before and after the wait.
    """

    wait: int
    launch: int
    store: int
    ahead: frozenset[str]
    behind: frozenset[str]


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and holds; instruction counts are of the machine code.

    loop_*: within the innermost loop that has most tensor-core (or else most) instructions.
    dependence: None where the kernel does not wait for the launch before. code: the machine code.
    """

    kernel: str
    constants: dict
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    num_warps: int
    mma: int
    async_copies: int
    loop_instructions: int
    loop_mma: int
    loop_barriers: int
    loop_loads: int
    dependence: Dependence | None = None
    code: list[Instruction] = field(default_factory=list, repr=False, compare=False)


class _AbsentGPU:
    """The little that Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list]:
    """Within the block every kernel launch compiles for the capability and runs nothing.

    Yields:
        the list of (kernel name, constants, compiled kernel), one entry per distinct kernel.
    """
    found, seen, run, old = [], set(), JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            constants = {k: v for k, v in kwargs.items() if k.isupper()}
            found.append((self.__name__, constants, kernel))
        return kernel

    driver.set_active(_AbsentGPU(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = old


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of what `nvdisasm -c -hex` prints of one kernel."""
    lines, labels = [], {}
    for line in listing.splitlines():
        word = re.search(r"/\* 0x([0-9a-f]{16}) \*/$", line)
        if label := re.match(r"(\.L_\S+):", line.strip()):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", line):
            lines.append([found[2], found[1] or "", 0])
        elif word and lines:
            # the second half of an instruction, which ends in its control word
            lines[-1][2] = int(word[1], 16) >> 41
    code = []
    for text, guard, word in lines:
        jump = re.match(r"BRA\b.*?`\((\.L_\S+)\)", text)
        code.append(
            Instruction(
                text, guard, jump and labels.get(jump[1]), word & 15,
                word >> 5 & 7, word >> 8 & 7, word >> 11 & 63,
            )
        )  # fmt: skip
    return code


def count(code: list[Instruction], pattern: str) -> int:
    """How many of the instructions begin with the pattern."""
    return sum(bool(re.match(pattern, line.text)) for line in code)


MMA = "H?G?MMA|UTC.?MMA"


def hot_loop(code: list[Instruction]) -> tuple[int, int]:
    """First and last line of the innermost loop with most tensor-core instructions; (0, -1): none.

    Where there is no such instruction, of the longest loop.
    """
    # the endless jump to itself that ends a kernel is no loop
    loops = [
        (line.target, at)
        for at, line in enumerate(code)
        if line.target is not None and line.target < at
    ]

    def rank(loop: tuple[int, int]) -> tuple[int, int]:
        body = code[loop[0] : loop[1] + 1]
        return count(body, MMA), len(body)

    return max(loops, key=rank, default=(0, -1))


CONSTANT = r"c\[0x0\]\[0x([0-9a-f]+)\]"


def dependence(code: list[Instruction], arguments: dict[int, str]) -> Dependence | None:
    """Where the code stands towards the launches before and after it; None if it does not wait.

    What an address was made of is followed through the registers; "?" stands for one that comes
    from no argument that could be found.

    Args:
        code: of one kernel. arguments: its pointers, by their place in constant memory.
    """
    patterns = {"wait": "ACQBULK", "launch": "PREEXIT", "store": r"STG\b|ST\b"}
    places = {
        name: [at for at, line in enumerate(code) if re.match(pattern, line.text)]
        for name, pattern in patterns.items()
    }
    if not places["wait"]:
        return None
    wait, made_of = places["wait"][0], {}
    read: tuple[set, set] = set(), set()

    def pointer(at: int) -> set[str]:
        return {arguments[k] for k in (at, at - 4) if k in arguments}

    def origin(text: str) -> set[str]:
        found = set()
        for at in re.findall(CONSTANT, text):
            found |= pointer(int(at, 16))
        for register in re.findall(r"\bU?R\d+", text):
            found |= made_of.get(register, set())
        return found

    # twice: a loop's registers come from its end, too
    for at, line in [*enumerate(code)] * 2:
        opcode, _, operands = line.text.partition(" ")
        if re.match(r"LDG(STS)?\b|LD\b", opcode):
            # desc[...] in front of the address holds no pointer of the kernel's
            address = re.findall(r"(?<!desc)\[([^\]]*)\]", operands)[-1]
            read[at > wait].update(origin(address) or {"?"})
        target, _, sources = operands.partition(",")
        first = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", target.strip())
        if not first or re.match("ST|RED|BRA", opcode):
            continue
        # a wide result lies in more than one register
        width = 4 if ".128" in opcode else 2 if re.search(r"\.64|WIDE|CS2R", opcode) else 1
        # a result of these is no address that came from an argument
        unknown = re.match(r"LDG|LDS|LDL|LD\b|S2U?R|SHFL", opcode)
        constants = re.match("U?LDCU?", opcode) and re.search(CONSTANT, sources)
        for k in range(width):
            register = first[1] + str(int(first[2]) + k)
            # wide enough, the load of a constant brings several arguments
            value = pointer(int(constants[1], 16) + 4 * k) if constants else origin(sources)
            kept = made_of.get(register, set()) if line.guard else set()
            made_of[register] = kept | (set() if unknown else value)
    end = len(code)
    launch, store = ((places[name] or [end])[0] for name in ("launch", "store"))
    return Dependence(wait, launch, store, frozenset(read[0]), frozenset(read[1]))


# where the arguments of a kernel begin in constant memory, from which compute capability on
ARGUMENTS = {100: 0x380, 90: 0x210, 80: 0x160}


def _pointers(signature: dict[str, str], capability: int) -> dict[int, str]:
    """The kernel's pointer arguments by their place in constant memory."""
    found, at = {}, next(at for least, at in ARGUMENTS.items() if capability >= least)
    for name, kind in signature.items():
        if kind != "constexpr":
            size = 8 if kind.startswith("*") or kind.endswith("64") else 4
            at = -(-at // size) * size
            if kind.startswith("*"):
                found[at] = name
            at += size
    return found


def read(name: str, constants: dict, kernel) -> Report:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    try:
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = parse(_tool("nvdisasm", "-c", "-hex", file.name))
    finally:
        os.unlink(file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    first, last = hot_loop(code)
    loop = code[first : last + 1]
    return Report(
        name, constants, registers, stack,
        count(code, "LDL|STL"), kernel.metadata.shared, kernel.metadata.num_warps,
        count(code, MMA), count(code, "LDGSTS"),
        len(loop), count(loop, MMA), count(loop, "BAR"), count(loop, r"LDG\."),
        dependence(code, _pointers(kernel.src.signature, kernel.metadata.target.arch)), code,
    )  # fmt: skip


def compile_layer(
    N: int,
    dtype: torch.dtype,
    capability: int,
    gates: tuple[str, ...] = ("f", "i", "b", "theta"),
    surrogate: str = "atan",
    T: int = 100,
    B: int = 256,
    every: int = 1,
    mean: bool = False,
    precision: str = "ieee",
    plan: tiles.Plan | None = None,
    lengths: bool = False,
) -> tuple[tiles.Plan, list[Report]]:
    """Compile every kernel that forward and backward of one layer launch, and of the linear layer
    on its spikes.

    Args:
        N, dtype, gates, surrogate, every, mean: of the layer; T, B: what the plan is chosen for.
        capability: 80, 86, 89, 90 or 100. precision: of float32 products, "ieee" or "tf32".
        plan: instead of tiles.choose. lengths: whether sequences have their own.
    Returns:
        the plan and one report per kernel.
    """
    plan = plan or tiles.choose(
        T, B, N, dtype, gates, every, precision, SM_COUNT[capability], SHARED_BYTES[capability],
        capability,
    )  # fmt: skip
    # the compiled code depends on neither T nor B: few steps of few rows reach every launch
    steps, rows = 3 * every, 2
    x = torch.zeros(steps, rows, N, dtype=dtype)
    state = torch.zeros(rows, N)
    ends = torch.ones(rows, dtype=torch.int64) if lengths else None
    weights = [None] * 3
    if gates:
        G = len(gates)
        weights = [torch.zeros(G * N, N), torch.zeros(G * N, N), torch.zeros(G * N)]
    with compiling(capability) as found:
        out, _, v_saved, bits = gpn_forward(
            x, *weights, state, state, gates, every, mean, plan, ends
        )
        g_out = torch.zeros_like(out)
        gpn_backward(
            g_out, None, x, *weights, state, bits, v_saved,
            gates, surrogate, 2.0, every, mean, plan, ends,
        )  # fmt: skip
        if not mean:
            for mask in (None, state):
                spikes_unpack(bits, mask, 0, steps, dtype)
    return plan, [read(*entry) for entry in found]


def compile_lif(
    N: int, dtype: torch.dtype, capability: int, surrogate: str = "atan", learns: bool = True
) -> tuple[tiles.Plan, list[Report]]:
    """Compile the kernels of a layer of LIF, or of PLIF (learns), as compile_layer."""
    plan, x = tiles.choose_lif(3), torch.zeros(3, 2, N, dtype=dtype)
    state, tau = torch.zeros(2, N), torch.ones(())
    with compiling(capability) as found:
        spikes, v, h, _ = lif_forward(x, state, tau, True, plan)
        lif_backward(spikes, v, h, state, tau, learns, surrogate, 2.0, plan)
    return plan, [read(*entry) for entry in found]


def compile_cuba_lif(
    N: int,
    dtype: torch.dtype,
    capability: int,
    surrogate: str = "atan",
    B: int = 256,
    precision: str = "ieee",
) -> tuple[tiles.Plan, list[Report]]:
    """Compile the kernels of a layer of CuBa-LIF, as compile_layer."""
    plan = tiles.choose_cuba_lif(
        3, B, N, dtype, precision, SM_COUNT[capability], SHARED_BYTES[capability], capability
    )
    x, state = torch.zeros(3, 2, N, dtype=dtype), torch.zeros(2, N)
    weights, decays = (torch.zeros(N, N), torch.zeros(N)), (0.5, 0.5)
    with compiling(capability) as found:
        spikes, *ends, h, bits = cuba_lif_forward(x, *weights, *[state] * 3, *decays, True, plan)
        cuba_lif_backward(spikes, *ends, h, bits, weights[0], state, *decays, surrogate, 2.0, plan)
    return plan, [read(*entry) for entry in found]
