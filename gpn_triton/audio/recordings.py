"""Recordings: which there are, what each says and who says it, and their sound.

A source is one of

    a folder of folders   yes/ab12_nohash_0.wav: the class is the folder's name, the speaker what
                          stands before _nohash_ in the file's, if it does; validation_list.txt and
                          testing_list.txt beside the folders name those parts, as Speech Commands
                          has them; folders that begin with _ are left out
    a folder of files     3_jackson_11.wav: {label}_{speaker}_{index}
    a CSV file            columns path, label and, where known, speaker and split (train, valid or
                          test); a path counts from the CSV's folder
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpn_triton.audio.ear import WAVE_RATE

SUFFIXES = (".wav", ".flac", ".ogg")
PARTS = ("train", "valid", "test")
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
NO_HASH = "_nohash_"
# what is shorter holds no word, seconds
SHORTEST = 0.01
# below this largest value, of 1, a recording counts as silent; so many samples at full scale, one
# after the other, are clipped
SILENCE, CLIPPED_RUN = 1e-3, 3


@dataclass(frozen=True)
class Recording:
    """A file and what is known of it: its class, who speaks, which part it belongs to."""

    path: Path
    label: str = ""
    speaker: str | None = None
    part: str = "train"


@dataclass(frozen=True)
class Sound:
    """What a file holds: samples [n] float32 of one channel, rate samples a second.

    notes: what one should know of it, in words: silence, clipping.
    """

    samples: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()

    def wave(self) -> np.ndarray:
        """The samples at the ear's rate, float64."""
        import soxr

        return soxr.resample(self.samples.astype(np.float64), self.rate, WAVE_RATE, quality="HQ")


def check_installed() -> None:
    """Raise RuntimeError, with the extra's name, unless sound can be read and resampled."""
    missing = [name for name in ("soundfile", "soxr") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"reading sound needs {' and '.join(missing)} (pip install 'gpn-triton[audio]')"
        )


def find(source: str | os.PathLike) -> list[Recording]:
    """The recordings of a source, in the order of their paths (of a CSV's lines), see above.

    Raises:
        FileNotFoundError: nothing there. ValueError: a source of another form, or no recording.
    """
    source = Path(source)
    if source.is_file():
        found = _of_csv(source)
    elif source.is_dir():
        folders = [p for p in sorted(source.iterdir()) if p.is_dir() and not p.name.startswith("_")]
        by_class = {folder: sound_files(folder) for folder in folders}
        flat = sound_files(source)
        if flat and any(by_class.values()):
            raise ValueError(
                f"{source}: expected sound files or folders of sound files, got both, as "
                f"{flat[0].name}"
            )
        found = [_of_flat(path) for path in flat] if flat else _of_folders(source, by_class)
    else:
        raise FileNotFoundError(f"{source}: expected a folder or a CSV file, found nothing there")
    if not found:
        raise ValueError(f"{source}: expected files ending in {', '.join(SUFFIXES)}, found none")
    return found


def sound_files(folder: Path) -> list[Path]:
    """A folder's own sound files, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def class_names(recordings: Iterable[Recording]) -> tuple[str, ...]:
    """The classes, in the order of their numbers if all are numbers, else of the alphabet."""
    names = sorted({r.label for r in recordings})
    return tuple(sorted(names, key=int) if all(n.isdecimal() for n in names) else names)


def _of_folders(source: Path, by_class: dict[Path, list[Path]]) -> list[Recording]:
    parts = {}
    for part, name in LISTS.items():
        if (source / name).is_file():
            lines = (source / name).read_text(encoding="utf-8").splitlines()
            parts |= dict.fromkeys((line.strip() for line in lines if line.strip()), part)
    found = []
    for folder, paths in by_class.items():
        for path in paths:
            speaker, mark, _ = path.stem.partition(NO_HASH)
            part = parts.pop(f"{folder.name}/{path.name}", "train")
            found.append(Recording(path, folder.name, speaker if mark else None, part))
    if parts:
        name = LISTS[next(iter(parts.values()))]
        raise ValueError(f"{source / name}: names {next(iter(parts))}, which is not there")
    return found


def _of_flat(path: Path) -> Recording:
    words = path.stem.split("_")
    if len(words) < 3 or not all(words):
        raise ValueError(
            f"{path}: expected a name as LABEL_SPEAKER_INDEX{path.suffix}, or a folder a class"
        )
    return Recording(path, "_".join(words[:-2]), words[-2])


def _of_csv(source: Path) -> list[Recording]:
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            columns = tuple(table.fieldnames or ())
            rows = list(table)
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{source}: expected a folder or a CSV file in UTF-8") from None
    allowed = ("path", "label", "speaker", "split")
    if not {"path", "label"} <= set(columns) <= set(allowed):
        raise ValueError(
            f"{source}: expected the columns path, label and, if known, speaker and split, "
            f"got {', '.join(map(repr, columns)) or 'none'}"
        )
    found = []
    for number, row in enumerate(rows, 2):
        part = row.get("split") or "train"
        if None in row or None in row.values() or not row["path"] or not row["label"]:
            raise ValueError(f"{source}: line {number}: expected {', '.join(columns)}")
        if part not in PARTS:
            raise ValueError(
                f"{source}: line {number}: split: expected {', '.join(PARTS)}, got {part!r}"
            )
        path = source.parent / row["path"]
        found.append(Recording(path, row["label"], row.get("speaker") or None, part))
    return found


def read(path: str | os.PathLike, max_seconds: float) -> Sound:
    """Decode a sound file, its channels mixed to one.

    Raises:
        ValueError: not a sound file, damaged, empty, shorter than SHORTEST or longer than
            max_seconds; in one line that begins with the path. FileNotFoundError: nothing there.
    """
    import soundfile

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            seconds, rate = file.frames / file.samplerate, file.samplerate
            if seconds > max_seconds:
                raise ValueError(
                    f"{path}: expected up to {max_seconds:g} s (--max-seconds), got {seconds:.1f} s"
                )
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        reason = str(error).rpartition(": ")[2].rstrip(".")
        raise ValueError(f"{path}: expected a sound file ({reason})") from None
    samples = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
    if len(samples) < SHORTEST * rate:
        raise ValueError(f"{path}: expected at least {SHORTEST} s, got {len(samples)} samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: expected finite samples, got NaN or infinity")
    notes, peak = [], np.abs(samples).max()
    if peak < SILENCE:
        notes.append(f"silent, its largest value is {peak:.1g} of 1")
    full = np.concatenate([[0], np.abs(samples) >= 1 - 2.0**-15, [0]])
    edges = np.flatnonzero(np.diff(full))
    clipped = int((edges[1::2] - edges[::2] >= CLIPPED_RUN).sum())
    if clipped:
        notes.append(f"clipped in {clipped} places")
    return Sound(samples, rate, tuple(notes))


@dataclass(frozen=True)
class Variation:
    """How copies of a recording are changed before the ear; 0 is off.

    Args:
        speed: played faster or slower by up to this share, which moves its pitch likewise.
        snr: white noise is added, so many to 20 dB more below the recording.
        gain: made up to so many dB too loud, and clipped at what was its largest value. (The ear
            levels every recording, so that gain without clipping would change nothing.)
    Raises:
        ValueError: a value out of range.
    """

    speed: float = 0.1
    snr: float = 10.0
    gain: float = 0.0

    def __post_init__(self):
        for name, top in (("speed", 1), ("snr", 200), ("gain", 60)):
            if not 0 <= getattr(self, name) < top:
                raise ValueError(
                    f"{name}: expected 0 <= value < {top}, got {getattr(self, name)!r}"
                )

    def __call__(self, sound: Sound, key: int, copy: int) -> Sound:
        """A changed copy, number `copy`, of a recording whose draws have the key recording_key."""
        import soxr

        draws = np.random.default_rng([key, copy])
        speed, snr, gain = draws.uniform(-1, 1), draws.uniform(0, 20), draws.uniform(0, 1)
        samples = sound.samples.astype(np.float64)
        if self.speed:
            samples = soxr.resample(samples, 1 + self.speed * speed, 1.0, quality="HQ")
        if self.snr:
            scale = np.sqrt(np.mean(samples**2)) * 10 ** (-(self.snr + snr) / 20)
            samples = samples + scale * draws.standard_normal(len(samples))
        if self.gain:
            peak = np.abs(samples).max()
            samples = np.clip(samples * 10 ** (self.gain * gain / 20), -peak, peak)
        return Sound(samples.astype(np.float32), sound.rate)
