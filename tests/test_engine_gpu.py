"""The captured training step on a GPU: its losses, its draws, and that nothing waits in it."""

import pytest
import torch

from gpn_triton.machine.graphs import WARM_RUNS
from gpn_triton.machine.profile import profiled
from tests.small_training import (
    BATCH,
    OPTIONS,
    draws,
    resident,
    small_engine,
    store,
    streamed,
    train,
)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
# libraries may choose another algorithm for a product within a graph, which sums in another order;
# a spike at its threshold then flips
LOSS = 1e-3


def close(losses, expected):
    for a, b in zip(losses, expected, strict=True):
        assert a == pytest.approx(b, rel=LOSS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_captured_steps_give_the_losses_of_uncaptured_ones(options):
    captured = small_engine(GPU, **options)
    losses = train(captured)
    plain = small_engine(GPU, no_graph=True, **options)
    assert captured.graphs.enabled and not plain.graphs.enabled
    close(losses, train(plain))


def test_streamed_events_and_a_batch_in_parts_give_the_same_losses():
    expected = train(small_engine(GPU))
    close(train(small_engine(GPU), streamed), expected)
    close(train(small_engine(GPU, accumulate=2)), expected)


def test_replays_draw_new_masks_and_resets_and_the_seed_brings_them_back():
    first, again, other = (draws(small_engine(GPU), seed, WARM_RUNS + 4) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == WARM_RUNS + 4


@pytest.mark.parametrize("neuron", ["gpn", "plif", "cuba-lif"])
@pytest.mark.parametrize("no_graph", [False, True])
def test_a_step_never_waits_for_the_device(no_graph, neuron):
    net = small_engine(GPU, no_graph=no_graph, amp="bf16", accumulate=2, neuron=neuron)
    feed = resident(store(), GPU)
    net.start_epoch(feed, 0, 0)
    for _ in range(WARM_RUNS + 1):
        net.train_step(feed, BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        net.train_step(feed, BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_profile_splits_replayed_steps_kernel_by_kernel(tmp_path):
    net, feed, steps = small_engine(GPU), resident(store(), GPU), WARM_RUNS + 3
    net.start_epoch(feed, 0, 0)
    with profiled(2, steps, GPU, tmp_path) as made:
        for _ in range(steps):
            net.train_step(feed, BATCH)
            made()
    text = (tmp_path / "profile.txt").read_text()
    assert "gpn_forward_kernel" in text and "binning" in text, text
    assert "saw no kernel" not in text
