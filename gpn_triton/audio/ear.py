"""The inner ear that made SHD and SSC: a recording's wave to spikes of bushy cells.

    wave  ->  RMS 0.3, Hann window  ->  velocity of the basilar membrane at 700 places
          ->  hair cells: a fibre's probability to fire  ->  bushy cells, 40 fibres each: spikes

Membrane (Sieroka, Dosch, Rupp 2006): a shallow fluid of height h over a membrane whose stiffness
falls along its length. At place x and angular frequency w it has the impedance

    xi(x, w) = S(x) - m w^2 - i w R(x),     S = C exp(-alpha x) - a,     R = r exp(-alpha x / 2)

and the wave number g = w sqrt(rho / (h xi)). To first order in the change of g along x the pressure
is sqrt(G / g) H0(G) with H0 Hankel's function of the first kind and the phase

    G(x) = 2 g(0) / alpha + integral of g from 0 to x,

and the velocity, for a given velocity of the stapes, whose load is an exponential membrane's,

    V(x, w) = 2 w / xi  p(x) / p(0)  Z(w),   Z = i sqrt(2 C / h) H0*(s) / H1*(s),
    s = (2 w / alpha) sqrt(2 / (h C)),       * : of the second kind.

With u = exp(-alpha x / 2) the integral is elementary: A = a + m w^2, xi = C u^2 - i w r u - A, and

    integral of g = (2 w / alpha) sqrt(rho / (h A)) (theta(1) - theta(u)),
    theta(u) = arctan y,   y = -(2 A + i w r u) / (2 sqrt(A xi)),
    1 + y^2 = u^2 (4 A C - w^2 r^2) / (4 A xi),

the last line because behind the resonance y comes so near to -i that arctan loses all digits.

How SHD samples it, which is part of what its files are: the spectrum of n samples at 48 kHz is
multiplied from 0 to 24 kHz by V at 1 Hz + f (1 - 1 Hz / 24 kHz), and the real part of the inverse
transform of these n / 2 + 1 values is the velocity, called 24,000 samples a second. Since V is of
waves exp(-i w t) and the transform of exp(i w t), delays along the membrane run backwards: a click
moves its far end 19 ms too early. The spikes of SHD and SSC are so, and these are.

Source: Cramer, Stradmann, Schemmel, Zenke, IEEE TNNLS 2020, appendix; constants as in its encoder.
Hair and bushy cells: kernels/inner_ear.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gpn_triton.data.augmentation import fold
from gpn_triton.machine.device import triton_unavailable

# samples a second: of the wave, and of the membrane, its cells and the spikes
WAVE_RATE, RATE = 48_000, 24_000
LEVEL = 0.3  # root mean square of the wave, before the window
# the membrane, in cm, g, s
LENGTH, HEIGHT, DENSITY = 3.5, 0.1, 1.0
STIFFNESS, SLACK, SLOPE = 1e9, 3500.0, 3.0  # C, a; alpha, 1 / cm
MASS = 0.05  # of an area, g / cm^2
DAMPING = 0.15 * math.sqrt(STIFFNESS * MASS)  # r
# the hair cell, rates a second (Meddis 1986): permeability A, B (in units of the velocity), release
# g, replenishment y, loss l, reuptake r, reprocessing x, firing h; a pool of 1 is the largest
PERMEABILITY_A, PERMEABILITY_B = 5.0, 300.0
RELEASE, REPLENISH, LOSS = 2000.0, 5.05, 2500.0
REUPTAKE, REPROCESS, FIRING = 6580.0, 66.3, 50_000.0
# fibres and bushy cells (Cramer et al. 2020): seconds; a fibre's current charges the membrane with
# 13,000 thresholds a second, shared by the fibres
FIBRES, REFRACTORY_SECONDS = 40, 1e-3
SYNAPSE_SECONDS, MEMBRANE_SECONDS, CHARGE = 5e-4, 1e-3, 13_000.0
REFRACTORY = round(REFRACTORY_SECONDS * RATE)

# nodes of the table of V lie at WARP sinh(STEP j) Hz: no node's V turns by more than 0.1 from the
# last one's, and cubic interpolation is within 4e-6 of the largest value of a channel
WARP, STEP = 100.0, 0.0025
# primes that FFT libraries have steps for
RADICES = (2, 3, 5, 7, 11, 13)
# memory of one stretch of channels' spectrum and velocity, MiB: of a recording on a CPU (24 and 96
# are alike), of a batch on a GPU (unmeasured)
CPU_MIB, GPU_MIB = 24, 2048


def step_constants() -> Tensor:
    """What a step of kernels/inner_ear.py takes, [14] float32: A, B, G, Y, X, R, LR, H; the pools
    q, c, w at rest; decays of the current and of the membrane, and a fibre's weight."""
    kt = RELEASE * PERMEABILITY_A / (PERMEABILITY_A + PERMEABILITY_B)
    cleft = REPLENISH * kt / (LOSS * kt + REPLENISH * (LOSS + REUPTAKE))
    rates = (RELEASE, REPLENISH, REPROCESS, REUPTAKE, LOSS + REUPTAKE, FIRING)
    return torch.tensor(
        [
            PERMEABILITY_A, PERMEABILITY_B, *(rate / RATE for rate in rates),
            cleft * (LOSS + REUPTAKE) / kt, cleft, cleft * REUPTAKE / REPROCESS,
            math.exp(-1 / (RATE * SYNAPSE_SECONDS)), math.exp(-1 / (RATE * MEMBRANE_SECONDS)),
            CHARGE / FIBRES / RATE,
        ]
    )  # fmt: skip


def window(wave: np.ndarray) -> np.ndarray:
    """The wave [n] at an RMS of 0.3 under a Hann window over all of it, float64; silence stays."""
    wave = np.asarray(wave, np.float64)
    rms, half = math.sqrt(np.mean(wave**2)), len(wave) // 2
    rise = np.hanning(2 * half)[:half]
    out = wave * (LEVEL / rms if rms else 0.0)
    out[:half] *= rise
    out[len(out) - half :] *= rise[::-1]
    return out


def places(channels: int) -> Tensor:
    """Where on the membrane so many channels lie, [channels] float64: cm from the stapes."""
    return torch.linspace(0, LENGTH, channels, dtype=torch.float64)


def transfer(frequencies: Tensor, places: Tensor) -> Tensor:
    """V: velocity of the membrane for a wave's amplitude, [C, F] complex128.

    Args:
        frequencies [F] float64: Hz, above 0. places [C] float64: cm from the stapes.
    """
    w = 2 * math.pi * frequencies
    area = SLACK + MASS * w**2
    slow = 4 * area * STIFFNESS - (w * DAMPING) ** 2

    def phase(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xi, theta and g where exp(-alpha x / 2) is u [C, 1]."""
        xi = torch.complex(STIFFNESS * u**2 - area, -w * DAMPING * u)
        y = -torch.complex(2 * area + 0 * u, w * DAMPING * u) / (2 * area.sqrt() * xi.sqrt())
        theta = 0.5j * (torch.log(slow * u**2 / (4 * area * xi)) - 2 * torch.log(1 + 1j * y))
        return xi, theta, w * torch.sqrt(DENSITY / (HEIGHT * xi))

    _, theta_0, g_0 = phase(torch.ones(1, 1, dtype=torch.float64))
    xi, theta, g = phase(torch.exp(-SLOPE / 2 * places)[:, None])
    start = 2 / SLOPE * g_0
    along = start + 2 / SLOPE * w * torch.sqrt(DENSITY / (HEIGHT * area)) * (theta_0 - theta)
    pressure = torch.sqrt(along / g) * hankel(along) / (torch.sqrt(start / g_0) * hankel(start))
    s = 2 / SLOPE * math.sqrt(2 / (HEIGHT * STIFFNESS)) * w
    j0, j1, y0, y1 = (
        getattr(torch.special, f"bessel_{name}")(s) for name in ("j0", "j1", "y0", "y1")
    )
    stapes = (
        math.sqrt(2 * STIFFNESS / HEIGHT) * 1j * torch.complex(j0, -y0) / torch.complex(j1, -y1)
    )
    return 2 * w / xi * pressure * stapes


def hankel(z: Tensor) -> Tensor:
    """Hankel's function H0 of the first kind, complex128, within 2e-8, for Re z > 0, Im z >= 0.

    The power series within |z| < 9, where it loses 8 of 16 digits at worst; the asymptotic series
    to its 17th term beyond. Source: Abramowitz and Stegun, 9.1.12, 9.1.13, 9.2.7.
    """
    near = z.abs() < 9
    out = torch.empty_like(z)
    x = z[near]
    square, j, y = -((x / 2) ** 2), torch.zeros_like(x), torch.zeros_like(x)
    # from the highest of 26 powers down
    for k in range(25, -1, -1):
        factor = 1 / math.factorial(k) ** 2
        j.mul_(square).add_(factor)
        y.mul_(square).sub_(factor * sum(1 / n for n in range(1, k + 1)))
    out[near] = j + 2j / math.pi * ((torch.log(x / 2) + np.euler_gamma) * j + y)
    x = z[~near]
    step, series = -1j / (8 * x), torch.ones_like(x)
    for k in range(17, 0, -1):
        series.mul_(step).mul_((2 * k - 1) ** 2 / k).add_(1)
    out[~near] = torch.sqrt(2 / (math.pi * x)) * torch.exp(1j * (x - math.pi / 4)) * series
    return out


@functools.lru_cache(maxsize=2)
def transfer_table(channels: int) -> Tensor:
    """V at the nodes, [channels, nodes] complex128; node j lies at WARP sinh(STEP j) Hz."""
    top = math.ceil(math.asinh(RATE / WARP) / STEP) + 2
    f = WARP * torch.sinh(STEP * torch.arange(top + 1, dtype=torch.float64))
    # a second of one core; of two, while other work holds one, four times that of both
    with _one_torch_thread():
        return torch.cat([transfer(_shifted(f), part) for part in places(channels).split(64)])


def _shifted(f: Tensor) -> Tensor:
    """At which frequency, Hz, SHD's encoder takes V for a component of f Hz."""
    return 1 + f * (1 - 1 / RATE)


@functools.lru_cache(maxsize=4)
def _between_nodes(samples: int) -> tuple[Tensor, Tensor]:
    """For the frequencies of so many samples of the membrane, the first of four nodes about each,
    [samples] int64, and their weights [samples, 4] float64."""
    at = torch.asinh(torch.linspace(0, RATE, samples, dtype=torch.float64) / WARP) / STEP
    first = (at.floor() - 1).clamp(min=0)
    t = at - first
    weights = [
        -(t - 1) * (t - 2) * (t - 3) / 6, t * (t - 2) * (t - 3) / 2,
        -t * (t - 1) * (t - 3) / 2, t * (t - 1) * (t - 2) / 6,
    ]  # fmt: skip
    return first.long(), torch.stack(weights, 1)


def folded_spectrum(sound: Tensor, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """inner_ear_cpu.spectrum_kernel's twin in torch, [C, samples // 2 + 1] complex128.

    Args:
        sound [samples] complex128. table [C, nodes] complex128. index [samples] int64, weights
        [samples, 4] float64: as _between_nodes gives them.
    """
    half = len(sound) // 2 + 1
    whole = sum(table[:, index + j] * weights[:, j] for j in range(4)) * sound
    upper = whole.roll(-1, 1).flip(1)[:, :half].conj()
    return (whole[:, :half] + upper) / 2


def membrane_samples(n: int) -> int:
    """Samples of the membrane for n of the wave: n / 2 + 1 and up to the next product of RADICES,
    so that its transform is fast: a five-hundredth more on average, silence behind the window."""
    samples = n // 2 + 1 + n % 2
    while True:
        rest = samples
        for radix in RADICES:
            while rest % radix == 0:
                rest //= radix
        if rest == 1:
            return samples
        samples += 1


def recording_key(samples: np.ndarray, rate: int, seed: int) -> int:
    """The key of a recording's draws, 32 bits: a hash of the seed, its rate and its samples as they
    were decoded, so that the same recording fires the same anywhere."""
    data = np.ascontiguousarray(samples, np.float32).tobytes()
    digest = hashlib.sha256(f"{rate} ".encode() + data).digest()
    key = fold(0, seed & 0xFFFFFFFF)
    for at in (0, 4):
        key = fold(key, int.from_bytes(digest[at : at + 4], "little"))
    return key


class InnerEar:
    """Encodes waves at 48 kHz into spikes.

    Args:
        channels: places on the membrane, evenly from the stapes on; SHD has 700.
        device: cpu or a GPU. On a CPU Numba's kernels run, on torch.get_num_threads() threads.
    Raises:
        ValueError: channels outside 1..65536. RuntimeError: the device's kernels cannot run.
    """

    def __init__(self, channels: int = 700, device: torch.device | str = "cpu"):
        if not 1 <= channels <= 1 << 16:
            raise ValueError(f"channels: expected 1..{1 << 16}, got {channels}")
        self.channels, self.device = channels, torch.device(device)
        if self.device.type != "cpu":
            reason = triton_unavailable(torch.empty(0, device=self.device))
            if reason:
                raise RuntimeError(f"the ear's kernels cannot run: {reason}")
        self.table = transfer_table(channels).to(self.device)
        self.rates = step_constants().to(self.device)

    def velocity(
        self, windowed: np.ndarray, samples: int | None = None, channels: slice = slice(None)
    ) -> Tensor:
        """The membrane's velocity for a windowed wave [n], [channels, samples] float64.

        Args:
            samples: how many; default: membrane_samples(n). n / 2 + 1 is SHD's, to the letter.
            channels: which of the ear's.
        """
        samples = samples or membrane_samples(len(windowed))
        return self._velocity(self._spectrum(windowed, samples), samples, channels)

    def encode(self, waves: Sequence[np.ndarray], keys: Sequence[int]) -> list[tuple]:
        """Spikes of some recordings, one by one on a CPU, side by side on a GPU.

        Args:
            waves: each [n] float, n >= 2, 48,000 samples a second. keys: recording_key of each.
        Returns:
            for each its spikes, sorted by time, then channel: times [E] float32, seconds, multiples
            of 1 / 24,000; units [E] uint16. They depend on the recording and its key alone.
        """
        windowed = [window(wave) for wave in waves]
        if self.device.type == "cpu":
            return self._encode_on_cpu(windowed, keys)
        return self._encode_on_gpu(windowed, keys)

    def _spectrum(self, windowed: np.ndarray, samples: int) -> Tensor:
        """Of a wave followed by silence, the components from 0 Hz to RATE, [samples] complex128."""
        wave = torch.from_numpy(windowed).to(self.device)
        return torch.fft.rfft(wave, n=2 * (samples - 1))

    def _velocity(self, sound: Tensor, samples: int, channels: slice) -> Tensor:
        table = self.table[channels]
        index, weights = (a.to(self.device) for a in _between_nodes(samples))
        half = samples // 2 + 1
        if self.device.type == "cpu":
            from gpn_triton.kernels.inner_ear_cpu import spectrum_kernel

            folded = sound.new_empty(len(table), half)
            spectrum_kernel(
                sound.numpy(), table.numpy().reshape(-1), table.shape[1], index.numpy(),
                weights.numpy().reshape(-1), len(table), samples, folded.numpy().reshape(-1),
            )  # fmt: skip
        else:
            folded = folded_spectrum(sound, table, index, weights)
        # the real part of the inverse transform of all samples is that of the folded half
        return torch.fft.irfft(folded, n=samples)

    def _encode_on_cpu(self, windowed: list[np.ndarray], keys: Sequence[int]) -> list[tuple]:
        from gpn_triton.kernels.inner_ear_cpu import LANES

        def spikes(sound: Tensor, samples: int, key: int, part: slice) -> tuple:
            return fire(self._velocity(sound, samples, part).numpy(), key, part.start)

        threads = torch.get_num_threads()
        with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            waiting = []
            for wave, key in zip(windowed, keys, strict=True):
                samples = membrane_samples(len(wave))
                sound = self._spectrum(wave, samples)
                width = (CPU_MIB << 20) // (16 * samples)
                # a whole number of the kernel's lanes, where memory allows
                width = min(64, width // LANES * LANES or max(1, width))
                parts = [
                    slice(first, min(first + width, self.channels))
                    for first in range(0, self.channels, width)
                ]
                waiting.append([pool.submit(spikes, sound, samples, key, p) for p in parts])
            out = []
            for parts in waiting:
                times, counts = zip(*(part.result() for part in parts), strict=True)
                out.append(_sorted(np.concatenate(times), np.concatenate(counts)))
        return out

    def _encode_on_gpu(self, windowed: list[np.ndarray], keys: Sequence[int]) -> list[tuple]:
        from gpn_triton.kernels.inner_ear import inner_ear

        samples = [membrane_samples(len(wave)) for wave in windowed]
        sounds = [self._spectrum(w, n) for w, n in zip(windowed, samples, strict=True)]
        row, signed = max(samples), np.array(keys, np.uint32).view(np.int32)
        lengths = torch.tensor(samples, dtype=torch.int32, device=self.device)
        keys = torch.from_numpy(signed).to(self.device)
        found = [[] for _ in windowed]
        width = max(1, min(self.channels, (GPU_MIB << 20) // (4 * row * len(windowed))))
        for first in range(0, self.channels, width):
            part = slice(first, min(first + width, self.channels))
            velocity = torch.zeros(len(windowed), part.stop - first, row, device=self.device)
            for out, sound, n in zip(velocity, sounds, samples, strict=True):
                out[:, :n] = self._velocity(sound, n, part)
            spikes, counts = inner_ear(
                velocity, lengths, keys, self.rates, first, FIBRES, REFRACTORY
            )
            valid = torch.arange(spikes.shape[2], device=self.device) < counts[..., None]
            for k in range(len(windowed)):
                found[k].append((spikes[k][valid[k]].cpu().numpy(), counts[k].cpu().numpy()))
        return [_sorted(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


def fire(velocity: np.ndarray, key: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Spikes of one recording's channels, computed on this CPU's calling thread.

    Args:
        velocity [C, T] float64: of the membrane. key: recording_key. first: the ear's number of
            channel 0 here, which the draws depend on.
    Returns:
        the samples at which channels fire, channel by channel, [E] int32; counts [C] int32: how
        many of them are each one's.
    """
    from gpn_triton.kernels.inner_ear_cpu import inner_ear_kernel

    channels, samples = velocity.shape
    most = samples // (REFRACTORY + 1) + 1
    found, counts = np.empty((channels, most), np.int32), np.empty(channels, np.int32)
    inner_ear_kernel(
        np.ascontiguousarray(velocity).reshape(-1), np.uint32(key), step_constants().numpy(),
        found.reshape(-1), counts, samples, channels, first, most, np.int32(FIBRES),
        np.int32(REFRACTORY),
    )  # fmt: skip
    return found[np.arange(most) < counts[:, None]], counts


def _sorted(samples: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times and units, by time and then channel, of samples that stand channel by channel."""
    order = np.argsort(samples, kind="stable")
    units = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    return (samples[order] / RATE).astype(np.float32), units[order]


class _one_torch_thread:
    """Within the block torch computes on the calling thread: two pools wait for each other."""

    # torch's number of threads is the process's
    lock = threading.RLock()

    def __enter__(self):
        self.lock.acquire()
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)
        self.lock.release()
