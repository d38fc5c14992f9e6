"""Every tolerance of the tests of the recurrence, each with its reason. Changing one is a design
decision.

Kernels are compared with the specification in float64, which resets where the kernel spiked, so
that a spike that rounding moved across its threshold does not start another trajectory. Where
nothing may differ, tests ask for equal bits (torch.equal) and no tolerance stands here.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """margin: spikes must agree wherever |h - theta| exceeds it. state: largest absolute error of
    v. gradient: largest error of a gradient, as a share of its norm."""

    margin: float
    state: float
    gradient: float


_HALF = Tolerance(
    # weights and v are float16 operands, z is stored in float16: 2^-11 of sums of magnitude 1 to 4
    # over up to 160 terms; seen up to 2e-3 after 20 steps
    margin=1e-2,
    state=1e-2,
    # g_z and its operands are bfloat16, 2^-9 each; seen up to 6e-3
    gradient=2e-2,
)
TOLERANCES = {
    # a product of up to 160 terms, once a step for up to 40 steps, at 2^-24 each; seen up to 4e-7
    # of the state and 5e-7 of a gradient. tanh and sigmoid by exp and division add 2 ulp
    torch.float32: Tolerance(margin=1e-5, state=1e-5, gradient=1e-5),
    torch.float16: _HALF,
    torch.bfloat16: _HALF,
}
# float64 sums of up to 6,000 terms in another order, 2^-53 each
REORDERED = {"rtol": 1e-12, "atol": 1e-12}
# a mean of float32 spikes, counted against summed: some ulp of 2^-24
MEAN = {"rtol": 1e-6, "atol": 1e-7}
# two float32 forms, each within its share of 1e-5 of the exact gradient's norm, element by element
BACKENDS = {"rtol": 1e-4, "atol": 1e-5}
# a central difference of width 2e-6 in float64: 1e-16 / 1e-6 of rounding and 1e-12 of curvature,
# times some hundred terms
DIFFERENCES = {"rtol": 1e-5, "atol": 1e-7}
# spikes that differ from a float64 run over 100 steps of 128 neurons with the layer's own initial
# weights, x rounded alike: float16 operands, stored products and tanh.approx gave 0.055 % in
# simulation; twice that
FLIPS = 0.0011
