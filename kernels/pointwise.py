"""The neurons' elementwise mathematics on a tile: gates, membrane, surrogate, and their gradients.

Every formula of the kernels is written here, once; its twins are in gpn_triton/neurons:
reference.py and surrogate.py. Tiles are float32 of any one shape. Two compile-time choices run
through everything of GPN:

    GATES   the gates that have weights, "f i b theta" or some of them in this order. A gate that is
            absent is its constant: f = 1/2, i = 1 - f, b = 0, theta = 1.
    FAST    sigmoid and tanh by the hardware's tanh.approx (relative error 2^-11, the precision of
            the half types); otherwise by exp and a division.

The neurons without gates (leak of LIF, charge of CuBa-LIF) have the threshold 1 and reset to 0.

Source: arXiv 2412.01087, equations of the gated parametric neuron; Fang et al., ICCV 2021 for LIF.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def has(GATES, gate):
    """Whether the variant has this gate."""
    return gate in GATES.split()


@triton.constexpr_function
def place(GATES, gate):
    """Which block of N columns of z (rows of the weights) belongs to this gate."""
    return GATES.split().index(gate)


@triton.jit
def tanh(z, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 2.0 / (1.0 + tl.exp(-2.0 * z)) - 1.0


@triton.jit
def tanh_derivative(y):
    """dy/dz of y = tanh(z)."""
    return 1.0 - y * y


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    if FAST:
        return 0.5 * tanh(0.5 * z, FAST) + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_derivative(y):
    """dy/dz of y = sigmoid(z)."""
    return y * (1.0 - y)


@triton.jit
def surrogate_derivative(u, alpha, SURROGATE: tl.constexpr):
    """ds/du in place of the derivative of s = Heaviside(u), u = h - theta."""
    if SURROGATE == "atan":
        w = 1.5707963267948966 * alpha * u
        return 0.5 * alpha / (1.0 + w * w)
    elif SURROGATE == "sigmoid":
        return alpha * sigmoid_derivative(sigmoid(alpha * u, False))
    elif SURROGATE == "fast-sigmoid":
        w = 1.0 + alpha * tl.abs(u)
        return 0.5 * alpha / (w * w)
    else:
        tl.static_assert(SURROGATE == "triangle", "unknown surrogate")
        return 0.5 * alpha * tl.maximum(1.0 - 0.5 * alpha * tl.abs(u), 0.0)


@triton.jit
def mix_gates(z_f, z_i, GATES: tl.constexpr, FAST: tl.constexpr):
    """f, i: how much of the old membrane and of the current enters h."""
    f = tl.full(z_f.shape, 0.5, tl.float32)
    if has(GATES, "f"):
        f = sigmoid(z_f, FAST)
    i = 1.0 - f
    if has(GATES, "i"):
        i = sigmoid(z_i, FAST)
    return f, i


@triton.jit
def bypass(z_b, GATES: tl.constexpr, FAST: tl.constexpr):
    """b: what is added to the membrane after the reset."""
    b = tl.zeros(z_b.shape, tl.float32)
    if has(GATES, "b"):
        b = tanh(z_b, FAST)
    return b


@triton.jit
def threshold(z_theta, GATES: tl.constexpr, FAST: tl.constexpr):
    theta = tl.full(z_theta.shape, 1.0, tl.float32)
    if has(GATES, "theta"):
        theta = sigmoid(z_theta, FAST)
    return theta


@triton.jit
def cell(z_f, z_i, z_theta, v, x, GATES: tl.constexpr, FAST: tl.constexpr):
    """h, theta: the membrane before the reset and what it is held against; s = h >= theta."""
    f, i = mix_gates(z_f, z_i, GATES, FAST)
    return f * v + i * x, threshold(z_theta, GATES, FAST)


@triton.jit
def next_v(h, s, z_b, v_reset, GATES: tl.constexpr, FAST: tl.constexpr):
    """v[t+1]: the membrane after the reset and the bypass; s is bool."""
    return tl.where(s, v_reset, h) + bypass(z_b, GATES, FAST)


@triton.jit
def cell_gradient(
    z_f, z_i, z_theta, v, x, g_s, alpha,
    GATES: tl.constexpr, SURROGATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The part of cell's gradient that does not wait for g_v[t+1].

    Returns:
        g_u = g_s surrogate'(h - theta), which enters g_h, and g_z_theta.
    """
    h, theta = cell(z_f, z_i, z_theta, v, x, GATES, FAST)
    g_u = g_s * surrogate_derivative(h - theta, alpha, SURROGATE)
    return g_u, -g_u * sigmoid_derivative(theta)


@triton.jit
def next_v_gradient(
    g_v, g_u, z_f, z_i, z_b, v, x, s, GATES: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """The serial part of the gradient of one step; g_v is g_v[t+1], s is 0.0 or 1.0.

    Returns:
        g_h f, the part of g_v[t] without the product; g_h i, that of g_x[t]; g_z_f, g_z_i, g_z_b.
    """
    f, i = mix_gates(z_f, z_i, GATES, FAST)
    g_h = g_v * (1.0 - s) + g_u
    # without a gate of its own, i = 1 - f: f then also carries what x contributes
    from_f = v - x
    if has(GATES, "i"):
        from_f = v
    g_z_f = g_h * from_f * sigmoid_derivative(f)
    g_z_i = g_h * x * sigmoid_derivative(i)
    g_z_b = g_v * tanh_derivative(bypass(z_b, GATES, FAST))
    return g_h * f, g_h * i, g_z_f, g_z_i, g_z_b


@triton.jit
def fire(h):
    """Spikes (bool) and v[t+1] of a neuron without gates."""
    s = h >= 1.0
    return s, tl.where(s, 0.0, h)


@triton.jit
def fire_gradient(g_v, g_s, h, alpha, SURROGATE: tl.constexpr):
    """g_h of a neuron without gates; g_v is g_v[t+1]."""
    alpha = tl.cast(alpha, tl.float32)
    return tl.where(h >= 1.0, 0.0, g_v) + g_s * surrogate_derivative(h - 1.0, alpha, SURROGATE)


@triton.jit
def leak(v, x, rate):
    """h of LIF; rate is 1 / tau."""
    return v + (x - v) * rate


@triton.jit
def leak_gradient(g_v, g_s, h, rate, alpha, SURROGATE: tl.constexpr):
    """g_v[t] and g_x[t] of LIF; g_v is g_v[t+1]."""
    g_h = fire_gradient(g_v, g_s, h, alpha, SURROGATE)
    g_x = g_h * rate
    return g_h - g_x, g_x


@triton.jit
def charge(current, v, x, recurrent, current_decay, membrane_decay):
    """The current after a step of CuBa-LIF, and h."""
    membrane_decay = tl.cast(membrane_decay, tl.float32)
    current = tl.cast(current_decay, tl.float32) * current + x + recurrent
    return current, membrane_decay * v + (1.0 - membrane_decay) * current


@triton.jit
def charge_gradient(
    g_current, g_v, g_s, h, current_decay, membrane_decay, alpha, SURROGATE: tl.constexpr
):  # fmt: skip
    """One step of CuBa-LIF backward: g_current and g_v are those after the step.

    Returns:
        those before it, and g_x[t].
    """
    membrane_decay = tl.cast(membrane_decay, tl.float32)
    g_h = fire_gradient(g_v, g_s, h, alpha, SURROGATE)
    g_x = (1.0 - membrane_decay) * g_h + g_current
    return tl.cast(current_decay, tl.float32) * g_x, membrane_decay * g_h, g_x
