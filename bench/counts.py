"""Operations and bytes of a layer or network, counted from its sizes, and the floor they set.

Operations are those of matrix products (2 for a multiplication and its addition); gate functions
are not counted. Bytes are what a program that keeps each product apart from the recurrence must
move between processor and memory: every tensor once for each pass that reads or writes it. A
program that fuses products into the recurrence moves less, so the byte floor bounds this design,
not every design; the operation floor bounds all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# passes over N elements of one sample and step, each tensor counted once a pass.
# x written, read by the product and by the step; z written and read by G; v and spike written
GPN_FORWARD = {"N": 5, "GN": 2}
# product of z: x, v read, z written. step: z, x, v, spike, gradient of the spike read, g_z written.
# product of g_x: g_z read, g_x written. weights: g_z, x, v read. input Linear: g_x read
GPN_BACKWARD = {"N": 10, "GN": 5}
# cell and output written, output read as operand; z written and read
ANN_FORWARD = {"N": 3, "GN": 2}
# gates, cell, output and gradient read, g_z written, then read for inputs and for weights
ANN_BACKWARD = {"N": 4, "GN": 4}
ANN_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


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


def linear(inputs: int, outputs: int, backward: bool, input_grad: bool, element: int = 2) -> Count:
    """Work of a Linear on one row; its output is counted by whatever reads it.

    Args:
        inputs, outputs: its sizes. backward: forward and backward instead of forward.
        input_grad: whether the gradient of its input is wanted. element: bytes of an element.
    """
    products = 1 + (backward * (1 + input_grad))
    return Count(2.0 * products * inputs * outputs, 0.0, element * products * inputs)


def neuron(kind: str, N: int, backward: bool, element: int = 2, gates: int = 4) -> Count:
    """Work of one layer of neurons on one sample and step, without its input Linear.

    Args:
        kind: gpn, lstm, gru, rnn (their input product is counted by `ann`) or lif (no product).
        N: neurons. backward: forward and backward instead of forward. element: bytes of an element.
        gates: of GPN's variant.
    Returns:
        For GPN: weight_v v and weight_x x, and backward additionally the two gradients of states
        and inputs, those of both weights and weight_v v once more, since gates are not saved.
    """
    if kind == "lif":
        # x read, spike written; h written and read, two gradients
        return Count(bytes=element * N * (7 if backward else 2))
    if kind == "gpn":
        product = 2.0 * gates * N * N
        flops, serial = 2 * product, product
        passes = GPN_FORWARD["N"] + gates * GPN_FORWARD["GN"]
        if backward:
            flops, serial = flops + 5 * product, serial + product
            passes += GPN_BACKWARD["N"] + gates * GPN_BACKWARD["GN"]
        return Count(flops, serial, element * N * passes)
    G = ANN_GATES[kind]
    product = 2.0 * G * N * N
    passes = ANN_FORWARD["N"] + G * ANN_FORWARD["GN"]
    if backward:
        passes += ANN_BACKWARD["N"] + G * ANN_BACKWARD["GN"]
    return Count(
        product * (3 if backward else 1), product * (2 if backward else 1), element * N * passes
    )


def layer(
    kind: str, N: int, inputs: int | None, backward: bool, input_grad: bool, element: int = 2
) -> Count:
    """Work of one layer on one sample and step.

    Args:
        kind: as `neuron`. N: neurons. inputs: of the input Linear; None: no Linear before GPN or
            LIF (x has N channels), which an LSTM or GRU always has.
        backward, input_grad, element: as `linear`.
    """
    total = neuron(kind, N, backward, element)
    if kind in ANN_GATES:
        outputs = ANN_GATES[kind] * N
        return total + linear(inputs or N, outputs, backward, input_grad, element)
    if inputs is None:
        return total
    return total + linear(inputs, N, backward, input_grad, element)


def network(
    kind: str,
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
        total += layer(kind, n, n_in, backward, k > 0, element)
    return total + linear(sizes[-1], classes, backward, True, 0)


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: matrix products in FLOP/s, copies in bytes/s, and where it is from."""

    flops_per_s: float
    bytes_per_s: float
    source: str


def floor_seconds(count: Count, ceilings: Ceilings) -> float:
    """The least time the work can take: the larger of arithmetic and traffic."""
    return max(count.flops / ceilings.flops_per_s, count.bytes / ceilings.bytes_per_s)
