"""A data set by its name or its files, as training, validation and test samples."""

import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from gpn_triton.data.dense import DenseStore
from gpn_triton.data.events import EventStore, check_range
from gpn_triton.data.hold_out import choose_split, one_speaker
from gpn_triton.data.sources.download import PARTS, fetch
from gpn_triton.data.sources.hdf5 import (
    NO_LABELS,
    SHD_CHANNELS,
    About,
    common_channels,
    likely_channels,
    read_about,
    read_events,
)
from gpn_triton.data.sources.images import PIXELS, digits, mnist
from gpn_triton.data.sources.long_tasks import add_pairs, long_task_splits
from gpn_triton.data.sources.synthetic import synthetic_splits

# the sets made from a seed, those whose inputs are no events, and all that are known by name; what
# ends in .h5 is a file
MADE = ("synthetic", "recall", "adding")
DENSE = ("adding", *PIXELS)
DATASETS = (*MADE, *PARTS, *PIXELS)
# the share of the images that is held out for the test where there is no test file
IMAGES_HELD_OUT = 0.2
# as published today; older documents give others for SHD
KNOWN_COUNTS = {
    "shd": {"train": 8156, "test": 2264},
    "ssc": {"train": 75466, "valid": 9981, "test": 20382},
}


@dataclass(frozen=True)
class Splits:
    """Training, validation and test samples of one data set.

    Args:
        train, valid: read already. load_test: reads the test samples; called once, when `test` is
            first asked for, so that training cannot have seen them.
        description: one line for people: where each part comes from.
    """

    train: EventStore | DenseStore
    valid: EventStore | DenseStore
    load_test: Callable[[], EventStore | DenseStore]
    description: str

    @property
    def learns_number(self) -> bool:
        """Whether the labels are numbers to come near to, not classes."""
        return self.train.labels.dtype.kind == "f"

    @cached_property
    def test(self) -> EventStore | DenseStore:
        """The test samples, read now if they were not before."""
        return self.load_test()


@dataclass(frozen=True)
class DataSource:
    """Where samples come from, and how they are split where parts have no file of their own.

    Args:
        dataset: one of DATASETS or a file in SHD's layout; a train_file wins over it.
        train_file, valid_file, test_file: files in SHD's layout. A missing test part is held out of
            the training data first, then a missing validation part.
        channels: input channels of the files. None: as they say, see hdf5.common_channels.
        samples, classes: training samples of MADE; words of synthetic, symbols of recall.
        time_bins, max_time: T, and the window in seconds: long tasks are made for them.
        permuted: whether the pixels of images come in one random order.
        add_pairs: whether two samples are put together, see long_tasks.add_pairs; of events only.
        valid_split, valid_fraction: see hold_out.choose_split; for a held-out test part, too.
        test_speaker: whose samples are the test part, and no others, where it has no file.
        data_dir, download: see download.fetch. cache_dir: see hdf5.read_events.
    """

    dataset: str | os.PathLike = "synthetic"
    train_file: str | os.PathLike | None = None
    valid_file: str | os.PathLike | None = None
    test_file: str | os.PathLike | None = None
    channels: int | None = None
    samples: int = 2000
    classes: int = 20
    time_bins: int = 25
    max_time: float = 1.0
    permuted: bool = False
    add_pairs: bool = False
    valid_split: str = "auto"
    valid_fraction: float = 0.1
    test_speaker: int | None = None
    data_dir: str | os.PathLike = "data"
    cache_dir: str | os.PathLike | None = None
    download: bool = False

    def files(self) -> tuple[str | os.PathLike, dict[str, str | os.PathLike | None]]:
        """The data's name and each part's file, fetched where that is asked for, or None to split
        it off. Raises ValueError for an unknown name, and what download.fetch does."""
        own = {"valid": self.valid_file, "test": self.test_file}
        if self.train_file is not None:
            return self.train_file, {"train": self.train_file, **own}
        if self.dataset in PARTS:
            return self.dataset, fetch(self.dataset, self.data_dir, self.download)
        if Path(self.dataset).suffix in (".h5", ".hdf5") or Path(self.dataset).exists():
            return self.dataset, {"train": self.dataset, **own}
        raise ValueError(
            f"dataset: expected {', '.join(DATASETS)} or FILE.h5, got {str(self.dataset)!r}"
        )


def load_splits(source: DataSource, seed: int = 0, test: bool = True) -> Splits:
    """Find, read and split a data set; whatever has no file of its own is split off the training.

    Args:
        source: the data. seed: of the splits, and of synthetic.
        test: whether there will be a test. Without one the training and validation parts are the
            same, a test file is not opened, not even to be checked, and to ask for the test part
            is a RuntimeError.
    Returns:
        the parts, all with the training data's classes.
    Raises:
        ValueError: an unknown name, a bad file, classes that do not fit the training data's, or a
            split that cannot be. FileNotFoundError, ConnectionError: no such file.
    """
    found = _find_splits(source, seed, test)
    if not test:
        found = replace(found, load_test=_no_test)
    if not source.add_pairs:
        return found

    def pairs(store: EventStore, part: int) -> EventStore:
        return add_pairs(store, source.max_time, 3 * seed + part)

    about = f"{found.description}; in pairs with the sum of their labels"
    return Splits(pairs(found.train, 0), pairs(found.valid, 1), lambda: pairs(found.test, 2), about)


def _no_test() -> EventStore:
    """Stands for the test part where there is no test."""
    raise RuntimeError("test: these data were loaded without a test part")


def _find_splits(source: DataSource, seed: int, test: bool) -> Splits:
    """The parts as they are made or read."""
    if source.train_file is None and source.dataset in MADE:
        if source.dataset == "synthetic":
            made = synthetic_splits(source.samples, seed, source.classes)
        else:
            made = long_task_splits(
                source.dataset, source.samples, seed, source.time_bins, source.max_time,
                source.classes,
            )  # fmt: skip
        about = f"{source.dataset}, seed {seed}: {_sizes(made.train, made.valid)}"
        return Splits(made.train, made.valid, lambda: made.test, about)
    if source.train_file is None and source.dataset in PIXELS:
        return _image_splits(source, seed)

    name, files = source.files()
    channels = SHD_CHANNELS if name in PARTS else source.channels

    def read(part: str) -> EventStore:
        store = read_events(files[part], source.cache_dir, channels)
        known = KNOWN_COUNTS.get(name, {}).get(part, len(store))
        if len(store) != known:
            warnings.warn(
                f"{files[part]}: {len(store)} samples, the published set has {known}", stacklevel=4
            )
        return store

    def split(store: EventStore, part: str, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
        try:
            return choose_split(store, source.valid_split, source.valid_fraction, seed)
        except ValueError as error:
            raise ValueError(
                f"{files['train']}: no {part} part can be held out: {error}; more samples would "
                f"do, or a file named by --{part}-file beside --train-file"
            ) from None

    _warn_of_same(files)
    parts = {part: read(part) for part in ("train", "valid") if files.get(part) is not None}
    # so that a wrong test file is not found out after the training
    about = None
    if test and files.get("test") is not None:
        about = read_about(files["test"], largest_unit=name not in PARTS)
    if channels is None:
        found = {files[part]: store.num_channels for part, store in parts.items()}
        if about is not None:
            found[files["test"]] = about.num_channels or likely_channels(about.largest_unit)
        channels = common_channels(found)
        for part, store in parts.items():
            if store.num_channels != channels:
                parts[part] = replace(store, num_channels=channels).validate(str(files[part]))
    train = parts["train"]
    classes, valid_how = train.class_names, Path(files.get("valid") or name).name
    if files.get("test") is None:
        if source.test_speaker is None:
            kept, held, how = split(train, "test", seed + 1)
        else:
            kept, held = one_speaker(train, source.test_speaker)
            how = f"all of speaker {source.test_speaker}"
        load_test = partial(train.subset, held)
        train = train.subset(kept)
        test_how = f"{len(held)} samples held out, {how}"
    else:
        if about is not None:
            _check_about(files["test"], about, classes, channels)
        load_test = lambda: _with_classes(read("test"), classes, files["test"])  # noqa: E731
        when = "read at the end" if test else "not opened"
        test_how = f"{Path(files['test']).name}, {when}"
    if files.get("valid") is None:
        kept, held, valid_how = split(train, "valid", seed)
        train, valid = train.subset(kept), train.subset(held)
    else:
        valid = _with_classes(parts["valid"], classes, files["valid"])
    parts_how = f"{_sizes(train, valid)} ({valid_how}); test: {test_how}"
    return Splits(train, valid, load_test, f"{Path(name).name}: {parts_how}")


def _image_splits(source: DataSource, seed: int) -> Splits:
    """The parts of a set of images, whose validation part is always held out."""
    name, how = source.dataset, (source.time_bins, source.permuted)
    read = partial(mnist, data_dir=source.data_dir, download=source.download)
    # nobody is known to have written an image
    method = "stratified" if source.valid_split == "auto" else source.valid_split
    if name == "mnist":
        train, test_how = read("train", *how), "t10k files, read at the end"
        load_test = partial(read, "t10k", *how)
    else:
        whole = digits(*how) if name == "digits" else read("t10k", *how)
        kept, held, test_how = choose_split(whole, method, IMAGES_HELD_OUT, seed + 1)
        train, load_test = whole.subset(kept), partial(whole.subset, held)
    kept, held, valid_how = choose_split(train, method, source.valid_fraction, seed)
    train, valid = train.subset(kept), train.subset(held)
    order = ", permuted" if source.permuted else ""
    about = f"{name}{order}: {_sizes(train, valid)} ({valid_how}); test: {test_how}"
    return Splits(train, valid, load_test, about)


def _sizes(train: EventStore | DenseStore, valid: EventStore | DenseStore) -> str:
    return f"{len(train)} training and {len(valid)} validation samples"


def _warn_of_same(files: dict[str, str | os.PathLike | None]) -> None:
    """Warn where two parts are one file."""
    for (one, a), (other, b) in itertools.combinations(files.items(), 2):
        if a and b and os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b):
            warnings.warn(
                f"{b} holds the {one} and the {other} data: an accuracy on samples "
                "that training has seen says little",
                stacklevel=4,
            )


def class_difference(expected: tuple[str, ...], got: tuple[str, ...]) -> str | None:
    """Where two lists of class names first differ, in words; None where neither contradicts the
    other, since they are equal or one of them only counts."""
    numbers = tuple(map(str, range(max(len(expected), len(got)))))
    if expected == got or any(names == numbers[: len(names)] for names in (expected, got)):
        return None
    k = next(
        (k for k, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None
    )
    k = min(len(expected), len(got)) if k is None else k
    there = f"{expected[k]!r} as class {k}" if k < len(expected) else f"no class {k}"
    here = f"{got[k]!r}" if k < len(got) else "none"
    return f"{there}, got {here} of {len(got)}"


def _check_classes(
    path: str | os.PathLike, names: tuple[str, ...], labels: np.ndarray, classes: tuple[str, ...]
) -> None:
    """Raise ValueError if a file's class names or labels contradict the training data's classes."""
    if difference := class_difference(classes, names):
        raise ValueError(f"{path}: extra/keys: expected the training data's {difference}")
    check_range(f"{path}: labels", labels, len(classes) - 1)


def _check_about(
    path: str | os.PathLike, about: About, classes: tuple[str, ...], channels: int
) -> None:
    """Raise ValueError if what a file says does not fit the training data."""
    if about.labels is None:
        raise ValueError(NO_LABELS.format(path))
    if about.num_channels not in (None, channels):
        raise ValueError(
            f"{path}: the file says {about.num_channels} channels, expected {channels}"
        )
    if about.largest_unit is not None and about.largest_unit >= channels:
        raise ValueError(
            f"{path}: spikes/units: expected 0..{channels - 1}, got up to {about.largest_unit}"
        )
    _check_classes(path, about.class_names, about.labels, classes)


def _with_classes(store: EventStore, classes: tuple[str, ...], path: str | os.PathLike):
    """The store with the training data's classes, where its own do not contradict them."""
    _check_classes(path, store.class_names, store.labels, classes)
    return replace(store, class_names=classes)
