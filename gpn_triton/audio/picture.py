"""One recording on its way through the ear, as a picture."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch

from gpn_triton.audio import recordings
from gpn_triton.audio.ear import RATE, WAVE_RATE, InnerEar, recording_key, window
from gpn_triton.audio.encoding import Encoding
from gpn_triton.machine.files import write_atomically

# what a picture can show: rows of the membrane, columns of time
ROWS, COLUMNS = 140, 800


def plot_recording(
    path: str | os.PathLike, out: str | os.PathLike, encoding: Encoding, device: torch.device
) -> None:
    """Draw a recording's wave, its membrane's velocity and its spikes, one above the other.

    Raises:
        RuntimeError: matplotlib is missing. What recordings.read and InnerEar raise.
    """
    recordings.check_installed()
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("a picture needs matplotlib (pip install 'gpn-triton[plot]')")
    from matplotlib.figure import Figure

    sound = recordings.read(path, encoding.max_seconds)
    ear, wave = InnerEar(encoding.channels, device), sound.wave()
    key = recording_key(sound.samples, sound.rate, encoding.seed)
    ((times, units),) = ear.encode([wave], [key])
    windowed = window(wave)
    strongest = []
    for channel in np.linspace(0, encoding.channels - 1, min(ROWS, encoding.channels)).round():
        velocity = ear.velocity(windowed, channels=slice(int(channel), int(channel) + 1))[0]
        columns = velocity.abs().tensor_split(min(COLUMNS, len(velocity)))
        strongest.append([column.max().item() for column in columns])
    seconds = len(velocity) / RATE

    figure = Figure((8, 7), layout="constrained")
    sound_axis, membrane, spikes = figure.subplots(3, sharex=True, height_ratios=(1, 2, 2))
    sound_axis.plot(np.arange(len(windowed)) / WAVE_RATE, windowed, lw=0.3)
    sound_axis.set(ylabel="wave", title=Path(path).name)
    decibels = 20 * np.log10(np.maximum(np.array(strongest), 1e-3))
    extent = (0, seconds, encoding.channels - 0.5, -0.5)
    image = membrane.imshow(decibels, aspect="auto", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=membrane, label="velocity, dB")
    membrane.set(ylabel="channel")
    spikes.plot(times, units, ",k")
    spikes.set(ylabel="channel", xlabel="seconds", xlim=(0, seconds))
    spikes.set_ylim(encoding.channels - 0.5, -0.5)
    write_atomically(out, lambda file: figure.savefig(file, format="png", dpi=150))
