"""Training steps: the same losses captured or not, streamed or not, in parts or whole."""

import math

import pytest
import torch

from gpn_triton import engine, memory
from gpn_triton.build import build_model
from gpn_triton.data import binning
from gpn_triton.data.binning import bin_batch
from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed
from gpn_triton.engine import Engine
from gpn_triton.options import TrainConfig
from gpn_triton.schedule import Schedule
from tests.replay import Recorded, RecordedGraphs
from tests.small_training import BATCH, CPU, EPOCHS, OPTIONS, SAMPLES, SMALL, store, streamed, train


def same(a, b, rel):
    assert len(a) == len(b) == EPOCHS
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=rel)


@torch.library.custom_op("test_engine::bins", mutates_args=())
def _bins(indices: torch.Tensor, key: torch.Tensor, call: int) -> torch.Tensor:
    events, config, augmentation = BINNED[call]
    return bin_batch(events, indices, config, augmentation, key)


BINNED = []


@pytest.fixture
def one_operation(monkeypatch):
    """Binning as one operation, as the kernel is: in torch its shapes depend on the data."""

    def bins(events, indices, config, augmentation, key, sparse):
        BINNED.append((events, config, augmentation))
        return _bins(indices, key, len(BINNED) - 1)

    monkeypatch.setattr(engine, "batch_input", bins)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replayed_steps_give_the_losses_of_uncaptured_ones(one_operation, options):
    graphs = RecordedGraphs(CPU)
    captured, losses = train(graphs=graphs, **options)
    plain, expected = train(**options)
    assert losses == expected
    for p, q in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    # runs of each piece in an epoch: whole and short batches, of training and of evaluation
    pieces = [5, 1, 11] if options.get("accumulate") else [5, 1, 5, 1]
    assert graphs.captures == len(pieces)
    # two runs of each as they are, and the third is the recording
    assert graphs.replays == sum(EPOCHS * count - 3 for count in pieces)


def test_a_step_that_waits_or_brings_numbers_from_the_host_cannot_be_replayed(monkeypatch):
    # in torch, binning waits for the number of events
    monkeypatch.setattr(binning, "prefers_cells", lambda *_: False)
    with pytest.raises(Recorded):
        train(graphs=RecordedGraphs(CPU))
    recorded = RecordedGraphs(CPU)
    for _ in range(2):
        recorded.run("key", lambda: torch.tensor([1.0]))
    with pytest.raises(Recorded):
        recorded.run("key", lambda: torch.tensor([1.0]))


def test_replays_draw_new_masks_and_resets_and_the_seed_brings_them_back(one_operation):
    def draws(seed):
        cfg = TrainConfig(**SMALL)
        net = Engine(cfg, build_model(cfg, 100, 2).train(), CPU)
        graphs, kept = RecordedGraphs(CPU), [torch.zeros(BATCH, N) for N in (9, 6, 9, 6)]

        def work():
            drawn = net.model.draw(BATCH)
            for to, t in zip(kept, [d.v_reset for d in drawn] + [d.mask for d in drawn]):  # noqa: B905
                to.copy_(t)

        torch.manual_seed(seed)
        found = []
        for _ in range(6):
            graphs.run("draw", work)
            found.append(torch.cat([t.flatten() for t in kept]))
        assert graphs.replays == 3
        return torch.stack(found)

    first, again, other = draws(1), draws(1), draws(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 6


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_gives_the_losses_of_the_whole(accumulate):
    # float32 sums in another order; a spike at its threshold may flip
    same(train(accumulate=accumulate)[1], train()[1], 1e-4)


def test_parts_hold_no_more_samples_at_once_than_they_say(monkeypatch):
    sizes, forward = [], Engine._forward

    def spy(self, model, events, indices, *rest):
        sizes.append((self.model.training, len(indices)))
        return forward(self, model, events, indices, *rest)

    monkeypatch.setattr(Engine, "_forward", spy)
    train(accumulate=3, epochs=1)
    assert {n for training, n in sizes if training} == {1, 2, 3}
    assert max(n for training, n in sizes if not training) == 3


def test_streamed_events_give_the_losses_of_resident_ones():
    assert train(make_feed=streamed)[1] == train()[1]


def test_learning_rate_scales_with_the_root_of_the_batch_and_warms_up_by_step():
    cfg = TrainConfig(
        batch_size=2048, lr=1e-3, lr_batch_size=128, warmup_epochs=2, epochs=6, schedule="constant"
    )
    schedule = Schedule(cfg)
    assert schedule.peak == pytest.approx(4e-3) and schedule.warm_steps(30) == 61
    steps = math.ceil(SAMPLES / BATCH)
    net, losses = train(schedule="constant", lr_batch_size=2, warmup_epochs=2)
    assert net.schedule.peak == pytest.approx(0.02)
    rates = [line[-1] for line in losses]
    warm = 2 * steps + 1
    assert rates == pytest.approx([0.02 * steps / warm, 0.02 * 2 * steps / warm, 0.02, 0.02])


def test_cosine_and_plateau_change_the_rate_by_epoch_once_warm():
    schedule = Schedule(TrainConfig(lr=1.0, epochs=6, warmup_epochs=2))
    rates = []
    for epoch in range(6):
        rates.append(schedule.rate)
        schedule.end_epoch(epoch, 1.0)
    expected = [1, 1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
    assert rates == pytest.approx(expected)
    schedule = Schedule(TrainConfig(lr=1.0, epochs=20, schedule="plateau"))
    losses, rates = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0], []
    for epoch, loss in enumerate(losses):
        schedule.end_epoch(epoch, loss)
        rates.append(schedule.rate)
    assert rates == pytest.approx([1] * 5 + [0.75] * 3)
    other = Schedule(TrainConfig(lr=1.0, epochs=20, schedule="plateau"))
    other.load_state_dict(schedule.state_dict())
    for epoch in range(8, 14):
        other.end_epoch(epoch, 1.0)
        schedule.end_epoch(epoch, 1.0)
    assert other.rate == schedule.rate == pytest.approx(0.75**2)


def test_out_of_memory_is_answered_with_parts_that_were_tried(monkeypatch):
    tried, fits = [], Engine.fits

    def spy(self, feed, size):
        tried.append((size, fits(self, feed, size)))
        return tried[-1][1]

    forward = Engine._forward

    def limited(self, model, events, indices, *rest):
        if len(indices) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return forward(self, model, events, indices, *rest)

    cfg = TrainConfig(**SMALL)
    net = Engine(cfg, build_model(cfg, 100, 2).train(), CPU)
    feed = Feed(DeviceEvents(store()))
    before = [p.clone() for p in net.model.parameters()]
    monkeypatch.setattr(Engine, "fits", spy)
    monkeypatch.setattr(Engine, "_forward", limited)
    line = memory.advice(net, feed)
    assert tried == [(4, False), (2, True)]
    assert "a step of 8 samples at once; --accumulate 4, 2 samples at once, fits;" in line
    for p, q in zip(before, net.model.parameters(), strict=True):
        assert torch.equal(p, q) and q.grad is None
    monkeypatch.setattr(
        Engine, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("another mistake"))
    )
    with pytest.raises(RuntimeError, match="another mistake"):
        memory.advice(net, feed)
