"""Writing a file that is added to a bundle after its export: the old content or the new one, never a part."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dspark_edge.engines.errors import BundleError

__all__ = ["replace_file", "replacing", "write_problem"]

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "the disk quota is used up; free some space and start again",
    errno.EFBIG: "the file is larger than the file system or the process's limit (ulimit -f) allows",
    errno.EROFS: "the place is read-only; copy the bundle to where you may write",
    errno.EACCES: "permission is denied; copy the bundle to where you may write",
    errno.EPERM: "permission is denied; copy the bundle to where you may write",
}


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name, flush it to disk, and give it its name.

    Raises:
        BundleError: it cannot be written; what was there before still is.
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to piece by piece, which takes its place when the block ends without an error.

    Raises:
        BundleError: it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise BundleError(write_problem(path, error)) from error


def write_problem(path: Path, error: OSError) -> str:
    """Why a file cannot be written, in one line."""
    return f"cannot write {path}: {_REASONS.get(error.errno or 0) or error.strerror or error}"


def _sync_folder(folder: Path) -> None:
    """Put a rename on disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
