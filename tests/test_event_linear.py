"""Lists of binned events against dense counts, and the linear layer over them against F.linear."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from gpn_triton.data import binning as module
from gpn_triton.data.augmentation import Augmentation
from gpn_triton.data.binning import BinningConfig, batch_input, bin_batch, bin_cells, prefers_cells
from gpn_triton.data.events import DeviceEvents
from gpn_triton.neurons.event_linear import Cells, event_linear
from tests.stores import make_store

EVERYTHING = Augmentation(20, 0.1, 0.005, 0.1, 0.1)
# float32 sums of up to some hundred terms in another order
CLOSE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float64: dict(rtol=1e-12, atol=1e-12)}


def some_cells(T=30, channel_bin=1, indices=(3, 1, 0, 3), augmentation=None):
    """A list of events (sample 1 has none, sample 3 comes twice) and its dense counts."""
    events, config = DeviceEvents(make_store(5, most=90)), BinningConfig(T, 1.0, channel_bin)
    arguments = (events, torch.tensor(indices, dtype=torch.int64), config, augmentation, (1, 2))
    return bin_cells(*arguments), bin_batch(*arguments)


@pytest.mark.parametrize("config", [
    BinningConfig(1), BinningConfig(25, 0.6, channel_bin=5),
    BinningConfig(25, 0.6, overflow="clip"), BinningConfig(1000, style="authors"),
])  # fmt: skip
@pytest.mark.parametrize("augmentation", [None, EVERYTHING])
def test_a_list_of_events_holds_the_counts_of_the_batch(config, augmentation):
    events, indices = DeviceEvents(make_store(8)), torch.tensor([7, 1, 0, 7, 2])
    cells = bin_cells(events, indices, config, augmentation, (4, 5))
    counts = bin_batch(events, indices, config, augmentation, (4, 5))
    assert counts.any() and torch.equal(cells.dense(), counts)
    T, B, _ = counts.shape
    assert torch.equal(cells.row_start.diff(), counts.sum(2).view(T * B).long())
    # it is taken where it is asked for and most cells are empty
    for sparse in (True, False):
        batch = batch_input(events, indices, config, augmentation, (4, 5), sparse)
        assert isinstance(batch, Cells) == (sparse and prefers_cells(events, config))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("T, channel_bin, augmentation", [
    (1, 1, None), (30, 1, EVERYTHING), (30, 5, None), (1000, 1, EVERYTHING), (3, 700, None),
])  # fmt: skip
def test_values_and_gradients_are_those_of_dense_counts(T, channel_bin, augmentation, dtype):
    cells, counts = some_cells(T, channel_bin, augmentation=augmentation)
    C, N = counts.shape[2], 13
    weight, bias = torch.randn(N, C, dtype=dtype), torch.randn(N, dtype=dtype)
    g_y = torch.randn(T, counts.shape[1], N, dtype=dtype)
    # as it is, expanded and transposed
    for g in (g_y, g_y[:1].expand_as(g_y), g_y.mT.contiguous().mT):
        results = []
        for linear, x in ((F.linear, counts.to(dtype)), (event_linear, cells)):
            leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            y = linear(x, *leaves)
            y.backward(g)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for expected, got in zip(*results, strict=True):
            assert expected.any() and got.dtype == dtype
            torch.testing.assert_close(got, expected, **CLOSE[dtype])


@pytest.mark.parametrize("shape", [(4, 0, 700), (3, 2, 5)])
def test_without_events_the_bias_is_left_and_the_gradient_is_zero(shape):
    cells = Cells.from_cells(torch.zeros(0, dtype=torch.int64), shape)
    weight, bias = torch.randn(6, shape[2]).requires_grad_(), torch.randn(6).requires_grad_()
    y = event_linear(cells, weight, bias)
    y.sum().backward()
    assert y.shape == (*shape[:2], 6) and torch.equal(y, bias.expand_as(y))
    assert not weight.grad.any() and (bias.grad == shape[0] * shape[1]).all()


def test_results_depend_neither_on_the_run_nor_on_the_order_of_events():
    _, counts = some_cells(T=20, augmentation=EVERYTHING)
    cell = torch.arange(counts.numel()).repeat_interleave(counts.flatten().long())
    cells = Cells.from_cells(cell, counts.shape)
    shuffled = Cells.from_cells(cell[torch.randperm(len(cell))], counts.shape)
    weight, bias = torch.randn(16, 700), torch.randn(16)
    g_y, results = torch.randn(20, 4, 16), []
    for one in (cells, cells, shuffled):
        leaf = weight.clone().requires_grad_()
        y = event_linear(one, leaf, bias)
        y.backward(g_y)
        results.append((y.detach(), leaf.grad))
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_result_alone(dtype):
    cells, counts = some_cells()
    weight, bias = torch.randn(6, 700).requires_grad_(), torch.randn(6)
    with torch.autocast("cpu", dtype):
        y = event_linear(cells, weight, bias)
        assert y.dtype == F.linear(counts, weight, bias).dtype == dtype
    assert torch.equal(y, event_linear(cells, weight, bias).to(dtype))
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_events_are_listed_where_they_are_few_and_on_a_cpu():
    store = make_store(10, most=40)
    events = DeviceEvents(store)
    mean = len(store.times) / 10
    few = int(mean / (700 * module.CELLS_DENSITY)) + 1
    assert prefers_cells(events, BinningConfig(few))
    assert not prefers_cells(events, BinningConfig(few, channel_bin=700))
    dense = dataclasses.replace(store, num_channels=int(mean / (few * module.CELLS_DENSITY)) - 1)
    assert not prefers_cells(DeviceEvents(dense), BinningConfig(few))
    events.times = events.times.to("meta")
    assert not prefers_cells(events, BinningConfig(few))


def test_wrong_arguments_are_refused():
    cells, _ = some_cells(channel_bin=5)
    with pytest.raises(ValueError, match=r"weight: expected \[N, 140\] and bias \[N\], got \[3, 7"):
        event_linear(cells, torch.zeros(3, 700), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias \[N\], got \[3, 140\] \[4\]"):
        event_linear(cells, torch.zeros(3, 140), torch.zeros(4))
    events, config = DeviceEvents(make_store(3)), BinningConfig(2)
    with pytest.raises(ValueError, match="indices: expected int64"):
        bin_cells(events, torch.zeros(1), config)
    with pytest.raises(ValueError, match="draw_key: expected two integers"):
        bin_cells(events, torch.tensor([0]), config, EVERYTHING)
