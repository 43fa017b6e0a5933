"""Responses of the target, which its drafter is trained on: written wave by wave, resumable, and read back.

A line of the file is one answer::

    {"plan": "…", "kind": "response", "prompt": 17, "turn": 0, "sample": 0, "domain": "math", "temperature": 0.0,
     "prompt_ids": [1, …], "response_ids": […], "finish_reason": "stop"}

`plan` identifies prompts, settings and target: a run goes on only with a file that it has begun itself. Lines of the
kind "prompt" are prompts that the target synthesised.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.responses.plan import Job, JobKey, Script
from dspark_edge.trainer.responses.responders import Answer, Responder

__all__ = ["Line", "read_lines", "write_responses"]

Report = Callable[[int, int, int], None]
"""(phase's requests done, phase's requests, response tokens of this run)"""


@dataclass(frozen=True, slots=True)
class Line:
    """An object of a JSON Lines file."""

    number: int  # 1-based
    entry: dict[str, Any]
    end: int  # offset behind it, bytes
    ended: bool  # by a line break: the last line of a file may lack it


def write_responses(script: Script, responder: Responder, path: Path, report: Report | None = None) -> int:
    """Answer everything a script asks, appending to a file; what it holds already is not asked again.

    Args:
        script: what to ask.
        responder: who answers.
        path: the file; begun if it is not there.
        report: hears of every wave.

    Returns:
        Lines that the file holds in the end.

    Raises:
        InvalidInputError: the file is of another plan or damaged, another process is writing to it, or it cannot be
            written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        stream = path.open("a+b", buffering=0)
    except OSError as error:
        raise InvalidInputError(f"cannot write {path}: {error.strerror or error}") from None
    with stream:
        _lock(stream, path)
        return _Writer(script, responder, stream, path, report).run()


def _lock(stream: RawIOBase, path: Path) -> None:
    """Keep other processes from writing to the file until it is closed."""
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInputError(
            f"another process is writing to {path}; wait for it to end, or give another output"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise InvalidInputError(f"cannot lock {path}: {error.strerror or error}") from None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A line that the file holds, as far as it is needed again."""

    number: int
    key: JobKey
    asked: tuple[int, float]  # hash of the question's ids, temperature
    end: int

    @classmethod
    def of(cls, line: Line) -> _Recorded:
        entry = line.entry
        key = (entry["kind"], entry["prompt"], entry["turn"], entry["sample"])
        return cls(line.number, key, (hash(tuple(entry["prompt_ids"])), entry["temperature"]), line.end)

    def answers(self, job: Job) -> bool:
        return self.key == job.key and self.asked == (hash(job.question.token_ids), job.question.temperature)


class _Writer:
    """One run over a file that is open for appending."""

    def __init__(
        self, script: Script, responder: Responder, stream: RawIOBase, path: Path, report: Report | None
    ) -> None:
        self._script, self._responder, self._stream, self._path = script, responder, stream, path
        self._report = report
        self._answers: dict[JobKey, tuple[int, ...]] = {}  # those that later phases stand on
        self._recorded: list[_Recorded] = []
        self._end = 0  # offset behind the last whole line
        self._tokens = 0

    def run(self) -> int:
        self._read_recorded()
        lines = 0
        for waves in self._script.phases(self._answers):
            total, done = sum(len(wave) for wave in waves), 0
            for wave in waves:
                if not self._holds(wave, lines):
                    self._answer(wave)
                lines += len(wave)
                done += len(wave)
                if self._report is not None:
                    self._report(done, total, self._tokens)
        return lines

    def _read_recorded(self) -> None:
        """Take up what the file holds, and cut off a line that was half written."""
        try:
            for line in read_lines(self._path):
                if not line.ended:
                    break
                self._take_up(line)
                self._end = line.end
            self._cut_rest()
        except OSError as error:
            raise InvalidInputError(f"cannot read {self._path}: {error.strerror or error}") from None

    def _take_up(self, line: Line) -> None:
        entry = line.entry
        if entry.get("plan") != self._script.digest:
            raise self._foreign()
        try:
            recorded = _Recorded.of(line)
            answer = tuple(entry["response_ids"])
            if not all(type(number) is int for number in (*answer, *recorded.key[1:])):
                raise TypeError
        except (KeyError, TypeError):
            raise InvalidInputError(
                f"{self._path}, line {line.number}: expected an answer as it was written, with its prompt_ids and "
                "response_ids; give another output, or remove this one"
            ) from None
        self._recorded.append(recorded)
        if self._script.stands_on(recorded.key):
            self._answers[recorded.key] = answer

    def _cut_rest(self) -> None:
        """What stands behind the last whole line is the beginning of a line of this plan, or not ours to remove."""
        begins = self._begins()
        self._stream.seek(self._end)
        rest = self._stream.read(len(begins)) or b""
        if not begins.startswith(rest):
            raise self._foreign()
        self._stream.truncate(self._end)

    def _foreign(self) -> InvalidInputError:
        return InvalidInputError(
            f"{self._path} was made from other prompts, another target or other settings; "
            "give another output, or remove it"
        )

    def _holds(self, wave: list[Job], lines: int) -> bool:
        """Whether the file holds a whole wave behind its first `lines` lines; half of one is cut off.

        Sequences that are decoded together may change each other's last bits, so a wave is answered as a whole.
        """
        recorded = self._recorded[lines : lines + len(wave)]
        for line, job in zip(recorded, wave, strict=False):
            if not line.answers(job):
                raise InvalidInputError(
                    f"{self._path}, line {line.number}: it answers something else than what is asked now: the "
                    "bundle's tokenizer or chat template has changed, or this program; give another output, or "
                    "remove this one"
                )
        if len(recorded) == len(wave):
            return True
        if recorded:
            for line in recorded:
                self._answers.pop(line.key, None)
            del self._recorded[lines:]
            self._end = self._recorded[-1].end if self._recorded else 0
            self._truncate()
        return False

    def _answer(self, wave: list[Job]) -> None:
        answers = self._responder.answer([job.question for job in wave])
        text = b"".join(self._line(job, answer) for job, answer in zip(wave, answers, strict=True))
        rest = memoryview(text)
        try:
            while rest:
                rest = rest[self._stream.write(rest) or 0 :]
            os.fsync(self._stream.fileno())
        except BaseException as error:  # a full disk, or a signal: whole waves stay
            if rest or isinstance(error, OSError):
                with suppress(OSError):
                    self._stream.truncate(self._end)
            if isinstance(error, OSError):
                raise self._unwritable(error) from None
            raise
        self._end += len(text)
        for job, answer in zip(wave, answers, strict=True):
            if self._script.stands_on(job.key):
                self._answers[job.key] = answer.token_ids
            self._tokens += len(answer.token_ids)

    def _truncate(self) -> None:
        try:
            self._stream.truncate(self._end)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> InvalidInputError:
        return InvalidInputError(
            f"cannot write {self._path}: {error.strerror or error}; nothing of what it holds is lost, "
            "start again to go on"
        )

    def _begins(self) -> bytes:
        """How each line of this plan begins."""
        return f'{{"plan":"{self._script.digest}",'.encode()

    def _line(self, job: Job, answer: Answer) -> bytes:
        entry = {
            "plan": self._script.digest,
            "kind": job.kind,
            "prompt": job.prompt,
            "turn": job.turn,
            "sample": job.sample,
            "domain": job.domain,
            "temperature": job.question.temperature,
            "prompt_ids": list(job.question.token_ids),
            "response_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
        }
        return (json.dumps(entry, separators=(",", ":")) + "\n").encode()


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSON Lines file; empty lines are skipped.

    A last line without its line break is left out where it is no object: a run was killed while it wrote it.

    Raises:
        InvalidInputError: another line is broken; the message names it.
        OSError: the file cannot be read.
    """
    end = 0
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            end += len(text)
            if not text.strip():
                continue
            ended = text.endswith(b"\n")
            try:
                entry = json.loads(text.strip())
                if not isinstance(entry, dict):
                    raise ValueError(f"it holds {type(entry).__name__}")
            except (ValueError, RecursionError) as error:
                if not ended:
                    return
                raise InvalidInputError(f"{path}, line {number}: {error}; expected a JSON object") from None
            yield Line(number, entry, end, ended)
