"""explain(): its numbers are cost's, and it says which GPU it describes."""

import dataclasses

import pytest
import torch

from gpn_triton.neurons import cost
from gpn_triton.neurons.explain import explain
from gpn_triton.neurons.networks import NEURONS

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpn", "gpn-no-i", "gpn-no-fitb"])
def test_work_and_traffic_are_what_cost_counts(name, dtype):
    T, B, N = 100, 24, 96
    found = explain(T, B, N, dtype, variant=name.removeprefix("gpn-") if "-" in name else "full")
    forward, both = (
        cost.layer(NEURONS[name].work, N, None, backward, False, dtype.itemsize) * (T * B)
        for backward in (False, True)
    )
    backward = found.forward_gflop + found.backward_gflop, found.forward_mib + found.backward_mib
    assert (found.forward_gflop * 1e9, found.forward_mib * 2**20) == (forward.flops, forward.bytes)
    assert backward == pytest.approx((both.flops / 1e9, both.bytes / 2**20))


def test_strategy_reason_and_memory_are_named():
    small, large = explain(100, 256, 128, torch.bfloat16), explain(50, 256, 512)
    assert small.plan.strategy == "persistent" and large.plan.strategy == "stepwise"
    assert not small.plan.measured and "unmeasured" in str(small)
    # x and v in two bytes, spikes in 4 words of 32 steps
    assert small.saved_mib == pytest.approx((2 * 100 * 2 + 4 * 4) * 256 * 128 / 2**20)
    tenth = explain(100, 256, 128, torch.bfloat16, checkpoint_every=10)
    assert tenth.saved_mib == pytest.approx((2 * 110 + 4 * 4) * 256 * 128 / 2**20)


def test_without_a_gpu_it_says_first_that_it_describes_another():
    found = explain(10, 4, 16)
    assert found.here == torch.cuda.is_available()
    elsewhere = str(dataclasses.replace(found, here=False))
    assert elsewhere.startswith("there is no GPU here") and "H200" in elsewhere.splitlines()[0]
    assert "H200" not in str(dataclasses.replace(found, here=True, target="a card"))


@pytest.mark.parametrize(("change", "message"), [
    ({"variant": "nope"}, "variant: expected one of full.*got 'nope'"),
    ({"output": "sum"}, "output: expected one of spikes, mean"),
    ({"checkpoint_every": 0}, "checkpoint_every: expected a whole number"),
    ({"dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        explain(1, 1, 1, **change)
