"""Which tokens a drafter drafts."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.training.dataset import Example
from dspark_edge.trainer.training.vocabulary import choose_draft_vocabulary, coverage

# Responses say 5 four times, 9 twice, 2 once; prompts 7 three times and 2 once.
EXAMPLES = (
    Example(np.array([7, 7, 5, 5, 9], dtype=np.int32), 2, "a", "g", False),
    Example(np.array([7, 2, 5, 2, 5, 9], dtype=np.int32), 2, "a", "h", False),
)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [5]),
        (2, [5, 9]),
        (3, [2, 5, 9]),
        (4, [2, 5, 7, 9]),  # what only prompts say comes next
        (6, [0, 1, 2, 5, 7, 9]),  # then the lowest ids
        (10, list(range(10))),
    ],
)
def test_the_commonest_tokens_are_taken(size: int, expected: list[int]) -> None:
    ids = choose_draft_vocabulary(EXAMPLES, 10, size)
    assert ids.tolist() == expected and ids.dtype == np.int64


def test_earlier_answers_count_as_responses() -> None:
    conversation = Example(np.array([7, 3, 3, 3, 7, 7, 4], dtype=np.int32), 6, "a", "g", True, ((1, 3),))
    assert choose_draft_vocabulary((conversation,), 10, 3).tolist() == [3, 4, 7]
    assert coverage((conversation,), 10, np.array([3])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidInputError, match=f"the draft vocabulary is {size}, expected 1 to .* 10 tokens"):
        choose_draft_vocabulary(EXAMPLES, 10, size)


def test_coverage_is_the_share_of_what_responses_say() -> None:
    assert coverage(EXAMPLES, 10, np.array([5])) == 4 / 7
    assert coverage(EXAMPLES, 10, np.array([2, 5, 9])) == 1
    assert coverage(EXAMPLES, 10, np.array([7, 8])) == 0
    assert coverage([], 10, np.array([1])) == 0
