"""The neuron's elementwise mathematics on one row: gates, membrane, surrogate, their gradients.

Every formula of the CPU's kernels is written here, once; its twin is in reference.py and
surrogate.py. Rows are arrays of N numbers, float32 or float64, that do not overlap where one is
written. A gate that is absent is a row of its constant: f = 1/2, i = 1 - f, b = 0, theta = 1.

In float32 the sigmoid's exp is a polynomial and tanh a rational function, within 3 ulp; in float64
both are libm's. NaN comes out wherever it goes in.

Source: arXiv 2412.01087, equations of the gated parametric neuron.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from gpn_triton.kernels.cpu import inner, row
from gpn_triton.kernels.tiles import WORD

SURROGATES = ("atan", "sigmoid", "fast-sigmoid", "triangle")


@intrinsic
def power_of_two(typing, n):
    """2^k of the float32 1.5 2^23 + k, whose last bits are k."""

    def code(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        k = builder.shl(builder.bitcast(arguments[0], i32), i32(23))
        return builder.bitcast(builder.add(k, i32(0x3F800000)), ir.FloatType())

    return types.float32(types.float32), code


def sigmoid(z):
    raise NotImplementedError


def tanh(z):
    raise NotImplementedError


@overload(sigmoid)
def _(z):
    if z == types.float64:
        return lambda z: 1.0 / (1.0 + math.exp(-z))
    one, most, magic = np.float32(1), np.float32(87), np.float32(12582912)
    log2_e, ln2_high, ln2_low = (np.float32(c) for c in (1.44269504, 0.693359375, -2.12194440e-4))
    c6, c5, c4, c3, c2, c1 = (
        np.float32(c)
        for c in (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 0.5)
    )

    def sigmoid(z):
        # exp(y) = 2^k exp(y - k ln 2), a polynomial (Cephes); comparisons let NaN through
        y = -z
        y = most if y > most else y
        y = -most if y < -most else y
        n = y * log2_e + magic
        k = n - magic
        r = (y - k * ln2_high) - k * ln2_low
        p = ((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r + c1
        return one / (one + (p * (r * r) + r + one) * power_of_two(n))

    return sigmoid


@overload(tanh)
def _(z):
    if z == types.float64:
        return lambda z: math.tanh(z)
    most = np.float32(7.90531110763549805)
    p6, p5, p4, p3, p2, p1, p0 = (
        np.float32(c)
        for c in (
            -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11,
            5.12229709037114e-08, 1.48572235717979e-05, 6.37261928875436e-04,
            4.89352455891786e-03,
        )
    )  # fmt: skip
    q3, q2, q1, q0 = (
        np.float32(c)
        for c in (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
                  4.89352518554385e-03)
    )  # fmt: skip

    def tanh(z):
        # a rational function up to where tanh rounds to 1 (Eigen's)
        z = most if z > most else z
        z = -most if z < -most else z
        y = z * z
        p = (((((p6 * y + p5) * y + p4) * y + p3) * y + p2) * y + p1) * y + p0
        return z * p / (((q3 * y + q2) * y + q1) * y + q0)

    return tanh


@inner
def gate(a, at, place, absent, absent_at):
    """The gate's row of a, or of its stand-in where the variant lacks it (place is -1)."""
    return row(a, at) if place >= 0 else row(absent, absent_at)


@inner
def start_z(z, bias, N, width, G):
    """z of one row before its products: the bias, and zeros where a panel has no neuron."""
    for g in range(G):
        z_g, bias_g = row(z, g * width), row(bias, g * N)
        for j in range(N):
            z_g[j] = bias_g[j]
        for j in range(N, width):
            z_g[j] = 0


@inner
def activate(z, N, width, G, p_b, skip_b):
    """The gates of one row in place of z."""
    for g in range(G):
        z_g = row(z, g * width)
        if g != p_b:
            for j in range(N):
                z_g[j] = sigmoid(z_g[j])
        elif not skip_b:
            for j in range(N):
                z_g[j] = tanh(z_g[j])


@inner
def input_gate(f, i, N):
    """i = 1 - f, where i has no gate of its own."""
    one = i.dtype.type(1)
    for j in range(N):
        i[j] = one - f[j]


@inner
def step(f, i, b, theta, x, v_reset, N, v, s):
    """One step of one row: v[t] becomes v[t+1], s is written."""
    for j in range(N):
        h = f[j] * v[j] + i[j] * x[j]
        fires = h >= theta[j]
        s[j] = 1 if fires else 0
        v[j] = (v_reset[j] if fires else h) + b[j]


@inner
def copy(source, target, N):
    for j in range(N):
        target[j] = source[j]


@inner
def count(s, counts, bits, t, N, mean, save):
    """Add the spikes of step t of one row to their counts, and write them into their word."""
    if mean:
        for j in range(N):
            counts[j] += s[j]
    if save:
        one, none = np.int32(np.int64(1) << (t % WORD)), np.int32(0)
        if t % WORD == 0:
            for j in range(N):
                bits[j] = none
        for j in range(N):
            bits[j] |= one if s[j] > 0 else none


@inner
def constants(N, like):
    """What stands for an absent gate: f = i = 1/2, b = 0, theta = 1, one after the other."""
    planes = np.empty(4 * N, like.dtype)
    for j in range(N):
        planes[j] = 0.5
        planes[N + j] = 0.5
        planes[2 * N + j] = 0
        planes[3 * N + j] = 1
    return planes


@inner
def replay(f, i, b, x, v, v_next, v_reset, bits, t, N, find_b):
    """v[t+1] of one row from the saved spikes or, if v[t+1] is known, b from v[t+1]."""
    one = np.int32(np.int64(1) << (t % WORD))
    for j in range(N):
        h = f[j] * v[j] + i[j] * x[j]
        after = v_reset[j] if (bits[j] & one) != 0 else h
        if find_b:
            b[j] = v_next[j] - after
        else:
            v_next[j] = after + b[j]


@inner
def surrogate_derivative(f, i, theta, x, v, N, name, alpha, g_u):
    """surrogate'(h - theta) of one row."""
    number = g_u.dtype.type
    half, one, zero = alpha * number(0.5), number(1), number(0)
    for j in range(N):
        g_u[j] = f[j] * v[j] + i[j] * x[j] - theta[j]
    if name == 0:
        scale = half * number(math.pi)
        for j in range(N):
            w = scale * g_u[j]
            g_u[j] = half / (one + w * w)
    elif name == 1:
        for j in range(N):
            p = sigmoid(alpha * g_u[j])
            g_u[j] = alpha * p * (one - p)
    elif name == 2:
        for j in range(N):
            u = g_u[j]
            w = one + alpha * (u if u > zero else -u)
            g_u[j] = half / (w * w)
    else:
        for j in range(N):
            u = g_u[j]
            w = one - half * (u if u > zero else -u)
            g_u[j] = half * (zero if w < zero else w)


@inner
def adjoint(
    f, i, b, theta, x, v, g_s, bits, t, scale, of_f, N, g_u, g_v, g_z_f, g_z_i, g_z_b, g_z_t, g_x
):  # fmt: skip
    """One step of one row backward: g_v[t+1] becomes g_v[t] without its product.

    g_u comes as surrogate'(h - theta); g_x becomes g_h i. of_f: how much of x is in f's gradient, 1
    where i = 1 - f, else 0.
    """
    one, none, bit = g_u.dtype.type(1), g_u.dtype.type(0), np.int32(np.int64(1) << (t % 32))
    for j in range(N):
        keep = none if (bits[j] & bit) != 0 else one
        g_s_u = g_s[j] * scale * g_u[j]
        g_h = g_v[j] * keep + g_s_u
        g_z_f[j] = g_h * (v[j] - of_f * x[j]) * (f[j] * (one - f[j]))
        g_z_i[j] = g_h * x[j] * (i[j] * (one - i[j]))
        g_z_b[j] = g_v[j] * (one - b[j] * b[j])
        g_z_t[j] = -g_s_u * (theta[j] * (one - theta[j]))
        g_x[j] = g_h * i[j]
        g_v[j] = g_h * f[j]
