"""What the compiler makes of the kernels for GPUs that need not be there: sm_80 and sm_90.

A process of its own compiles everything once, since this one may interpret kernels instead:
python -m tests.test_kernels_offline prints what it found as JSON. Triton's own cache makes the
second run quick. `python -m bench.offline` goes through every size, variant and option.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a layer is named by what differs from N = 128 in float16, the full neuron, spikes, B = 256
LAYERS = {
    "N128": {},
    "N128-spikes-replay": {"every": 10},
    "N128-mean": {"mean": True},
    "N37": {"N": 37, "dtype": "bfloat16"},
    "N128-replay": {"mean": True, "every": 10},
    "N128-no-i": {"variant": "no-i"},
    "N300-no-fitb": {"N": 300, "variant": "no-fitb"},
    "N64-tf32": {"N": 64, "dtype": "float32", "precision": "tf32"},
    "N64-ieee": {"N": 64, "dtype": "float32"},
    "N256-replay": {"N": 256, "mean": True, "every": 10},
    "N512-tf32": {"N": 512, "dtype": "float32", "precision": "tf32"},
    "N128-ieee": {"dtype": "float32"},
    # these three spilled: with a third stage in backward, or with 4 warps
    "N256-ieee": {"N": 256, "dtype": "float32"},
    "N160-replay": {"N": 160, "mean": True, "every": 10},
    "N513-ieee": {"N": 513, "dtype": "float32"},
    "N1024-B8192": {"N": 1024, "B": 8192},
}
CASES = [(name, capability) for name in LAYERS for capability in (80, 90)]
# what a change of T or B might compile anew: a masked persistent layer, a stepwise one
UNCHANGED = [(37, "float16"), (160, "float32")]


def recompiled(N: int, dtype: str) -> dict[str, int]:
    """Versions of each kernel after layers of many lengths and batches: {kernel: versions}."""
    import torch

    from gpn_triton.kernels import offline, tiles
    from gpn_triton.kernels.recurrence_backward import recurrence_backward
    from gpn_triton.kernels.recurrence_forward import recurrence_forward
    from gpn_triton.kernels.spikes import spikes_unpack
    from gpn_triton.reference import GATES

    gates, G, dtype = GATES["full"], 4, getattr(torch, dtype)
    weights = torch.zeros(G * N, N), torch.zeros(G * N, N), torch.zeros(G * N)
    versions = {}
    # the plan may depend on the batch, the code of a plan must not
    plan = tiles.choose(100, 256, N, dtype, gates, 3)
    with offline.compiling(90) as found:
        for T in (1, 2, 100):
            for B in (1, 13, 256) if T < 100 else (1, 13):
                x, state = torch.zeros(T, B, N, dtype=dtype), torch.zeros(B, N)
                for every, mean in ((1, False), (3, True)):
                    out, _, v_saved, bits = recurrence_forward(
                        x, *weights, state, state, gates, every, mean, plan
                    )
                    recurrence_backward(
                        out, None, x, *weights, state, bits, v_saved,
                        gates, "atan", 2.0, every, mean, plan,
                    )  # fmt: skip
                    spikes_unpack(bits, state, 0, T, dtype)
    for name, constants, _ in found:
        key = f"{name} {constants}"
        versions[key] = versions.get(key, 0) + 1
    return versions


def compile_everything() -> dict:
    """What the tests ask about, as JSON holds it."""
    from bench.offline import Layer, faults

    layers = {}
    for name, capability in CASES:
        options = {"N": 128, **LAYERS[name], "capability": capability}
        plan, reports = Layer(**options).compile()
        layers[f"{name}-{capability}"] = {
            "strategy": plan.strategy,
            "reports": [asdict(r) | {"faults": faults(r, capability)} for r in reports],
        }
    versions = {f"{N}-{dtype}": recompiled(N, dtype) for N, dtype in UNCHANGED}
    return {"layers": layers, "versions": versions}


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_offline"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name, capability", CASES)
def test_no_kernel_spills_or_outgrows_the_gpu_and_every_loop_is_pipelined(
    compiled, name, capability
):
    for report in compiled["layers"][f"{name}-{capability}"]["reports"]:
        assert not report["faults"], report


@pytest.mark.parametrize("name, capability", CASES)
def test_every_kernel_of_the_strategy_was_compiled(compiled, name, capability):
    layer = compiled["layers"][f"{name}-{capability}"]
    stepwise = (
        name.split("-")[0] in ("N160", "N256", "N512", "N513", "N1024") or name == "N128-ieee"
    )
    assert layer["strategy"] == ("stepwise" if stepwise else "persistent")
    kernels = {report["kernel"] for report in layer["reports"]}
    expected = {
        f"recurrence_forward_{layer['strategy']}_kernel",
        f"recurrence_backward_{layer['strategy']}_kernel",
        "recurrence_gradient_kernel",
    }
    # a mean of spikes leaves no spikes to a linear layer
    mean = LAYERS[name].get("mean", False)
    assert kernels == expected | (set() if mean else {"spikes_unpack_kernel"})
    replays = [report for report in layer["reports"] if report["constants"].get("REPLAY")]
    assert len(replays) == name.endswith("replay")


@pytest.mark.parametrize("capability", [80, 90])
def test_persistent_loop_holds_all_products_and_few_barriers(compiled, capability):
    forward, _, backward = compiled["layers"][f"N128-{capability}"]["reports"][:3]
    # 16 x 128 x 128 a gate, in pieces of 16 x 8 x 16 over 8 warps
    assert forward["loop_mma"] == forward["mma"] == 4 * 8 * 16 / 8
    assert backward["loop_mma"] == backward["mma"] == 3 * 8 * 16 / 8
    # without asynchronous copies there are 14 forward and 24 backward
    assert forward["loop_barriers"] <= 8 and backward["loop_barriers"] <= 10


@pytest.mark.parametrize("N, dtype", UNCHANGED)
def test_a_changed_length_or_batch_does_not_recompile(compiled, N, dtype):
    versions = compiled["versions"][f"{N}-{dtype}"]
    assert len(versions) >= 6
    assert set(versions.values()) == {1}, versions


@pytest.mark.parametrize(
    "changes, named",
    [
        ({}, None),
        ({"stack_bytes": 8}, "spills"),
        ({"local_accesses": 2}, "spills"),
        ({"shared_bytes": (227 << 10) + 1}, "shared memory"),
        ({"registers": 255, "num_warps": 16}, "registers"),
        ({"mma": 0}, "tensor-core"),
        ({"async_copies": 0}, "asynchronous"),
        ({"loop_loads": 1}, "wait"),
    ],
)
def test_every_fault_is_named(changes, named):
    pytest.importorskip("triton")
    from bench.offline import faults
    from gpn_triton.kernels.offline import Report

    constants = {"GATES": "fibt", "FAST": True, "PRECISION": "ieee"}
    right = Report(
        "recurrence_forward_persistent_kernel", constants, registers=128, stack_bytes=0,
        local_accesses=0, shared_bytes=227 << 10, num_warps=8, mma=64, async_copies=15,
        loop_instructions=400, loop_mma=64, loop_barriers=6, loop_loads=0,
    )  # fmt: skip
    found = faults(replace(right, **changes), 90)
    assert [named in fault for fault in found] == ([True] if named else [])


if __name__ == "__main__":
    print(json.dumps(compile_everything(), default=str))
