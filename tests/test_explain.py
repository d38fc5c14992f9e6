"""explain(): its numbers are cost's, and it says which GPU it describes."""

import dataclasses

import pytest
import torch

from gpn_triton.machine import device
from gpn_triton.neurons import cost
from gpn_triton.neurons.explain import explain, layers_run
from gpn_triton.neurons.networks import NEURONS, SpikingClassifier

pytest.importorskip("triton")
CPU = torch.device("cpu")


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


@pytest.mark.parametrize(("backend", "how", "strategies", "reason"), [
    ("triton", "triton", ["persistent", "stepwise"], "the weights stay in shared memory"),
    ("auto", "cpu", [None, None], "these are the kernels for a CPU"),
    ("torch", "torch", [None, None], "it was asked for by name"),
])  # fmt: skip
def test_what_computes_each_layer_is_named_with_the_reason(backend, how, strategies, reason):
    layers = SpikingClassifier([128, 256], backend=backend).neurons
    found = layers_run(layers, 100, 256, torch.bfloat16, torch.device("cpu"))
    assert [layer["backend"] for layer in found] == [how] * 2
    assert [layer["strategy"] for layer in found] == strategies
    assert found[0]["reason"].startswith(reason)


@pytest.mark.parametrize(("neuron", "strategies"), [
    ("plif", ["persistent", "persistent"]), ("cuba-lif", ["persistent", "stepwise"]),
])  # fmt: skip
def test_what_computes_leaky_neurons_is_named_like_gpn_s(neuron, strategies):
    sizes = 100, 256, torch.bfloat16, CPU
    found = layers_run(SpikingClassifier([256, 512], neuron, backend="triton").neurons, *sizes)
    assert [(layer["backend"], layer["strategy"]) for layer in found] == [
        ("triton", strategy) for strategy in strategies
    ]
    (found,) = layers_run(SpikingClassifier([8], neuron).neurons, *sizes)
    assert (found["backend"], found["reason"]) == ("cpu", "these are the kernels for a CPU")


def test_a_neuron_without_kernels_and_a_gpu_without_triton_say_so(monkeypatch):
    (found,) = layers_run(SpikingClassifier([8], "gru").neurons, 5, 4, torch.float32, CPU)
    assert (found["backend"], found["reason"]) == ("torch", "GRU has no kernel")
    # as on a GPU that is too old
    monkeypatch.setattr(device, "choose_backend", lambda *_: "torch")
    monkeypatch.setattr(device, "triton_unavailable", lambda x: "the GPU is too old")
    (found,) = layers_run(SpikingClassifier([8]).neurons, 5, 4, torch.float32, CPU)
    assert found["reason"] == "triton cannot run: the GPU is too old"


def test_a_surrogate_that_is_none_is_refused_for_a_neuron_that_takes_none():
    with pytest.raises(ValueError, match="surrogate: expected one of"):
        SpikingClassifier([8], "lif", surrogate="nonsense")
