"""Fetch files by their sums: from two hosts in turn, resumed, verified, and never half of one.

This is not left to pooch, which has the hashes and whole files, too, but begins every attempt at an
archive of up to 1.2 GB anew: pooch 1.9 asks for no range and deletes what a cut connection left.

fetch() knows the files of SHD and SSC.
Source: Cramer, Stradmann, Schemmel, Zenke, 2022; licence CC BY 4.0.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import ssl
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from gpn_triton.machine.files import write_atomically

HOSTS = ("https://compneuro.net/datasets/", "https://zenkelab.org/datasets/")
PARTS = {"shd": ("train", "test"), "ssc": ("train", "valid", "test")}
# of NAME.h5.zip
MD5 = {
    "shd_train": "f3252aeb598ac776c1b526422d90eecb",
    "shd_test": "1503a5064faa34311c398fb0a1ed0a6f",
    "ssc_train": "d102be95e7144fcc0553d1f45ba94170",
    "ssc_valid": "b4eee3516a4a90dd0c71a6ac23a8ae43",
    "ssc_test": "a35ff1e9cffdd02a20eb850c17c37748",
}
_BLOCK = 1 << 18
# what the network raises; a full disk is another OSError and ends everything
_HOST_ERRORS = (
    urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
)  # fmt: skip


def fetch(
    name: str, data_dir: str | os.PathLike, download: bool, hosts: Sequence[str] = HOSTS,
    md5: Mapping[str, str] = MD5, timeout: float = 30.0,
) -> dict[str, Path]:  # fmt: skip
    """Find a data set's files, or fetch and unpack the missing ones.

    A download continues where an earlier one, from whichever host, was cut (NAME.h5.zip.part).
    Archives NAME.h5.zip that lie in the folder already are used, and kept.

    Args:
        name: shd or ssc. data_dir: the folder the files lie in, or come into; made if missing.
        download: whether to fetch what is missing.
        hosts: addresses to which NAME.h5.zip is appended, tried in this order.
        md5: sums of the archives by NAME, such as shd_train.
        timeout: how long a host may be silent, seconds.
    Returns:
        the unpacked files: train, test and, for ssc, valid.
    Raises:
        ValueError: an unknown name, or an archive with the right sum but the wrong contents.
        FileNotFoundError: files are missing and download is off.
        ConnectionError: no host could deliver; what arrived is kept for the next attempt.
        OSError: the folder cannot be written or the disk is full.
    """
    if name not in PARTS:
        raise ValueError(f"dataset: expected one of {', '.join(PARTS)}, got {name!r}")
    folder = Path(data_dir)
    files = {part: folder / f"{name}_{part}.h5" for part in PARTS[name]}
    if download:
        folder.mkdir(parents=True, exist_ok=True)
    # the processes of one distributed run come here together: one fetches, the others wait
    with locked(folder) if folder.is_dir() else contextlib.nullcontext():
        for path in files.values():
            _unpack_if_there(path, md5[path.stem])
        missing = [path for path in files.values() if not path.exists()]
        if missing and not download:
            raise FileNotFoundError(
                f"{', '.join(path.name for path in missing)} not found in {folder.resolve()}: add "
                f"--download, or put the files or their .zip from {' or '.join(hosts)} there"
            )
        for path in missing:
            archive = path.with_name(path.name + ".zip")
            download_file(archive, [host + archive.name for host in hosts], md5[path.stem], timeout)
            _unpack(archive, path)
            archive.unlink()
    return files


def download_file(archive: Path, addresses: Sequence[str], md5: str, timeout: float) -> None:
    """Fetch a file into NAME.part from the addresses in turn, verify and rename it.

    Raises:
        ConnectionError: no host could deliver; what arrived is kept for the next attempt.
    """
    part = archive.with_name(archive.name + ".part")
    waiting, reasons, furthest = list(addresses), {}, 0
    while waiting:
        address, before = waiting.pop(0), _size(part)
        try:
            _receive(address, part, before, timeout)
        except _HOST_ERRORS as error:
            reasons[address] = str(error) or type(error).__name__
            # a host that was cut off, but further than any before, is worth another turn
            again = _size(part) > max(before, furthest)
        else:
            found = md5_of(part)
            if found == md5:
                os.replace(part, archive)
                return
            reasons[address] = f"sent {_size(part)} bytes of md5 {found}, expected {md5}"
            part.unlink()
            # the wrong bytes may be those that were there before
            again = before > 0
        waiting += [address] if again else []
        furthest = max(furthest, _size(part))
    told = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
    raise ConnectionError(
        f"{archive.name}: no host delivered it ({told}): try again, which goes on from what "
        f"arrived, or put the file into {archive.parent.resolve()} by hand"
    )


def _receive(address: str, part: Path, have: int, timeout: float) -> None:
    """Append to `part`, of `have` bytes, what it lacks, or write it anew where the host sends all.

    Raises one of _HOST_ERRORS where the host does not deliver all that it announced.
    """
    headers = {"User-Agent": "gpn-triton", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(address, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:
            # there is nothing beyond what is here: the sum will tell whether that is all
            return
        raise
    with response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None
        )
        with part.open("ab" if have else "wb") as file, bar:
            while block := response.read1(_BLOCK):
                bar.update(file.write(block))
    if total is not None and _size(part) < total:
        raise ConnectionError(f"cut off after {_size(part)} of {total} bytes")


def _unpack_if_there(path: Path, md5: str) -> None:
    """Unpack an archive that somebody put beside the place of its missing contents."""
    archive = path.with_name(path.name + ".zip")
    if path.exists() or not archive.exists():
        return
    found = md5_of(archive)
    if found == md5:
        _unpack(archive, path)
    else:
        warnings.warn(f"{archive}: ignored, md5 {found}, expected {md5}", stacklevel=3)


def _unpack(archive: Path, path: Path) -> None:
    """Write the archive's one member of path's name to path, whatever folder it claims."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [m for m in file.namelist() if PurePosixPath(m).name == path.name]
            if len(members) != 1:
                found = file.namelist()[:5]
                raise ValueError(f"{archive}: expected one member {path.name}, got {found}")
            with file.open(members[0]) as source:
                write_atomically(path, lambda target: shutil.copyfileobj(source, target, _BLOCK))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        expected = f"a zip archive with {path.name}"
        raise ValueError(f"{archive}: expected {expected}, got: {error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that ask for it by this function."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def md5_of(path: Path) -> str:
    """A file's sum."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
