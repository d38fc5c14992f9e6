"""Operations and bytes of a layer or network, counted from its sizes, and the floor they set.

Operations are those of matrix products (2 for a multiplication and its addition); gate functions
are not counted. Bytes are what a program that keeps each product apart from the recurrence must
move between processor and memory: every tensor once for each pass that reads or writes it. A
program that fuses products into the recurrence moves less, so the byte floor bounds this design,
not every design; the operation floor bounds all but a first layer that skips its input's zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpn_triton.device import Ceilings
from gpn_triton.reference import GATES

# passes over N elements of one sample and step, each tensor counted once a pass; "products": those
# of N elements that a variant without gates has not.
# x written, read by the product and by the step; z written and read by G; v and spike written
GPN_FORWARD = {"N": 4, "products": 1, "GN": 2}
# product of z: x, v read, z written. step: z, x, v, gradient of the spike read (the spike itself is
# one bit), g_z written. product of g_x: g_z read, g_x written. weights: g_z, x, v read. input
# Linear: g_x read
GPN_BACKWARD = {"N": 5, "products": 4, "GN": 5}
# cell and output written, output read as operand; z written and read
ANN_FORWARD = {"N": 3, "GN": 2}
# gates, cell, output and gradient read, g_z written, then read for inputs and for weights
ANN_BACKWARD = {"N": 4, "GN": 4}
ANN_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
GPN_GATES = {"gpn" if name == "full" else f"gpn-{name}": len(GATES[name]) for name in GATES}
COUNTED = (*GPN_GATES, *ANN_GATES, "lif", "plif")


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


def neuron(kind: str, N: int, backward: bool, element: int = 2) -> Count:
    """Work of one layer of neurons on one sample and step, without its input Linear.

    Args:
        kind: one of COUNTED: gpn and its variants, each with its own gates; lstm, gru, rnn, whose
            input product is counted by `layer`; lif and plif, which have no product.
        N: neurons. backward: forward and backward instead of forward. element: bytes of an element.
    Returns:
        For GPN: weight_v v and weight_x x, and backward additionally the two gradients of states
        and inputs, those of both weights and weight_v v once more, since gates are not saved.
    Raises:
        ValueError: a kind whose work is not counted.
    """
    if kind not in COUNTED:
        raise ValueError(f"kind: expected one of {', '.join(COUNTED)}, got {kind!r}")
    if kind in ("lif", "plif"):
        # x read, spike written; h written and read, two gradients
        return Count(bytes=element * N * (7 if backward else 2))
    if kind in GPN_GATES:
        G = GPN_GATES[kind]
        product, flops, serial, passes = 2.0 * G * N * N, 0.0, 0.0, 0
        for k, table in ((2, GPN_FORWARD), (5, GPN_BACKWARD))[: 1 + backward]:
            flops, serial = flops + k * product, serial + product
            passes += table["N"] + (G > 0) * table["products"] + G * table["GN"]
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


def floor_seconds(count: Count, ceilings: Ceilings) -> float:
    """The least time the work can take: the larger of arithmetic and traffic."""
    return max(count.flops / ceilings.flops_per_s, count.bytes / ceilings.bytes_per_s)


def training_floor(
    neuron: str,
    hidden: Sequence[int],
    channels: int,
    classes: int,
    T: int,
    samples: int,
    amp: str | None,
    ceilings: Ceilings,
) -> float | None:
    """Seconds that training on so many samples takes at least; bins and updates are not counted.

    Args:
        neuron: one of model.NEURONS. hidden: neurons of each layer. channels: inputs C.
        T: time bins. samples: of this device's share. amp: as --amp: elements of 2 bytes, without
            it of 4. ceilings: of the device.
    Returns:
        Seconds; None for cuba-lif and cnn, whose work is not counted.
    """
    if neuron not in COUNTED:
        return None
    work = network(neuron, hidden, channels, classes, True, 4 if amp is None else 2)
    return floor_seconds(work * (T * samples), ceilings)
