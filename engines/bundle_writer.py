"""Writing a bundle so that it is there completely or not at all.

Files go to a hidden sibling of the output, ``.<name>.partial-<pid>-<random>``, which is renamed into place
when all is on disk. A failure before that leaves nothing behind. A killed process or a power failure can
leave the sibling; the next writer for the same output removes it.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dspark_edge.engines.bundle import Bundle, hash_file, is_bundle, walk_files
from dspark_edge.engines.bundle_paths import MANIFEST_NAME, check_path, is_recorded
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["BundleStream", "BundleWriter"]

REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another output",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output",
    errno.EFBIG: "the file is larger than the file system or the process's limit (ulimit -f) allows",
    errno.EROFS: "the place is read-only; choose another output",
    errno.EACCES: "permission is denied; choose another output",
    errno.EPERM: "permission is denied; choose another output",
    errno.EIO: "the disk reports an input/output error; check it before trying again",
}
# Errors that a write alone can raise; Python gives them no file name when they come from a file's write().
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class BundleWriter:
    """A bundle in the making; a context manager.

        with BundleWriter(output) as writer:
            writer.reserve(bytes_needed)
            with writer.open_stream("target.onnx.data") as stream:
                stream.write(weights)
            bundle = writer.finish(manifest)

    Leaving the block without ``finish`` removes all that was written. The output may be an empty folder; a
    bundle is replaced with ``overwrite`` only, and stays until the new one is complete; all else is refused.
    A failure to write is a ``BundleError``, also where the caller's own writing under ``path`` failed.
    """

    def __init__(self, output: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.output = Path(output)
        self._overwrite = overwrite
        self._site = _Site.of(self.output)
        self._settle: weakref.finalize[..., BundleWriter] | None = None
        self._unfinished: set[str] = set()  # names of streams that were not closed after all was written
        self._streamed: dict[str, _Streamed] = {}

    @property
    def path(self) -> Path:
        """The folder to write files into; it is not the output, and there only inside the ``with`` block."""
        return self._site.partial

    def __enter__(self) -> BundleWriter:
        # Should an interrupt come where no __exit__ will run, this runs when the writer or the process ends.
        self._settle = weakref.finalize(self, _Site.settle, self._site)
        try:
            with _in_words(self.output):
                self._site.make_parents()
                self._site.remove_leftovers()
                self._check_output()
                os.mkdir(self.path)
                self._site.lock(self.path)
        except BaseException:
            self._site.settle()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with _in_words(self.output):
            self._site.settle()
        if self._settle is not None:
            self._settle.detach()
            self._settle = None
        if isinstance(error, OSError) and self._is_ours(error):
            with _in_words(self.output):
                raise error

    def reserve(self, bytes_needed: int) -> None:
        """Raise ``BundleError`` unless ``bytes_needed`` more bytes fit on the disk. A quota is not seen."""
        with _in_words(self.output):
            free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            sizes = f"{bytes_needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free at {self._site.final.parent}"
            raise BundleError(f"the bundle {self.output} needs {sizes}; free some or choose another output")

    def write_bytes(self, name: str, data: ReadableBuffer) -> None:
        """Write a whole file; ``name`` is relative to the bundle, "/" between names."""
        with self.open_stream(name) as stream:
            stream.write(data)

    def open_stream(self, name: str) -> BundleStream:
        """Open the file ``name`` for writing once, from start to end; close it, or use it in a ``with``.

        It is hashed while it is written, so ``finish`` need not read it again.
        """
        self._require_open()
        check_path(name, "the file's name")
        if name == MANIFEST_NAME:
            raise BundleError(f"{MANIFEST_NAME} cannot be written as a file; finish() writes it")
        self._streamed.pop(name, None)
        self._unfinished.add(name)
        path = self.path / name

        def closed(streamed: _Streamed) -> None:
            self._streamed[name] = streamed
            self._unfinished.discard(name)

        with _in_words(self.output):
            path.parent.mkdir(parents=True, exist_ok=True)
            return BundleStream(open(path, "wb", buffering=1 << 20), self.output, closed)

    def finish(self, manifest: Manifest) -> Bundle:
        """Complete the bundle and move it into place; ``manifest.files`` is ignored, the writer fills it in.

        Raises:
            BundleError: the manifest breaks the schema or names a graph that was not written, a stream is not
                closed, a link was written, or the bundle cannot be moved into place.
        """
        self._require_open()
        if self._unfinished:
            raise BundleError(f"not completely written: {', '.join(sorted(self._unfinished))}")
        Manifest.from_json(dataclasses.replace(manifest, files=()).to_json())  # before the long hashing
        with _in_words(self.output):
            records = tuple(self._record(name) for name in walk_files(self.path) if is_recorded(name))
            written = {record.path for record in records}
            for role, graph in manifest.graphs.items():
                if graph.file not in written:
                    raise BundleError(f"the graph {role!r} is to be in {graph.file!r}, which was not written")
            complete = dataclasses.replace(manifest, files=records)
            (self.path / MANIFEST_NAME).write_text(complete.to_text(), encoding="utf-8")
            _sync(self.path / MANIFEST_NAME)
            for folder, _, _ in os.walk(self.path):
                _sync(Path(folder))
            self._check_output()
            self._site.publish()
        return Bundle(self.output.absolute(), complete)

    def _record(self, name: str) -> FileRecord:
        path = self.path / check_path(name, "a file of the bundle")
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{name} is a link or a special file; a bundle holds plain files only")
        streamed = self._streamed.get(name)
        if streamed is not None and streamed.mark == _mark(status):
            return FileRecord(name, status.st_size, streamed.sha256)
        _sync(path)
        return FileRecord(name, status.st_size, hash_file(path))

    def _check_output(self) -> None:
        """Raise ``BundleError`` if the output is neither free nor ours to replace."""
        final = self._site.final
        if not os.path.lexists(final):
            return
        if not final.is_dir():
            raise BundleError(f"the output {self.output} is a file; give a folder")
        if os.path.ismount(final) or os.path.samefile(final, "."):  # neither can be renamed onto, usefully
            raise BundleError(f"the output {self.output} is a mount point or this folder; give one inside it")
        if not any(final.iterdir()):
            return
        if not is_bundle(final):
            raise BundleError(f"the output {self.output} holds files of no bundle; choose another output")
        if not self._overwrite:
            raise BundleError(f"the output {self.output} holds a bundle; pass --overwrite to replace it")

    def _require_open(self) -> None:
        if self._settle is None or not self.path.is_dir():
            raise RuntimeError("a BundleWriter writes inside its with block, before finish()")

    def _is_ours(self, error: OSError) -> bool:
        """Whether an error of the caller's comes from writing the bundle, not from reading a checkpoint."""
        if isinstance(error.filename, (str, bytes)):
            return Path(os.fsdecode(error.filename)).is_relative_to(self.path)
        return error.errno in WRITE_ERRORS


class BundleStream(io.BufferedIOBase):
    """A file of a bundle that is written from start to end and hashed on the way.

    It has no file descriptor to give away: what went past ``write`` would miss in the hash.
    """

    def __init__(self, file: BinaryIO, output: Path, closed: Callable[[_Streamed], None]) -> None:
        self._file = file
        self._output = output
        self._report_closed = closed
        self._digest = hashlib.sha256()
        self._count = 0
        self._whole = True  # false while, and after, a write was cut short

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """The bytes written so far."""
        return self._count

    def write(self, data: ReadableBuffer) -> int:
        """Write all of ``data``, any C-contiguous buffer; returns its bytes. Raises ``BundleError``."""
        view = memoryview(data)
        count = view.nbytes
        if count == 0:  # what has a 0 in its shape cannot be cast
            return 0
        view = view.cast("B")
        self._whole = False
        with _in_words(self._output):
            self._file.write(view)
        self._digest.update(view)
        self._count += count
        self._whole = True
        return count

    def close(self) -> None:
        """Put the file on disk and hand its hash to the writer; ``BundleError`` if that fails."""
        if self.closed:
            return
        try:
            if self._whole:
                self._whole = False
                with _in_words(self._output):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    mark = _mark(os.fstat(self._file.fileno()))
                self._report_closed(_Streamed(self._digest.hexdigest(), mark))
        finally:
            with suppress(OSError):  # closing flushes again what failed above
                self._file.close()
            super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._whole = self._whole and kind is None  # what an exception cut short is not a file of the bundle
        self.close()

    def __del__(self) -> None:
        self._whole = False  # nobody closed it, so nobody said that it is complete
        self.close()


@dataclass(frozen=True, slots=True)
class _Streamed:
    sha256: str
    mark: tuple[int, int, int]  # of the file when it was closed; another one now: it was changed since


@dataclass(frozen=True, slots=True)
class _Site:
    """The output and the hidden folders beside it; a value of its own, so that it can outlive the writer."""

    final: Path
    partial: Path  # the new bundle until it is complete
    replaced: Path  # the old bundle while the new one takes its place
    pid: int
    parents: list[Path]  # folders that we created above the output, innermost first
    locks: list[int]  # file descriptors; they tell other writers that the folders are in use

    @classmethod
    def of(cls, output: Path) -> _Site:
        # Links are followed first: the hidden folder must be on the file system that the bundle will be on.
        final = Path(os.path.realpath(output))
        if not final.name:
            raise BundleError(f"the output {output} is a mount point; give a folder inside it")
        tag = f"{os.getpid()}-{secrets.token_hex(4)}"
        partial, replaced = (final.with_name(f".{final.name}.{kind}-{tag}") for kind in ("partial", "replaced"))
        return cls(final, partial, replaced, os.getpid(), [], [])

    def make_parents(self) -> None:
        missing = []
        parent = self.final.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for parent in reversed(missing):
            with suppress(FileExistsError):  # another writer may have been faster
                os.mkdir(parent)
                self.parents.insert(0, parent)

    def lock(self, folder: Path) -> None:
        descriptor = _lock(folder)
        if descriptor is not None:  # without locks (some network file systems) the process id has to do
            self.locks.append(descriptor)

    def publish(self) -> None:
        """Move the new bundle into place, and an old one out of it; ``settle`` then removes the old one."""
        if self.final.is_dir() and any(self.final.iterdir()):
            self.lock(self.final)
            os.rename(self.final, self.replaced)
        os.rename(self.partial, self.final)
        _sync(self.final.parent)

    def settle(self) -> None:
        """Remove all but the output; put the old bundle back if none took its place. Can be repeated."""
        if os.getpid() != self.pid:  # a forked child owns a copy of the writer but not the folders
            return
        _restore_or_remove(self.replaced, self.final)
        shutil.rmtree(self.partial, ignore_errors=True)
        for parent in self.parents:
            with suppress(OSError):  # not empty: it holds the output
                os.rmdir(parent)
        while self.locks:
            os.close(self.locks.pop())

    def remove_leftovers(self) -> None:
        """Settle for writers of the same output that were killed."""
        pattern = re.compile(rf"\.{re.escape(self.final.name)}\.(partial|replaced)-([1-9]\d{{0,9}})-[0-9a-f]{{8}}")
        for entry in list(os.scandir(self.final.parent)):
            match = pattern.fullmatch(entry.name)
            if match is None or not entry.is_dir(follow_symlinks=False) or _is_alive(int(match[2])):
                continue
            # The lock tells writers apart whose process ids this machine or container cannot see.
            descriptor = _lock(Path(entry.path))
            if descriptor is None:
                continue
            try:
                if match[1] == "replaced":
                    _restore_or_remove(Path(entry.path), self.final)
                else:
                    shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _restore_or_remove(replaced: Path, final: Path) -> None:
    if os.path.lexists(replaced) and not os.path.lexists(final):
        os.rename(replaced, final)
    shutil.rmtree(replaced, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed, at the latest when the process ends; or None."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; no process id of this system
        pass
    return True


def _mark(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sync(path: Path) -> None:
    """Put a file or a folder's list of names on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _in_words(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0) or f"{error.strerror or error}; choose another output"
        raise BundleError(f"cannot write the bundle {output}: {reason}") from error
