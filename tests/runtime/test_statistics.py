"""Sums over the rounds of many requests."""

from __future__ import annotations

import pytest

from dspark_edge.runtime.round import NO_DRAFT, Draft, Prediction, Round
from dspark_edge.runtime.statistics import EngineTally


def round_of(accepted: int, verified: int, prediction: Prediction | None = None, drafted: bool = True) -> Round:
    return Round(
        position=10,
        draft=Draft((1, 2, 3)) if drafted else NO_DRAFT,
        verify_length=verified,
        accepted_length=accepted,
        draft_s=0.01 if drafted else 0.0,
        verify_s=0.04,
        schedule_s=0.001,
        prediction=prediction,
    )


def test_what_requests_share_counts_once() -> None:
    tally = EngineTally()
    tally.add_prefill(0.5)
    expected = Prediction(0.01, 0.05, 0.03)
    tally.add_step((round_of(3, 2, expected), round_of(1, 2, expected)), 0.06)
    tally.add_step((round_of(1, 0, Prediction(0.0, 0.04, 0.03), drafted=False),), 0.05)
    tally.end_request(7, 5)
    found = tally.result()
    assert (found.requests, found.prompt_tokens, found.new_tokens) == (1, 7, 5)
    assert (found.steps, found.rounds, found.committed_tokens, found.draft_tokens) == (2, 3, 5, 4)
    assert found.drafted_rounds == 2 and found.mean_concurrency == 1.5
    assert found.mean_accepted_length == pytest.approx(5 / 3)
    assert (found.prefill_s, found.decode_s) == (0.5, pytest.approx(0.11))
    assert (found.draft_s, found.verify_s) == (pytest.approx(0.01), pytest.approx(0.08))
    assert found.tokens_per_second == pytest.approx(5 / 0.11)
    assert found.verify_length_counts == (1, 0, 2) and found.accepted_by_position == (1, 1)
    assert found.parked_share == pytest.approx(0.04 / 0.09)
    # Plain decoding would have needed two steps of 0.03 s for the four tokens, and one for the fifth.
    assert found.plain_s == pytest.approx(2 * 0.03 + 0.03)
    assert found.speedup == pytest.approx(0.09 / (0.01 + 0.08 + 0.002))
    assert found.predicted_s == pytest.approx(0.10)
    assert found.prediction_error == pytest.approx((0.06 / 0.05 - 1 + 0.0) / 2)


def test_a_step_without_prediction_leaves_nothing_to_compare() -> None:
    tally = EngineTally()
    assert tally.result().tokens_per_second == 0 and tally.result().speedup is None
    tally.add_step((round_of(2, 1),), 0.05)
    tally.add_step((round_of(2, 1, Prediction(0.01, 0.04, 0.03)),), 0.05)
    found = tally.result()
    assert found.plain_s is None and found.predicted_s is None and found.speedup is None
    assert found.to_json()["spec_decode_num_accepted_tokens_per_pos_0"] == 2
