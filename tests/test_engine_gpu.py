"""The captured training step on a GPU: its losses, its draws, and that nothing waits in it."""

import functools

import pytest
import torch

from gpn_triton import memory
from gpn_triton.build import build_model
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed
from gpn_triton.data.synthetic import synthetic_splits
from gpn_triton.engine import Engine
from gpn_triton.graphs import WARM_RUNS
from gpn_triton.options import TrainConfig
from gpn_triton.profile import StepProfile
from tests.small_training import BATCH, OPTIONS, SMALL, store, streamed, train

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
    captured, losses = train(device=GPU, **options)
    assert captured.graphs.enabled and len(captured.graphs._replays) >= 3
    plain, expected = train(device=GPU, no_graph=True, **options)
    assert not plain.graphs.enabled
    close(losses, expected)


def test_streamed_events_give_the_losses_of_resident_ones():
    feed = functools.partial(streamed, device=GPU)
    close(train(make_feed=feed, device=GPU)[1], train(device=GPU)[1])


def test_a_batch_in_parts_gives_the_losses_of_the_whole():
    close(train(accumulate=2, device=GPU)[1], train(device=GPU)[1])


def engine(**options):
    torch.manual_seed(0)
    cfg = TrainConfig(**{**SMALL, **options})
    return Engine(cfg, build_model(cfg, 100, 2).to(GPU).train(), GPU)


def test_replays_draw_new_masks_and_resets_and_the_seed_brings_them_back():
    def draws(seed):
        net = engine()
        kept = [torch.zeros(BATCH, N, device=GPU) for N in (9, 6, 9, 6)]

        def work():
            drawn = net.model.draw(BATCH)
            for to, t in zip(
                kept, [d.v_reset for d in drawn] + [d.mask for d in drawn], strict=True
            ):
                to.copy_(t)

        torch.manual_seed(seed)
        found = []
        for _ in range(WARM_RUNS + 4):
            net.graphs.run("draw", work)
            found.append(torch.cat([t.flatten() for t in kept]))
        return torch.stack(found)

    first, again, other = draws(1), draws(1), draws(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == WARM_RUNS + 4


@pytest.mark.parametrize("no_graph", [False, True])
def test_a_step_never_waits_for_the_device(no_graph):
    net, feed = (
        engine(no_graph=no_graph, amp="bf16", accumulate=2),
        Feed(DeviceEvents(store(), GPU)),
    )
    net.start_epoch(feed, 0, 0)
    for _ in range(WARM_RUNS + 1):
        net.train_step(feed, BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        net.train_step(feed, BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_want_of_memory_is_answered_with_parts_that_fit():
    net = engine(hidden=(256,), time_bins=200, batch_size=512, epochs=2)
    feed = Feed(DeviceEvents(synthetic_splits(512, 0, 2).train, GPU))
    net = Engine(net.cfg, build_model(net.cfg, 700, 2).to(GPU).train(), GPU)
    net.start_epoch(feed, 0, 0)
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    # 512 samples hold 280 MiB of counts alone, twice that with the current
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3e8) / total)
    try:
        failed = False
        try:
            net.train_step(feed, 512)
        except torch.OutOfMemoryError:
            failed = True
        assert failed
        line = memory.advice(net, feed)
        parts = int(line.split("--accumulate ")[1].split(",")[0])
        assert net.fits(feed, -(-512 // parts)) and not net.fits(feed, 512)
        assert " needs about " in line and "GiB" in line
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_profile_splits_replayed_steps_kernel_by_kernel():
    net, feed = engine(), Feed(DeviceEvents(store(), GPU))
    profile = StepProfile(steps=2, warmup=WARM_RUNS + 1, device=GPU)
    with profile:
        net.start_epoch(feed, 0, 0)
        for _ in range(WARM_RUNS + 3):
            net.train_step(feed, BATCH)
            profile.step()
    names = [row.name for row in profile.rows]
    assert any("recurrence" in name for name in names), names
    assert any("binning" in name for name in names), names
    assert all(row.ms >= 0 for row in profile.rows)
