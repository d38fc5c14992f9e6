"""Whole training steps and epochs: ours, the loop and twins of the same sizes, on made-up events.

Events are uniform in time and channel, EVENTS a sample: what a step costs depends on how many there
are, not on what they say. The network, its loss and its optimiser are train.Engine's, whatever the
neuron, so that only the neuron differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.competitors import LoopGPN, Unavailable
from bench.measure import peak_bytes
from bench.subjects import (
    DTYPES,
    GATE_WEIGHTS,
    ROWS,
    SPIKING,
    TOLERANCE,
    Entry,
    compare,
    compare_gradients,
    double_leaves,
    expect,
)  # fmt: skip
from gpn_triton import gpn
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.feed import Feed
from gpn_triton.machine.graphs import WARM_RUNS
from gpn_triton.neurons import cost
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training import build, options
from gpn_triton.training.engine import Engine
from gpn_triton.training.options import TrainConfig

# about as many as a sample of SHD or SSC has
EVENTS = 4000
# as many as a step draws from, many times over; to draw all of a large set takes half a minute
DISTINCT = 2048
SECONDS = 1.0
GAIN = 5.0
SUBJECTS = (
    "gpn", "gpn-no-graph", "gpn-every-10", "loop", "loop-graph", "lif", "cuba-lif", "lstm", "gru",
)  # fmt: skip
# dtype -> the training command's name of it
AMP = {str(dtype).removeprefix("torch."): name for name, dtype in options.AMP.items() if name}


def event_store(samples: int, channels: int, classes: int) -> EventStore:
    """Samples of EVENTS uniform events within SECONDS; beyond DISTINCT of them they repeat."""
    draw, distinct = np.random.default_rng(0), min(samples, DISTINCT)
    times = np.sort(draw.random((distinct, EVENTS), np.float32) * np.float32(SECONDS), 1)
    return EventStore(
        np.resize(times, samples * EVENTS),
        np.resize(draw.integers(0, channels, times.size, np.uint16), samples * EVENTS),
        np.arange(samples + 1, dtype=np.int64) * EVENTS,
        np.resize(draw.integers(0, classes, distinct, np.int64), samples),
        None,
        channels,
        tuple(map(str, range(classes))),
    )


def engine(case: Case, subject: str, device: torch.device) -> Engine:
    """A network with the subject's neurons, and its optimiser.

    Raises:
        Unavailable: the subject cannot take part here.
    """
    if subject == "gpn-no-graph" and device.type == "cpu":
        raise Unavailable("the same as gpn here")
    if subject == "loop-graph" and device.type == "cpu":
        raise Unavailable("CUDA graphs need a GPU")
    kind = subject if subject in NEURONS else "gpn"
    cfg = TrainConfig(
        hidden=case.hidden, neuron=kind, time_bins=case.T, max_time=SECONDS, batch_size=case.B,
        amp=AMP.get(case.dtype),
        checkpoint_every=10 if subject == "gpn-every-10" else None,
        # the loop is the authors' way
        no_graph=subject in ("gpn-no-graph", "loop"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build.build_model(cfg, case.inputs, case.classes)
    if kind in SPIKING:
        # as drawn the neurons hardly spike; trained ones do, and the check should see spikes
        with torch.no_grad():
            for linear in model.inputs:
                linear.weight *= GAIN
    if subject.startswith("loop"):
        last = len(model.neurons) - 1
        for k, layer in enumerate(model.neurons):
            model.neurons[k] = LoopGPN(layer, mean=k == last)
    return Engine(cfg, model.to(device).train(), device)


def steps(
    case: Case, device: torch.device, batches: int, samples: int | None = None
) -> Callable[[str], Entry]:
    """A function that prepares a subject by name: so many training steps a call.

    They are those of the training command's engine, each on the next samples of a random order.

    Args:
        case: sizes. batches: steps of one call. samples: of the set from which they draw; default:
            as many as one call takes.
    """
    size = samples or case.B * batches

    @functools.cache
    def data() -> tuple[Feed, Tensor]:
        """The set on the device, and an order of it."""
        store = event_store(size, case.inputs, case.classes)
        draw = torch.Generator(device).manual_seed(0)
        order = torch.randperm(size, generator=draw, device=device)
        return Feed(DeviceEvents(store, device)), order

    def prepare(subject: str) -> Entry:
        trainer = engine(case, subject, device)
        feed, order = data()
        trainer.start_epoch(feed, 0, 0)

        def run(count: int) -> None:
            feed.start(order, 0, case.B)
            trainer.step.zero_()
            for _ in range(count):
                trainer.train_step(feed, case.B)

        def checked() -> dict[str, Any]:
            seen = check(trainer, case, device)
            run(1)
            if trainer.graphs.enabled:
                # the other runs as it is, and the capture: a replay allocates nothing
                seen["peak_bytes"] = peak_bytes(functools.partial(run, WARM_RUNS), device)
            return seen

        work, element = NEURONS[trainer.cfg.neuron].work, DTYPES[case.dtype].itemsize
        count = cost.network(work, case.hidden, case.inputs, case.classes, True, element)
        return Entry(functools.partial(run, batches), checked, count * (case.T * case.B * batches))

    return prepare


def check(trainer: Engine, case: Case, device: torch.device) -> dict[str, Any]:
    """Run the network forward and backward once and compare every layer with float64.

    At the shape that is timed, without dropout, with a loss over ROWS samples alone. A layer is
    judged on the input it got and the gradient it was given: rounding of a layer before may flip a
    spike, and what follows is then another problem.
    """
    g = torch.Generator(device).manual_seed(1)
    x = torch.rand(case.T, case.B, case.inputs, generator=g, device=device)
    # about EVENTS events a sample, most bins empty
    x = (x < EVENTS / (case.T * case.inputs)).float()
    rows = torch.linspace(0, case.B - 1, min(case.B, ROWS), device=device).round().long()
    weights = torch.randn(len(rows), case.classes, generator=g, device=device)
    model, kind = trainer.model, trainer.cfg.neuron
    seen: dict[nn.Module, dict[str, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        seen[module] = record = {"x": inputs[0].detach(), "out": outputs[0].detach()}
        outputs[0].register_hook(lambda g: record.__setitem__("g_out", g.detach()))
        # a network's input needs none
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda g: record.__setitem__("g_x", g.detach()))

    hooks = [module.register_forward_hook(keep) for module in model.neurons]
    model.eval()
    with torch.autocast(device.type, trainer.amp, enabled=trainer.amp is not None):
        logits, activity = model(x)
    (logits[rows].float() * weights).sum().backward()
    for hook in hooks:
        hook.remove()
    try:
        for module, record in seen.items():
            _check_layer(module, trainer.cfg, record, rows, TOLERANCE[DTYPES[case.dtype]])
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
    if kind not in SPIKING:
        return {}
    size = torch.tensor(case.hidden, device=activity.device)
    return {"spikes_a_step": (activity * size).sum().item()}


def _check_layer(
    module: nn.Module, cfg: TrainConfig, record: dict, rows: Tensor, tolerance: tuple[float, float]
) -> None:
    """Compare one layer's output (spikes, or their mean) and gradients with float64."""
    looped = isinstance(module, LoopGPN)
    parameters = dict((module.layer if looped else module).named_parameters())
    x, out, cotangent = record["x"], record["out"], record["g_out"]
    if out.ndim == 2:
        weights = [parameters[name] for name in GATE_WEIGHTS]
        with torch.no_grad():
            spikes = module.spikes(x) if looped else gpn(x, *weights, backend=cfg.backend)[0]
        compare("the mean of the spikes", out, spikes.double().mean(0), 1e-3)
        out, cotangent = spikes, (cotangent / len(x)).expand(len(x), -1, -1)
    got = out[:, rows].cpu().double()
    leaves = double_leaves({"x": x, **parameters}, rows)
    no_reset = torch.zeros_like(got[0])
    expected = expect(cfg.neuron, leaves["x"], leaves, got, tolerance, no_reset, module)
    expected.backward(cotangent[:, rows].cpu().double())
    gradients = {name: p.grad for name, p in parameters.items()}
    gradients |= {"x": record["g_x"]} if "g_x" in record else {}
    compare_gradients(gradients, leaves, rows, tolerance[1])
