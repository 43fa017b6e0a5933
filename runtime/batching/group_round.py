"""The round of a group: draft, schedule, verify, accept, commit; `runtime/round.py` for several requests."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from dspark_edge.runtime.batching.executor import Executor
from dspark_edge.runtime.batching.policy import GroupPolicy, Member
from dspark_edge.runtime.round import NO_DRAFT, Request, Round

__all__ = ["decode_group"]


def decode_group(
    requests: Sequence[Request], members: Sequence[Member], executor: Executor, policy: GroupPolicy
) -> list[Round]:
    """Decode one round and commit its tokens to the requests' sequences.

    Args:
        requests: in slots 0 … n − 1; each is cached up to its anchor, and has room for the anchor itself.
        members: the same as the policy sees them.
        executor: target, drafter and acceptance.
        policy: decides who is drafted for, and the verify lengths.

    Returns:
        A record for each request. Times are the group's: every request waits for all of it.
    """
    started = perf_counter()
    decision = policy.decide(members)
    executor.observe(decision.observer)
    decided = perf_counter()
    drafts = executor.draft(requests, decision.drafting) if any(decision.drafting) else [NO_DRAFT] * len(requests)

    drafted = perf_counter()
    lengths = decision.lengths(drafts)
    scheduled = perf_counter()
    verdicts = executor.verify(requests, drafts, lengths)
    verified = perf_counter()

    prediction = decision.prediction()
    decision.learn([verdict.accepted_length for verdict in verdicts])
    records = []
    for request, draft, length, verdict in zip(requests, drafts, lengths, verdicts, strict=True):
        position = request.sequence.cache_length
        accepted = draft.token_ids[: verdict.accepted_length]
        request.sequence.commit((*accepted, verdict.next_id), verdict.log_probs)
        records.append(
            Round(
                position=position,
                draft=draft,
                verify_length=length,
                accepted_length=len(accepted) + 1,
                draft_s=drafted - decided,
                verify_s=verified - scheduled,
                schedule_s=decided - started + scheduled - drafted,
                prediction=prediction,
            )
        )
    return records
