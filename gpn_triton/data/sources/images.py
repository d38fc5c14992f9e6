"""Images of digits as sequences: scikit-learn's (8 x 8) and MNIST's (28 x 28), pixel by pixel.

Pixels come row by row, or in one random order (permuted), T steps of so many pixels each. MNIST is
read from its IDX files as distributed, whose sums are checked at every reading. mnist-10k is what
its test files alone allow, 8,000 of their images to train and validate on and 2,000 to test:
figures from it are named so, and compared with none on the whole set.

Source: Alpaydin and Kaynak, 1998; LeCun, Cortes, Burges, 1998. Permuted: Le, Jaitly, Hinton, 2015.
"""

import contextlib
import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gpn_triton.data.dense import DenseStore
from gpn_triton.data.sources.download import download_file, locked, md5_of

MNIST_HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
PIXELS = {"digits": 8 * 8, "mnist": 28 * 28, "mnist-10k": 28 * 28}
CLASSES = tuple(map(str, range(10)))
# of the order of permuted pixels
ORDER = 92916


def digits(time_bins: int, permuted: bool) -> DenseStore:
    """scikit-learn's 1,797 images of 8 x 8 pixels of 0..16.

    Raises:
        ValueError: scikit-learn is missing, or as `sequences`.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError(
            "dataset: digits are scikit-learn's, which is missing: pip install 'gpn-triton[digits]'"
        ) from None
    found = load_digits()
    pixels = found.images.reshape(-1, PIXELS["digits"]).astype(np.uint8)
    return sequences("digits", pixels, found.target.astype(np.int64), 16, time_bins, permuted)


def mnist(
    part: str, time_bins: int, permuted: bool, data_dir: str | os.PathLike, download: bool,
    hosts: Sequence[str] = MNIST_HOSTS, md5: Mapping[str, str] = MNIST_MD5, timeout: float = 30.0,
) -> DenseStore:  # fmt: skip
    """A part of MNIST from its two files, fetched where that is asked for.

    Args:
        part: train (60,000 images) or t10k (10,000). time_bins, permuted: as `sequences`.
        data_dir: the folder of the files. download: whether to fetch what is missing.
        hosts, timeout: as download.fetch. md5: the sums of the files by their names.
    Raises:
        ValueError: a file of another sum or contents, or as `sequences`.
        FileNotFoundError: a file is missing and download is off. ConnectionError: no host delivers.
    """
    folder, names = Path(data_dir), [name for name in md5 if name.startswith(part)]
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if folder.is_dir() else contextlib.nullcontext():
        for path in (folder / name for name in names):
            if path.exists():
                continue
            if not download:
                raise FileNotFoundError(
                    f"{path.name} not found in {folder.resolve()}: add --download, or put the file "
                    f"from {' or '.join(hosts)} there"
                )
            download_file(path, [host + path.name for host in hosts], md5[path.name], timeout)
    images, labels = (_read_idx(folder / name, md5[name]) for name in names)
    if images.ndim != 3 or images[0].size != PIXELS["mnist"] or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder / names[0]}: expected [S, 28, 28] and labels [S], got {list(images.shape)} "
            f"and {list(labels.shape)}"
        )
    pixels = images.reshape(len(images), -1)
    return sequences("mnist", pixels, labels.astype(np.int64), 255, time_bins, permuted)


def sequences(
    name: str, pixels: np.ndarray, labels: np.ndarray, top: float, time_bins: int, permuted: bool
) -> DenseStore:
    """Images as sequences.

    Args:
        name: a key of PIXELS, for the error. pixels [S, P] uint8. labels [S] int64. top: of pixels.
        time_bins: T; a step has P / T pixels, each a channel. permuted: in one random order.
    Raises:
        ValueError: a time_bins that does not divide P.
    """
    S, P = pixels.shape
    if P % time_bins:
        raise ValueError(
            f"time_bins: expected {P}, or a divisor of it, for {name}, whose images have so many "
            f"pixels, got {time_bins}"
        )
    if permuted:
        pixels = pixels[:, np.random.default_rng(ORDER).permutation(P)]
    return DenseStore(pixels.reshape(S, time_bins, P // time_bins), labels, CLASSES, top)


def _read_idx(path: Path, md5: str) -> np.ndarray:
    """The array of bytes in a gzipped IDX file; ValueError for a file of another sum or layout."""
    if (found := md5_of(path)) != md5:
        raise ValueError(f"{path}: expected md5 {md5}, got {found}: remove it and --download")
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, got: {error}") from None
    # two bytes of zero, the type (8: a byte), the dimensions; each size in 4 bytes, big end first
    sizes = np.frombuffer(data[4 : 4 + 4 * data[3]], ">u4") if len(data) > 3 else []
    begin = 4 + 4 * len(sizes)
    if data[:3] != b"\0\0\x08" or len(data) - begin != np.prod(sizes, dtype=np.int64):
        raise ValueError(f"{path}: expected an IDX file of bytes")
    # a copy, since torch wants memory that can be written
    return np.frombuffer(data, np.uint8, offset=begin).reshape(sizes).copy()
