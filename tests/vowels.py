"""Made recordings of two vowels, in folders by class, to try the way from sound to answer.

python tests/vowels.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np

RATE = 16_000
# the first two formants and their widths, Hz
FORMANTS = {"a": ((730, 90), (1090, 110)), "i": ((270, 60), (2290, 200))}


def vowel(label: str, speaker: int, index: int, seconds: float = 0.4) -> np.ndarray:
    """A voice's pulses through two resonances, [n] float32; a speaker has a pitch and a tract."""
    draws = np.random.default_rng([speaker, index])
    pitch, tract = 90 + 25 * speaker, 0.92 + 0.04 * speaker
    n = int(seconds * draws.uniform(0.8, 1.2) * RATE)
    phase = np.cumsum(pitch * (1 + 0.02 * draws.standard_normal()) / RATE * np.ones(n))
    sound = np.diff(np.floor(phase), prepend=0) + 0.01 * draws.standard_normal(n)
    spectrum, f = np.fft.rfft(sound), np.fft.rfftfreq(n, 1 / RATE)
    for centre, width in FORMANTS[label]:
        spectrum *= (centre * tract) ** 2 / ((centre * tract) ** 2 - f**2 + 1j * f * width)
    sound = np.fft.irfft(spectrum, n)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def write_vowels(folder: Path, speakers: int = 5, each: int = 8, seconds: float = 0.4) -> None:
    """Write FOLDER/train and FOLDER/new: recordings by class, those in new of a further speaker."""
    import soundfile

    for speaker in range(speakers + 1):
        for label in FORMANTS:
            own = folder / ("new" if speaker == speakers else "train") / label
            own.mkdir(parents=True, exist_ok=True)
            for index in range(each):
                path = own / f"s{speaker}_nohash_{index}.wav"
                soundfile.write(path, vowel(label, speaker, index, seconds), RATE)


if __name__ == "__main__":
    write_vowels(Path(sys.argv[1]))
