"""Products of a training step, counted without a clock, where the specification computes it; and
what the kernels of the leaky neurons multiply and move, counted in Triton's interpreter.

These numbers change only when the program does. A change that adds a product fails here on any
machine; one that saves some lowers a constant below, in its commit.
"""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpn_triton import SpikingClassifier
from gpn_triton.neurons import cost
from gpn_triton.neurons.lif import cuba_lif
from gpn_triton.neurons.networks import NEURONS
from tests import leaky
from tests.interpreter import need_interpreter

# products of a row [N] with a matrix [N, N] that the specification takes a sample and step, 4 gates
# each. forward: x and v. backward: x and v once more; g_x and g_v; both weights' gradients
FORWARD = 8
BACKWARD = 24


class Counter(TorchDispatchMode):
    """Counts operations of matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            if func.namespace == "gpn_triton":
                # the project's own operators are counted by what they do inside
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            # linear, matmul, to and their like are counted by what they are made of
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        if func._schema.name.split("::")[1].rstrip("_") in ("mm", "addmm", "bmm"):
            a, b = [t for t in args if torch.is_tensor(t)][-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return out


def a_sample_and_step(count, T=8, B=2):
    """The part of count(T, B) that grows with T B, of one sample and step."""
    corners = count(2 * T, 2 * B) - count(T, 2 * B) - count(2 * T, B) + count(T, B)
    return corners / (T * B)


def counted(step):
    """Operations of a step's matrix products."""
    with Counter() as counter:
        step()
    return counter.flops


def test_training_step_takes_the_products_of_its_layers():
    C, hidden, classes = 12, [8, 4], 3

    def flops(T, B):
        torch.manual_seed(0)
        model = SpikingClassifier(hidden, inputs=C, classes=classes, backend="torch")
        x, labels = torch.rand(T, B, C), torch.zeros(B, dtype=torch.long)
        return counted(lambda: F.cross_entropy(model(x)[0], labels).backward())

    linear = 2 * C * hidden[0] + 3 * hidden[0] * hidden[1]
    neurons = (FORWARD + BACKWARD) * sum(n * n for n in hidden)
    assert a_sample_and_step(flops) == 2 * (linear + neurons)
    # what is called the least is not more than what is done
    work = NEURONS["gpn"].work
    least = sum(cost.neuron(work, n, True).flops for n in hidden)
    assert least <= 2 * neurons


def test_cuba_lif_takes_the_products_that_are_counted():
    N = 8

    def flops(T, B):
        x, weight, bias, *state = leaky.layer("cuba-lif", T, B, N)
        run = lambda: cuba_lif(x, weight, bias, state, backend="torch")[0].sum().backward()  # noqa: E731
        return counted(run)

    assert a_sample_and_step(flops) == cost.neuron(cost.RECURRENT_LEAKY, N, True).flops


@pytest.fixture
def moved_and_multiplied(monkeypatch):
    """Bytes that interpreted kernels load and store, and operations of their products."""
    need_interpreter()
    if torch.cuda.is_available():
        pytest.skip("beside a GPU kernels are not interpreted")
    from triton.runtime.interpreter import InterpreterBuilder as builder

    seen = {"bytes": 0, "flops": 0}
    load, store, dot = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "dot")
    )

    def count(pointers, mask):
        seen["bytes"] += int(mask.data.sum()) * pointers.dtype.scalar.element_ty.itemsize

    def counting_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_dot(self, a, b, *rest):
        seen["flops"] += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    monkeypatch.setattr(builder, "create_dot", counting_dot)
    return seen


# passes over [T, B, N]. x, spikes, h; h, g_s, g_x. Of CuBa-LIF, too: the spikes that the weight's
# gradient takes, once written, whose product is the library's
@pytest.mark.parametrize("kind, passes", [("lif", 6), ("cuba-lif", 7)])
def test_the_kernels_of_leaky_neurons_pass_once_over_each_tensor(
    kind, passes, moved_and_multiplied
):
    N, seen = 16, moved_and_multiplied

    def both(T, B):
        seen.update(bytes=0, flops=0)
        inputs = leaky.layer(kind, T, B, N, torch.float32)
        spikes, *_ = leaky.run(kind, inputs, "triton")
        spikes.backward(torch.ones_like(spikes))
        return torch.tensor([seen["bytes"], seen["flops"]])

    moved, multiplied = a_sample_and_step(both, T=2, B=16).tolist()
    work = NEURONS[kind].work
    assert moved == passes * 4 * N
    # less than the least of a program that keeps products apart, but for what the Linear reads
    assert moved <= cost.neuron(work, N, True, 4).bytes - 4 * N
    assert multiplied == cost.neuron(work, N, True).serial_flops
