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
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and holds; instruction counts are of the machine code.

    loop_*: within the innermost loop that has most tensor-core (or else most) instructions.
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


def _tool(name: str, option: str, cubin: str) -> str:
    command = [str(TOOLS / name), option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(name: str, constants: dict, kernel) -> Report:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    try:
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    finally:
        os.unlink(file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\S+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(.*?);", line):
            instructions.append(instruction[1])
    for at, text in enumerate(instructions):
        jump = re.match(r"BRA\b.*?`\((\.L_\S+)\)", text)
        # the endless jump to itself that ends a kernel is no loop
        if jump and labels.get(jump[1], at) < at:
            loops.append(instructions[labels[jump[1]] : at + 1])

    def count(code: list[str], pattern: str) -> int:
        return sum(bool(re.match(pattern, text)) for text in code)

    loop = max(loops, key=lambda code: (count(code, "H?G?MMA"), len(code)), default=[])
    return Report(
        name, constants, registers, stack,
        count(instructions, "LDL|STL"), kernel.metadata.shared, kernel.metadata.num_warps,
        count(instructions, "H?G?MMA"), count(instructions, "LDGSTS"),
        len(loop), count(loop, "H?G?MMA"), count(loop, "BAR"), count(loop, r"LDG\."),
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
