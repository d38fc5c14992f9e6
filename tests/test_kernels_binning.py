"""What the binning kernel alone can get wrong, against its twin in torch: in Triton's
interpreter where there is no GPU, on the GPU where there is one."""

import dataclasses

import pytest
import torch

from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import DeviceEvents
from tests import interpreted_bfloat16
from tests.interpreter import need_interpreter
from tests.stores import make_store, store_of
from tests.test_data_binning import (
    EVERYTHING,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    need_interpreter()
    if DEVICE == "cpu":
        interpreted_bfloat16.correct(monkeypatch)


def small_blocks(monkeypatch, block=16, split=2):
    """Several blocks and programs a sample, for samples of few events."""
    from gpn_triton.kernels import binning

    monkeypatch.setattr(binning, "BLOCK", block)
    monkeypatch.setattr(binning, "SPLIT", split)


def assert_as_the_twin(store, indices, config, augmentation=None, key=None):
    """The kernel's counts, equal to the last bit to those of torch on a CPU."""
    indices = torch.tensor(indices, dtype=torch.int64)
    expected = bin_batch(DeviceEvents(store), indices, config, augmentation, key, backend="torch")
    key = None if key is None else torch.tensor(key, device=DEVICE)
    counts = bin_batch(
        DeviceEvents(store, DEVICE), indices.to(DEVICE), config, augmentation, key, backend="triton"
    )
    assert counts.dtype == config.dtype and counts.is_contiguous()
    assert torch.equal(counts.cpu(), expected)
    return expected


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_part_of_a_set_is_counted_as_in_the_whole(backend, monkeypatch):
    small_blocks(monkeypatch)
    store, config = make_store(9), BinningConfig(25, 1.0)
    rows, key = [7, 1, 2, 7, 0], torch.tensor([7, 3], device=DEVICE)

    def counts(store, indices, numbers=None):
        events = DeviceEvents(store, DEVICE, numbers)
        indices = torch.tensor(list(indices), device=DEVICE)
        return bin_batch(events, indices, config, EVERYTHING, key, backend=backend)

    whole, part = counts(store, rows), store.subset(rows)
    numbers = torch.tensor(rows, device=DEVICE)
    assert whole.any() and torch.equal(counts(part, range(5), numbers), whole)
    assert torch.equal(counts(part, [2, 4], numbers), whole[:, [2, 4]])
    assert not torch.equal(counts(part, range(5)), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels, time_bins, indices", [(700, 3, [0, 1, 2]), (3, 5, [3])])
def test_half_types_round_as_the_twin(dtype, channels, time_bins, indices):
    store = make_store(4, most=4500, channels=channels)
    config = BinningConfig(time_bins, dtype=dtype)
    # an odd number of cells in both cases, and counts that bfloat16 rounds in the second
    counts = assert_as_the_twin(store, indices, config, EVERYTHING, (3, 1))
    assert counts.numel() % 2 == (channels == 3)
    rounds = assert_as_the_twin(store, indices, dataclasses.replace(config, time_bins=1))
    assert channels == 700 or rounds.max() > 256


@pytest.mark.parametrize("events, noise", [(65_534, 0), (65_600, 0), (60_000, 0.2), (65_534, 1.0)])
def test_a_sample_of_65_thousand_events_does_not_spill_into_the_next_cell(
    events, noise, monkeypatch
):
    small_blocks(monkeypatch, block=1 << 16, split=1)
    config = BinningConfig(1, dtype=torch.bfloat16)
    augmentation = Augmentation(noise=noise) if noise else None
    # all are in the first cell but for an event in the last
    store = store_of(([0.1] * events, [0] * (events - 1) + [1]), channels=2)
    assert_as_the_twin(store, [0], config, augmentation, (1, 1))


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    from gpn_triton.machine import device

    events, indices, config = DeviceEvents(make_store(3)), torch.tensor([0]), BinningConfig(2)
    with pytest.raises(ValueError, match="backend: expected one of auto, .* torch, got 'jax'"):
        bin_batch(events, indices, config, backend="jax")
    monkeypatch.setattr(device, "triton_unavailable", lambda _: "there is none")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: there is none"):
        bin_batch(events, indices, config, backend="triton")
    assert bin_batch(events, indices, config).any()


@pytest.mark.gpu
def test_a_captured_graph_counts_what_indices_and_key_hold_at_replay():
    events = DeviceEvents(make_store(64, most=3000), DEVICE)
    config = BinningConfig(50, dtype=torch.bfloat16)
    # every second number: strided indices are read
    indices = torch.arange(16, device=DEVICE)[::2]
    key = torch.tensor([1, 2], device=DEVICE)

    def call(backend="triton"):
        return bin_batch(events, indices, config, EVERYTHING, key, backend=backend)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = call()
    seen = []
    for epoch in range(3):
        indices.copy_(torch.randperm(64, device=DEVICE)[:8])
        key.copy_(torch.tensor([1, epoch]))
        graph.replay()
        assert torch.equal(counts, call("torch"))
        seen.append(counts.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
