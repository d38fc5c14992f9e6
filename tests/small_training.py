"""A small training on a small set, of which several tests want the losses."""

from __future__ import annotations

import torch

from gpn_triton.data.events import DeviceEvents
from gpn_triton.data.feed import Feed, StreamedFeed
from gpn_triton.machine.distributed import ALONE
from gpn_triton.training.build import build_model
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig
from tests.stores import make_store

CPU = torch.device("cpu")
EPOCHS, SAMPLES, BATCH = 4, 44, 8
SMALL = dict(
    hidden=(9, 6), time_bins=7, batch_size=BATCH, epochs=EPOCHS, lr=0.01, channel_shift=3,
    clip_grad=1.0, warmup_epochs=1,
)  # fmt: skip
OPTIONS = [
    {},
    {"amp": "bf16", "accumulate": 2},
    {"amp": "fp16"},
    {"amp": "fp16", "clip_grad": None, "neuron": "lif"},
    {"neuron": "gru", "schedule": "plateau"},
    {"readout": "last", "checkpoint_every": 3, "schedule": "constant", "warmup_epochs": 0},
]


def store():
    """Samples of two classes that fire in different channels, 0 to 39 events each."""
    return make_store(SAMPLES, 2, None, 100, least=0, most=39, end=1.0, empty=False, band=(50, 40))


def small_engine(device=CPU, kind=Engine, world=ALONE, **options):
    """An engine of a kind for the small set; the same network each time."""
    torch.manual_seed(0)
    cfg = TrainConfig(**{**SMALL, **options})
    net = kind(cfg, build_model(cfg, 100, 2).to(device).train(), device, world)
    with torch.no_grad():
        # as drawn the neurons hardly spike
        for parameter in net.model.inputs[0].parameters():
            parameter *= 4
    return net


def resident(events, device=CPU):
    """A feed of events that lie on the device."""
    return Feed(DeviceEvents(events, device))


def train(net, make_feed=resident, epochs=EPOCHS):
    """Train an engine on the small set; by epoch the totals, the evaluated loss and the rate."""
    feed, evaluated = make_feed(store(), net.device), resident(store(), net.device)
    losses = []
    for epoch in range(epochs):
        net.start_epoch(feed, 3, epoch)
        for first in range(0, SAMPLES, BATCH):
            net.train_step(feed, min(BATCH, SAMPLES - first))
        line = net.totals.tolist() + [net.evaluate(evaluated).loss, float(net.lr)]
        losses.append(line)
        net.schedule.end_epoch(epoch, line[0])
    return losses


def streamed(events, device=CPU):
    """A feed of about two batches a shard."""
    return StreamedFeed(events, device, 2 * (2 * BATCH * 20 * 6 + 30 * SAMPLES) / 2**20)


def draws(net, seed, runs):
    """What an engine's graphs draw for a batch, a row a run."""
    kept = [torch.zeros(BATCH, N, device=net.device) for N in (9, 6, 9, 6)]

    def work():
        drawn = net.model.draw(BATCH)
        tensors = [d.v_reset for d in drawn] + [d.mask for d in drawn]
        for to, t in zip(kept, tensors, strict=True):
            to.copy_(t)

    torch.manual_seed(seed)
    found = []
    for _ in range(runs):
        net.graphs.run("draw", work)
        found.append(torch.cat([t.flatten() for t in kept]))
    return torch.stack(found)
