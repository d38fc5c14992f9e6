"""The inner ear against numbers of the published encoder, and its kernels against each other."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpn_triton.audio import ear, reference
from tests.interpreter import need_interpreter

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one recording at 48 kHz; velocity and hair at three of the ten channels of which spikes are known
GOLDEN = dict(np.load(ROOT / "tests" / "data" / "inner_ear_golden.npz"))
PLACES = ear.places(700)[GOLDEN["channels"]]
SAMPLES = GOLDEN["velocity"].shape[1]


def exact_velocity(windowed, places):
    """Of as many samples as the published encoder makes, V computed at every frequency."""
    f = ear._shifted(torch.linspace(0, ear.RATE, SAMPLES, dtype=torch.float64))
    sound = torch.fft.rfft(torch.from_numpy(windowed))
    return torch.fft.ifft(ear.transfer(f, places) * sound).real.numpy()


def spike_set(samples, counts):
    return set(
        zip(np.repeat(np.arange(len(counts)), counts).tolist(), samples.tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def windowed():
    return GOLDEN["windowed"].astype(np.float64)


def test_the_windowed_wave_is_the_published_encoders():
    assert np.abs(ear.window(GOLDEN["wave"]) - GOLDEN["windowed"]).max() < 1e-6


def test_the_membrane_moves_as_the_published_encoders(windowed):
    golden = GOLDEN["velocity"]
    largest = np.abs(golden).max(1, keepdims=True)
    exact = exact_velocity(windowed, PLACES[GOLDEN["rows"]])
    assert np.abs((exact - golden) / largest).max() < 1e-5
    # the table, of an ear whose channels lie between the golden ones' places too
    inner_ear = ear.InnerEar(19)
    velocity = inner_ear.velocity(windowed, SAMPLES).numpy()
    exact = exact_velocity(windowed, ear.places(19))
    assert np.abs(velocity - exact).max() < 1e-5 * np.abs(exact).max()
    # a few samples of silence behind it, for the sake of the transform, move little
    padded = inner_ear.velocity(windowed).numpy()
    assert padded.shape[1] == ear.membrane_samples(len(windowed)) == 10752
    assert np.abs(padded[:, :SAMPLES] - exact).max() < 5e-3 * np.abs(exact).max()


def test_the_hair_cells_fire_as_the_published_encoders():
    probability = reference.hair_cells(GOLDEN["velocity"].astype(np.float64))
    assert np.abs(probability - GOLDEN["hair"]).max() < 1e-6


def test_the_bushy_cells_spike_counts_lie_in_the_spread_of_the_published_encoders(windowed):
    velocity = exact_velocity(windowed, PLACES)
    ours = np.array([ear.fire(velocity, key)[1] for key in range(200)])  # [draws, channels]
    golden = GOLDEN["bushy_spikes"].T
    # each channel's mean of five draws in units of its own scatter, 0.3 spikes where nothing fires
    scatter = np.sqrt((ours.var(0) + 0.1) / len(golden))
    off = (golden.mean(0) - ours.mean(0)) / scatter
    assert np.abs(off).max() < 4 and (off**2).sum() < 30
    # sums over all channels scatter as theirs do
    assert 0.2 < golden.sum(1).std() / ours.sum(1).std() < 2.5


@pytest.mark.parametrize("p", [0.003, 0.05, 0.4])
def test_one_binomial_draw_is_forty_fibres_with_refractory_times(p):
    probability = np.full((40, 200), p)
    one_by_one = reference.fibres(probability, np.random.default_rng(0))
    hashed = reference.hashed_fibres(probability, 5)
    for of in (np.sum, lambda n, axis: (n > 0).sum(axis), lambda n, axis: (n**2).sum(axis)):
        a, b = of(one_by_one, axis=1), of(hashed, axis=1)
        error = np.sqrt((a.var() + b.var()) / len(a))
        assert abs(a.mean() - b.mean()) < 4 * error
    # nobody fires twice within 24 samples
    windows = np.lib.stride_tricks.sliding_window_view(hashed, ear.REFRACTORY, axis=1)
    assert windows.sum(2).max() <= ear.FIBRES


def test_the_kernel_fires_as_the_reference_in_float64():
    velocity = GOLDEN["velocity"][:, 2000:6000].astype(np.float64)
    probability = reference.hair_cells(velocity)
    spikes = reference.bushy_cells(reference.hashed_fibres(probability, 3))
    expected = set(zip(*(at.tolist() for at in np.nonzero(spikes)), strict=True))
    found = spike_set(*ear.fire(velocity, 3))
    # a float32 sum on the other side of a draw moves a fibre's spike, and that sometimes another
    assert len(expected) > 10 and len(found ^ expected) <= 0.1 * len(expected)


class Loud(ear.InnerEar):
    """An ear whose membrane reaches every branch of the cells: rest, depletion, samples in which 20
    fibres fire."""

    def _velocity(self, sound, samples, channels):
        draws = np.random.default_rng(samples)
        scale = 10.0 ** draws.uniform(0, 4, (self.channels, 1))
        velocity = scale * draws.standard_normal((self.channels, samples))
        return torch.from_numpy(velocity[channels]).to(self.device)


def test_the_triton_kernel_fires_as_its_twin_to_the_last_bit():
    need_interpreter()
    waves, keys = [np.ones(94), np.ones(10)], [7, 0xDEADBEEF]
    # of several recordings side by side, and of two programs
    found = Loud(33, DEVICE)._encode_on_gpu(waves, keys)
    expected = Loud(33)._encode_on_cpu(waves, keys)
    for (times, units), (twins_times, twins_units) in zip(found, expected, strict=True):
        assert np.array_equal(times, twins_times) and np.array_equal(units, twins_units)
    # some channels fire twice
    assert len(found[0][1]) > len(np.unique(found[0][1])) > 15


@pytest.mark.parametrize("samples", [2401, 2400])
def test_the_folded_spectrum_is_the_twins_and_gives_the_real_part(samples):
    inner_ear = ear.InnerEar(6)
    wave = np.random.default_rng(0).standard_normal(2 * (samples - 1))
    sound = torch.fft.rfft(torch.from_numpy(wave))
    index, weights = ear._between_nodes(samples)
    folded = ear.folded_spectrum(sound, inner_ear.table, index, weights)
    f = ear._shifted(torch.linspace(0, ear.RATE, samples, dtype=torch.float64))
    exact = torch.fft.ifft(ear.transfer(f, ear.places(6)) * sound).real
    scale = exact.abs().max()
    torch.testing.assert_close(
        torch.fft.irfft(folded, n=samples) / scale, exact / scale, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        inner_ear.velocity(wave, samples), torch.fft.irfft(folded, n=samples), rtol=1e-12,
        atol=1e-12 * scale.item(),
    )  # fmt: skip


def test_a_recordings_spikes_depend_on_nothing_beside_it(monkeypatch):
    draws = np.random.default_rng(0)
    waves = [draws.standard_normal(n) for n in (9601, 7000)]
    inner_ear = ear.InnerEar(70)
    together = inner_ear.encode(waves, [1, 2])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    # a channel a stretch instead of 64
    monkeypatch.setattr(ear, "CPU_MIB", 0)
    try:
        alone = [
            inner_ear.encode([wave], [key])[0] for wave, key in zip(waves, (1, 2), strict=True)
        ]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for (times, units), (other_times, other_units) in zip(together, alone, strict=True):
        assert np.array_equal(times, other_times) and np.array_equal(units, other_units)
        assert len(times) > 10 and times.dtype == np.float32 and units.dtype == np.uint16
        order = np.lexsort((units, times))
        assert np.array_equal(order, np.arange(len(times)))
    assert not np.array_equal(together[0][0], inner_ear.encode(waves[:1], [9])[0][0])


def test_silence_is_encoded_as_the_cells_at_rest():
    ((times, units),) = ear.InnerEar(70).encode([np.zeros(48_000)], [0])
    # 0.3 spikes a second and channel, in no place more than elsewhere
    assert 0 < len(times) < 100 and len(np.unique(units)) > len(units) // 3


def test_keys_tell_recordings_seeds_and_rates_apart():
    a = np.zeros(100, np.float32)
    b = a.copy()
    b[50] = 1e-3
    keys = {
        ear.recording_key(*of) for of in ((a, 8000, 0), (b, 8000, 0), (a, 8000, 1), (a, 9000, 0))
    }
    assert len(keys) == 4 and ear.recording_key(a, 8000, 0) in keys
