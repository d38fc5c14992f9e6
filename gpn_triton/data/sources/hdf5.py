"""Files in the layout of SHD and SSC to and from event stores, with a cache of flat arrays.

    spikes/times    [S] rows of variable length, float16 or float32: seconds
    spikes/units    [S] rows of variable length, integer: input channel, 0..num_channels - 1
    labels          [S] integer: class, from 0; left out where nobody knows them
    extra/speaker   [S] integer or string, optional: who spoke
    extra/keys      [classes] string, optional: the classes' names

and, which SHD's own files do not have, as attributes of the file:

    num_channels    integer, optional: number of input channels, 1 to 65536
    sensor_size     [3] integer, optional: width, height and polarities of a 2-D sensor, whose
                    product num_channels is; see data.events

Source: Cramer, Stradmann, Schemmel, Zenke, 2022, the Heidelberg spiking data sets.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

import h5py
import numpy as np

from gpn_triton.data.events import (
    MAX_CHANNELS,
    MAX_SECONDS,
    UNKNOWN,
    EventStore,
    check_range,
    unsorted_samples,
)
from gpn_triton.data.sources import hdf5_reader
from gpn_triton.machine.files import write_atomically

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# part of every cache's name: raise it when what a cache holds changes
CACHE_FORMAT = 2
# of SHD and SSC, whose files do not say it
SHD_CHANNELS = 700
NO_LABELS = "{}: expected a dataset labels, got a file without it"
# labels without names are believed up to here
MAX_CLASSES = 1 << 16
# time given to the reading program: a fixed part, and the slowest disk worth waiting for
READ_SECONDS, READ_BYTES_PER_SECOND = 30.0, 1e6


@dataclass(frozen=True)
class About:
    """What a file says without its events.

    class_names: as read_events gives them. labels [S]: as stored, or None. num_channels,
    sensor_size: as the file says, or None. largest_unit: None unless it was looked for.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray | None
    num_channels: int | None
    sensor_size: tuple[int, int, int] | None
    largest_unit: int | None


def read_events(
    path: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    num_channels: int | None = None,
    use_cache: bool = True,
    labelled: bool = True,
) -> EventStore:
    """Read a file's samples, from its cache if there is one, else in bulk and then cached.

    Legal: samples without events, events in any order (sorted here), classes without samples (with
    a warning). The cache is written whole or not at all as NAME.FINGERPRINT.cache.npz; it is not
    found again once the file has changed, and a damaged one is made anew with a warning.

    Args:
        path: an HDF5 file in SHD's layout, see this module's head.
        cache_dir: folder of the cache, made if missing. Default: the file's folder.
        num_channels: input channels, up to 65536; a unit beyond them is an error, and so is a file
            that says another number. Default: as the file says, or as likely_channels says.
        use_cache: whether to read and write the cache at all.
        labelled: whether a file without labels is an error.
    Returns:
        The samples. Classes are those of extra/keys, or 0..largest label, named by their numbers.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, damaged, not of this layout or with values out of range; one line that
            names the file, what was expected and what came.
    """
    path = Path(path)
    if num_channels is not None and not 1 <= num_channels <= MAX_CHANNELS:
        raise ValueError(f"num_channels: expected 1..{MAX_CHANNELS}, got {num_channels}")
    check_file(path)
    folder = path.parent if cache_dir is None else Path(cache_dir)
    cache = folder / f"{path.name}.{_source_fingerprint(path, num_channels)}.cache.npz"
    store = _load_cache(cache) if use_cache else None
    if store is None:
        store, times_dtype = _parse(path, num_channels, labelled)
        try:
            if use_cache:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(cache, lambda file: _save_cache(file, store, times_dtype))
        except OSError as error:
            warnings.warn(
                f"{folder}: no cache of {path.name} could be written ({error.strerror}); the file "
                "will be parsed again next time",
                stacklevel=2,
            )
    if not store.labelled:
        if labelled:
            raise ValueError(NO_LABELS.format(path))
        return store
    counts = np.bincount(store.labels, minlength=len(store.class_names))
    empty = [name for name, count in zip(store.class_names, counts, strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        warnings.warn(f"{path}: {len(empty)} classes have no sample: {shown}", stacklevel=2)
    return store


def check_file(path: str | os.PathLike) -> None:
    """Raise FileNotFoundError or ValueError unless an HDF5 file is there; reads its first bytes."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"{path}: expected an HDF5 file in SHD's layout, found {found}")
    with path.open("rb") as file:
        head = file.read(len(_SIGNATURE))
    if head != _SIGNATURE:
        raise ValueError(f"{path}: expected an HDF5 file, got one that begins with {head!r}")


def read_about(path: str | os.PathLike, largest_unit: bool = False) -> About:
    """What a file says without its events.

    Args:
        path: the file. largest_unit: whether to look for that, where it does not say num_channels.
    Raises:
        As read_events, for what can be seen without the events.
    """
    path = Path(path)
    check_file(path)
    arrays, about = _run_reader(path, "--largest-unit" if largest_unit else "--no-events")
    labels = arrays.get("labels")
    return About(
        _class_names(path, about["names"], labels),
        labels,
        about["num_channels"],
        _size(about),
        about.get("largest_unit"),
    )


def read_stored(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A file's arrays as they are stored, with whatever is wrong with their values, and what the
    file says of itself: as hdf5_reader.read_layout. Raises as read_events, but for values."""
    path = Path(path)
    check_file(path)
    return _run_reader(path)


def likely_channels(largest_unit: int) -> int:
    """How many input channels a file has that does not say it.

    They reach to its largest unit; and where that lies in the upper half of SHD's 700 they are as
    many, since a file of speech need not have heard the highest.
    """
    if SHD_CHANNELS // 2 <= largest_unit < SHD_CHANNELS:
        return SHD_CHANNELS
    return largest_unit + 1


def common_channels(found: dict[str | os.PathLike, int]) -> int:
    """How many input channels a data set has: what one of its files says, else the most.

    Args:
        found: of each file the number that it says, or that is likely of its largest unit.
    Raises:
        ValueError: files that say different numbers.
    """
    most = max(found.values())
    if min(found.values()) == most:
        return most
    said = {path: read_about(path).num_channels for path in found}
    said = {path: channels for path, channels in said.items() if channels is not None}
    if len(set(said.values())) > 1:
        each = ", ".join(f"{Path(path).name} {channels}" for path, channels in said.items())
        raise ValueError(f"num_channels: expected the same in all files, they say {each}")
    return next(iter(said.values()), most)


def write_events(
    path: str | os.PathLike, store: EventStore, times_dtype: type[np.floating] = np.float32
) -> None:
    """Write a store as an HDF5 file in SHD's layout, see this module's head; whole or not at all.

    The file says its number of channels and, of a 2-D sensor, its size; samples whose classes
    nobody knows have no labels in it.

    Args:
        path: the file; replaced if it exists. store: what to write.
        times_dtype: how times are stored: float32, exact, or float16 as SHD, to 0.5 ms at 0.5 s.
    """
    store.validate("store")
    path = Path(path)

    def write(file: IO[bytes]) -> None:
        with h5py.File(file, "w") as h5:
            for name, flat in (("times", store.times.astype(times_dtype)), ("units", store.units)):
                rows = np.empty(len(store), object)
                rows[:] = np.split(flat, store.offsets[1:-1])
                h5.create_dataset(f"spikes/{name}", data=rows, dtype=h5py.vlen_dtype(flat.dtype))
            h5.attrs["num_channels"] = store.num_channels
            if store.sensor_size is not None:
                h5.attrs["sensor_size"] = store.sensor_size
            if store.labelled:
                h5["labels"] = store.labels
            if store.speakers is not None:
                h5["extra/speaker"] = store.speakers
            if store.class_names:
                h5["extra/keys"] = np.array([name.encode() for name in store.class_names])

    write_atomically(path, write)


def _parse(path: Path, num_channels: int | None, labelled: bool) -> tuple[EventStore, np.dtype]:
    """The file's samples, checked, and the type its times are stored in."""
    arrays, about = _run_reader(path)
    times, units, labels = arrays["times"], arrays["units"], arrays.get("labels")
    if labelled and labels is None:
        raise ValueError(NO_LABELS.format(path))
    names = _class_names(path, about["names"], labels)
    said = about["num_channels"]
    if None not in (said, num_channels) and said != num_channels:
        raise ValueError(f"{path}: the file says {said} channels, expected {num_channels}")
    channels = num_channels or said
    if channels is None:
        largest = min(int(units.max(initial=0)), MAX_CHANNELS - 1)
        channels = likely_channels(max(largest, 0))
    samples = len(arrays["lengths"])
    offsets = np.zeros(samples + 1, np.int64)
    np.cumsum(arrays["lengths"], out=offsets[1:])
    check_range(f"{path}: spikes/times", times, MAX_SECONDS, "seconds", offsets)
    check_range(f"{path}: spikes/units", units, channels - 1, offsets=offsets)
    store = EventStore(
        times=times.astype(np.float32),
        units=units.astype(np.uint16, copy=False),
        offsets=offsets,
        labels=np.full(samples, UNKNOWN, np.int64) if labels is None else labels.astype(np.int64),
        speakers=arrays.get("speakers"),
        num_channels=channels,
        class_names=names,
        sensor_size=_size(about),
    )
    for k in unsorted_samples(store.times, offsets):
        own = slice(offsets[k], offsets[k + 1])
        order = np.argsort(store.times[own], kind="stable")
        store.times[own], store.units[own] = store.times[own][order], store.units[own][order]
    return store.validate(str(path)), times.dtype


def _size(about: dict[str, Any]) -> tuple[int, int, int] | None:
    """The sensor's size that a file says."""
    return about["sensor_size"] and tuple(about["sensor_size"])


def _class_names(path: Path, names: list[str] | None, labels: np.ndarray | None) -> tuple[str, ...]:
    """A file's class names, or its labels' numbers; ValueError for labels beyond them, or none."""
    if labels is None:
        return tuple(names or ())
    check_range(f"{path}: labels", labels, len(names or range(MAX_CLASSES)) - 1)
    if not len(labels):
        raise ValueError(f"{path}: expected at least one sample, got none")
    return tuple(names or map(str, range(int(labels.max()) + 1)))


def _run_reader(path: Path, *flags: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What hdf5_reader.py sends of a file."""
    limit = READ_SECONDS + path.stat().st_size / READ_BYTES_PER_SECOND
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, hdf5_reader.__file__, str(path), *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            # each of the numerical library's threads would take address space from the limit
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        ) as reader,
    ):
        ended = threading.Event()
        watchdog = threading.Timer(limit, lambda: (ended.set(), reader.kill()))
        watchdog.start()
        try:
            # a pipe was asked for, so that there is one
            sent = _receive(cast(BufferedReader, reader.stdout))
            reader.wait()
        finally:
            watchdog.cancel()
            reader.kill()
        if sent is not None:
            return sent
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
    if ended.is_set():
        raise ValueError(
            f"{path}: expected to be read within {limit:.0f} s, the HDF5 library had not finished: "
            "the file is damaged or the disk very slow"
        )
    if reader.returncode == hdf5_reader.BAD_FILE and lines:
        raise ValueError(f"{path}: {lines[-1]}")
    last = f": {lines[-1]}" if lines else ""
    raise ValueError(
        f"{path}: expected a readable HDF5 file, the HDF5 library failed on it "
        f"(exit {reader.returncode}{last})"
    )


def _receive(stream: BufferedReader) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and sayings hdf5_reader.main writes; None if the stream ends before they do."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    arrays = {}
    for name, dtype, length in header["arrays"]:
        array = np.empty(length, dtype)
        if stream.readinto(array.view(np.uint8).data) < array.nbytes:
            return None
        arrays[name] = array
    return arrays, header["about"]


def _source_fingerprint(path: Path, num_channels: int | None) -> str:
    """Changes with the file's size, its time of change, its first, middle and last 64 KiB."""
    status, block = path.stat(), 1 << 16
    parts = (CACHE_FORMAT, num_channels, status.st_size, status.st_mtime_ns)
    digest = hashlib.sha256(repr(parts).encode())
    with path.open("rb") as file:
        for start in (0, status.st_size // 2, max(status.st_size - block, 0)):
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()[:16]


def _save_cache(file: IO[bytes], store: EventStore, times_dtype: np.dtype) -> None:
    """Write the store's arrays; times that were float16 in the source are so here, losslessly."""
    half = times_dtype == np.float16
    arrays = {
        "times": store.times.astype(np.float16) if half else store.times,
        "units": store.units,
        "offsets": store.offsets,
        "labels": store.labels,
        "about": np.array(json.dumps([store.num_channels, store.sensor_size, store.class_names])),
    }
    if store.speakers is not None:
        arrays["speakers"] = store.speakers
    np.savez(file, **arrays)


def _load_cache(cache: Path) -> EventStore | None:
    """The store a cache holds; None where there is none or, with a warning, it is damaged."""
    if not cache.exists():
        return None
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            num_channels, size, names = json.loads(str(arrays["about"]))
            return EventStore(
                arrays["times"].astype(np.float32, copy=False),
                arrays["units"],
                arrays["offsets"],
                arrays["labels"],
                arrays["speakers"] if "speakers" in arrays else None,
                num_channels,
                tuple(names),
                size and tuple(size),
            ).validate(str(cache))
    # what numpy and zipfile raise for a file that is cut, altered or no cache at all
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{cache}: damaged cache, made anew ({error})", stacklevel=3)
        return None
