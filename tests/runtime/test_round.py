"""The round on a scripted model: no weights, every rejection position."""

from __future__ import annotations

import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.round import NO_DRAFT, Draft, FixedLength, Request, decode_round
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.sequence import Sequence

from .scripted import ScriptedDrafter, ScriptedVerifier, scripted_next

PROMPT = [3, 1, 4, 1, 5]


def make_request(prompt: list[int] = PROMPT) -> Request:
    return Request(Sequence(list(prompt), len(prompt), len(prompt) - 1), SamplingParams(), RandomStream(0))


def plain(length: int) -> list[int]:
    token_ids = list(PROMPT)
    while len(token_ids) < length:
        token_ids.append(scripted_next(token_ids))
    return token_ids


@pytest.mark.parametrize("right", range(6))
def test_a_rejection_at_every_position_gives_the_plain_tokens(right: int) -> None:
    request, verifier = make_request(), ScriptedVerifier()
    rounds = [decode_round(request, verifier, ScriptedDrafter(right), FixedLength(5)) for _ in range(10)]
    assert [one.accepted_length for one in rounds] == [right + 1] * 10
    assert request.sequence.token_ids == plain(len(request.sequence.token_ids))
    assert len(request.sequence.token_ids) == len(PROMPT) + 10 * (right + 1)


@pytest.mark.parametrize("verify_length", range(6))
def test_the_verify_length_bounds_what_is_sent_and_accepted(verify_length: int) -> None:
    request, verifier = make_request(), ScriptedVerifier()
    record = decode_round(request, verifier, ScriptedDrafter(right=5), FixedLength(verify_length))
    assert (record.verify_length, record.accepted_length) == (verify_length, verify_length + 1)
    assert record.drafted == (5 if verify_length else 0)  # what would not be verified is not drafted
    assert verifier.widths == [verify_length + 1]
    assert request.sequence.token_ids == plain(len(PROMPT) + verify_length + 1)


def test_without_a_drafter_a_round_is_a_plain_step() -> None:
    request, verifier = make_request(), ScriptedVerifier()
    record = decode_round(request, verifier, None, FixedLength(0))
    assert (record.drafted, record.verify_length, record.accepted_length) == (0, 0, 1)
    assert verifier.widths == [1]


def test_a_block_that_would_pass_the_capacity_is_shortened() -> None:
    request, verifier = make_request(), ScriptedVerifier(capacity=len(PROMPT) + 8)
    accepted = []
    while request.sequence.cache_length < verifier.capacity:
        record = decode_round(request, verifier, ScriptedDrafter(right=5), FixedLength(5))
        accepted.append(record.accepted_length)
    assert accepted == [6, 3]  # the last round has room for the anchor and two drafts
    assert request.sequence.token_ids == plain(len(request.sequence.token_ids))


def test_the_last_slot_is_decoded_plainly_without_asking_the_drafter() -> None:
    class Unwanted(ScriptedDrafter):
        def draft(self, request: Request, length: int = 0) -> Draft:
            raise AssertionError("there is no room for a draft")

    request, verifier = make_request(), ScriptedVerifier(capacity=len(PROMPT))
    assert decode_round(request, verifier, Unwanted(5), FixedLength(5)).verify_length == 0


def test_a_fixed_length_takes_what_there_is() -> None:
    policy = FixedLength(4)
    assert policy.draft_length(0) == 4
    assert policy.verify_length(Draft((1, 2, 3, 4, 5)), 10, 0) == 4
    assert policy.verify_length(Draft((1, 2)), 10, 0) == 2
    assert policy.verify_length(Draft((1, 2, 3, 4, 5)), 3, 0) == 3
    assert policy.verify_length(NO_DRAFT, 10, 0) == 0
    assert FixedLength(0).draft_length(0) == 0


def test_committing_caches_everything_but_the_anchor() -> None:
    sequence = Sequence([1, 2, 3], 3, 2)
    sequence.commit((4, 5), (-0.5, -0.25))
    assert (sequence.token_ids, sequence.cache_length, sequence.anchor) == ([1, 2, 3, 4, 5], 4, 5)
    assert (sequence.new_ids, sequence.num_new, sequence.log_probs) == ([4, 5], 2, [-0.5, -0.25])


def test_rolling_back_drops_tokens_and_frees_their_slots() -> None:
    sequence = Sequence([1, 2, 3], 3, 2)
    sequence.commit((4, 5, 6), (-1.0, -2.0, -3.0))
    sequence.rollback_to(4)
    assert (sequence.token_ids, sequence.cache_length, sequence.log_probs) == ([1, 2, 3, 4], 4, [-1.0])
    sequence.rollback_to(2)
    assert (sequence.token_ids, sequence.prompt_length, sequence.cache_length, sequence.log_probs) == ([1, 2], 2, 2, [])


@pytest.mark.parametrize("length", [-1, 4])
def test_rolling_back_to_what_is_not_there_is_an_error(length: int) -> None:
    with pytest.raises(InvalidInputError, match=f"cannot roll back to {length}"):
        Sequence([1, 2, 3], 3, 2).rollback_to(length)
