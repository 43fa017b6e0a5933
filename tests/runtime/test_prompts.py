"""Prompts files, line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import Message
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts, read_prompt_records


def read(folder: Path, *lines: str) -> list[PromptRecord]:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_prompt_records(path)


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    records = read(
        tmp_path,
        '{"domain": "math", "turns": ["a", "b"], "source": "gsm8k"}',
        "",
        '{"prompt": "c"}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\r',
        '{"domain": "x", "token_ids": [1, 2]}',
    )
    assert records == [
        PromptRecord(1, "math", turns=("a", "b")),
        PromptRecord(3, "default", turns=("c",)),
        PromptRecord(4, "default", messages=(Message("system", "s"), Message("user", "u"))),
        PromptRecord(5, "x", token_ids=(1, 2)),
    ]
    assert [record.num_turns for record in records] == [2, 1, 1, 1]
    assert [record.opening for record in records] == ["a", "c", list(records[2].messages), [1, 2]]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0cfour"
    (record,) = read(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False))
    assert record.turns == (text,)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n', encoding="utf-8")
    assert read_prompt_records(path)[0].turns == ("a",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds list"),
        ("{}", "it holds no prompt"),
        ('{"prompt": 3}', "the prompt is 3"),
        ('{"turns": []}', "'turns' is \\[\\], expected a list that is not empty"),
        ('{"turns": "abc"}', "'turns' is 'abc'"),
        ('{"turns": ["a", 1]}', "the prompt is 1"),
        ('{"messages": [{"role": "user"}]}', "is no object with 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": 1}]}', "a message's content must be a str"),
        ('{"token_ids": []}', "'token_ids' is \\[\\]"),
        ('{"token_ids": [1.5]}', "the token id 1.5 is no whole number"),
        ('{"token_ids": [true]}', "the token id True is no whole number"),
        ('{"token_ids": [-1]}', "the token id -1 is no whole number"),
        ('{"prompt": "a", "domain": 1}', "the domain is 1"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem) as caught:
        read(tmp_path, '{"prompt": "a"}', line)
    assert "prompts.jsonl, line 2: " in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no prompts"):
        read(tmp_path, "", " ")
    with pytest.raises(InvalidInputError, match="cannot read the prompts"):
        read_prompt_records(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(InvalidInputError, match="cannot read the prompts"):
        read_prompt_records(tmp_path / "latin.jsonl")


def test_digests_tell_openings_apart(tmp_path: Path) -> None:
    same = read(
        tmp_path,
        '{"prompt": "a"}',
        '{"turns": ["a", "later"], "domain": "x"}',
        '{"messages": [{"role": "user", "content": "a"}]}',
    )
    other = read(
        tmp_path, '{"prompt": "b"}', '{"token_ids": [97]}', '{"messages": [{"role": "system", "content": "a"}]}'
    )
    assert len({record.digest for record in same}) == 1
    assert len({record.digest for record in [*same, *other]}) == 4
    assert all(len(record.digest) == 16 for record in other)


def test_the_hash_is_of_what_is_said(tmp_path: Path) -> None:
    plain = hash_prompts(read(tmp_path, '{"prompt": "é"}', '{"prompt": "b"}'))
    assert hash_prompts(read(tmp_path, "", '{"prompt": "\\u00e9",  "source": 1}', '{"turns": ["b"]}')) == plain
    assert hash_prompts(read(tmp_path, '{"prompt": "b"}', '{"prompt": "é"}')) != plain
    assert hash_prompts(read(tmp_path, '{"prompt": "é", "domain": "x"}', '{"prompt": "b"}')) != plain
