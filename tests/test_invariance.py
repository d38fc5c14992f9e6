"""What a sample gets does not depend on its batch, the batch's size or the number of threads.

To the bit where this project's kernels compute, which is from events to the first layer's spikes on
a CPU (recurrences by themselves are in test_kernels_cpu). Behind it torch multiplies, whose
products take another path for another number of rows: equal but for the last bits.
"""

import pytest
import torch

from gpn_triton.data.binning import BinningConfig, batch_input
from gpn_triton.data.events import DeviceEvents
from gpn_triton.neurons.networks import SpikingClassifier
from tests.small_training import CPU, SAMPLES, store

BATCHES = (1, 3, 7, SAMPLES)
THREADS = (1, 2, 5)


@pytest.fixture(autouse=True)
def _threads(one_thread):
    yield


def network(neuron, dtype):
    model = SpikingClassifier([37, 20], neuron, 100, 2).to(dtype).eval()
    with torch.no_grad():
        for linear in model.inputs:
            # as drawn the neurons hardly spike
            linear.weight *= 12
    return model


def batches(size, sparse):
    """The samples in the form that a network takes them in, so many at once."""
    events, indices = DeviceEvents(store(), CPU), torch.arange(SAMPLES)
    for some in indices.split(size):
        yield batch_input(events, some, BinningConfig(9), None, None, sparse)


@torch.no_grad()
def first_spikes(model, size):
    return torch.cat([model.neurons[0](model.inputs[0](x))[0] for x in batches(size, True)], 1)


@torch.no_grad()
def logits(model, size):
    return torch.cat([model(x.double())[0] for x in batches(size, False)])


@pytest.mark.parametrize("neuron", ["gpn", "lif", "cuba-lif"])
def test_spikes_are_the_same_bits_in_any_batch_and_on_any_number_of_threads(neuron):
    model = network(neuron, torch.float32)
    expected = first_spikes(model, SAMPLES)
    assert 0.01 < expected.mean() < 0.9
    for size in BATCHES:
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert torch.equal(first_spikes(model, size), expected), (size, threads)


@pytest.mark.parametrize("neuron", ["gpn", "lif", "cuba-lif"])
def test_logits_are_the_same_but_for_the_last_bits_of_float64(neuron):
    model = network(neuron, torch.float64)
    expected = logits(model, SAMPLES)
    assert expected.std(0).min() > 1e-4
    for size in BATCHES:
        for threads in THREADS:
            torch.set_num_threads(threads)
            torch.testing.assert_close(logits(model, size), expected, rtol=0, atol=1e-13)
