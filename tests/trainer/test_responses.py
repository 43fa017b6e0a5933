"""The responses file: whatever kills a run, starting again ends with the same bytes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.tokenizer import Tokenizer
from dspark_edge.trainer.responses.plan import ResponseSettings, Script
from dspark_edge.trainer.responses.responders import Answer, Question
from dspark_edge.trainer.responses.writer import read_lines, write_responses
from tests.runtime.conftest import CHAT_TEMPLATE, byte_tokenizer

END = 256
SETTINGS = ResponseSettings(max_new_tokens=12, wave=3, seed=1, synthesise=4, samples=(("b", 2), ("", 1)))
PROMPTS = (
    PromptRecord(1, "a", turns=("one",)),
    PromptRecord(2, "b", turns=("two", "and then", "what")),
    PromptRecord(3, "b", turns=("three three",)),
    PromptRecord(4, "a", token_ids=(1, 2, 3)),
)


class Echo:
    """Says something of each question, and of the wave that it is in: as rounding does, only louder."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.waves: list[list[Question]] = []
        self._fail_at, self._error = fail_at, error or KeyboardInterrupt()

    @property
    def capacity(self) -> int | None:
        return 256

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        if len(self.waves) == self._fail_at:
            raise self._error
        self.waves.append(list(questions))
        together = sum(question.seed for question in questions) % 26 + 97
        return [
            Answer((97 + question.seed % 26, together, 97 + len(question.token_ids) % 26, END), "stop")
            for question in questions
        ]


def make_script(
    prompts: Sequence[PromptRecord] = PROMPTS, settings: ResponseSettings = SETTINGS, template: str = CHAT_TEMPLATE
) -> Script:
    return Script(prompts, settings, Tokenizer(byte_tokenizer()), ChatTemplate(template), 256, "m")


def write(path: Path, responder: Echo | None = None, **given: Any) -> int:
    return write_responses(make_script(**given), responder or Echo(), path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an uninterrupted run writes."""
    path = tmp_path_factory.mktemp("whole") / "responses.jsonl"
    assert write(path) == len(path.read_bytes().splitlines())
    return path.read_bytes()


def waves_of(whole: bytes) -> list[int]:
    """Offsets at which a wave ends, from 0 on."""
    sizes: list[int] = []
    answers: dict[Any, tuple[int, ...]] = {}
    lines = whole.splitlines(keepends=True)
    for waves in make_script().phases(answers):
        for wave in waves:
            sizes.append(len(wave))
            for job in wave:
                entry = json.loads(lines[len(answers)])
                answers[job.key] = tuple(entry["response_ids"])
    ends = [0]
    for size in sizes:
        first = sum(sizes[: len(ends) - 1])
        ends.append(ends[-1] + sum(len(line) for line in lines[first : first + size]))
    return ends


def test_a_line_is_an_answer(whole: bytes, tmp_path: Path) -> None:
    entries = [json.loads(line) for line in whole.splitlines()]
    script = make_script()
    assert all(
        list(entry) == ["plan", "kind", "prompt", "turn", "sample", "domain", "temperature", "prompt_ids",
                        "response_ids", "finish_reason"]
        for entry in entries
    )  # fmt: skip
    assert {entry["plan"] for entry in entries} == {script.digest}
    kinds = [entry["kind"] for entry in entries]
    assert kinds[:4] == ["prompt"] * 4 and set(kinds[4:]) == {"response"}
    by_key = {(entry["kind"], entry["prompt"], entry["turn"], entry["sample"]): entry for entry in entries}
    assert len(by_key) == len(entries)
    # a: two prompts, one response each; b: three turns and one, of two samples; four synthesised prompts
    assert len(entries) == 4 + 2 + 2 * (3 + 1) + len({tuple(entry["response_ids"]) for entry in entries[:4]})
    first, second = by_key["response", 1, 0, 1], by_key["response", 1, 1, 1]
    assert bytes(second["prompt_ids"]).startswith(bytes([*first["prompt_ids"], *first["response_ids"][:-1]]))
    assert first["domain"] == "b" and first["temperature"] in (0.0, 1.0)
    assert by_key["response", 3, 0, 0]["prompt_ids"] == [1, 2, 3]


def test_a_run_that_is_through_asks_nothing_again(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "responses.jsonl"
    reports: list[tuple[int, int, int]] = []
    first = Echo()
    lines = write_responses(make_script(), first, path, lambda *given: reports.append(given))
    assert path.read_bytes() == whole and len(first.waves) == len(waves_of(whole)) - 1
    assert reports[0] == (3, 4, 12) and reports[1] == (4, 4, 16) and reports[-1][2] == 4 * lines
    again = Echo()
    reports.clear()
    assert write_responses(make_script(), again, path, lambda *given: reports.append(given)) == lines
    assert path.read_bytes() == whole and again.waves == []
    assert reports[0] == (3, 4, 0) and reports[-1][0] == reports[-1][1]


def test_killed_at_any_byte_the_same_file_comes_out(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    ends = waves_of(whole)
    assert ends[-1] == len(whole)
    near = {end + offset for end in ends for offset in (-2, -1, 0, 1, 2, 12, 30)}
    for size in sorted({size for size in near if 0 <= size <= len(whole)} | set(range(0, len(whole), 61))):
        path.write_bytes(whole[:size])
        responder = Echo()
        write(path, responder)
        assert path.read_bytes() == whole, size
        # A wave is kept if it is whole, and answered again as a whole otherwise.
        kept = sum(end <= size for end in ends) - 1
        assert len(responder.waves) == len(ends) - 1 - kept, size


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("backend")])
def test_whatever_ends_a_run_it_goes_on(whole: bytes, tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "responses.jsonl"
    for wave in range(len(waves_of(whole)) - 1):
        path.unlink(missing_ok=True)
        with pytest.raises(type(error)):
            write(path, Echo(wave, error))
        assert path.read_bytes() == whole[: waves_of(whole)[wave]]
        write(path)
        assert path.read_bytes() == whole


def test_an_error_of_the_responder_is_not_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the backend's own"):
        write(tmp_path / "responses.jsonl", Echo(1, OSError("the backend's own")))


@pytest.mark.parametrize(
    "given",
    [
        {"prompts": PROMPTS[:2]},
        {"settings": replace(SETTINGS, seed=2)},
        {"settings": replace(SETTINGS, wave=4)},
    ],
    ids=["prompts", "seed", "wave"],
)
@pytest.mark.parametrize("size", [None, 40], ids=["whole", "half a line"])
def test_a_file_of_another_plan_is_refused(
    whole: bytes, tmp_path: Path, given: dict[str, Any], size: int | None
) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(whole[:size])
    with pytest.raises(InvalidInputError, match="was made from other prompts, another target or other settings"):
        write(path, **given)
    assert path.read_bytes() == whole[:size]


@pytest.mark.parametrize(
    "content", [b"precious", b"precious\n", b'{"prompt": "a"}\n', b'{"prompt": "a"}', b'{"plan":"0', b"[]", b"\0\0"]
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError):
        write(path)
    assert path.read_bytes() == content


def test_an_empty_file_is_begun(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.touch()
    write(path)
    assert path.read_bytes() == whole


def test_a_changed_template_is_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(whole)
    with pytest.raises(InvalidInputError, match=r"responses\.jsonl, line 1: .* chat template has changed"):
        write(path, template="!" + CHAT_TEMPLATE)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda line: line[:-9] + b"\n", "line 6: Expecting ':' delimiter: line 1 column"),
        (lambda line: b"[1]\n", "line 6: it holds list; expected a JSON object"),
        (lambda line: b"\xff\n", "line 6: .*; expected a JSON object"),
        (lambda line: b"[" * 100_000 + b"\n", "line 6: .*; expected a JSON object"),
        (lambda line: line.replace(b'"response_ids"', b'"other"'), "line 6: expected an answer as it was written"),
        (lambda line: line.replace(b'"prompt_ids":[', b'"prompt_ids":[[],'), "line 6: expected an answer"),
        (lambda line: line.replace(b'"response_ids":[', b'"response_ids":["a",'), "line 6: expected an answer"),
        (lambda line: line.replace(b'"turn":0', b'"turn":"0"'), "line 6: expected an answer"),
        (lambda line: line.replace(b'"sample":0', b'"sample":9'), "line 6: it answers something else"),
        (lambda line: line.replace(b'"prompt_ids":[', b'"prompt_ids":[7,'), "line 6: it answers something else"),
        (lambda line: b"", "line 6: it answers something else"),
    ],
)
def test_a_broken_line_is_named(whole: bytes, tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    lines = whole.splitlines(keepends=True)
    assert b'"turn":0,"sample":0' in lines[5] and change(lines[5]) != lines[5]
    path = tmp_path / "responses.jsonl"
    damaged = b"".join([*lines[:5], change(lines[5]), *lines[6:]])
    path.write_bytes(damaged)
    with pytest.raises(InvalidInputError, match=problem) as caught:
        write(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == damaged


def test_empty_lines_are_no_answers(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"\n".join(lines))
    numbers = [line.number for line in read_lines(path)]
    assert numbers == list(range(1, 2 * len(lines), 2))
    responder = Echo()
    assert write(path, responder) == len(lines) and responder.waves == []


def test_a_full_disk_leaves_whole_waves(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "responses.jsonl"
    synced = os.fsync
    ends, calls = waves_of(whole), 0

    def refuse(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InvalidInputError) as caught:
        write(path)
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; nothing of what it holds is lost, start again to go on"
    )
    assert path.read_bytes() == whole[: ends[2]]
    write(path)
    assert path.read_bytes() == whole


def test_an_interrupt_behind_a_write_keeps_the_wave(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "responses.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert path.read_bytes() == whole[: waves_of(whole)[1]]
    write(path)
    assert path.read_bytes() == whole


def test_a_write_that_is_cut_short_leaves_whole_waves(whole: bytes, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    path = tmp_path / "responses.jsonl"
    ends = waves_of(whole)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ends[2] + 50, limits[1]))  # the third wave is begun, and cut
    try:
        with pytest.raises(
            InvalidInputError, match=r"cannot write .*: File too large; nothing of what it holds is lost"
        ):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole[: ends[2]]
    write(path)
    assert path.read_bytes() == whole


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot write .*: Is a directory"):
        write(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="cannot write "):
        write(tmp_path / "file" / "responses.jsonl")


def test_only_one_run_at_a_time(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "responses.jsonl"

    class Intruder(Echo):
        """Starts another run on the file while it answers."""

        def answer(self, questions: Sequence[Question]) -> list[Answer]:
            before = path.read_bytes()
            with pytest.raises(InvalidInputError, match=r"another process is writing to .*responses\.jsonl"):
                write(path)
            assert path.read_bytes() == before
            return super().answer(questions)

    write(path, Intruder())
    assert path.read_bytes() == whole
    assert write(path) == len(whole.splitlines())  # the lock ends with its run

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path.unlink()
    monkeypatch.setattr(fcntl, "flock", unsupported)
    write(path)
    assert path.read_bytes() == whole


def test_lines_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"a": 1}\n\n \n{"b": "\xe2\x80\xa8"}\n{"c": 3}')
    lines = list(read_lines(path))
    assert [(line.number, line.entry, line.ended) for line in lines] == [
        (1, {"a": 1}, True),
        (4, {"b": "\u2028"}, True),
        (5, {"c": 3}, False),
    ]
    assert [line.end for line in lines] == [9, 25, 33]
    path.write_bytes(b'{"a": 1}\n{"c": ')
    assert [line.number for line in read_lines(path)] == [1]
