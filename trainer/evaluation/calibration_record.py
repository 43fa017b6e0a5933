"""What a calibration has collected so far, on disk: a run that was killed goes on where it stopped.

The record is a JSON Lines file. Its first line names the run by a key, every other line holds the rounds of one
prompt at one temperature. Lines are written whole and flushed to disk; what a kill leaves of the last one is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

from dspark_edge.engines.errors import BundleError, InvalidInputError
from dspark_edge.engines.replace_file import write_problem
from dspark_edge.trainer.evaluation.collection import RoundSample

__all__ = ["CalibrationRecord"]

_VERSION = 1


class CalibrationRecord:
    """The finished prompts of one run; a context manager that holds the file open and locked.

    Args:
        path: the file, made where it is missing.
        key: names the run: prompts, bundle and settings. A record of another run is refused.

    Raises:
        BundleError: the file cannot be written.
        InvalidInputError: it is another run's, no record at all, or in use.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.finished: dict[tuple[int, float], list[RoundSample]] = {}  # (prompt, temperature) → its rounds
        self._descriptor: int | None = None

    def __enter__(self) -> CalibrationRecord:
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._lock()
            self._read()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise BundleError(write_problem(self.path, error)) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.finished:  # nothing to go on from
            self.remove()
        self._close()

    def add(self, prompt: int, temperature: float, samples: list[RoundSample]) -> None:
        """Keep a finished prompt's rounds.

        Raises:
            BundleError: they cannot be written; what was kept before stays.
        """
        rounds = [[sample.verified, sample.accepted, list(sample.logits or ())] for sample in samples]
        self._append(_line({"prompt": prompt, "temperature": temperature, "rounds": rounds}))
        self.finished[prompt, temperature] = _samples(rounds)

    def remove(self) -> None:
        """Delete the file: the run is over."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(f"another calibration is writing {self.path}; wait until it is done") from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> None:
        """Take in all whole lines, and cut off what is behind them."""
        header = _line({"calibration_record": _VERSION, "key": self.key})
        regular = stat.S_ISREG(os.fstat(self._file()).st_mode)
        content = self.path.read_bytes() if regular else b""
        if not regular or not (content.startswith(header) or header.startswith(content)):
            raise InvalidInputError(
                f"{self.path} is no record of this calibration (of its prompts, bundle and settings); "
                "delete it, or give another --work"
            )
        whole = len(header) if content.startswith(header) else 0  # bytes that are in order
        for line in content[whole:].splitlines(keepends=True):
            try:
                if not whole or not line.endswith(b"\n"):
                    break
                self._take_rounds(json.loads(line))
            except (ValueError, TypeError, KeyError):  # a disk that lost what it had promised to hold
                break
            whole += len(line)
        os.ftruncate(self._file(), whole)
        os.lseek(self._file(), 0, os.SEEK_END)
        if not whole:
            self._append(header)

    def _take_rounds(self, entry: Any) -> None:
        self.finished[int(entry["prompt"]), float(entry["temperature"])] = _samples(entry["rounds"])

    def _append(self, line: bytes) -> None:
        data = memoryview(line)
        try:
            while data:
                data = data[os.write(self._file(), data) :]
            os.fsync(self._file())
        except OSError as error:
            raise BundleError(write_problem(self.path, error)) from error

    def _file(self) -> int:
        if self._descriptor is None:
            raise RuntimeError("a CalibrationRecord works inside its with block")
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(entry: Any) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _samples(rounds: Any) -> list[RoundSample]:
    """Rounds as they are kept: what a fit needs of them."""
    return [
        RoundSample(0, int(verified), int(accepted), int(accepted) + 1, tuple(map(float, logits)), None)
        for verified, accepted, logits in rounds
    ]
