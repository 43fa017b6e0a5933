"""What a round of several requests drafts and verifies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from dspark_edge.engines.profile import SAMPLER_ROLES
from dspark_edge.runtime.batching.drafting import CallObserver
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.round import Draft, Prediction
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduled_policy import kinds_of
from dspark_edge.runtime.scheduling import (
    Controller,
    CorrectedCosts,
    Costs,
    Offer,
    ParkingOptions,
    Plan,
    Pricing,
    Scheduler,
    SequenceState,
)

__all__ = ["Decision", "FixedLengths", "GroupPolicy", "GroupScheduling", "Member"]


@dataclass(frozen=True, slots=True)
class Member:
    """A request in a round."""

    params: SamplingParams
    state: SequenceState | None  # what is remembered of it; None where nothing is scheduled
    context: int  # cached tokens
    room: int  # cache slots behind its anchor's own


class Decision(Protocol):
    """Decides one round of a group."""

    @property
    def drafting(self) -> tuple[bool, ...]:
        """Who is drafted for."""

    @property
    def observer(self) -> CallObserver | None:
        """Who is to be told what the calls take."""

    def lengths(self, drafts: Sequence[Draft]) -> tuple[int, ...]:
        """Verify lengths, each at most the draft and the room."""

    def prediction(self) -> Prediction | None:
        """What the round was expected to take, after `lengths`; None where nothing is known of costs."""

    def learn(self, accepted: Sequence[int]) -> None:
        """How many draft tokens of each request were accepted."""


class GroupPolicy(Protocol):
    """Decides for all requests of an engine, round by round."""

    def join(self, params: SamplingParams, group: int) -> SequenceState | None:
        """The state of a new request.

        Args:
            group: how many are decoded together, the new one included.
        """

    def decide(self, members: Sequence[Member]) -> Decision:
        """Begin a round of these, at least one."""


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """Always verify `length` tokens, as far as there are so many (0 is plain decoding).

    Lossless at any temperature: the length depends on no token.
    """

    length: int

    def join(self, params: SamplingParams, group: int) -> SequenceState | None:
        return None

    def decide(self, members: Sequence[Member]) -> Decision:
        return _Fixed(self.length, tuple(member.room for member in members))


@dataclass(frozen=True, slots=True)
class _Fixed:
    length: int
    rooms: tuple[int, ...]

    @property
    def drafting(self) -> tuple[bool, ...]:
        return tuple(self.length > 0 and room > 0 for room in self.rooms)

    @property
    def observer(self) -> CallObserver | None:
        return None

    def lengths(self, drafts: Sequence[Draft]) -> tuple[int, ...]:
        return tuple(
            min(self.length, room, len(draft.token_ids)) for room, draft in zip(self.rooms, drafts, strict=True)
        )

    def prediction(self) -> Prediction | None:
        return None

    def learn(self, accepted: Sequence[int]) -> None:
        """Nothing to learn."""


class GroupScheduling:
    """The scheduler's decisions for groups.

    Costs depend on how requests are sampled. A group is charged as its dearest member: a round with a filtered request
    as filtered, one with a drawing request as drawing. What is learned of a request goes with it from group to group.

    Args:
        costs: by sampler role, as profiled on this device; those of a single kind serve all.
        pricing: how the engine verifies a group, at given costs.
        block_size: γ.
        scheduler: chooses verify lengths.
        parking: when not to draft.
        calibration: the drafter's; its acceptance is what the first requests start from.
    """

    def __init__(
        self,
        costs: Costs | Mapping[str, Costs],
        pricing: Callable[[Costs], Pricing],
        block_size: int,
        scheduler: Scheduler | None = None,
        parking: ParkingOptions | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        known: Mapping[str, Costs] = costs if isinstance(costs, Mapping) else dict.fromkeys(SAMPLER_ROLES, costs)
        self._kinds = kinds_of(known, pricing, block_size, scheduler, parking, calibration)
        self._rest: _Resting | None = None

    def join(self, params: SamplingParams, group: int) -> SequenceState | None:
        return self._kinds[params.sampler_role].controller.join(group)

    def decide(self, members: Sequence[Member]) -> Decision:
        rest = self._rest
        if rest is not None:
            if rest.left and rest.is_of(members):
                return rest
            rest.end()
            self._rest = None
        present = {member.params.sampler_role for member in members}
        dearest = next(role for role in reversed(SAMPLER_ROLES) if role in present)
        kind = self._kinds[dearest]
        return _Scheduled(kind.controller, kind.costs, members, self._begin_rest)

    def _begin_rest(self, rest: _Resting) -> None:
        self._rest = rest


class _Resting:
    """Rounds of a group that decodes plainly, as in the round before; see `Controller.record`.

    Args:
        controller: is told in the end.
        states: of the group's requests.
        plan: of the round before.
        left: rounds that need no decision.
    """

    observer = None

    def __init__(self, controller: Controller, states: Sequence[SequenceState], plan: Plan, left: int) -> None:
        self._controller, self._states, self._plan = controller, states, plan
        self._prediction = Prediction(plan.draft_s, plan.verify_s, plan.plain_s)
        self.left, self._taken = left, 0
        self.drafting = (False,) * len(states)

    def is_of(self, members: Sequence[Member]) -> bool:
        """Whether these are the same requests."""
        states = self._states
        return len(members) == len(states) and all(
            member.state is state for member, state in zip(members, states, strict=True)
        )

    def lengths(self, drafts: Sequence[Draft]) -> tuple[int, ...]:
        return self._plan.lengths

    def prediction(self) -> Prediction | None:
        return self._prediction

    def learn(self, accepted: Sequence[int]) -> None:
        self.left -= 1
        self._taken += 1

    def end(self) -> None:
        """Tell the controller."""
        if self._taken:
            self._controller.rested(self._states, self._taken)


class _Scheduled:
    """One round of a group; see `Controller`.

    Args:
        begin_rest: is given the rounds that follow, where they need no decision.
    """

    def __init__(
        self,
        controller: Controller,
        costs: CorrectedCosts,
        members: Sequence[Member],
        begin_rest: Callable[[_Resting], None],
    ) -> None:
        started = perf_counter()
        self._begin_rest = begin_rest
        self._controller, self._costs, self._members = controller, costs, members
        self._states = [member.state for member in members if member.state is not None]
        self._contexts = [member.context for member in members]
        wanted = controller.drafting(self._states, self._contexts)
        if any(wanted):
            wanted = tuple(wants and member.room > 0 for wants, member in zip(wanted, members, strict=True))
        self._drafting = wanted
        self._plan: Plan | None = None
        self._spent_s = perf_counter() - started

    @property
    def drafting(self) -> tuple[bool, ...]:
        return self._drafting

    @property
    def observer(self) -> CallObserver | None:
        return self._costs

    def lengths(self, drafts: Sequence[Draft]) -> tuple[int, ...]:
        if not any(self._drafting):  # most rounds where drafting does not pay: nothing is to be weighed
            self._plan = self._controller.plain(self._contexts)
            return self._plan.lengths
        started = perf_counter()
        offers = [
            Offer(
                min(len(draft.token_ids), member.room),
                draft.confidences,
                member.context,
                member.params.greedy,
            )
            for draft, member in zip(drafts, self._members, strict=True)
        ]
        self._plan = self._controller.plan(self._states, offers)
        self._spent_s += perf_counter() - started
        return self._plan.lengths

    def prediction(self) -> Prediction | None:
        plan = self._plan
        return None if plan is None else Prediction(plan.draft_s, plan.verify_s, plan.plain_s)

    def learn(self, accepted: Sequence[int]) -> None:
        plan = self._plan
        if plan is None:
            return
        started = perf_counter()
        rest = self._controller.record(self._states, plan, accepted)
        if plan.proposals:
            self._controller.observe_overhead(self._spent_s + perf_counter() - started)
        if rest:
            self._begin_rest(_Resting(self._controller, self._states, plan, rest))
