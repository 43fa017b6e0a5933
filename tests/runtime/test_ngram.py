from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_edge.runtime.ngram import NgramIndex


def reference_continuation(token_ids: list[int], smallest: int, largest: int, length: int) -> tuple[int, ...]:
    """Prompt lookup, spelled out: longest run first, its latest earlier occurrence."""
    for size in range(largest, smallest - 1, -1):
        if size > len(token_ids):
            continue
        suffix = token_ids[-size:]
        for start in range(len(token_ids) - size - 1, -1, -1):
            if token_ids[start : start + size] == suffix:
                return tuple(token_ids[start + size : start + size + length])
    return ()


def test_the_latest_occurrence_of_the_longest_run_is_continued() -> None:
    index = NgramIndex(1, 3)
    token_ids = [1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3]
    index.extend(token_ids)
    assert index.continuation(token_ids, 2) == (9, 5)  # after 1 2 3; the later 2 3 8 is a shorter run
    assert index.continuation(token_ids, 1) == (9,)


def test_nothing_is_drafted_for_what_was_never_seen() -> None:
    index = NgramIndex(1, 3)
    index.extend([1, 2, 3])
    assert index.continuation([1, 2, 3], 4) == ()


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 2), st.integers(0, 2), st.integers(1, 4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_growing_token_by_token_equals_searching_the_whole(
    token_ids: list[int], smallest: int, extra: int, length: int
) -> None:
    index = NgramIndex(smallest, smallest + extra)
    for end in range(1, len(token_ids) + 1):
        seen = token_ids[:end]
        index.extend(seen)
        expected = reference_continuation(seen, smallest, smallest + extra, length)
        assert index.continuation(seen, length) == expected
