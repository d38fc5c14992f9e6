"""What is timed for one layer: ours and its competitors on the same numbers, each with its check.

A check runs the very call that is timed, at the very shape, with a gradient that is zero outside
ROWS samples of the batch; samples do not depend on each other, so the outputs of those samples and
all gradients can be compared with the float64 specification at the cost of ROWS samples.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Case
from bench.competitors import (
    Unavailable,
    authors_loop,
    flashrnn_lstm,
    hoisted_loop,
    spikingjelly_lif,
)  # fmt: skip
from bench.kernel_call import STRATEGIES, KernelCall
from bench.measure import Call, GraphedCall, PieceCall
from gpn_triton import gpn
from gpn_triton.neurons import cost, reference
from gpn_triton.neurons.lif import cuba_lif, lif
from gpn_triton.neurons.networks import NEURONS

ROWS = 8
# a loop in Python takes seconds and gigabytes beyond so many steps
LOOP_STEPS = 3000
# dtype -> (margin of h - theta within which a spike may differ, largest error of a gradient as a
# share of its largest value). float32: rounding of sums of up to 1,024 products over T steps. half:
# a gate has 3 (bfloat16) or 4 digits, and competitors keep gates and gradients in that dtype
TOLERANCE = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (2e-2, 3e-2),
    torch.bfloat16: (1e-1, 1e-1),
}
DTYPES = {str(d).removeprefix("torch."): d for d in TOLERANCE}

GATE_WEIGHTS = ("weight_x", "weight_v", "bias")
# the weights of a kind of neuron
WEIGHTS = {"gpn": GATE_WEIGHTS, "lif": (), "cuba-lif": ("recurrent.weight", "recurrent.bias")}
SPIKING = tuple(WEIGHTS)
OURS = (
    "gpn-cpu", "gpn-cpu-every-10", "gpn-triton", "gpn-triton-every-10",
    "gpn-triton-graph", "gpn-persistent", "gpn-stepwise",
)  # fmt: skip
LOOPS = ("loop", "authors", "hoisted", "hoisted-compiled-step", "authors-graph", "hoisted-graph")
OTHERS = (
    "lstm", "lstm-graph", "lstm-float32", "lstm-float16", "lstm-bfloat16", "gru", "flashrnn-lstm",
    "lif", "lif-graph", "cuba-lif", "cuba-lif-graph", "spikingjelly-lif",
)  # fmt: skip
SUBJECTS = OURS + LOOPS + OTHERS


class Wrong(Exception):
    """A subject's result departs from the reference: it is not timed."""


@dataclass
class Entry:
    """A subject ready to be timed.

    call: what is timed. check: raises Wrong, or returns what it saw for the record.
    count: its work. saves: the Call whose tensors held for backward are counted, if any.
    """

    call: Callable[[], Any]
    check: Callable[[], dict[str, Any]]
    count: cost.Count
    saves: Call | None = None


class Problem:
    """The numbers of one case, the same for every subject.

    Attributes:
        x [T, B, C]: spikes of a layer before (5 % are 1) where there is an input Linear, else a
            normal current. weights: of that Linear ("linear_weight", "linear_bias") and of each
            kind of neuron, by the names in WEIGHTS.
        v_reset [B, N]. cotangent [T, B, N]: gradient of the result. rows: samples that are checked.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.dtype = case, device, DTYPES[case.dtype]
        T, B, N, C = case.T, case.B, case.N, case.inputs
        g = torch.Generator(device).manual_seed(0)

        def uniform(*shape: int, scale: float) -> Tensor:
            return (torch.rand(shape, generator=g, device=device) * 2 - 1) * scale

        self.projects = case.kind == "layer"
        if self.projects:
            x = (torch.rand(T, B, C, generator=g, device=device) < 0.05).to(self.dtype)
        else:
            x = torch.randn(T, B, N, generator=g, device=device).to(self.dtype)
        self.x = x
        k = (2 * N) ** -0.5
        self.weights = {
            "weight_x": uniform(4 * N, N, scale=k),
            "weight_v": uniform(4 * N, N, scale=k),
            "bias": uniform(4 * N, scale=k),
        }
        if self.projects:
            # a current of deviation 0.7, as trained networks have
            self.weights["linear_weight"] = uniform(N, C, scale=0.7 * math.sqrt(3 / (0.05 * C)))
            self.weights["linear_bias"] = uniform(N, scale=C**-0.5)
        self.v_reset = 0.05 * torch.randn(B, N, generator=g, device=device)
        self.cotangent = torch.randn(T, B, N, generator=g, device=device).to(self.dtype)
        self.rows = torch.linspace(0, B - 1, min(B, ROWS), device=device).round().long()
        self.weights["recurrent.weight"] = uniform(N, N, scale=N**-0.5)
        self.weights["recurrent.bias"] = uniform(N, scale=N**-0.5)

    def leaves(self, kind: str) -> dict[str, Tensor]:
        """x and a kind's weights sharing memory with the problem, with gradients of their own.

        x needs no gradient where it is a network's input.
        """
        leaves = {"x": self.x.detach().requires_grad_(not self.projects)}
        linear = ("linear_weight", "linear_bias") if self.projects else ()
        for name in (*WEIGHTS[kind], *linear):
            leaves[name] = self.weights[name].detach().requires_grad_()
        return leaves

    def current(self, leaves: dict[str, Tensor]) -> Tensor:
        """The synaptic current [T, B, N]."""
        if not self.projects:
            return leaves["x"]
        return F.linear(leaves["x"], leaves["linear_weight"], leaves["linear_bias"])

    def masked(self) -> Tensor:
        """The cotangent, zero outside the checked rows."""
        mask = torch.zeros(self.case.B, 1, dtype=self.dtype, device=self.device)
        mask[self.rows] = 1
        return self.cotangent * mask


def prepare(problem: Problem, subject: str, backward: bool) -> Entry:
    """Set a subject up.

    Args:
        problem: the numbers. subject: one of SUBJECTS. backward: forward and backward.
    Raises:
        Unavailable: it cannot take part here, with the reason.
    """
    # the launches alone would be timed at the host's pace
    launches = subject.removeprefix("gpn-") in STRATEGIES
    graphed = subject.endswith("-graph") or (launches and problem.device.type == "cuda")
    if graphed and problem.device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    build = _ann if "lstm" in subject or subject == "gru" else _spiking
    kind, call, module = build(problem, subject.removesuffix("-graph"), backward)
    case, projects = problem.case, problem.projects
    # without an input Linear x is a layer's output, and gets a gradient
    inputs = case.inputs if projects else None
    element = call.dtype.itemsize
    count = cost.layer(NEURONS[kind].work, case.N, inputs, backward, not projects, element)
    runs = GraphedCall(call, problem.device) if graphed else call
    checked = runs
    if isinstance(call, PieceCall):
        checked = copy.copy(call)
        checked.keeps = True
    check = functools.partial(_check, problem, checked, kind, module)
    # torch saves nothing where a graph or a launch stands instead of autograd
    plain = backward and not graphed and not launches and not isinstance(call, PieceCall)
    return Entry(runs, check, count * (case.T * case.B), call if plain else None)


def entries(case: Case, device: torch.device, backward: bool) -> Callable[[str], Entry]:
    """A function that prepares a subject of a case by name; numbers are made at first use."""
    problem = functools.cache(lambda: Problem(case, device))
    return lambda subject: prepare(problem(), subject, backward)


def _spiking(problem: Problem, subject: str, backward: bool) -> tuple[str, Call, None]:
    """Kind and call of a spiking layer, which the reference specifies."""
    case, device, v_reset = problem.case, problem.device, problem.v_reset
    family, _, how = subject.partition("-")
    if family == "gpn" and how in STRATEGIES:
        if problem.projects:
            raise Unavailable("the kernels alone are timed without an input Linear")
        return "gpn", KernelCall(problem, how, backward), None
    kind = {"lif": "lif", "spikingjelly-lif": "lif", "cuba-lif": "cuba-lif"}.get(subject, "gpn")
    leaves = problem.leaves(kind)

    def layer(run: Callable[..., Tensor]) -> tuple[str, Call, None]:
        """Of a function of the current and of the weights of the kind."""
        half = None if problem.dtype == torch.float32 else problem.dtype

        def forward() -> Tensor:
            return run(problem.current(leaves), *(leaves[name] for name in WEIGHTS[kind]))

        forward = functools.partial(run, leaves) if subject == "authors" else forward
        return kind, Call(forward, leaves, problem.cotangent if backward else None, half), None

    if family == "gpn":
        backend, *every = how.split("-")
        if backend == "triton" and device.type != "cuda":
            raise Unavailable("the Triton kernels need a GPU")
        if backend == "cpu" and device.type != "cpu":
            raise Unavailable("the CPU's kernels need CPU tensors")
        if every and every[0] == "tbptt":
            if not backward or problem.projects:
                raise Unavailable("pieces are for backward, without an input Linear")

            def piece(x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
                weights = (leaves[name] for name in GATE_WEIGHTS)
                return gpn(x, *weights, v_reset, v, backend=backend)

            return "gpn", PieceCall(piece, int(every[1]), leaves, problem.cotangent), None
        options = {"backend": backend, "checkpoint_every": int(every[1]) if every else None}
        return layer(lambda *inputs: gpn(*inputs, v_reset, **options)[0])
    if subject == "lif":
        return layer(lambda x: lif(x)[0])
    if subject == "cuba-lif":
        return layer(lambda *inputs: cuba_lif(*inputs)[0])
    if subject == "spikingjelly-lif":
        node = spikingjelly_lif(device)
        return layer(lambda x: (node.reset(), node(x))[1])
    if case.T > LOOP_STEPS and device.type == "cpu":
        raise Unavailable(f"a loop is compared up to T = {LOOP_STEPS}")
    if subject == "loop":
        return layer(lambda *inputs: reference.gpn_loop(*inputs, v_reset, v_reset)[0])
    if subject == "authors":
        # they hold weight_v and weight_x as one matrix
        joint = torch.cat([leaves.pop("weight_v"), leaves.pop("weight_x")], 1)
        leaves["weight_vx"] = joint.detach().requires_grad_()
        return layer(lambda leaves: authors_loop(leaves, v_reset))
    if subject == "hoisted-compiled-step":
        if not case.compiled:
            raise Unavailable("compiling takes 10 s and more a shape: chosen shapes only")
        if device.type == "cpu" and not shutil.which("g++"):
            raise Unavailable("torch.compile needs a C++ compiler, g++ is not here")
    run = hoisted_loop(compiled=subject != "hoisted")
    return layer(lambda *inputs: run(*inputs, v_reset))


def _ann(problem: Problem, subject: str, backward: bool) -> tuple[str, Call, nn.Module]:
    """LSTM or GRU of the same sizes, in the case's dtype or the one its name says."""
    case, device = problem.case, problem.device
    named = DTYPES.get(subject.rsplit("-", 1)[-1])
    dtype = named or problem.dtype
    if named == problem.dtype:
        raise Unavailable("the same as lstm here")
    if device.type == "cpu" and dtype != torch.float32:
        raise Unavailable("half types are compared on a GPU: a CPU converts to and fro")
    kind = "gru" if subject == "gru" else "lstm"
    torch.manual_seed(0)
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](case.inputs, case.N).to(device, dtype)
    x, weights = problem.x.to(dtype).requires_grad_(not problem.projects), module.parameters()
    if subject == "flashrnn-lstm":
        forward = functools.partial(flashrnn_lstm(case.N, device), x, *weights)
    else:
        forward = lambda: module(x)[0]  # noqa: E731
    leaves = {"x": x, **dict(module.named_parameters())}
    return kind, Call(forward, leaves, problem.cotangent if backward else None), module


def _check(problem: Problem, call: Call | GraphedCall, kind: str, module) -> dict[str, Any]:
    """Compare a call with float64; Wrong if it departs, else what the record wants to know."""
    inner = call.call if isinstance(call, GraphedCall) else call
    kept = problem.cotangent.clone()
    problem.cotangent.copy_(problem.masked())
    call()
    out = call.out.detach()
    gradients = {name: g.detach().clone() for name, g in call.gradients().items()}
    problem.cotangent.copy_(kept)
    if not torch.isfinite(out).all():
        raise Wrong("the result is not finite")
    rows, tolerance = problem.rows, TOLERANCE[inner.dtype]
    leaves, got = double_leaves(inner.leaves, rows), out[:, rows].cpu().double()
    v_reset = problem.v_reset[rows].cpu().double()
    current = problem.current(leaves) if kind in SPIKING else leaves["x"]
    piece = inner.steps if isinstance(inner, PieceCall) else None
    expected = expect(kind, current, leaves, got, tolerance, v_reset, module, piece)
    if gradients:
        expected.backward(problem.cotangent[:, rows].cpu().double())
        compare_gradients(gradients, leaves, rows, tolerance[1])
    steps = problem.case.T * problem.case.B
    return {"spikes_a_step": out.sum().item() / steps} if kind in SPIKING else {}


def expect(
    kind: str, current: Tensor, leaves: dict[str, Tensor], got: Tensor,
    tolerance: tuple[float, float], v_reset: Tensor, module: nn.Module | None,
    piece: int | None = None,
) -> Tensor:  # fmt: skip
    """What a layer should put out, after comparing it with what it did; all in float64.

    Args:
        kind: gpn, lif, cuba-lif, lstm or gru. current [T, R, N]: of a spiking layer, made from the
            leaves. leaves: x [T, R, C] and weights. got [T, R, N]: the layer's output.
        tolerance: of TOLERANCE. v_reset [R, N]. module: of an LSTM or GRU, whose float64 twin
            specifies it. piece: steps of a GPN that no gradient leaves; None: all.
    Returns:
        [T, R, N], differentiable.
    Raises:
        Wrong: the layer's output departs.
    """
    margin, share = tolerance
    if kind == "gpn":
        if "weight_vx" in leaves:
            weight_v, weight_x = leaves["weight_vx"].split(got.shape[-1], 1)
        else:
            weight_v, weight_x = leaves["weight_v"], leaves["weight_x"]
        # under the resets of its own spikes trajectories do not part, so spikes must agree at
        # every step where |h - theta| exceeds the margin; the smooth step has the surrogate's slope
        weights = weight_x, weight_v, leaves["bias"]
        v, smooth = v_reset, []
        steps = piece or len(got)
        for x, s in zip(current.split(steps), got.split(steps), strict=True):
            part, v = reference.gpn_loop(x, *weights, v_reset, v.detach(), reset_mask=s)
            smooth.append(part)
        smooth = torch.cat(smooth)
        # the inverse of surrogate.SURROGATES["atan"].value at alpha = 2
        compare_spikes(torch.tan(math.pi * (smooth.detach() - 0.5)) / math.pi, got, margin)
        return smooth
    if kind in SPIKING:
        # likewise, a step at a time
        zero, steps = torch.zeros_like(current[0]), []
        for x, s in zip(current, got, strict=True):
            state = steps[-1].state if steps else (zero if kind == "lif" else (zero,) * 3)
            if kind == "lif":
                steps.append(reference.lif_step(x, state, 2.0, fired=s))
            else:
                weights = (leaves[name] for name in WEIGHTS[kind])
                steps.append(reference.cuba_lif_step(x, *weights, state, fired=s))
        compare_spikes(torch.stack([step.h.detach() - 1 for step in steps]), got, margin)
        return torch.stack([step.s for step in steps])
    twin = copy.deepcopy(module).cpu().double()
    weights = {name: leaf for name, leaf in leaves.items() if name != "x"}
    expected = torch.func.functional_call(twin, weights, (leaves["x"],))[0]
    compare("the result", got, expected, share)
    return expected


def compare_spikes(u: Tensor, got: Tensor, margin: float) -> None:
    """Raise Wrong if a spike differs from Heaviside(u) where |u| exceeds the margin."""
    differs = ((u >= 0).double() != got) & (u.abs() > margin)
    if differs.any():
        t, b, n = differs.nonzero()[0].tolist()
        raise Wrong(
            f"{int(differs.sum())} of {got.numel()} checked spikes differ, the first at step "
            f"{t}, checked sample {b}, neuron {n}, where h - theta is {u[t, b, n]:.2g}"
        )


def double_leaves(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The tensors as float64 leaves on the CPU, of x the given rows of the batch alone."""
    return {
        name: (t[:, rows] if name == "x" else t).detach().cpu().double().requires_grad_()
        for name, t in tensors.items()
    }


def compare(what: str, got: Tensor, expected: Tensor, share: float) -> None:
    """Raise Wrong if an element is off by more than a share of the largest one."""
    got, expected = (a.detach().cpu().double() for a in (got, expected))
    scale = expected.abs().max().item()
    error = (got - expected).abs().max().item()
    if not error <= share * scale:
        raise Wrong(f"{what} is off by {error:.2g}, its largest value is {scale:.2g}")


def compare_gradients(
    gradients: dict[str, Tensor], leaves: dict[str, Tensor], rows: Tensor, share: float
) -> None:
    """Compare gradients with those that float64 leaves got; leaves as double_leaves gives them."""
    for name, gradient in gradients.items():
        got = gradient[:, rows] if name == "x" else gradient
        compare(f"the gradient of {name}", got, leaves[name].grad, share)
