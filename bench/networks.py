"""Whole training steps and epochs: ours, the loop and twins of the same sizes, on made-up events.

Events are uniform in time and channel, EVENTS a sample: what a step costs depends on how many there
are, not on what they say. The network, its loss and its optimiser are train.Engine's, whatever the
neuron, so that only the neuron differs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.competitors import LoopGPN, Unavailable
from bench.subjects import DTYPES, ROWS, TOLERANCE, Entry, Wrong, compare, specification_under
from gpn_triton import GPN, SpikingClassifier, cost, reference
from gpn_triton.data.events import DeviceEvents, EventStore
from gpn_triton.data.feed import Feed
from gpn_triton.engine import Engine
from gpn_triton.model import NEURONS
from gpn_triton.options import TrainConfig

# about as many as a sample of SHD or SSC has
EVENTS = 4000
SECONDS = 1.0
GAIN = 5.0
SUBJECTS = (
    "gpn", "gpn-no-graph", "gpn-torch", "gpn-every-10", "loop", "loop-graph", "lif", "lstm", "gru",
)  # fmt: skip
AMP = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}


def event_store(samples: int, channels: int, classes: int, seed: int = 0) -> EventStore:
    """A data set of uniform events.

    Args:
        samples: how many, each of EVENTS events within SECONDS. channels, classes: numbers of them.
    """
    draw = np.random.default_rng(seed)
    times = np.sort(draw.random((samples, EVENTS), np.float32) * np.float32(SECONDS), 1)
    return EventStore(
        times.ravel(),
        draw.integers(0, channels, samples * EVENTS, np.uint16),
        np.arange(samples + 1, dtype=np.int64) * EVENTS,
        draw.integers(0, classes, samples, np.int64),
        None,
        channels,
        tuple(map(str, range(classes))),
    )


def engine(case: Case, subject: str, device: torch.device) -> Engine:
    """A network with the subject's neurons, and its optimiser.

    Raises:
        Unavailable: the subject cannot take part here.
    """
    if subject in ("gpn-torch", "gpn-no-graph") and device.type == "cpu":
        raise Unavailable("the same as gpn here")
    if subject == "loop-graph" and device.type == "cpu":
        raise Unavailable("CUDA graphs need a GPU")
    kind = subject if subject in ("lif", "lstm", "gru") else "gpn"
    cfg = TrainConfig(
        hidden=case.hidden,
        neuron=kind,
        time_bins=case.T,
        max_time=SECONDS,
        batch_size=case.B,
        amp=AMP[case.dtype],
        backend="torch" if subject == "gpn-torch" else "auto",
        checkpoint_every=10 if subject == "gpn-every-10" else None,
        # the torch path's reference is written for a CPU, the loop is the authors' way
        no_graph=subject in ("gpn-no-graph", "gpn-torch", "loop"),
    )
    torch.manual_seed(0)
    model = SpikingClassifier(
        case.hidden, kind, case.inputs, case.classes, cfg.dropout,
        backend=cfg.backend, checkpoint_every=cfg.checkpoint_every,
    )  # fmt: skip
    if kind in ("gpn", "lif"):
        # as drawn the neurons hardly spike; trained ones do, and the check should see spikes
        with torch.no_grad():
            for linear in model.inputs:
                linear.weight *= GAIN
    if subject.startswith("loop"):
        for k, layer in enumerate(model.neurons):
            model.neurons[k] = LoopGPN(layer)
    return Engine(cfg, model.to(device).train(), device)


def steps(case: Case, device: torch.device, batches: int) -> Callable[[str], Entry]:
    """A function that prepares a subject by name: so many training steps a call.

    Args:
        case: sizes. batches: steps of one call, on samples of their own.
    """

    @functools.cache
    def data() -> Feed:
        return Feed(DeviceEvents(event_store(case.B * batches, case.inputs, case.classes), device))

    def prepare(subject: str) -> Entry:
        trainer, feed = engine(case, subject, device), data()
        trainer.start_epoch(feed, 0, 0)

        def call() -> None:
            feed.start(None, 0, case.B)
            for _ in range(batches):
                trainer.train_step(feed, case.B)

        def checked() -> dict[str, Any]:
            seen = check(trainer, case, device)
            # of the runs before a capture one is here, one in the warm-up; memory is counted while
            # it is captured, as a replay allocates nothing
            call()
            return seen

        kind = trainer.cfg.neuron
        element = 4 if case.dtype == "float32" else 2
        count = cost.network(
            NEURONS[kind].work, case.hidden, case.inputs, case.classes, True, element
        )
        return Entry(call, checked, count * (case.T * case.B * batches))

    return prepare


def check(trainer: Engine, case: Case, device: torch.device) -> dict[str, Any]:
    """Run the network forward and backward once and compare every layer with float64.

    At the shape that is timed, without dropout, with a loss over ROWS samples alone. A layer of
    spikes is judged on the input it got and the gradient it was given, as rounding of a layer
    before may flip a spike and what follows is then another problem; other networks as a whole.
    """
    g = torch.Generator(device).manual_seed(1)
    x = torch.rand(case.T, case.B, case.inputs, generator=g, device=device)
    # about EVENTS events a sample, most bins empty
    x = (x < EVENTS / (case.T * case.inputs)).float()
    rows = torch.linspace(0, case.B - 1, min(case.B, ROWS), device=device).round().long()
    weights = torch.randn(len(rows), case.classes, generator=g, device=device)
    model, margin_share = trainer.model, TOLERANCE[DTYPES[case.dtype]]
    seen: dict[nn.Module, dict[str, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        record = {"x": inputs[0].detach(), "out": outputs[0].detach()}
        inputs[0].register_hook(lambda g: record.__setitem__("g_x", g.detach()))
        outputs[0].register_hook(lambda g: record.__setitem__("g_out", g.detach()))
        seen[module] = record

    spiking = trainer.cfg.neuron in ("gpn", "lif")
    hooks = [m.register_forward_hook(keep) for m in model.neurons] if spiking else []
    model.eval()
    with torch.autocast(device.type, trainer.amp, enabled=trainer.amp is not None):
        logits, activity = model(x)
    (logits[rows].float() * weights).sum().backward()
    for hook in hooks:
        hook.remove()
    try:
        if trainer.cfg.neuron == "gpn":
            for module, record in seen.items():
                _check_gpn(module, record, rows, *margin_share)
        elif trainer.cfg.neuron == "lif":
            for record in seen.values():
                _check_lif(record, rows, margin_share[1])
        else:
            _check_whole(model, x[:, rows], logits[rows], weights, margin_share[1])
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
    if not spiking:
        return {}
    size = torch.tensor(case.hidden, device=activity.device)
    return {"spikes_a_step": (activity * size).sum().item()}


def _check_gpn(module: nn.Module, record: dict, rows: Tensor, margin: float, share: float) -> None:
    """Compare one layer's spikes (or their mean) and gradients with the specification."""
    layer: GPN = module.layer if isinstance(module, LoopGPN) else module
    T, mean = len(record["x"]), layer.options.output == "mean"
    spikes = record["out"]
    if mean:
        twin = copy.copy(layer)
        twin.options = dataclasses.replace(layer.options, output="spikes")
        with torch.no_grad():
            spikes = (LoopGPN(twin).eval() if module is not layer else twin)(record["x"])[0]
        compare("the mean of the spikes", record["out"].float(), spikes.float().mean(0), 1e-3)
    spikes = spikes[:, rows].cpu().double()
    names = ("weight_x", "weight_v", "bias")
    leaves = {n: getattr(layer, n).detach().cpu().double().requires_grad_() for n in names}
    leaves["x"] = record["x"][:, rows].cpu().double().requires_grad_()
    smooth = specification_under(
        spikes, leaves["x"], leaves["weight_x"], leaves["weight_v"], leaves["bias"],
        torch.zeros_like(spikes[0]), margin,
    )  # fmt: skip
    cotangent = record["g_out"]
    cotangent = (cotangent[rows] / T).expand(T, -1, -1) if mean else cotangent[:, rows]
    smooth.backward(cotangent.cpu().double())
    compare("the gradient of x", record["g_x"][:, rows].cpu().double(), leaves["x"].grad, share)
    for name in names:
        got = getattr(layer, name).grad.cpu().double()
        compare(f"the gradient of {name}", got, leaves[name].grad, share)


def _check_lif(record: dict, rows: Tensor, share: float) -> None:
    """Compare one LIF layer's spikes with the specification's."""
    x, got = (record[k][:, rows].cpu().double() for k in ("x", "out"))
    differ = (reference.lif_loop(x, torch.zeros_like(x[0]), 2.0)[0] != got).double().mean().item()
    if differ > (1e-4 if share <= 1e-3 else 0.02):
        raise Wrong(f"{differ:.2%} of the spikes differ from the float64 LIF")


def _check_whole(model: nn.Module, x: Tensor, logits: Tensor, weights: Tensor, share: float):
    """Compare a network's logits and gradients with its float64 twin's."""
    twin = copy.deepcopy(model).cpu().double()
    twin.zero_grad(set_to_none=True)
    expected, _ = twin(x.cpu().double())
    (expected * weights.cpu().double()).sum().backward()
    compare("the logits", logits.detach().cpu().double(), expected.detach(), share)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        compare(f"the gradient of {name}", p.grad.cpu().double(), q.grad, share)
