"""Writing a file of a training run: the old content or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["replacing_path"]


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Gives a name beside the file's own to write to; in the end it is flushed to disk and renamed over it.

    Raises:
        InvalidInputError: it cannot be written; what was there before still is.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidInputError(
            f"cannot write {path}: {error.strerror or error}; make room and start again to go on"
        ) from None
