"""The binning kernel against its twin in torch and a loop over single events: in Triton's
interpreter where there is no GPU, on the GPU where there is one; and what the compiler makes of it
for sm_80 and sm_90, in a process of its own (python -m tests.test_kernels_binning prints that)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, bin_batch
from gpn_triton.data.events import DeviceEvents
from tests import interpreted_bfloat16
from tests.stores import make_store, store_of
from tests.test_data_binning import (
    AUGMENTATIONS,
    EDGES,
    EVERYTHING,
    KEYS,
    on_edges,
)

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what is compiled for a GPU: (config, augmentation) that together hold every branch
COMPILED = {
    "plain-bfloat16": (BinningConfig(100, dtype=torch.bfloat16), None),
    "everything-clip-5": (BinningConfig(100, channel_bin=5, overflow="clip"), EVERYTHING),
    "everything-authors-float16": (
        BinningConfig(100, style="authors", dtype=torch.float16),
        EVERYTHING,
    ),
}
CASES = [(name, capability) for name in COMPILED for capability in (80, 90)]


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
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


@pytest.mark.parametrize("overflow", ["drop", "clip"])
@pytest.mark.parametrize("time_bins, max_time, channel_bin", [
    (1, 1.0, 1), (20, 1.4, 5), (100, 0.7, 1), (33, 2.5, 7), (2, 0.3, 1000),
])  # fmt: skip
def test_counts_are_the_twins(time_bins, max_time, channel_bin, overflow, monkeypatch):
    small_blocks(monkeypatch)
    config = BinningConfig(time_bins, max_time, channel_bin, overflow)
    # sample 1 is empty, sample 3 comes twice, most cells have no event
    counts = assert_as_the_twin(make_store(10, most=60), [3, 1, 0, 3, 9], config)
    assert counts.any() and not counts[:, 1].any() and torch.equal(counts[:, 0], counts[:, 3])


@pytest.mark.parametrize("overflow", ["drop", "clip"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_counts_are_the_twins(name, overflow, monkeypatch):
    small_blocks(monkeypatch, block=32)
    store, config = make_store(8, most=80), BinningConfig(25, 1.0, overflow=overflow)
    for key in KEYS:
        assert_as_the_twin(store, [5, 1, 0, 7], config, AUGMENTATIONS[name], key)


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


@pytest.mark.parametrize("time_bins", [1, 2, 7, 100, 3000])
def test_the_authors_binning_is_the_twins(time_bins):
    store, config = on_edges(time_bins, 40), BinningConfig(time_bins, style="authors")
    counts = assert_as_the_twin(store, [0, 2, 1, 3], config)
    assert counts.any() and not counts[:, :, 0].any()
    assert_as_the_twin(store, [3, 0], config, EVERYTHING, (1, 1))


@pytest.mark.parametrize("case", EDGES)
def test_edges_are_the_twins(case):
    store, config, _ = EDGES[case]
    for dtype in (torch.float32, torch.float16):
        config = dataclasses.replace(config, dtype=dtype)
        for augmentation in (None, EVERYTHING):
            assert_as_the_twin(store, [0, 0], config, augmentation, (1, 2))
            columns = config.columns(store.num_channels)
            none = assert_as_the_twin(store, [], config, augmentation, (1, 2))
            assert none.shape == (config.time_bins, 0, columns)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_indices_are_read(dtype):
    indices = torch.arange(6, device=DEVICE)[::2]
    events, config = DeviceEvents(make_store(6), DEVICE), BinningConfig(5, dtype=dtype)
    counts = bin_batch(events, indices, config, backend="triton")
    assert torch.equal(counts, bin_batch(events, indices, config, backend="torch"))


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    from gpn_triton.machine import device

    events, indices, config = DeviceEvents(make_store(3)), torch.tensor([0]), BinningConfig(2)
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, torch, got 'jax'"):
        bin_batch(events, indices, config, backend="jax")
    monkeypatch.setattr(device, "triton_unavailable", lambda _: "there is none")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: there is none"):
        bin_batch(events, indices, config, backend="triton")
    assert bin_batch(events, indices, config).any()


@pytest.mark.gpu
def test_a_captured_graph_counts_what_indices_and_key_hold_at_replay():
    events = DeviceEvents(make_store(64, most=3000), DEVICE)
    config = BinningConfig(50, dtype=torch.bfloat16)
    indices = torch.arange(8, device=DEVICE)
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


def compile_everything() -> dict:
    """{case: [kernel, registers, stack, local accesses, fused multiply-adds, versions]}."""
    import re
    import tempfile

    from gpn_triton.kernels import offline
    from gpn_triton.kernels.binning import binning_count

    def fused(kernel) -> int:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            return len(re.findall(r"\bFFMA\b", offline._tool("nvdisasm", "-c", file.name)))

    found = {}
    store, key = make_store(4), torch.zeros(2, dtype=torch.int64)
    for name, capability in CASES:
        config, augmentation = COMPILED[name]
        # a part of a set in one of the cases
        numbers = torch.zeros(4, dtype=torch.int64) if config.channel_bin == 5 else None
        with offline.compiling(capability) as kernels:
            for T, B in ((1, 1), (16, 3), (100, 256), (1000, 1)):
                binning_count(
                    *(torch.from_numpy(a) for a in (store.times, store.units.view("int16"))),
                    torch.from_numpy(store.offsets), numbers, torch.zeros(B, dtype=torch.int64),
                    None if augmentation is None else key, 700, 40,
                    dataclasses.replace(config, time_bins=T), augmentation,
                )  # fmt: skip
        found[f"{name}-{capability}"] = [
            {**dataclasses.asdict(offline.read(*entry)), "fused": fused(entry[2])}
            for entry in kernels
        ]
    return found


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernels_binning"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name, capability", CASES)
def test_compiled_kernels_neither_spill_nor_fuse_nor_depend_on_sizes(compiled, name, capability):
    reports = compiled[f"{name}-{capability}"]
    half = COMPILED[name][0].dtype != torch.float32
    # one version each, whatever T and B
    names = [report["kernel"] for report in reports]
    assert names == ["binning_count_kernel", "binning_convert_kernel"][: 1 + half]
    for report in reports:
        assert report["stack_bytes"] == report["local_accesses"] == report["fused"] == 0, report
        # eight programs of four warps and more share a multiprocessor
        assert report["registers"] <= 64


if __name__ == "__main__":
    print(json.dumps(compile_everything(), default=str))
