"""The inner ear on a CPU, compiled by Numba: a membrane's spectrum, and velocities to spikes.

Equations, draws and results are those of kernels/inner_ear.py, bit for bit. LANES channels go side
by side through all samples; what every lane does is a loop that LLVM vectorises, the search for the
number of fibres (needed in one sample of five at rest) is a loop over the lanes that need it.

spectrum_kernel multiplies a sound's spectrum with the membrane's transfer function, interpolated
from a table between whose nodes it turns by less than a tenth of a radian, and folds the upper half
of the result onto the lower, so that a real transform of half the size remains (see audio/ear.py).

Both kernels take one stretch of channels and leave threads to the caller, who alternates them with
torch's transform: a stretch's spectrum and velocity stay in the cache between them.

Twins: kernels/inner_ear.py; gpn_triton/audio/reference.py and ear.transfer in float64.
"""

from __future__ import annotations

import numpy as np

from gpn_triton.kernels.cpu import EXACT, exact_disjoint, inner, kernel, row

# channels side by side, two vectors of AVX2; samples transposed at a time
LANES, BLOCK = 16, 64
ONE = np.float32(1)
NONE = np.float32(0)
UNIT = np.float32(2.0**-24)
GOLDEN = np.uint32(0x9E3779B9)
MIX_1, MIX_2 = np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)
S15, S16, S8 = np.uint32(15), np.uint32(16), np.uint32(8)


@exact_disjoint
def mix(h):
    """binning.mix: a hash of 32 bits."""
    h = np.uint32(h + GOLDEN)
    h = np.uint32(np.uint32(h ^ (h >> S16)) * MIX_1)
    h = np.uint32(np.uint32(h ^ (h >> S15)) * MIX_2)
    return np.uint32(h ^ (h >> S15))


@exact_disjoint
def _hair_cells(x, rates, q, c, w, fired, keys, t, fibres, p, none, u, searching):
    """Pools after sample t, and for each lane the probability that none of its fibres fires."""
    A, B, G, Y, X, R, LR, H = (
        rates[0], rates[1], rates[2], rates[3], rates[4], rates[5], rates[6], rates[7],
    )  # fmt: skip
    for j in range(LANES):
        drive = x[j] + A
        kt = G * drive / (drive + B)
        kt = kt if drive > NONE else NONE
        ejected, reprocessed = kt * q[j], X * w[j]
        filled = Y - Y * q[j]
        filled = filled if q[j] < ONE else NONE
        w_j = (w[j] + R * c[j]) - reprocessed
        c_j = (c[j] + ejected) - LR * c[j]
        q_j = ((q[j] + filled) - ejected) + reprocessed
        w[j] = w_j if w_j > NONE else NONE
        c[j] = c_j if c_j > NONE else NONE
        q[j] = q_j if q_j > NONE else NONE
        p[j] = H * c[j]
    for j in range(LANES):
        u[j] = np.float32(np.int32(mix(keys[j] ^ t) >> S8)) * UNIT
    for j in range(LANES):
        trials, power, left = fibres - fired[j], ONE - p[j], ONE
        for bit in range(6):
            left = left * power if (trials >> np.int32(bit)) & np.int32(1) else left
            power = power * power
        none[j] = left
        searching[j] = np.int32(1) if u[j] >= left and trials > 0 else np.int32(0)


@exact_disjoint
def _search(u, p, trials, total):
    """How many of so many trials succeed; total: the probability of none, not above u."""
    odds, term = p / (ONE - p), total
    for k in range(trials):
        term = term * (np.float32(trials - k) * odds / np.float32(k + 1))
        total = total + term
        if u < total:
            return np.int32(k + 1)
    return np.int32(trials)


@exact_disjoint
def _bushy_cells(n, oldest, fired, i, v, wait, rates, refractory, spike):
    """Queue, current and membrane after sample t; returns how many lanes fire."""
    decay_i, decay_v, weight, firing = rates[11], rates[12], rates[13], np.int32(0)
    for j in range(LANES):
        fired[j] += n[j] - oldest[j]
        i[j] = i[j] * decay_i + np.float32(n[j])
        v_j = v[j] * decay_v + weight * i[j]
        v_j = v_j if wait[j] <= 0 else NONE
        fires = np.int32(1) if v_j >= ONE else np.int32(0)
        rest = wait[j] - np.int32(1)
        rest = rest if rest > 0 else np.int32(0)
        wait[j] = refractory if fires else rest
        v[j] = NONE if fires else v_j
        spike[j] = fires
        firing += fires
    return firing


@kernel(options=EXACT)
def inner_ear_kernel(
    velocity, key, rates, spikes, counts, T, channels, first, most, fibres, refractory
):
    """Spikes of `channels` channels of one recording of T samples.

    velocity [channels, T] float64, rounded to float32 here; key uint32; spikes [channels, most],
    counts [channels] int32. All flat. first: the ear's number of channel 0 here.
    """
    q, c, w = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    i, v, p = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    none, u = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    n, fired, wait = np.empty(LANES, np.int32), np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    searching, spike = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    keys, count = np.empty(LANES, np.uint32), np.empty(LANES, np.int32)
    slots = refractory - np.int32(1)
    queue, x = np.empty(slots * LANES, np.int32), np.zeros(BLOCK * LANES, np.float32)
    for begin in range(0, channels, LANES):
        lanes = LANES if begin + LANES < channels else channels - begin
        q[:], c[:], w[:] = rates[8], rates[9], rates[10]
        i[:], v[:] = NONE, NONE
        fired[:], wait[:], count[:], queue[:] = 0, 0, 0, 0
        for j in range(LANES):
            keys[j] = mix(np.uint32(key ^ np.uint32(first + begin + j)))
        slot = 0
        for start in range(0, T, BLOCK):
            steps = BLOCK if start + BLOCK < T else T - start
            for j in range(lanes):
                for k in range(steps):
                    x[k * LANES + j] = np.float32(velocity[(begin + j) * T + start + k])
            for k in range(steps):
                t = start + k
                _hair_cells(
                    row(x, k * LANES), rates, q, c, w, fired, keys, np.uint32(t), fibres,
                    p, none, u, searching,
                )  # fmt: skip
                for j in range(LANES):
                    n[j] = 0
                    if searching[j]:
                        n[j] = _search(u[j], p[j], fibres - fired[j], none[j])
                oldest = row(queue, slot * LANES)
                if _bushy_cells(n, oldest, fired, i, v, wait, rates, refractory, spike):
                    for j in range(lanes):
                        if spike[j]:
                            spikes[(begin + j) * most + count[j]] = t
                            count[j] += 1
                for j in range(LANES):
                    oldest[j] = n[j]
                slot = slot + 1 if slot + 1 < slots else 0
        for j in range(lanes):
            counts[begin + j] = count[j]


@inner
def _at(table, at, index, weight, k):
    """The transfer function of one channel at frequency k, from four nodes."""
    i, w = at + index[k], 4 * k
    a = weight[w] * table[i] + weight[w + 1] * table[i + 1]
    return a + weight[w + 2] * table[i + 2] + weight[w + 3] * table[i + 3]


@kernel()
def spectrum_kernel(sound, table, nodes, index, weight, channels, M, out):
    """out [channels, M // 2 + 1]: the real velocity's spectrum of M samples.

    sound [M] complex128: the sound's spectrum from 0 Hz to the ear's rate. table [channels, nodes]
    complex128: the transfer function. index [M], weight [M, 4]: where between its nodes each
    frequency lies.
    """
    half = M // 2 + 1
    for c in range(channels):
        at = c * nodes
        for k in range(half):
            m = M - k if k > 0 else 0
            upper = sound[m] * _at(table, at, index, weight, m)
            lower = sound[k] * _at(table, at, index, weight, k)
            out[c * half + k] = (lower + upper.conjugate()) / 2
