"""Training steps: the same losses captured or not, streamed or not, in parts or whole."""

import math

import pytest
import torch

from gpn_triton.data.binning import bin_batch
from gpn_triton.machine.distributed import World
from gpn_triton.neurons.event_linear import Cells
from gpn_triton.training.build import build_augmentation, build_binning
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig
from gpn_triton.training.schedule import Schedule
from tests.replay import Recorded, RecordedGraphs
from tests.small_training import (
    BATCH,
    CPU,
    EPOCHS,
    OPTIONS,
    SAMPLES,
    SMALL,
    draws,
    resident,
    small_engine,
    store,
    streamed,
    train,
)  # fmt: skip


def same(a, b, rel):
    assert len(a) == len(b) == EPOCHS
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=rel)


def dense(events, device=CPU):
    """A feed whose events are counted, as where a sample has many."""
    feed = resident(events, device)
    feed.events.mean = math.inf
    return feed


CONFIG, EVENTS = TrainConfig(**SMALL), resident(store()).events


@torch.library.custom_op("test_engine::bins", mutates_args=())
def _bins(indices: torch.Tensor, key: torch.Tensor, augmented: bool) -> torch.Tensor:
    augmentation = build_augmentation(CONFIG) if augmented else None
    return bin_batch(EVENTS, indices, build_binning(CONFIG), augmentation, key)


class OneOperation(Engine):
    """Bins as one operation, as the kernel is: in torch its shapes depend on the data."""

    def _input(self, events, indices, augmentation):
        return _bins(indices, self.key, augmentation is not None).to(self.binning.dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replayed_steps_give_the_losses_of_uncaptured_ones(options):
    captured = small_engine(kind=OneOperation, **options)
    captured.graphs = graphs = RecordedGraphs(CPU)
    losses = train(captured)
    plain = small_engine(kind=OneOperation, **options)
    assert losses == train(plain)
    for p, q in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    # runs of each piece in an epoch: whole and short batches, of training and of evaluation
    pieces = [5, 1, 11] if options.get("accumulate") else [5, 1, 5, 1]
    assert graphs.captures == len(pieces)
    # two runs of each as they are, and the third is the recording
    assert graphs.replays == sum(EPOCHS * count - 3 for count in pieces)


def test_a_step_that_waits_or_brings_numbers_from_the_host_cannot_be_replayed():
    # in torch, binning waits for the number of events
    net = small_engine()
    net.graphs = RecordedGraphs(CPU)
    with pytest.raises(Recorded):
        train(net)
    recorded = RecordedGraphs(CPU)
    for _ in range(2):
        recorded.run("key", lambda: torch.tensor([1.0]))
    with pytest.raises(Recorded):
        recorded.run("key", lambda: torch.tensor([1.0]))


def test_replays_draw_new_masks_and_resets_and_the_seed_brings_them_back():
    found = []
    for seed in (1, 1, 2):
        net = small_engine()
        net.graphs = RecordedGraphs(CPU)
        found.append(draws(net, seed, 6))
        assert net.graphs.replays == 3
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len(found[0].unique(dim=0)) == 6


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_gives_the_losses_of_the_whole_and_holds_no_more_than_it_says(accumulate):
    net, sizes = small_engine(accumulate=accumulate), set()
    net.model.register_forward_pre_hook(lambda m, args: sizes.add(args[0].shape[1]))
    # float32 sums in another order; a spike at its threshold may flip
    same(train(net), train(small_engine()), 1e-4)
    assert max(sizes) == math.ceil(BATCH / accumulate)


class Mirrored(World):
    """Of two processes the first, where the second computes the same as this one."""

    def part(self, indices):
        return indices, 0, 1

    def add_up(self, tensor):
        return tensor.mul_(2)

    def align(self, tensors):
        pass


@pytest.mark.parametrize("options", [{}, {"amp": "fp16", "accumulate": 2}, {"neuron": "cnn"}])
def test_several_processes_replay_what_they_compute_without_graphs(options):
    found = []
    for kind in (RecordedGraphs, None):
        net = small_engine(kind=OneOperation, world=Mirrored(0, 2), **options)
        if kind:
            net.graphs = kind(CPU)
        found.append(train(net))
        assert not any(p.grad is not None for p in net.model.parameters())
        if kind:
            # whole and short batches of training and evaluation, and the update; what is added up
            # lies apart
            assert net.graphs.captures == (4 if "accumulate" in options else 5)
            assert net.graphs.replays > 3 * EPOCHS
            updated = [p.clone() for p in net.model.parameters()]
    assert found[0] == found[1]
    assert all(map(torch.equal, updated, net.model.parameters()))
    # twice the gradient of half the mean: as one process
    if options == {}:
        alone = [line[-2:] for line in train(small_engine(kind=OneOperation, clip_grad=None))]
        both = small_engine(kind=OneOperation, clip_grad=None, world=Mirrored(0, 2))
        assert both.exchange.count == len(list(both.model.parameters()))
        same([line[-2:] for line in train(both)], alone, 0.05)


def test_streamed_events_give_the_losses_of_resident_ones():
    assert train(small_engine(), streamed) == train(small_engine())


def test_the_shares_of_a_batch_are_the_batch_and_who_has_none_stands_in_without_weight():
    batch = torch.arange(5) + 10
    shares = [World(rank, 3).part(batch) for rank in range(3)]
    assert torch.equal(torch.cat([share for share, _, _ in shares]), batch)
    assert [(first, weight) for _, first, weight in shares] == [(0, 1), (1, 1), (3, 1)]
    shares = [World(rank, 3).part(batch[:2]) for rank in range(3)]
    assert [(len(share), weight) for share, _, weight in shares] == [(1, 0), (1, 1), (1, 1)]


def test_event_driven_input_gives_the_losses_of_counts():
    losses, kinds = [], []
    for feed in (resident, dense):
        net, seen = small_engine(time_bins=25), set()
        net.model.register_forward_pre_hook(lambda m, args, seen=seen: seen.add(type(args[0])))
        losses.append(train(net, feed))
        kinds.append(Cells in seen and torch.Tensor not in seen)
    assert kinds == [True, False]
    same(*losses, 1e-4)


def test_evaluation_does_not_depend_on_the_batch_size():
    found = []
    for batch_size in (3, 8, 100):
        found.append(small_engine(batch_size=batch_size).evaluate(resident(store())))
    for other in found[1:]:
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert other.accuracy == found[0].accuracy


def test_learning_rate_scales_with_the_root_of_the_batch_and_warms_up_by_step():
    cfg = TrainConfig(
        batch_size=2048, lr=1e-3, lr_batch_size=128, warmup_epochs=2, epochs=6, schedule="constant"
    )
    schedule = Schedule(cfg)
    assert schedule.peak == pytest.approx(4e-3) and schedule.warm_steps(30) == 61
    steps = math.ceil(SAMPLES / BATCH)
    net = small_engine(schedule="constant", lr_batch_size=2, warmup_epochs=2)
    assert net.schedule.peak == pytest.approx(0.02)
    rates = [line[-1] for line in train(net)]
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


def test_health_is_what_the_spikes_and_gradients_of_the_steps_say():
    options = dict(dropout=0.0, clip_grad=1e-3, warmup_epochs=0, batch_size=SAMPLES)
    net, feed = small_engine(**options), resident(store())
    with torch.no_grad():
        # the first layer's first two neurons never spike, the third always does
        net.model.inputs[0].weight[:3] = 0
        net.model.inputs[0].bias[:3] = torch.tensor([-50.0, -50.0, 50.0])
    x = bin_batch(feed.events, torch.arange(SAMPLES), build_binning(net.cfg))
    spikes = []
    hook = net.model.neurons[0].register_forward_hook(lambda *args: spikes.append(args[2][0]))
    net.model.eval()
    evaluated = net.evaluate(feed)
    hook.remove()
    rate = spikes[0].mean((0, 1))
    assert evaluated.dead[0] == pytest.approx(float((rate == 0).sum()) / 9)
    assert evaluated.saturated[0] == pytest.approx(float((rate > 0.95).sum()) / 9)
    assert evaluated.dead[0] > 0.2 and evaluated.saturated[0] > 0.1
    assert evaluated.activity[0] == pytest.approx(float(rate.mean()), rel=1e-5)
    assert len(evaluated.dead) == 2 and evaluated.dead[1] < 1

    net.augmentation = None
    for neuron in net.model.neurons:
        neuron.reset_std = 0
    loss = torch.nn.functional.cross_entropy(net.model(x)[0], feed.events.labels)
    parameters = dict(net.model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    expected = [
        torch.stack([g.norm() for name, g in gradients.items() if part in name]).norm().item()
        for part in (".0.", ".1.", "output")
    ]
    net.start_epoch(feed, 3, 0)
    net.train_step(feed, SAMPLES)
    assert net.gradient_norms() == pytest.approx(expected, rel=1e-3)
