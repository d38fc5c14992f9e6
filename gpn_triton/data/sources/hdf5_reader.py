"""Read an HDF5 file in SHD's layout and send its flat arrays to standard output.

python gpn_triton/data/sources/hdf5_reader.py FILE.h5
python gpn_triton/data/sources/hdf5_reader.py FILE.h5 --no-events
python gpn_triton/data/sources/hdf5_reader.py FILE.h5 --largest-unit

A program of its own, because on a damaged file the HDF5 library itself may crash, loop for ever or
ask for any amount of memory: gpn_triton.data.sources.hdf5 runs it, ends it in time and reads its
output, one line of JSON (names, types and lengths of the arrays; what the file says of itself)
and then the arrays' bytes. It imports nothing of the package, so that it starts in a third of a
second.
"""

import json
import os
import resource
import sys
from typing import Any

import h5py
import numpy as np

# samples read in one call: bounds the memory of the library's own array objects
SLAB = 4096
# memory the program may take: a fixed part, and a multiple of the file for arrays and their copies
MEMORY_BASE, MEMORY_FACTOR = 4 << 30, 6
BAD_FILE = 2
MAX_CHANNELS = 1 << 16


class LayoutError(ValueError):
    """What is wrong with a file, in one line."""


def read_layout(
    path: str, events: bool = True, largest_unit: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the arrays of a file as they are stored, samples concatenated.

    Args:
        path: a file with spikes/times (float, a variable length per sample), spikes/units (integer,
            likewise) and, where known, labels [S] integer, extra/speaker [S] and extra/keys.
        events: whether to read times and units; without, they are checked by type and shape only.
        largest_unit: whether to look for it where the file does not say num_channels.
    Returns:
        times [E], units [E], lengths [S] int64, and, if present, labels [S] and speakers [S] int32;
        what the file says: names, its classes'; num_channels; sensor_size (width, height,
        polarities); each None where it does not; and largest_unit, if it was looked for.
    Raises:
        LayoutError: not HDF5, truncated, or not of this layout; naming what was expected and found.
    """
    try:
        with h5py.File(path, "r") as file:
            return _read(file, events, largest_unit)
    except LayoutError:
        raise
    # h5py raises these, and no others were seen in thousands of damaged files
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:
        reason = (str(error).strip("'\"") or type(error).__name__).splitlines()[0]
        raise LayoutError(f"expected a readable HDF5 file, got: {reason}") from None


def _read(
    file: h5py.File, events: bool, largest_unit: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    labels = _dataset(file, "labels" if "labels" in file else "spikes/times")
    if "labels" in file:
        _expect_kind("labels", labels.dtype, "iu", "whole numbers")
    if labels.ndim != 1:
        name = labels.name.lstrip("/")
        raise LayoutError(f"{name}: expected one value a sample, got shape {labels.shape}")
    samples = len(labels)
    times, lengths = _read_ragged(
        file, "spikes/times", "f", "floating-point seconds", samples, events
    )
    units, unit_lengths = _read_ragged(file, "spikes/units", "iu", "whole numbers", samples, events)
    different = np.flatnonzero(lengths != unit_lengths)
    if len(different):
        k = different[0]
        raise LayoutError(
            f"spikes/units: expected as many as spikes/times, sample {k} has "
            f"{unit_lengths[k]} units and {lengths[k]} times"
        )
    arrays = {"times": times, "units": units, "lengths": lengths}
    if "labels" in file:
        arrays["labels"] = labels[()]
    if "extra/speaker" in file:
        speaker = _dataset(file, "extra/speaker")
        _expect_samples("extra/speaker", speaker, samples)
        arrays["speakers"] = _speaker_numbers(speaker[()])
    names = None
    if "extra/keys" in file:
        keys = _dataset(file, "extra/keys")
        if keys.ndim != 1:
            raise LayoutError(f"extra/keys: expected one name a class, got shape {keys.shape}")
        names = [k.decode(errors="replace") if isinstance(k, bytes) else str(k) for k in keys[()]]
    native = {name: a.astype(a.dtype.newbyteorder("="), copy=False) for name, a in arrays.items()}
    about = {"names": names, **_channels(file)}
    if largest_unit and about["num_channels"] is None:
        rows = _dataset(file, "spikes/units")
        slabs = (rows[a : a + SLAB] for a in range(0, samples, SLAB))
        tops = (int(row.max()) for slab in slabs for row in slab if len(row))
        about["largest_unit"] = max(tops, default=0)
    return native, about


def _channels(file: h5py.File) -> dict[str, Any]:
    """What the file's attributes say of its channels; None where they do not."""
    found = {}
    for name, shape, expected in (
        ("num_channels", (), f"a whole number from 1 to {MAX_CHANNELS}"),
        ("sensor_size", (3,), "a width, a height and a number of polarities"),
    ):
        value = np.asarray(file.attrs[name]) if name in file.attrs else None
        if value is not None and not (
            value.dtype.kind in "iu" and value.shape == shape and (value >= 1).all()
            and (value <= MAX_CHANNELS).all()
        ):  # fmt: skip
            raise LayoutError(f"attribute {name}: expected {expected}, got {file.attrs[name]}")
        found[name] = None if value is None else value.tolist()
    size = found["sensor_size"]
    if size is not None and found["num_channels"] != size[0] * size[1] * size[2]:
        raise LayoutError(
            f"attribute sensor_size: expected the product {found['num_channels']}, as num_channels "
            f"says, got {size}"
        )
    return found


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of that name."""
    if name not in file:
        raise LayoutError(f"expected a dataset {name}, got a file without it")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise LayoutError(f"{name}: expected a dataset, got a {type(found).__name__.lower()}")
    return found


def _expect_kind(name: str, dtype: np.dtype, kinds: str, what: str) -> None:
    if dtype.kind not in kinds or dtype.itemsize > 8:
        raise LayoutError(f"{name}: expected {what}, got {dtype}")


def _expect_samples(name: str, data: h5py.Dataset, samples: int) -> None:
    if data.shape != (samples,):
        raise LayoutError(
            f"{name}: expected {samples} samples as in labels, got shape {data.shape}"
        )


def _read_ragged(
    file: h5py.File, name: str, kinds: str, what: str, samples: int, events: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A dataset of one variable-length row a sample, as one array and the rows' lengths; without
    its events as one of none."""
    data = _dataset(file, name)
    dtype = h5py.check_vlen_dtype(data.dtype)
    if not isinstance(dtype, np.dtype):
        raise LayoutError(f"{name}: expected a variable length per sample, got {data.dtype} rows")
    _expect_kind(name, dtype, kinds, what)
    if not dtype.isnative:
        # h5py 3.16 returns such rows with their bytes in the wrong order
        raise LayoutError(f"{name}: expected this machine's byte order, got {dtype.str}")
    _expect_samples(name, data, samples)
    lengths = np.zeros(samples, np.int64)
    parts = [np.empty(0, dtype)]
    for a in range(0, samples if events else 0, SLAB):
        rows = data[a : a + SLAB]
        lengths[a : a + SLAB] = [len(row) for row in rows]
        # rows never written come as float64
        parts.append(np.concatenate(rows, dtype=dtype, casting="unsafe"))
    return np.concatenate(parts), lengths


def _speaker_numbers(speakers: np.ndarray) -> np.ndarray:
    """The speakers' numbers as stored, or numbers given to names in alphabetical order."""
    if speakers.dtype.kind in "iu":
        numbers = speakers.astype(np.int32)
        if (numbers == speakers).all():
            return numbers
    return np.unique(speakers, return_inverse=True)[1].astype(np.int32)


def _limit_memory(size: int) -> None:
    """Have a damaged length end as a failed allocation here, not as an exhausted machine."""
    limit = MEMORY_BASE + MEMORY_FACTOR * size
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main(path: str, *flags: str) -> int:
    """Send the file's arrays, or say on standard error why not and return BAD_FILE."""
    try:
        _limit_memory(os.path.getsize(path))
        arrays, about = read_layout(path, not flags, "--largest-unit" in flags)
    except LayoutError as error:
        print(error, file=sys.stderr)
        return BAD_FILE
    header = {"arrays": [[n, a.dtype.str, len(a)] for n, a in arrays.items()], "about": about}
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n")
    for array in arrays.values():
        sys.stdout.buffer.write(array.view(np.uint8))
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
