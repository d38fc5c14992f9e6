"""Registers, spills, shared memory and instructions of the kernels, without a GPU.

python -m bench.offline                                            all, into bench/results
python -m bench.offline --N 128 --dtype float16 --capability 90    one layer, printed
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from bench.report import markdown
from bench.step_time import CLOCK_GHZ, COSTS, LAUNCH_US, OTHER, WAIT_US, Estimate, estimate
from gpn_triton.kernels import tiles
from gpn_triton.kernels.offline import (
    SHARED_BYTES,
    SM_COUNT,
    Report,
    compile_cuba_lif,
    compile_layer,
    compile_lif,
)
from gpn_triton.kernels.tiles import L2_BYTES, L2_BYTES_TOGETHER
from gpn_triton.machine.provenance import provenance
from gpn_triton.neurons.reference import GATES
from gpn_triton.neurons.surrogate import SURROGATES

CAPABILITIES = (80, 90, 100)
# of the stepwise tiles' estimates
BATCHES = (256, 2048)
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

    def compile(self, plan: tiles.Plan | None = None) -> tuple[tiles.Plan, list[Report]]:
        """The plan, that which is chosen or another, and a report for each kernel."""
        options = asdict(self) | {"plan": plan}
        options["dtype"] = getattr(torch, options["dtype"])
        options["gates"] = GATES[options.pop("variant")]
        neuron = options.pop("neuron")
        if neuron == "gpn":
            return compile_layer(**options)
        names = ["N", "dtype", "capability", "surrogate"]
        if neuron == "lif":
            return compile_lif(*(options[name] for name in names))
        return compile_cuba_lif(*(options[name] for name in (*names, "B", "precision")))

    def chosen(self) -> tiles.Plan:
        """What tiles.choose, or its counterpart for the neuron, answers."""
        sizes = 100, self.B, self.N, getattr(torch, self.dtype)
        limits = self.precision, SM_COUNT[self.capability], SHARED_BYTES[self.capability]
        limits = *limits, self.capability
        if self.neuron == "lif":
            return tiles.choose_lif(100)
        if self.neuron == "cuba-lif":
            return tiles.choose_cuba_lif(*sizes, *limits)
        return tiles.choose(*sizes, GATES[self.variant], self.every, *limits)

    def plan(self) -> tiles.Plan:
        """The same without what does not change the compiled code."""
        return replace(self.chosen(), forward_steps=0, backward_steps=0, reason="")


def all_layers() -> list[Layer]:
    """What the table of layers holds: a choice, since a layer takes up to half a minute to compile.

    The full neuron in float16, persistent and stepwise, for every GPU. For sm_90, too, each way of
    multiplying float32, a size that masks fill up, a large batch, every variant, and the options.
    bfloat16 has the tiles and, but for the type of x, the code of float16. The leaky neurons are
    not in it (`--neuron`).
    """
    layers = [Layer(N, capability=sm) for sm in CAPABILITIES for N in (128, 512)]
    layers += [Layer(256), Layer(512, B=2048), Layer(512, "float32", "tf32"), Layer(37)]
    layers += [Layer(256, "float32", "ieee"), Layer(256, every=10, mean=True)]
    layers += [Layer(128, variant=v) for v in GATES if v != "full"]
    return [*layers, Layer(128, every=10, lengths=True)]


def candidates(
    capability: int, N: int = 512, dtype: str = "float16"
) -> list[tuple[Layer, tiles.Plan]]:
    """A layer with each of the stepwise tiles, forward's and backward's side by side."""
    layer = Layer(N, dtype, capability=capability)
    found = tiles.stepwise_candidates(
        getattr(torch, dtype), layer.precision, SHARED_BYTES[capability], capability
    )
    pairs = itertools.zip_longest(*found.values(), fillvalue=found["forward"][0])
    return [
        (layer, replace(layer.chosen(), forward=forward, backward=backward))
        for forward, backward in pairs
    ]


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


def size(tile: tiles.Tile) -> str:
    """Rows x neurons x depth of a tile; + where its sums are chained."""
    return f"{tile.BLOCK_B}x{tile.BLOCK_N}x{tile.BLOCK_K}" + "+" * tile.chained


def serial(reports: list[Report]) -> dict[str, Report]:
    """GPN's kernels of which a step in the midst of a chunk is one, forward and backward."""
    found = {}
    for report in reports:
        constants = report.constants
        whole = constants.get("PRODUCT", True) and constants.get("CELL", True)
        if not re.match("gpn_.*(persistent|stepwise)", report.kernel) or constants.get("REPLAY"):
            continue
        way = "forward" if "forward" in report.kernel else "backward"
        # of two versions the one that begins early is a chain's
        if whole and (way not in found or constants.get("DEPENDENT")):
            found[way] = report
    return found


def microseconds(found: Estimate) -> str:
    """A step's estimated time; behind a stroke, where it begins before the one before has ended."""
    early = "" if found.dependent_us is None else f" / {found.dependent_us:.2g}"
    return f"{found.step_us:.2g}{early}"


def candidate_rows(layer: Layer, plan: tiles.Plan, reports: list[Report]) -> list[dict]:
    """The lines of one pair of stepwise tiles: forward's and backward's."""
    rows = []
    for way, report in serial(reports).items():
        tile = getattr(plan, way)
        found = {B: estimate(report, B, layer.capability) for B in BATCHES}
        chosen = [B for B in BATCHES if getattr(replace(layer, B=B).chosen(), way) == tile]
        rows.append(
            {
                "sm": layer.capability,
                "way": way,
                "tile": size(tile),
                "warps": tile.num_warps,
                "stages": tile.num_stages,
                "registers": report.registers,
                "shared KiB": report.shared_bytes >> 10,
                "spills": report.local_accesses,
                "loop instructions": report.loop_instructions,
                "chain, cycles, estimated": f"{found[BATCHES[0]].chain:.0f}",
                **{f"B = {B}, us, estimated": microseconds(found[B]) for B in BATCHES},
                "chosen at B =": ", ".join(map(str, chosen)) or "-",
            }
        )
    return rows


def row(layer: Layer, reports: list[Report]) -> dict[str, object]:
    """A layer's line of the table: the most that any of its kernels takes."""
    wrong = [f"{name(r)}: {fault}" for r in reports for fault in faults(r, layer.capability)]
    plan, steps = layer.plan(), serial(reports)

    def most(field: str) -> int:
        return max(getattr(report, field) for report in reports)

    times = {way: microseconds(estimate(r, layer.B, layer.capability)) for way, r in steps.items()}

    return {
        "neuron": layer.variant if layer.neuron == "gpn" else layer.neuron,
        "N": layer.N,
        "B": layer.B,
        "products": layer.precision if layer.dtype == "float32" else layer.dtype,
        "sm": layer.capability,
        "strategy": plan.strategy,
        "forward tile": size(plan.forward),
        "backward tile": size(plan.backward),
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
        **{f"{way} step, us, estimated": times.get(way, "-") for way in ("forward", "backward")},
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
    """Compile everything and write the tables; returns the number of layers with faults.

    The progress goes to standard error.
    """
    rows, tried, layers = [], [], all_layers()
    pairs = [pair for capability in CAPABILITIES for pair in candidates(capability)]
    for k, (layer, plan) in enumerate([(layer, None) for layer in layers] + pairs):
        text = f"\r{k + 1}/{len(layers) + len(pairs)} {layer}"
        print(text, end="\x1b[K", file=sys.stderr, flush=True)
        reports = layer.compile(plan)[1]
        if plan is None:
            rows.append(row(layer, reports))
        else:
            tried += [r for r in candidate_rows(layer, plan, reports) if r not in tried]
    print(file=sys.stderr)
    path.write_text(page(rows, tried), encoding="utf-8")
    return sum(r["faults"] != "-" for r in rows)


def page(rows: list[dict], tried: list[dict]) -> str:
    """The record: lines of layers, of stepwise tiles, and how times are estimated."""
    kernels = sum(r["kernels"] for r in rows)
    wrong = sum(r["faults"] != "-" for r in rows)
    made = provenance(torch.device("cpu"))
    costs = [
        {
            "lines": f"`{cost.pattern}`".replace("|", ", ") or "others",
            "unit": cost.unit,
            "latency": spread(cost.latency),
            "interval": spread(cost.interval),
            "source": cost.source,
        }
        for cost in (*COSTS, OTHER)
    ]
    return f"""# The kernels as compiled, without a GPU

Made by `python -m bench.offline` at commit {made["commit"]} with triton {triton.__version__} \
(its own ptxas) and torch {torch.__version__}. Nothing here was run: these are the compiler's \
figures and the machine code's, counted; times are estimated from it. {len(rows)} layers of \
{kernels} kernels, {wrong} layers with faults.

What is compiled is a choice (`all_layers` in `bench/offline.py`): for sm 80, 90 and 100 the full \
neuron in float16, persistent and stepwise; for sm 90, too, float32, a size that masks fill up, a \
large batch, every variant, and the options; and for all three every stepwise tile that `tiles.py` \
chooses from, at N = 512 in float16. `python -m bench.offline --N 128` prints any other layer, \
kernel by kernel.

A fault is: a spill; more shared memory than one program may have (163 KiB on sm 80, 227 KiB \
on sm 90 and 100); more registers than 65,536 a multiprocessor; no tensor-core instruction where a \
product has half or tf32 operands; where loads are to be pipelined, no asynchronous copy or, in \
the loop, a load that waits; a launch that may begin before the one before has ended and reads \
or writes too soon what their chain writes.

## Layers

A line is a layer: the most that any of its kernels takes. products: what the operands are \
(float16: x's dtype; tf32, ieee: float32 x). tile: rows x neurons x depth, + where backward's \
products are one sum. spills: local loads and stores. loop: the innermost loop with most \
tensor-core instructions, per warp. step, us, estimated: of an ordinary launch / of one that \
begins early (programmatic dependent launch), see below.

{markdown(rows[0], (r.values() for r in rows), left=len(rows[0]))}

## Stepwise tiles

chain: estimated cycles of one round of the loop (of a depth tile where the compiler unrolled it) \
for a warp that shares no unit with another.

{markdown(tried[0], (r.values() for r in tried), left=len(tried[0]))}

## How times are estimated

`bench/step_time.py` walks through the machine code as a warp does. A step of a stepwise kernel \
begins {LAUNCH_US} us after the end of the one before; one that begins early has done all ahead of \
its wait by then, which ends {WAIT_US} us after it (both assumed). Clocks: \
{", ".join(f"sm {sm}: {ghz} GHz" for sm, ghz in CLOCK_GHZ.items())}; from the L2 cache \
{L2_BYTES} bytes a clock and multiprocessor, {L2_BYTES_TOGETHER} together (assumed). Latency and \
interval are in cycles, for sm 80 / 90 / 100 where they differ; an interval of memory is for 4 \
bytes a thread, 0 where the shape or the bandwidth says it.

{markdown(costs[0], (c.values() for c in costs), left=len(costs[0]))}
"""


def spread(values: dict[int, float]) -> str:
    """The numbers of the capabilities, or the one that all have."""
    found = [f"{v:g}" for v in values.values()]
    return " / ".join(found) if len(set(found)) > 1 else found[0]


def main() -> None:
    """Compile one layer and print a line per kernel, or everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--N", type=int, help="one layer of so many neurons instead of all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the tables go")
    choices = {
        "dtype": ["float16", "bfloat16", "float32"],
        "capability": [90, 80, 100],
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
    steps = list(serial(reports).values())
    for report in reports:
        lines = [name(report), report, *faults(report, options["capability"])]
        if report in steps:
            lines.append(estimate(report, options["B"], options["capability"]))
        print(*lines, sep="\n  ")


if __name__ == "__main__":
    main()
