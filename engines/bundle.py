"""A bundle on disk: opening, checking and reading one. ``docs/bundle-format.md`` describes the folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dspark_edge.engines.bundle_paths import MANIFEST_NAME, check_path, is_recorded
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import FileRecord, Manifest

__all__ = ["Bundle", "hash_file", "is_bundle", "walk_files"]

CHUNK = 1 << 20  # bytes read at a time when hashing: large enough for the disk, small next to any model


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: a folder whose manifest, file list and file sizes have been checked."""

    path: Path  # absolute
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open the bundle in the folder ``path``; checks everything but the files' hashes (see ``verify``).

        Raises:
            BundleError: there is no bundle, or it is incomplete, damaged, made by a newer version, or has a
                path or a link that leads outside its folder.
        """
        folder = Path(path).absolute()
        manifest = Manifest.from_text(_manifest_text(folder), where=f"{path}: manifest")
        bundle = cls(folder, manifest)
        problems = [p for record in manifest.files if (p := bundle._problem(record.path, record.size))]
        if problems:
            raise BundleError(f"the bundle {path} is damaged: {'; '.join(problems)}; copy or export it again")
        recorded = {record.path for record in manifest.files}
        for role, graph in manifest.graphs.items():
            if graph.file not in recorded:
                raise BundleError(f"{path}: manifest.graphs.{role}.file, {graph.file!r}, is not among its files")
        return bundle

    def file(self, name: str) -> Path:
        """The absolute path of the file ``name`` (relative, "/" between names), recorded or added later.

        Raises:
            BundleError: there is no such file, or the name or a link leads outside the bundle.
        """
        check_path(name, "the file's name")
        problem = self._problem(name, size=None)
        if problem:
            raise BundleError(f"the bundle {self.path}: {problem}")
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether there is a file ``name``; raises ``BundleError`` if it leads outside the bundle."""
        check_path(name, "the file's name")
        return self._problem(name, size=None) is None

    def graph_path(self, role: str) -> Path:
        """The absolute path of a role's ONNX file; raises ``BundleError`` if the bundle has no such graph."""
        graph = self.manifest.graphs.get(role)
        if graph is None:
            there = ", ".join(sorted(self.manifest.graphs))
            raise BundleError(f"the bundle {self.path} has no graph {role!r}; it has {there}")
        return self.file(graph.file)

    def read_text(self, name: str) -> str:
        """The UTF-8 text of the file ``name``; raises ``BundleError`` if it cannot be read as that."""
        path = self.file(name)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read {path}: {error}") from error

    def read_json(self, name: str, advice: str) -> object:
        """The JSON value in the file ``name``.

        Raises:
            BundleError: it cannot be read as that; the message ends with ``advice``.
        """
        try:
            return json.loads(self.read_text(name))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path / name} is damaged, not valid JSON ({error}); {advice}") from error

    def verify(self, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
        """Check the hash of every recorded file.

        Args:
            progress: called with (bytes hashed so far, bytes in all) after every megabyte.

        Returns:
            The names of files that are in the folder but not part of the bundle, sorted. They do no harm.

        Raises:
            BundleError: names all damaged files.
        """
        total = sum(record.size for record in self.manifest.files)
        done = 0
        damaged = []
        for record in self.manifest.files:
            problem = self._damage(record, _shifted(progress, done, total))
            if problem is not None:
                damaged.append(problem)
            done += record.size
        if damaged:
            raise BundleError(f"the bundle {self.path} is damaged: {'; '.join(damaged)}; copy or export it again")
        recorded = {record.path for record in self.manifest.files}
        try:
            names = walk_files(self.path)
        except OSError as error:
            raise BundleError(f"cannot list the bundle {self.path}: {error}") from error
        return tuple(name for name in names if is_recorded(name) and name not in recorded)

    def _damage(self, record: FileRecord, report: Callable[[int], None]) -> str | None:
        """What is wrong with a recorded file or its content, in words; None if nothing is."""
        problem = self._problem(record.path, record.size)
        if problem is not None:
            return problem
        try:
            same = hash_file(self.path / record.path, report) == record.sha256
        except OSError as error:
            return f"{record.path} cannot be read ({error.strerror})"
        return None if same else f"{record.path} is not what was exported (its sha256 differs)"

    def _problem(self, name: str, size: int | None) -> str | None:
        """What is wrong with a file, in words; None if it is a file of the bundle, and of ``size`` bytes.

        Raises:
            BundleError: a link leads outside the bundle. That is no damage to list among others.
        """
        try:
            actual = _inside(self.path, name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not stat.S_ISREG(actual.st_mode):
            return f"{name} is not a file"
        if size is not None and actual.st_size != size:
            return f"{name} has {actual.st_size} bytes instead of {size}"
        return None


def is_bundle(folder: Path) -> bool:
    """Whether the folder's ``manifest.json`` is a bundle's, of any version; other tools use that name too."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema_version", "graphs", "files"} <= data.keys()


def hash_file(path: Path, report: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file as hexadecimal digits; ``report`` gets the bytes so far. Raises ``OSError``."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    done = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if report is not None:
                report(done)
    return digest.hexdigest()


def walk_files(folder: Path) -> list[str]:
    """The names, relative and sorted, of all but plain folders under ``folder``. Raises ``OSError``."""
    names = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(names)


def _shifted(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int], None]:
    """``progress`` for the bytes of one file, ``before`` bytes into the whole."""
    return lambda count: None if progress is None else progress(before + count, total)


def _raise(error: OSError) -> None:
    raise error


def _manifest_text(folder: Path) -> bytes:
    if not os.path.lexists(folder):
        raise BundleError(f"there is no bundle at {folder}; give a folder that `dspark-edge export` wrote")
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give a folder that `dspark-edge export` wrote")
    try:
        if not stat.S_ISREG(_inside(folder, MANIFEST_NAME).st_mode):
            raise BundleError(f"{folder} is not a bundle: its {MANIFEST_NAME} is not a file")
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle, or an incomplete one: it has no {MANIFEST_NAME}") from error
    except OSError as error:
        raise BundleError(f"cannot read {folder / MANIFEST_NAME}: {error.strerror}") from error


def _inside(folder: Path, name: str) -> os.stat_result:
    """The status of a file of the bundle, links followed.

    Raises:
        BundleError: a link on the way leads outside ``folder``.
        OSError: it is missing or cannot be reached.
    """
    root = os.path.realpath(folder)
    real = os.path.realpath(folder / name)
    if os.path.commonpath([root, real]) != root:
        raise BundleError(f"{folder}: {name} is a link that points outside its folder; do not trust this bundle")
    return os.stat(real)
