"""Files that are written whole or not at all, and JSON that is read or named in one line."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name, sync it and rename it into place.

    Args:
        path: the file; an older one of that name is replaced at once or stays.
        write: called with the binary file, open to read and write.
    Raises:
        OSError: the folder cannot be written or the disk is full, with the file's own name; no half
            file is left.
    """
    path, temporary = Path(path), None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:
            raise _of(path, error) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: str | os.PathLike, argument: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file. argument: what named it, for errors.
    Raises:
        FileNotFoundError: no such file. ValueError: no JSON, or no object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{argument}: no such file: {path}") from None
    # a file of brackets is too deep for the parser
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{argument}: {path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{argument}: {path}: expected an object, got {type(found).__name__}")
    return found


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError, with the file's name, unless a file of that name could be written."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _of(path, error) from None


def _of(path: Path, error: OSError) -> OSError:
    """The error as one of this file, whose temporary name nobody knows."""
    return OSError(error.errno, error.strerror, str(path))
