"""Registers, spills, shared memory and instructions of the kernels, without a GPU.

python -m bench.offline                                            all, into bench/results
python -m bench.offline --N 128 --dtype float16 --capability 90    one layer, printed
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from bench.report import markdown
from gpn_triton.kernels import tiles
from gpn_triton.kernels.offline import (
    SHARED_BYTES,
    SM_COUNT,
    Report,
    compile_cuba_lif,
    compile_layer,
    compile_lif,
)
from gpn_triton.machine.provenance import provenance
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.surrogate import SURROGATES

CAPABILITIES = (80, 90)
# dtype of x, precision of float32 products
NUMBERS = (("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee"))
# every power of two that has tiles of its own, and sizes that masks or padding fill up
SIZES = (1, 16, 32, 37, 64, 100, 128, 160, 256, 512, 1024)
BATCHES = (1, 32, 256, 2048, 8192)
REGISTERS = 1 << 16
RESULTS = Path(__file__).parent / "results" / "offline_kernels.md"


@dataclass(frozen=True)
class Layer:
    """What decides which kernels a layer launches: arguments of offline.compile_layer, or those of
    them that compile_lif or compile_cuba_lif take."""

    N: int
    dtype: str = "float16"
    precision: str = "ieee"
    capability: int = 90
    variant: str = "full"
    B: int = 256
    every: int = 1
    mean: bool = False
    surrogate: str = "atan"
    lengths: bool = False
    neuron: str = "gpn"

    def compile(self) -> tuple[tiles.Plan, list[Report]]:
        """The plan and a report for each kernel."""
        options = asdict(self)
        options["dtype"] = getattr(torch, options["dtype"])
        options["gates"] = GATES[options.pop("variant")]
        neuron = options.pop("neuron")
        if neuron == "gpn":
            return compile_layer(**options)
        names = ["N", "dtype", "capability", "surrogate"]
        if neuron == "lif":
            return compile_lif(*(options[name] for name in names))
        return compile_cuba_lif(*(options[name] for name in (*names, "B", "precision")))

    def plan(self) -> tiles.Plan:
        """What tiles.choose answers, without what does not change the compiled code."""
        sizes = 100, self.B, self.N, getattr(torch, self.dtype)
        limits = self.precision, SM_COUNT[self.capability], SHARED_BYTES[self.capability]
        limits = *limits, self.capability
        if self.neuron == "lif":
            plan = tiles.choose_lif(100)
        elif self.neuron == "cuba-lif":
            plan = tiles.choose_cuba_lif(*sizes, *limits)
        else:
            plan = tiles.choose(*sizes, GATES[self.variant], self.every, *limits)
        return replace(plan, forward_steps=0, backward_steps=0, reason="")


def all_layers() -> list[Layer]:
    """What the table holds.

    First the full neuron at a batch of 256: every size, dtype and capability. Then every other
    tile, variant, option and surrogate, each at sizes of both strategies; bfloat16 has the tiles
    and, but for the type of x, the code of float16. LIF aligned and not, and CuBa-LIF at every
    size, come last.
    """
    each = itertools.product
    layers = [Layer(N, *kind, sm) for sm, kind, N in each(CAPABILITIES, NUMBERS, SIZES)]
    options = [{"variant": v} for v in GATES if v != "full"]
    options += [{"mean": True}, {"every": 10}, {"mean": True, "every": 10}, {"lengths": True}]
    for sm, kind in each(CAPABILITIES, [n for n in NUMBERS if n[0] != "bfloat16"]):
        # the batch changes the tiles of the stepwise strategy
        seen = {Layer(256, *kind, sm).plan()}
        for N, B in each((256, 1024), BATCHES):
            layer = Layer(N, *kind, sm, B=B)
            if layer.plan() not in seen:
                seen.add(layer.plan())
                layers.append(layer)
        layers += [replace(Layer(N, *kind, sm), **o) for N, o in each((64, 128, 256), options)]
        layers += [Layer(128, *kind, sm, surrogate=s) for s in SURROGATES if s != "atan"]
    for sm, kind in each(CAPABILITIES, NUMBERS):
        if kind[1] == "ieee":
            layers += [Layer(N, *kind, sm, neuron="lif") for N in (128, 37)]
        layers += [Layer(N, *kind, sm, neuron="cuba-lif") for N in SIZES]
    return layers


def multiplies(report: Report) -> bool:
    """Whether the kernel holds a matrix product."""
    constants = report.constants
    # CuBa-LIF's kernels have no constant GATES
    multiplying = constants.get("GATES", True) and constants.get("PRODUCT", True)
    return "PRECISION" in constants and multiplying


# what the launches of a chain write, by the kernel's arguments
CHAIN = {
    "gpn_forward_stepwise_kernel": {
        "v_in_ptr", "state_ptr", "v_ptr", "v_out_ptr", "spikes_ptr", "bits_ptr", "counts_ptr",
    },
    "gpn_backward_stepwise_kernel": {"g_v_in_ptr", "g_v_ptr", "g_z_ptr", "g_x_ptr"},
}  # fmt: skip


def out_of_step(report: Report) -> list[str]:
    """What a launch that may begin before the one before it has ended does too soon or too late."""
    where, found = report.dependence, []
    if where is None:
        return ["does not wait for the launch before"]
    if early := where.ahead & (CHAIN[report.kernel] | {"?"}):
        found.append(f"reads {', '.join(sorted(early))} ahead of the wait")
    if where.store < where.wait:
        found.append("stores ahead of the wait")
    if not where.wait < where.launch < where.store:
        found.append("lets the next launch begin ahead of the wait or behind a store")
    return found


def faults(report: Report, capability: int) -> list[str]:
    """What keeps a kernel from being launched or from being fast; empty if all is well.

    Args:
        report: of one kernel. capability: of the GPU it was compiled for.
    """
    found = []
    if report.stack_bytes or report.local_accesses:
        found.append(f"spills: {report.stack_bytes} bytes of stack")
    if report.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"shared memory: {report.shared_bytes} of {SHARED_BYTES[capability]} bytes")
    if report.registers * 32 * report.num_warps > REGISTERS:
        found.append(f"registers: {report.registers} x {32 * report.num_warps} threads")
    constants = report.constants
    half = constants.get("FAST") or str(constants.get("OPERAND")) in ("fp16", "bf16")
    tensor_cores = half or constants.get("PRECISION") == "tf32"
    if multiplies(report) and tensor_cores and not report.mma:
        found.append("no tensor-core instruction")
    if "persistent" in report.kernel or report.kernel.startswith("lif") or multiplies(report):
        if not report.async_copies:
            found.append("no asynchronous copy")
        if report.loop_loads:
            found.append(f"{report.loop_loads} loads that wait within the loop")
    if constants.get("DEPENDENT"):
        found += out_of_step(report)
    return found


def row(layer: Layer, reports: list[Report]) -> dict[str, object]:
    """A layer's line of the table: the most that any of its kernels takes."""
    wrong = [f"{name(r)}: {fault}" for r in reports for fault in faults(r, layer.capability)]
    plan, tile = layer.plan(), layer.plan().forward

    def most(field: str) -> int:
        return max(getattr(report, field) for report in reports)

    return {
        "neuron": layer.variant if layer.neuron == "gpn" else layer.neuron,
        "N": layer.N,
        "B": layer.B,
        "products": layer.precision if layer.dtype == "float32" else layer.dtype,
        "sm": layer.capability,
        "strategy": plan.strategy,
        "forward tile": f"{tile.BLOCK_B}x{tile.BLOCK_N}x{tile.BLOCK_K}",
        "output": "mean" if layer.mean else "spikes",
        "v saved every": layer.every,
        "surrogate": layer.surrogate,
        "kernels": len(reports),
        "registers": most("registers"),
        "shared KiB": most("shared_bytes") >> 10,
        "spills": sum(r.local_accesses for r in reports),
        "mma": most("mma"),
        "loop instructions": most("loop_instructions"),
        "loop barriers": most("loop_barriers"),
        "faults": "; ".join(wrong) or "-",
    }


def name(report: Report) -> str:
    """A kernel in words: forward persistent, backward stepwise, last product, gradient ..."""
    words = report.kernel.removeprefix("recurrence_").removesuffix("_kernel").replace("_", " ")
    constants = report.constants
    if constants.get("REPLAY"):
        words = words.replace("forward", "replay")
    if not constants.get("PRODUCT", True):
        words += ", first step"
    if not constants.get("CELL", True):
        words += ", last product"
    if constants.get("DEPENDENT"):
        words += ", begun early"
    return words + (", masked" if constants.get("MASKED") else "")


def write_results(path: Path) -> int:
    """Compile everything and write the table; returns the number of layers with faults.

    The progress goes to standard error.
    """
    rows, layers = [], all_layers()
    for k, layer in enumerate(layers):
        print(f"\r{k + 1}/{len(layers)} {layer}", end="\x1b[K", file=sys.stderr, flush=True)
        rows.append(row(layer, layer.compile()[1]))
    print(file=sys.stderr)
    kernels = sum(r["kernels"] for r in rows)
    wrong = sum(r["faults"] != "-" for r in rows)
    made = provenance(torch.device("cpu"))
    path.write_text(
        f"""# The kernels as compiled, without a GPU

Made by `python -m bench.offline` at commit {made["commit"]} with triton {triton.__version__} \
(its own ptxas) and torch {torch.__version__}. Nothing here was run: these are the compiler's \
figures and the machine code's, counted. {len(rows)} layers of {kernels} kernels, {wrong} layers \
with faults.

A fault is: a spill; more shared memory than one program may have (163 KiB on sm 80, 227 KiB \
on sm 90); more registers than 65,536 a multiprocessor; no tensor-core instruction where a product \
has half or tf32 operands; where loads are to be pipelined, no asynchronous copy or, in the \
loop, a load that waits.

A line is a layer: the most that any of its kernels takes (`python -m bench.offline --N 128` \
prints each kernel). products: what the operands are (float16 and bfloat16: x's dtype; tf32, ieee: \
float32 x). spills: local loads and stores. loop: the innermost loop with most tensor-core \
instructions, per warp.

{markdown(rows[0], (r.values() for r in rows), left=len(rows[0]))}
""",
        encoding="utf-8",
    )
    return wrong


def main() -> None:
    """Compile one layer and print a line per kernel, or everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--N", type=int, help="one layer of so many neurons instead of all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the tables go")
    choices = {
        "dtype": ["float16", "bfloat16", "float32"],
        "capability": [90, 80],
        "neuron": ["gpn", "lif", "cuba-lif"],
        "variant": list(GATES),
        "precision": ["ieee", "tf32"],
        "surrogate": list(SURROGATES),
    }
    for option, values in choices.items():
        usual = getattr(Layer, option)
        parser.add_argument(f"--{option}", type=type(usual), default=usual, choices=values)
    parser.add_argument("--B", type=int, default=256)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--mean", action="store_true")
    options = vars(parser.parse_args())
    out = options.pop("out")
    if options["N"] is None:
        wrong = write_results(out)
        print(f"{out}: {wrong} layers with faults")
        sys.exit(wrong > 0)
    plan, reports = Layer(**options).compile()
    print(plan)
    for report in reports:
        print(name(report), report, *faults(report, options["capability"]), sep="\n  ")


if __name__ == "__main__":
    main()
