"""What the compiler makes of the kernels for GPUs that need not be there: sm_80 and sm_90.

A process of its own compiles, since this one may interpret kernels instead:
`python -m tests.test_kernels_offline sample` prints what it found as JSON. Triton's own cache makes
the second run quick. Layers marked slow are left out of the default run (`pytest -m slow` runs
them); `python -m bench.offline` goes through every size, variant and option.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# by the strategy a layer should have: its capability, and what differs from N = 128 in float16, the
# full GPN, spikes, B = 256. Each kind of kernel once in the sample; in the rest other variants
# and tiles, and those that once spilled: with a third stage in backward, or with 4 warps
LAYERS = {
    "sample": [
        ("persistent", 80, {}),
        ("persistent", 90, {}),
        ("persistent", 90, {"N": 37, "dtype": "bfloat16", "mean": True, "every": 10}),
        ("persistent", 90, {"N": 300, "variant": "no-fitb"}),
        ("persistent", 80, {"N": 64, "dtype": "float32", "lengths": True}),
        ("stepwise", 80, {"N": 256, "every": 10}),
        ("stepwise", 90, {"N": 512}),
        ("persistent", 90, {"neuron": "lif"}),
        ("persistent", 80, {"neuron": "cuba-lif", "N": 256}),
        ("stepwise", 90, {"neuron": "cuba-lif", "N": 512, "dtype": "float32", "precision": "tf32"}),
    ],
    "rest": [
        ("stepwise", 90, {"N": 512, "dtype": "float32", "precision": "tf32"}),
        ("stepwise", 90, {"N": 512, "B": 2048, "every": 2, "lengths": True}),
        ("persistent", 90, {"every": 10, "lengths": True}),
        ("stepwise", 90, {"N": 256, "lengths": True}),
        ("persistent", 80, {"variant": "no-i"}),
        ("persistent", 90, {"N": 64, "dtype": "float32", "precision": "tf32"}),
        ("stepwise", 90, {"dtype": "float32"}),
        ("stepwise", 80, {"N": 256, "dtype": "float32"}),
        ("stepwise", 80, {"N": 160, "mean": True, "every": 10}),
        ("stepwise", 90, {"N": 513, "dtype": "float32"}),
        ("stepwise", 90, {"N": 1024, "B": 8192}),
        ("persistent", 80, {"neuron": "lif", "N": 37, "dtype": "bfloat16"}),
        ("persistent", 80, {"neuron": "lif", "N": 37, "dtype": "float32"}),
        ("persistent", 90, {"neuron": "cuba-lif", "dtype": "float32"}),
        ("persistent", 90, {"neuron": "cuba-lif", "N": 256, "dtype": "bfloat16"}),
        ("stepwise", 80, {"neuron": "cuba-lif", "N": 256, "dtype": "float32"}),
        ("stepwise", 80, {"neuron": "cuba-lif", "N": 1024, "B": 8192}),
    ],
}
# of the sample: a stepwise layer of sm_90, behind one of sm_80
OVERLAPPING = LAYERS["sample"].index(("stepwise", 90, {"N": 512}))
CASES = [("sample", k) for k in range(len(LAYERS["sample"]))]
CASES += [pytest.param("rest", k, marks=pytest.mark.slow) for k in range(len(LAYERS["rest"]))]
# what a change of T or B might compile anew: a masked persistent layer, a stepwise one
UNCHANGED = [(37, "float16"), (160, "float32")]


def fields(report) -> dict:
    """A report without its machine code, as JSON holds it."""
    found = {key: value for key, value in vars(report).items() if key != "code"}
    where = report.dependence
    if where:
        found["dependence"] = {**where._asdict(), "ahead": sorted(where.ahead)}
        found["dependence"]["behind"] = sorted(where.behind)
    return found


def recompiled(N: int, dtype: str) -> dict[str, int]:
    """Versions of each kernel after layers of many lengths and batches: {kernel: versions}."""
    import torch

    from gpn_triton.kernels import offline, tiles
    from gpn_triton.kernels.cuba_lif import cuba_lif_backward, cuba_lif_forward
    from gpn_triton.kernels.gpn_backward import gpn_backward
    from gpn_triton.kernels.gpn_forward import gpn_forward
    from gpn_triton.kernels.lif import lif_backward, lif_forward
    from gpn_triton.kernels.spikes import spikes_unpack
    from gpn_triton.neurons.reference import GATES

    gates, G, dtype = GATES["full"], 4, getattr(torch, dtype)
    weights = torch.zeros(G * N, N), torch.zeros(G * N, N), torch.zeros(G * N)
    versions = {}
    # the plan may depend on the batch, the code of a plan must not
    plan = tiles.choose(100, 256, N, dtype, gates, 3)
    lif, cuba_lif = tiles.choose_lif(100), tiles.choose_cuba_lif(100, 256, N, dtype)
    with offline.compiling(90) as found:
        for T in (1, 2, 100):
            for B in (1, 13, 256) if T < 100 else (1, 13):
                x, state = torch.zeros(T, B, N, dtype=dtype), torch.zeros(B, N)
                for every, mean in ((1, False), (3, True)):
                    out, _, v_saved, bits = gpn_forward(
                        x, *weights, state, state, gates, every, mean, plan
                    )
                    gpn_backward(
                        out, None, x, *weights, state, bits, v_saved,
                        gates, "atan", 2.0, every, mean, plan,
                    )  # fmt: skip
                    spikes_unpack(bits, state, 0, T, dtype)
                spikes, v, h, _ = lif_forward(x, state, weights[2][0], True, lif)
                lif_backward(spikes, v, h, state, weights[2][0], True, "atan", 2.0, lif)
                weight, bias = weights[0][:N], weights[2][:N]
                spikes, *ends, h, bits = cuba_lif_forward(
                    x, weight, bias, *[state] * 3, 0.5, 0.5, True, cuba_lif
                )
                cuba_lif_backward(
                    spikes, *ends, h, bits, weight, state, 0.5, 0.5, "atan", 2.0, cuba_lif
                )
    for name, constants, kernel in found:
        # what casts operands has one for each pair of dtypes
        pointers = [kind for kind in kernel.src.signature.values() if kind.startswith("*")]
        key = f"{name} {constants} {pointers}"
        versions[key] = versions.get(key, 0) + 1
    return versions


# (config, augmentation) that together hold every branch of the binning kernels
BINNING = {
    "plain bfloat16": ({"dtype": "bfloat16"}, False),
    "augmented, clip, 5": ({"channel_bin": 5, "overflow": "clip"}, True),
    "augmented, authors, float16": ({"style": "authors", "dtype": "float16"}, True),
    "augmented, log": ({"scale": "log"}, True),
}


def compile_binning(config: dict, augmented: bool, capability: int) -> list[dict]:
    """Reports of the binning kernels, with the fused multiply-adds of each."""
    import torch

    from gpn_triton.data.augmentation import Augmentation
    from gpn_triton.data.binning import BinningConfig
    from gpn_triton.kernels import offline
    from gpn_triton.kernels.binning import binning_count

    dtype = getattr(torch, config.get("dtype", "float32"))
    augmentation = Augmentation(20, 0.1, 0.005, 0.1, 0.1, 0.05, 0.8) if augmented else None
    # a part of a set in one of the cases
    numbers = torch.zeros(4, dtype=torch.int64) if "channel_bin" in config else None
    with offline.compiling(capability) as found:
        for T, B in ((1, 1), (16, 3), (100, 256), (1000, 1)):
            binning_count(
                torch.zeros(80), torch.zeros(80, dtype=torch.int16), torch.arange(5) * 20, numbers,
                torch.zeros(B, dtype=torch.int64),
                torch.zeros(2, dtype=torch.int64) if augmented else None, 700, 40,
                BinningConfig(T, **{**config, "dtype": dtype}), augmentation, 0, T,
            )  # fmt: skip
    reports = []
    for entry in found:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(entry[2].asm["cubin"])
            file.flush()
            fused = len(re.findall(r"\bFFMA\b", offline._tool("nvdisasm", "-c", file.name)))
        reports.append({**fields(offline.read(*entry)), "fused": fused})
    return reports


def most_shared(options: dict, way: str, stages: int) -> int:
    """The shared memory that tiles.choose reckons a persistent kernel with."""
    import torch

    from gpn_triton.kernels import tiles
    from gpn_triton.neurons.reference import GATES

    N, dtype = options.get("N", 128), getattr(torch, options.get("dtype", "float16"))
    if options.get("neuron") == "cuba-lif":
        sizes = tiles.cuba_lif_shared_bytes(N, dtype)
    else:
        sizes = tiles.persistent_shared_bytes(N, GATES[options.get("variant", "full")], dtype)
    fixed, stage = sizes[way]
    return fixed + (stages - 1) * stage


def compile_inner_ear(capability: int) -> list[dict]:
    """Reports of the ear's kernel for recordings of two sizes."""
    import torch

    from gpn_triton.kernels import offline
    from gpn_triton.kernels.inner_ear import inner_ear

    with offline.compiling(capability) as found:
        for R, C, row in ((1, 33, 40), (2, 700, 24_010)):
            ints = torch.zeros(R, dtype=torch.int32)
            inner_ear(torch.zeros(R, C, row), ints, ints, torch.zeros(14), 0, 40, 24)
    return [fields(offline.read(*entry)) for entry in found]


def compile_group(group: str) -> dict:
    """What the tests ask about a group, as JSON holds it."""
    from bench.offline import Layer, faults

    layers = []
    for _, capability, options in LAYERS[group]:
        plan, reports = Layer(**{"N": 128, **options, "capability": capability}).compile()
        reports = [fields(r) | {"faults": faults(r, capability)} for r in reports]
        for report in reports:
            if "persistent" in report["kernel"] and report["constants"].get("GATES", True):
                way = "forward" if "forward" in report["kernel"] else "backward"
                report["bound"] = most_shared(options, way, getattr(plan, way).num_stages)
        layers.append({"strategy": plan.strategy, "reports": reports})
    found = {"layers": layers}
    if group == "sample":
        found["versions"] = {f"{N}-{dtype}": recompiled(N, dtype) for N, dtype in UNCHANGED}
        found["inner ear"] = {capability: compile_inner_ear(capability) for capability in (80, 90)}
        found["binning"] = {
            f"{case}-{capability}": compile_binning(*options, capability)
            for case, options in BINNING.items()
            for capability in (80, 90)
        }
    return found


@functools.cache
def compiled(group: str) -> dict:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_offline", group]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("group, k", CASES)
def test_no_kernel_spills_or_outgrows_the_gpu_and_every_loop_is_pipelined(group, k):
    layer, (strategy, _, options) = compiled(group)["layers"][k], LAYERS[group][k]
    assert layer["strategy"] == strategy
    for report in layer["reports"]:
        assert not report["faults"], report
        assert report["shared_bytes"] <= report.get("bound", report["shared_bytes"]), report
    # half types also have what casts operands
    kernels = {report["kernel"] for report in layer["reports"]} - {"operands_cast_kernel"}
    neuron = options.get("neuron", "gpn")
    if neuron == "lif":
        assert kernels == {"lif_forward_kernel", "lif_backward_kernel"}
        return
    # forward and backward of the strategy, and what unpacks spikes for the weight's gradient or for
    # a linear layer, to which a mean leaves none; of GPN also the gradient's elementwise part
    assert sum(strategy in kernel for kernel in kernels) == 2
    assert len(kernels) == 2 + (neuron == "gpn") + (not options.get("mean", False))
    replays = [report for report in layer["reports"] if report["constants"].get("REPLAY")]
    assert len(replays) == (options.get("every", 1) > 1)


@pytest.mark.parametrize("k", [0, 1], ids=["80", "90"])
def test_persistent_loop_holds_all_products_and_few_barriers(k):
    reports = compiled("sample")["layers"][k]["reports"]
    forward, backward = (r for r in reports if "persistent" in r["kernel"])
    # 16 x 128 x 128 a gate, in pieces of 16 x 8 x 16 over 8 warps
    assert forward["loop_mma"] == forward["mma"] == 4 * 8 * 16 / 8
    assert backward["loop_mma"] == backward["mma"] == 3 * 8 * 16 / 8
    # without asynchronous copies there are 14 forward and 24 backward
    assert forward["loop_barriers"] <= 8 and backward["loop_barriers"] <= 10


def test_a_step_loads_what_it_may_and_nothing_else_before_the_step_before_has_ended():
    early = [r for r in compiled("sample")["layers"][OVERLAPPING]["reports"] if r["dependence"]]
    forward, backward, closing = early
    assert [r["constants"]["DEPENDENT"] for r in early] == [True] * 3
    assert forward["kernel"] == "gpn_forward_stepwise_kernel"
    where = forward["dependence"]
    assert where["ahead"] == ["v_reset_ptr", "x_ptr", "zx_ptr"]
    # v for the product, the owner's own v, the word of spikes
    assert {"v_in_ptr", "state_ptr", "bits_ptr", "weight_v_ptr"} == set(where["behind"])
    where = backward["dependence"]
    assert where["ahead"] == ["bits_ptr", "g_u_ptr", "rest_ptr", "v_ptr", "x_ptr", "z_ptr"]
    assert {"g_z_ptr", "g_v_in_ptr", "weight_v_ptr"} == set(where["behind"])
    assert closing["dependence"]["ahead"] == []
    for report in early:
        where = report["dependence"]
        assert where["wait"] < where["launch"] < where["store"]


def test_launches_of_sm_80_and_the_first_of_a_chain_neither_wait_nor_let_another_begin():
    old, new = compiled("sample")["layers"][OVERLAPPING - 1 : OVERLAPPING + 1]
    assert not any(r["dependence"] for r in old["reports"])
    ordinary = [r for r in new["reports"] if "stepwise" in r["kernel"] and not r["dependence"]]
    # forward's first step, and backward's, which has no product to close
    assert len(ordinary) == 2 and not any(r["constants"]["DEPENDENT"] for r in ordinary)
    assert [r["constants"].get("PRODUCT") for r in ordinary] == [None, False]


LISTING = """
.text.kernel:
        /*0000*/  ULDC.64 UR4, c[0x0][0x210] ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
        /*0010*/  ULDC.64 UR6, c[0x0][0x218] ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
        /*0020*/  IMAD.WIDE R2, R0, 0x4, UR4 ;  /* 0x0000000000000ab9 */
                           /* 0x000fca0000000a00 */
        /*0030*/ @!P0 LDG.E R5, desc[UR8][R2.64] ;  /* 0x0000000000000ab9 */
                           /* 0x000ea20000000a00 */
        /*0040*/  IMAD.WIDE R6, R0, 0x4, UR6 ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
EARLY   /*0050*/  ACQBULK ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
        /*0060*/  PREEXIT ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
LATE    /*0080*/  FADD R5, R5, R9 ;  /* 0x0000000000000ab9 */
                           /* 0x004fca0000000a00 */
        /*0090*/  STG.E desc[UR8][R6.64], R5 ;  /* 0x0000000000000ab9 */
                           /* 0x000fe20000000a00 */
        /*00a0*/  EXIT ;  /* 0x0000000000000ab9 */
                           /* 0x000fea0003800000 */
"""
READ_V = """        /*0070*/  LDG.E R9, desc[UR8][R6.64] ;  /* 0x0000000000000ab9 */
                           /* 0x000ea20000000a00 */
"""


@pytest.mark.parametrize("early", [False, True])
def test_a_load_of_v_ahead_of_the_wait_is_a_fault(early):
    pytest.importorskip("triton")
    from bench.offline import out_of_step
    from gpn_triton.kernels import offline

    listing = LISTING.replace("EARLY", READ_V if early else "")
    code = offline.parse(listing.replace("LATE", "" if early else READ_V))
    where = offline.dependence(code, {0x210: "zx_ptr", 0x218: "v_in_ptr"})
    assert where.ahead == ({"zx_ptr", "v_in_ptr"} if early else {"zx_ptr"})
    report = offline.Report("gpn_forward_stepwise_kernel", {}, *[0] * 11, where, code)
    assert out_of_step(report) == ["reads v_in_ptr ahead of the wait"] * early
    # the control word: what a load raises, and who waits for it
    load = next(line for line in code if line.text.startswith("LDG"))
    assert (load.guard, load.stall, load.result, load.operands) == ("!P0", 1, 2, 7)
    assert next(line for line in code if line.text.startswith("FADD")).waits == 0b100


@pytest.mark.parametrize("N, dtype", UNCHANGED)
def test_a_changed_length_or_batch_does_not_recompile(N, dtype):
    versions = compiled("sample")["versions"][f"{N}-{dtype}"]
    assert len(versions) >= 10
    assert set(versions.values()) == {1}, versions


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", BINNING)
def test_binning_neither_spills_nor_fuses_nor_depends_on_sizes(case, capability):
    reports = compiled("sample")["binning"][f"{case}-{capability}"]
    # one version each, whatever T and B
    names = [report["kernel"] for report in reports]
    converts = "float16" in case or "log" in case
    assert names == ["binning_count_kernel", "binning_convert_kernel"][: 1 + converts]
    # all but a logarithm, which is a polynomial
    exact = [report["fused"] for report in reports if "log" not in case or report is reports[0]]
    assert not any(exact)
    for report in reports:
        assert report["stack_bytes"] == report["local_accesses"] == 0, report
        # eight programs of four warps and more share a multiprocessor
        assert report["registers"] <= 64


@pytest.mark.parametrize("capability", [80, 90])
def test_the_ear_compiles_once_for_all_sizes_and_does_not_spill(capability):
    (report,) = compiled("sample")["inner ear"][str(capability)]
    assert report["stack_bytes"] == report["local_accesses"] == 0
    # 32 programs of a warp and more share a multiprocessor
    assert report["registers"] <= 64


@pytest.mark.parametrize("changes, named", [
    ({}, None),
    ({"stack_bytes": 8}, "spills"),
    ({"local_accesses": 2}, "spills"),
    ({"shared_bytes": (227 << 10) + 1}, "shared memory"),
    ({"registers": 255, "num_warps": 16}, "registers"),
    ({"mma": 0}, "tensor-core"),
    ({"async_copies": 0}, "asynchronous"),
    ({"loop_loads": 1}, "wait"),
])  # fmt: skip
def test_every_fault_is_named(changes, named):
    pytest.importorskip("triton")
    from bench.offline import faults
    from gpn_triton.kernels.offline import Report

    constants = {"GATES": "f i b theta", "FAST": True, "PRECISION": "ieee"}
    right = Report(
        "gpn_forward_persistent_kernel", constants, registers=128, stack_bytes=0,
        local_accesses=0, shared_bytes=227 << 10, num_warps=8, mma=64, async_copies=15,
        loop_instructions=400, loop_mma=64, loop_barriers=6, loop_loads=0,
    )  # fmt: skip
    found = faults(replace(right, **changes), 90)
    assert [named in fault for fault in found] == ([True] if named else [])


if __name__ == "__main__":
    print(json.dumps(compile_group(sys.argv[1]), default=str))
