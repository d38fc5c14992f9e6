"""Recordings to a file of events in SHD's layout: in parts, so that it streams and resumes.

speech.h5.parts/plan.json       what is encoded and how; other parts are never taken up
speech.h5.parts/000007.npz      PART recordings' spikes, whole or not there
speech.h5                       made of all parts at the end, whole or not there
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import torch
from tqdm import tqdm

from gpn_triton.audio import recordings
from gpn_triton.audio.ear import InnerEar, recording_key
from gpn_triton.audio.recordings import PARTS, Recording, Variation
from gpn_triton.data.events import UNKNOWN, EventStore
from gpn_triton.data.sources.hdf5 import check_file
from gpn_triton.machine.files import write_atomically
from gpn_triton.machine.provenance import VERSION

ATTRIBUTE = "encoding"
# seconds; an event store takes 600 s, and a little silence is put behind a recording
LONGEST = 590
# recordings of one file of parts, and seconds that go through the ear side by side
PART, SIDE_BY_SIDE = 64, 60.0


@dataclass(frozen=True)
class Encoding:
    """How recordings are encoded; stands as JSON in the attribute `encoding` of the file.

    Args:
        channels: places on the membrane; SHD has 700. seed: of fibres and copies.
        max_seconds: longer recordings are left out.
        copies: changed copies of each training recording beside it. variation: how they change.
    Raises:
        ValueError: a value out of range.
    """

    channels: int = 700
    seed: int = 0
    max_seconds: float = 10.0
    copies: int = 0
    variation: Variation = Variation()

    def __post_init__(self):
        for name, low, high in (
            ("channels", 1, 1 << 16), ("seed", 0, (1 << 32) - 1), ("copies", 0, 1000),
            ("max_seconds", recordings.SHORTEST, LONGEST),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low}..{high}, got {getattr(self, name)!r}")

    def to_json(self) -> str:
        """The fields, and what encoded them."""
        return json.dumps({**asdict(self), "ear": "cramer2020", "version": VERSION})


def encoding_of(path: str | os.PathLike) -> Encoding | None:
    """How a file of events was encoded; None where it does not say so, as SHD's own."""
    check_file(path)
    with h5py.File(path, "r") as file:
        text = file.attrs.get(ATTRIBUTE)
    if text is None:
        return None
    values = json.loads(text)
    del values["ear"], values["version"]
    return Encoding(**{**values, "variation": Variation(**values["variation"])})


def encode(
    found: Sequence[Recording], out: str | os.PathLike, encoding: Encoding,
    device: torch.device | str = "cpu",
) -> dict[str, Path]:  # fmt: skip
    """Encode recordings into one file, or into one a part of train, valid and test.

    Recordings that cannot be read are named and left out. Memory does not grow with their number.
    After a kill the same call goes on where it was.

    Args:
        found: what recordings.find found. out: NAME.h5; of several parts NAME_train.h5 and so on.
        encoding: how. device: where the ear computes.
    Returns:
        the files by part.
    Raises:
        ValueError: copies without a validation part, or no recording that can be encoded.
        RuntimeError: the extra audio is missing. OSError: a file cannot be written.
    """
    recordings.check_installed()
    out = Path(out)
    by_part = {part: [r for r in found if r.part == part] for part in PARTS}
    by_part = {part: own for part, own in by_part.items() if own}
    if encoding.copies and "valid" not in by_part:
        raise ValueError(
            "copies: expected a source with a validation part (validation_list.txt, or a CSV's "
            "split): of what is held out later, training would have copies"
        )
    ear, classes = InnerEar(encoding.channels, device), recordings.class_names(found)
    several, files = len(by_part) > 1, {}
    for part, own in by_part.items():
        files[part] = out.with_name(f"{out.stem}_{part}{out.suffix}") if several else out
        copies = encoding.copies if part == "train" else 0
        _encode_part(own, classes, files[part], encoding, copies, ear)
    return files


def prepare(
    folder: str | os.PathLike, cache: str | os.PathLike | None, device: torch.device | str = "cpu"
) -> dict[str, Path]:
    """The files of a folder's recordings, encoded now unless they were before and nothing changed.

    Args:
        folder: a source of recordings.find. cache: where the files lie; default: beside the folder.
        device: where the ear computes.
    Raises: as recordings.find and encode.
    """
    folder, encoding = Path(folder).resolve(), Encoding()
    found = recordings.find(folder)
    cache = Path(cache) if cache else folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    out = cache / f"{folder.name}.{_fingerprint(found, encoding.to_json())}.h5"
    parts = [part for part in PARTS if any(r.part == part for r in found)]
    names = [out.with_name(f"{out.stem}_{part}.h5") if len(parts) > 1 else out for part in parts]
    if all(path.is_file() for path in names):
        return dict(zip(parts, names, strict=True))
    return encode(found, out, encoding, device)


def encode_for_prediction(
    paths: Sequence[Path], encoding: Encoding, device: torch.device | str, num_channels: int
) -> tuple[list[Path], EventStore]:
    """Recordings as samples without labels; those that cannot be read are named and left out.

    Args:
        paths: the recordings. encoding: how. device: where the ear computes. num_channels: of the
            network that will hear them, no fewer than the ear's places.
    Returns:
        the paths that were encoded, and their samples.
    Raises:
        ValueError: a network of fewer channels, or no recording that can be encoded.
    """
    if encoding.channels > num_channels:
        raise ValueError(
            f"channels: expected a run of {encoding.channels} or more, as the ear has places, got "
            f"{num_channels}"
        )
    recordings.check_installed()
    ear, kept, rows = InnerEar(encoding.channels, device), [], []
    # one by one: nobody waits for a group
    for path in paths:
        for sound, _ in _sounds(Recording(path), encoding, 0, _say):
            key = recording_key(sound.samples, sound.rate, encoding.seed)
            rows += ear.encode([sound.wave()], [key])
            kept.append(path)
    if not kept:
        raise ValueError("no recording could be encoded")
    arrays = _flat(rows)
    arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("lengths"))])
    labels = np.full(len(kept), UNKNOWN)
    # older networks have 700 channels also where the ear had fewer places
    store = EventStore(
        **arrays, labels=labels, speakers=None, num_channels=num_channels, class_names=()
    )
    return kept, store.validate("recordings")


def _encode_part(
    own: list[Recording], classes: tuple[str, ...], out: Path, encoding: Encoding, copies: int,
    ear: InnerEar,
) -> None:  # fmt: skip
    """Encode the recordings of one file."""
    folder = out.with_name(f"{out.name}.parts")
    plan = json.dumps([_fingerprint(own, encoding.to_json()), len(own), copies, list(classes)])
    folder.mkdir(exist_ok=True)
    plan_file = folder / "plan.json"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise ValueError(
            f"{folder}: holds parts of other recordings or options: remove it, or change --out"
        )
    write_atomically(plan_file, lambda file: file.write(plan.encode()))
    starts = range(0, len(own), PART)
    files = [folder / f"{start // PART:06d}.npz" for start in starts]
    done = sum(min(PART, len(own) - s) for s, f in zip(starts, files, strict=True) if f.exists())
    if done:
        _say(f"{out.name}: goes on after {done} recordings")
    with tqdm(total=len(own), initial=done, desc=out.name, unit="rec", disable=None) as bar:
        for start, file in zip(starts, files, strict=True):
            if not file.exists():
                some = own[start : start + PART]
                arrays = _encode_some(some, classes, encoding, copies, ear, bar)
                write_atomically(file, lambda opened, arrays=arrays: np.savez(opened, **arrays))
    spoken, counts = any(r.speaker is not None for r in own), []
    write_atomically(
        out, lambda file: counts.extend(_assemble(file, files, classes, spoken, encoding))
    )
    shutil.rmtree(folder)
    samples, skipped, noted = counts
    left = f", {skipped} left out" if skipped else ""
    odd = f", {noted} silent or clipped" if noted else ""
    print(f"{out}: {samples} samples of {len(own)} recordings, {len(classes)} classes{left}{odd}")


def _encode_some(
    some: list[Recording], classes: tuple[str, ...], encoding: Encoding, copies: int, ear: InnerEar,
    bar: tqdm,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What one file of parts holds."""
    rows, labels, speakers, skipped, noted = [], [], [], 0, 0
    waves, keys, seconds = [], [], 0.0

    def flush() -> None:
        nonlocal seconds
        if waves:
            rows.extend(ear.encode(waves, keys))
        waves.clear(), keys.clear()
        seconds = 0.0

    for recording in some:
        sounds = _sounds(recording, encoding, copies, bar.write)
        skipped += not sounds
        for sound, original in sounds:
            noted += original and bool(sound.notes)
            waves.append(sound.wave())
            keys.append(recording_key(sound.samples, sound.rate, encoding.seed))
            labels.append(classes.index(recording.label))
            speakers.append(recording.speaker or "")
            seconds += len(sound.samples) / sound.rate
            if seconds > SIDE_BY_SIDE:
                flush()
        bar.update()
    flush()
    return {
        **_flat(rows), "labels": np.array(labels, np.int64), "speakers": np.array(speakers, "U"),
        "counts": np.array([skipped, noted]),
    }  # fmt: skip


def _sounds(recording: Recording, encoding: Encoding, copies: int, say) -> list[tuple]:
    """A recording's sound and its copies', each with whether it is the original; none of one that
    cannot be read, which is said."""
    try:
        sound = recordings.read(recording.path, encoding.max_seconds)
    except (ValueError, OSError) as error:
        say(f"left out: {error}", file=sys.stderr)
        return []
    for note in sound.notes:
        say(f"{recording.path}: {note}", file=sys.stderr)
    key = recording_key(sound.samples, sound.rate, encoding.seed)
    made = [(encoding.variation(sound, key, copy), False) for copy in range(1, copies + 1)]
    return [(sound, True), *made]


def _flat(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Times, units and lengths of samples, one behind the other."""
    return {
        "times": np.concatenate([np.empty(0, np.float32), *(times for times, _ in rows)]),
        "units": np.concatenate([np.empty(0, np.uint16), *(units for _, units in rows)]),
        "lengths": np.array([len(times) for times, _ in rows], np.int64),
    }


def _assemble(
    opened: IO[bytes], files: list[Path], classes: tuple[str, ...], spoken: bool, encoding: Encoding
) -> tuple[int, int, int]:  # fmt: skip
    """Write the file from its parts, one after the other; returns samples, left out and noted."""
    samples, skipped, noted = 0, 0, 0
    with h5py.File(opened, "w") as h5:
        h5.attrs[ATTRIBUTE] = encoding.to_json()
        h5.attrs["num_channels"] = encoding.channels
        h5["extra/keys"] = np.array([name.encode() for name in classes])
        data = {
            name: h5.create_dataset(name, (0,), maxshape=(None,), dtype=dtype)
            for name, dtype in (
                ("spikes/times", h5py.vlen_dtype(np.float32)),
                ("spikes/units", h5py.vlen_dtype(np.uint16)), ("labels", np.int64),
                *([("extra/speaker", h5py.string_dtype())] if spoken else []),
            )
        }  # fmt: skip
        for file in files:
            with np.load(file) as part:
                ends = np.cumsum(part["lengths"])
                for dataset in data.values():
                    dataset.resize((samples + len(ends),))
                for name in ("times", "units"):
                    # row by row: of one row h5py would make as many as it has elements
                    for k, row in enumerate(np.split(part[name], ends)[:-1], samples):
                        data[f"spikes/{name}"][k] = row
                data["labels"][samples:] = part["labels"]
                if spoken:
                    data["extra/speaker"][samples:] = part["speakers"].astype(object)
                samples += len(ends)
                skipped, noted = skipped + part["counts"][0], noted + part["counts"][1]
        if not samples:
            raise ValueError("no recording could be encoded")
    return samples, int(skipped), int(noted)


def _fingerprint(found: Sequence[Recording], encoding: str) -> str:
    """Changes with the encoding and with any recording's path, size, time, label or part."""
    digest = hashlib.sha256(encoding.encode())
    for r in found:
        try:
            status = r.path.stat()
            about = (status.st_size, status.st_mtime_ns)
        except OSError:
            about = None
        digest.update(repr((str(r.path), r.label, r.speaker, r.part, about)).encode())
    return digest.hexdigest()[:16]


def _say(message: str, file: IO[str] | None = None) -> None:
    print(message, file=file or sys.stderr)
