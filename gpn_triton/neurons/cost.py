"""Operations and bytes of a layer or network, counted from its sizes, and the floor they set.

Operations are those of matrix products (2 for a multiplication and its addition); gate functions
are not counted. Bytes are what a program that keeps each product apart from the recurrence must
move between processor and memory: every tensor once for each pass that reads or writes it. A
program that fuses products into the recurrence moves less, so the byte floor bounds this design,
not every design. The kernels move more, about twice as much backward: they add weight_v v to z in
place, which reads it again, hold two parts of the gradient apart, and sum each weight's gradient in
a product of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gpn_triton.machine.device import Ceilings


@dataclass(frozen=True)
class Count:
    """Work of one call: operations of matrix products, those on the serial chain, bytes moved."""

    flops: float = 0.0
    serial_flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.flops + other.flops,
            self.serial_flops + other.serial_flops,
            self.bytes + other.bytes,
        )

    def __mul__(self, k: float) -> Count:
        return Count(self.flops * k, self.serial_flops * k, self.bytes * k)


@dataclass(frozen=True)
class Work:
    """What a layer of N neurons of some kind takes a sample and step, beside its input product.

    forward, backward: (products of [G N, N] with a row, those of them on the serial chain, passes
        over N elements, each tensor counted once a pass). gates: G.
    input_rows: rows of the input product a neuron. has_input: whether the layer always has one.
    """

    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    gates: int = 0
    input_rows: int = 1
    has_input: bool = False


def gated_spiking(G: int) -> Work:
    """GPN's: spiking neurons with G gates of current and membrane, none of which is saved.

    Forward are the products with weight_v and weight_x; backward those of two gradients of states
    and inputs and of both weights, and weight_v v once more.
    """
    # forward: x written, read by the product (if there are gates) and by the step; z written and
    # read by G; v and spike written.
    # backward: the product of z reads x and v and writes z; the step reads z, x, v and the spike's
    # gradient (the spike itself is one bit) and writes g_z; the product of g_x reads g_z and writes
    # g_x; the weights' products read g_z, x and v; the input Linear reads g_x
    products = G > 0
    return Work((2, 1, 4 + products + 2 * G), (5, 1, 5 + 4 * products + 5 * G), gates=G)


def gated(G: int) -> Work:
    """A layer with G gates of its input and its own output, as nn.LSTM, nn.GRU and nn.RNN."""
    # forward: cell and output written, output read as an operand; z written and read.
    # backward: gates, cell, output and gradient read; g_z written, then read for inputs and weights
    return Work((1, 1, 3 + 2 * G), (2, 1, 4 + 4 * G), gates=G, input_rows=G, has_input=True)


# spiking neurons without products. forward: x read, spike written; backward: h written and read,
# two gradients
LEAKY = Work((0, 0, 2), (0, 0, 5))


def linear(inputs: int, outputs: int, backward: bool, input_grad: bool, element: int = 2) -> Count:
    """Work of a Linear on one row; its output is counted by whatever reads it.

    Args:
        inputs, outputs: its sizes. backward: forward and backward instead of forward.
        input_grad: whether the gradient of its input is wanted. element: bytes of an element.
    """
    products = 1 + (backward * (1 + input_grad))
    return Count(2.0 * products * inputs * outputs, 0.0, element * products * inputs)


def neuron(work: Work, N: int, backward: bool, element: int = 2) -> Count:
    """Work of one layer of neurons on one sample and step, without its input product.

    Args:
        work: of its kind. N: neurons. backward: forward and backward instead of forward.
        element: bytes of an element.
    """
    total, product = Count(), 2.0 * work.gates * N * N
    for products, serial, passes in (work.forward, work.backward)[: 1 + backward]:
        total += Count(products * product, serial * product, element * N * passes)
    return total


def layer(
    work: Work, N: int, inputs: int | None, backward: bool, input_grad: bool, element: int = 2
) -> Count:
    """Work of one layer on one sample and step.

    Args:
        work: of its kind. N: neurons. inputs: of the input product; None: x has N channels, and no
            product is before the layer unless its kind always has one.
        backward, input_grad, element: as `linear`.
    """
    total = neuron(work, N, backward, element)
    if inputs is None and not work.has_input:
        return total
    return total + linear(inputs or N, work.input_rows * N, backward, input_grad, element)


def network(
    work: Work,
    hidden: Sequence[int],
    inputs: int,
    classes: int,
    backward: bool,
    element: int = 2,
) -> Count:
    """Work of a network on one sample and step; its input needs no gradient.

    The readout's operations are counted at every step, as a readout before the mean over time would
    take them (below 1.5 % of the whole in the paper's networks); its bytes are not.
    """
    total, sizes = Count(), [inputs, *hidden]
    for k, (n_in, n) in enumerate(zip(sizes, hidden, strict=False)):
        total += layer(work, n, n_in, backward, k > 0, element)
    return total + linear(sizes[-1], classes, backward, True, 0)


def floor_seconds(count: Count, ceilings: Ceilings) -> float:
    """The least time the work can take: the larger of arithmetic and traffic."""
    return max(count.flops / ceilings.flops_per_s, count.bytes / ceilings.bytes_per_s)


def training_floor(
    work: Work | None,
    hidden: Sequence[int],
    channels: int,
    classes: int,
    T: int,
    samples: int,
    amp: torch.dtype | None,
    ceilings: Ceilings,
) -> float | None:
    """Seconds that training on so many samples takes at least; bins and updates are not counted.

    Args:
        work: of the neurons, networks.NEURONS[name].work. hidden: neurons of each layer.
        channels: inputs C. T: time bins. samples: of this device's share.
        amp: a half type, elements of 2 bytes; None: float32, of 4. ceilings: of the device.
    Returns:
        Seconds; None where the neurons' work is not counted.
    """
    if work is None:
        return None
    total = network(work, hidden, channels, classes, True, 4 if amp is None else 2)
    return floor_seconds(total * (T * samples), ceilings)


def _flops(products: int, rows: Sequence[int], weight: Sequence[int] | None) -> int:
    """Operations of products of rows [T, B, ...] with a weight, whose shapes are given."""
    return 0 if weight is None else 2 * products * prod((*rows[:2], *weight))


def tell_flop_counter() -> None:
    """Register the operators with torch.utils.flop_counter once somebody has imported it.

    Called by whoever calls an operator: importing that module here would import triton with it.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.ops.gpn_triton.recurrence in counter.flop_registry:
        return
    ops = torch.ops.gpn_triton
    (forward, *_), (backward, *_) = gated_spiking(4).forward, gated_spiking(4).backward
    formulas = {
        ops.recurrence: lambda x, w, *_, **__: _flops(forward, x, w),
        ops.recurrence_backward: lambda g, h, x, w, *_, **__: _flops(backward, x, w),
        ops.spike_linear: lambda s, bits, mask, w, *_, **__: _flops(1, s, w),
        ops.spike_linear_backward: lambda g, bits, mask, w, *_, **__: _flops(2, g, w),
    }
    for op, formula in formulas.items():
        counter.register_flop_formula(op)(formula)
    # who counts already has copied the register
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry |= {op: counter.flop_registry[op] for op in formulas}
