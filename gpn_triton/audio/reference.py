"""The ear's cells in float64, a line an equation: what its kernels are judged against."""

from __future__ import annotations

import numpy as np

from gpn_triton.audio import ear
from gpn_triton.data.augmentation import fold


def hair_cells(velocity: np.ndarray) -> np.ndarray:
    """A fibre's probability to fire in each sample, for the membrane's velocity, both [C, T].

    Source: Meddis 1986, 1988, with Euler's step of one sample.
    """
    dt, out = 1 / ear.RATE, np.empty(velocity.shape)
    kt = ear.RELEASE * ear.PERMEABILITY_A / (ear.PERMEABILITY_A + ear.PERMEABILITY_B)
    lost = ear.LOSS + ear.REUPTAKE
    # the pools at rest: what flows into each flows out
    c = np.full(len(velocity), ear.REPLENISH * kt / (ear.LOSS * kt + ear.REPLENISH * lost))
    q, w = c * lost / kt, c * ear.REUPTAKE / ear.REPROCESS
    for t in range(velocity.shape[1]):
        drive = velocity[:, t] + ear.PERMEABILITY_A
        kt = np.where(drive > 0, ear.RELEASE * drive / (drive + ear.PERMEABILITY_B), 0)
        ejected, reprocessed = kt * q, ear.REPROCESS * w
        filled = np.where(q < 1, ear.REPLENISH * (1 - q), 0)
        q, c, w = (
            np.maximum(q + dt * (filled - ejected + reprocessed), 0),
            np.maximum(c + dt * (ejected - lost * c), 0),
            np.maximum(w + dt * (ear.REUPTAKE * c - reprocessed), 0),
        )
        out[:, t] = ear.FIRING * dt * c
    return out


def fibres(probability: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How many of a channel's 40 fibres fire in each sample, [C, T], each fibre drawn by itself and
    silent for a millisecond after it fired."""
    C, T = probability.shape
    last = np.full((C, ear.FIBRES), -ear.REFRACTORY)
    out = np.empty((C, T), np.int64)
    for t in range(T):
        drawn = generator.random((C, ear.FIBRES)) < probability[:, t, None]
        fires = drawn & (t - last >= ear.REFRACTORY)
        last[fires] = t
        out[:, t] = fires.sum(1)
    return out


def hashed_fibres(probability: np.ndarray, key: int) -> np.ndarray:
    """The same in distribution, [C, T], by the draws of kernels/inner_ear.py: one binomial number a
    sample, found by inversion at a hash of the recording's key, the channel and the sample."""
    C, T = probability.shape
    out = np.zeros((C, T), np.int64)
    keys = [fold(key, channel) for channel in range(C)]
    for t in range(T):
        fired = out[:, max(0, t - ear.REFRACTORY + 1) : t].sum(1)
        for channel in range(C):
            trials, p = ear.FIBRES - int(fired[channel]), probability[channel, t]
            u = (fold(keys[channel], t) >> 8) * 2.0**-24
            term = total = (1 - p) ** trials
            n = 0
            while u >= total and n < trials:
                term *= (trials - n) / (n + 1) * p / (1 - p)
                total += term
                n += 1
            out[channel, t] = n
    return out


def bushy_cells(fibres: np.ndarray) -> np.ndarray:
    """Which samples a channel's bushy cell fires in, [C, T] bool, for its fibres' spikes [C, T].

    Every spike adds 1 to the current, and the current charges a leaky membrane, which fires at 1
    and stays at 0 for a millisecond.
    """
    C, T = fibres.shape
    i, v, wait = np.zeros(C), np.zeros(C), np.zeros(C, np.int64)
    out = np.zeros((C, T), bool)
    for t in range(T):
        i = i * np.exp(-1 / (ear.RATE * ear.SYNAPSE_SECONDS)) + fibres[:, t]
        v = v * np.exp(-1 / (ear.RATE * ear.MEMBRANE_SECONDS))
        v = np.where(wait > 0, 0, v + ear.CHARGE / ear.FIBRES / ear.RATE * i)
        out[:, t] = v >= 1
        wait = np.where(out[:, t], ear.REFRACTORY, wait - 1)
        v[out[:, t]] = 0
    return out
