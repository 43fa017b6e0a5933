"""Responses read back as training sequences, and split by prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.training.dataset import Example, hash_examples, read_examples, split_examples

VOCABULARY = 260


def entry(prompt: int, turn: int = 0, sample: int = 0, **changes: Any) -> dict[str, Any]:
    """A line as `dspark-edge respond` writes it; a later turn's prompt goes on from the one before."""
    return {
        "plan": "p",
        "kind": "response",
        "prompt": prompt,
        "turn": turn,
        "sample": sample,
        "domain": "a",
        "temperature": float(sample),
        "prompt_ids": [prompt + 1, 100, *[101 + sample] * turn],
        "response_ids": [7, 8 + sample, 9],
        **changes,
    }


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in entries))
    return path


def example(group: str, length: int = 5) -> Example:
    return Example(np.arange(length, dtype=np.int32), 2, "a", group, False)


def test_a_response_is_an_example(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [entry(3, domain="math"), entry(3, sample=1), entry(4, kind="prompt")])
    greedy, drawn = read_examples([path], VOCABULARY)
    assert greedy.token_ids.tolist() == [4, 100, 7, 8, 9] and greedy.token_ids.dtype == np.int32
    assert (greedy.prompt_length, greedy.domain, greedy.greedy, len(greedy)) == (2, "math", True, 5)
    assert drawn.token_ids.tolist() == [4, 100, 7, 9, 9] and not drawn.greedy


def test_a_line_needs_only_its_ids(tmp_path: Path) -> None:
    bare = {"prompt_ids": [1], "response_ids": [2, 3]}
    path = write(tmp_path / "r.jsonl", [bare, bare, {**bare, "prompt_ids": [5]}])
    examples = read_examples([path], VOCABULARY)
    assert [each.domain for each in examples] == ["default"] * 3 and not examples[0].greedy
    assert examples[0].group == examples[1].group != examples[2].group


def test_what_cannot_be_drafted_is_left_out(tmp_path: Path) -> None:
    lines = [entry(0, response_ids=[7]), entry(1, response_ids=[]), entry(2), entry(3, prompt_ids=[1] * 9)]
    path = write(tmp_path / "r.jsonl", lines)
    assert [each.prompt_length for each in read_examples([path], VOCABULARY)] == [2, 9]
    # A sequence is cut behind so many tokens, and left out where nothing of its response is left.
    (kept,) = read_examples([path], VOCABULARY, max_length=4)
    assert kept.token_ids.tolist() == [3, 100, 7, 8]
    with pytest.raises(InvalidInputError, match="hold no responses of at least two tokens within 3 tokens"):
        read_examples([path], VOCABULARY, max_length=3)


def test_a_last_line_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    text = json.dumps(entry(0)) + "\n" + json.dumps(entry(1))
    path.write_text(text)
    assert len(read_examples([path], VOCABULARY)) == 2
    path.write_text(text[:-10])
    assert len(read_examples([path], VOCABULARY)) == 1


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds list"),
        ("{}", "'prompt_ids' is None; expected 'prompt_ids' and 'response_ids', lists of token ids"),
        (entry(0, prompt_ids=[]), "'prompt_ids' is empty"),
        (entry(0, prompt_ids="abc"), "'prompt_ids' is 'abc'"),
        (entry(0, response_ids=None), "'response_ids' is None"),
        (entry(0, response_ids=[1, True]), "'response_ids' is \\[1, True\\]"),
        (entry(0, response_ids=[1, 2.0]), "'response_ids' is \\[1, 2.0\\]"),
        (entry(0, response_ids=[1, "2"]), "'response_ids' is \\[1, '2'\\]"),
        (entry(0, response_ids=[1, 260]), "token id 260 in 'response_ids' is outside the target's vocabulary of 260"),
        (entry(0, prompt_ids=[-1]), "token id -1 in 'prompt_ids' is outside"),
        (entry(0, prompt_ids=[1 << 70]), "is outside the target's vocabulary"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: Any, problem: str) -> None:
    text = broken if isinstance(broken, str) else json.dumps(broken)
    # An empty line counts, too: editors number it.
    good, bad = write(tmp_path / "good.jsonl", [entry(0)]), tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(entry(0)) + "\n\n" + text + "\n" + json.dumps(entry(1)) + "\n")
    with pytest.raises(InvalidInputError, match=problem) as caught:
        read_examples([good, bad], VOCABULARY)
    assert f"{bad}, line 3: " in str(caught.value) and "\n" not in str(caught.value)


def test_files_without_responses_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    prompts = write(tmp_path / "prompts.jsonl", [entry(0, kind="prompt"), entry(1, kind="prompt")])
    with pytest.raises(InvalidInputError, match=r"empty\.jsonl, .*prompts\.jsonl hold no responses of at least two"):
        read_examples([empty, prompts], VOCABULARY)
    with pytest.raises(InvalidInputError, match=r"cannot read the responses .*missing\.jsonl: No such file"):
        read_examples([tmp_path / "missing.jsonl"], VOCABULARY)
    with pytest.raises(InvalidInputError, match=r"cannot read the responses .*: Is a directory"):
        read_examples([tmp_path], VOCABULARY)


def test_samples_and_turns_of_a_prompt_are_one_group(tmp_path: Path) -> None:
    lines = [entry(prompt, turn, sample) for prompt in range(6) for turn in range(3) for sample in range(2)]
    numbers = [line["prompt"] for line in lines]
    groups = [each.group for each in read_examples([write(tmp_path / "r.jsonl", lines)], VOCABULARY)]
    assert len(set(groups)) == 6
    assert all(len({g for g, n in zip(groups, numbers, strict=True) if n == number}) == 1 for number in range(6))
    # In another order, and under other numbers in another file, too.
    backwards = read_examples([write(tmp_path / "b.jsonl", lines[::-1])], VOCABULARY)
    assert [each.group for each in backwards] == groups[::-1]
    renamed = [{**line, "plan": "q", "prompt": 50 - line["prompt"]} for line in lines]
    assert [each.group for each in read_examples([write(tmp_path / "q.jsonl", renamed)], VOCABULARY)] == groups
    # Equal numbers of other plans are other prompts.
    other = [{**line, "plan": "q", "prompt_ids": [200, *line["prompt_ids"]]} for line in lines]
    both = read_examples([write(tmp_path / "o.jsonl", lines + other)], VOCABULARY)
    assert len({each.group for each in both}) == 12


def test_a_first_turn_without_response_still_names_the_group(tmp_path: Path) -> None:
    lines = [entry(0, 1, 0), entry(0, 0, 0, response_ids=[7]), entry(9, prompt_ids=[1, 100])]
    later, same = read_examples([write(tmp_path / "r.jsonl", lines)], VOCABULARY)
    assert later.group == same.group


def test_groups_are_held_out_as_a_whole() -> None:
    examples = [example(f"g{index % 50}", 5 + index % 3) for index in range(200)]
    split = split_examples(examples, 0.1)
    held, trained = {each.group for each in split.held_out}, {each.group for each in split.train}
    assert len(held) == 5 and len(trained) == 45 and not held & trained
    assert len(split.held_out) == 20 and len(split.train) == 180
    # Whatever the order in the files.
    again = split_examples(examples[::-1], 0.1)
    assert {each.group for each in again.held_out} == held
    assert split.train == [each for each in examples if each.group in trained]


def test_more_prompts_move_few_to_the_other_side() -> None:
    held = [
        {each.group for each in split_examples([example(f"g{index}") for index in range(count)], 0.1).held_out}
        for count in (100, 110)
    ]
    # A hash decides: those held out of the longer list are those of the shorter one, but for the newcomers.
    assert len(held[0] - held[1]) <= 5 and len(held[1]) == 11


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("groups", [2, 3, 7])
def test_neither_side_is_empty_where_there_are_two_prompts(share: float, groups: int) -> None:
    split = split_examples([example(f"g{index}") for index in range(groups)], share)
    assert split.train and split.held_out and len(split.train) + len(split.held_out) == groups


def test_no_more_is_held_out_than_measuring_needs() -> None:
    examples = [example(f"g{index % 100}") for index in range(1000)]
    split = split_examples(examples, 0.5, most=64)
    assert len(split.held_out) == 60 and set(Counter(each.group for each in split.held_out).values()) == {10}
    assert len(split.train) == 940  # what is not held out is trained on
    # One prompt is held out in any case.
    assert len(split_examples(examples, 0.5, most=3).held_out) == 10


def test_a_split_that_would_be_empty_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"the 3 response\(s\) are to 1 prompt\(s\), expected at least two"):
        split_examples([example("g")] * 3, 0.1)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InvalidInputError, match=r"the held-out share is .*, expected between 0 and 1"):
            split_examples([example("g"), example("h")], share)


def test_the_hash_is_of_what_is_trained_on() -> None:
    first, second = example("g", 5), example("h", 6)
    plain = hash_examples([first, second])
    assert plain == hash_examples([example("x", 5), example("y", 6)]) and len(plain) == 64
    others = [[second, first], [first], [first, second, second], [Example(first.token_ids, 3, "a", "g", True), second]]
    assert plain not in {hash_examples(other) for other in others}


def test_a_conversation_is_trained_on_as_one_sequence(tmp_path: Path) -> None:
    """Where a later turn's prompt repeats what was answered before."""
    said = [1, 100, 7, 8, 9]
    lines = [
        entry(0),
        entry(0, 1, prompt_ids=[*said, 50, 51], response_ids=[4, 5, 6]),
        entry(0, 2, prompt_ids=[*said, 50, 51, 4, 5, 6, 52], response_ids=[2, 3]),
        entry(0, sample=1),  # was sampled, and led to nothing
        entry(5),
    ]
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 4, 3]):
        examples = read_examples([write(tmp_path / "r.jsonl", [lines[index] for index in order])], VOCABULARY)
        (whole,) = (each for each in examples if each.earlier)
        assert len(examples) == 3 and len({each.group for each in examples}) == 2
        assert whole.token_ids.tolist() == [*said, 50, 51, 4, 5, 6, 52, 2, 3]
        assert whole.answers == ((2, 5), (7, 10), (11, 13))
    # Cut behind the second turn, the third is left out and the second takes up the first.
    cut = read_examples([write(tmp_path / "r.jsonl", lines[:3])], VOCABULARY, max_length=11)
    assert [(len(each), each.answers) for each in cut] == [(10, ((2, 5), (7, 10)))]


def test_turns_that_are_not_repeated_stay_sequences_of_their_own(tmp_path: Path) -> None:
    long = entry(0, response_ids=[7, 8, 9, 10])
    halved = entry(0, 1, prompt_ids=[1, 100, 7, 8, 9, 11, 12], response_ids=[4, 5])  # 10 became 11
    other = entry(0, 1, prompt_ids=[1, 100, 7, 8, 3, 10, 12], response_ids=[4, 5])
    (joined,) = read_examples([write(tmp_path / "r.jsonl", [long, halved])], VOCABULARY)
    assert joined.answers == ((2, 5), (7, 9))
    for second in (other, {**halved, "temperature": 1.0}, {**halved, "prompt": 3}):
        apart = read_examples([write(tmp_path / "r.jsonl", [long, second])], VOCABULARY)
        assert [each.earlier for each in apart] == [(), ()]
