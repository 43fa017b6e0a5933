"""The paper's Appendix A: confidences that tell of later tokens must not decide on earlier ones.

A target and a drafter over three tokens, and a confidence head that says of position 2 whether d_1 is one that the
target likes more than the drafter does. A step in the costs makes verifying d_1 alone unprofitable: a rule that may
look at c_2 verifies d_1 only if it is such a token. Acceptance is that of the reference (accept with probability
min(1, target_probs / draft_probs), the normalised positive part of the difference at a rejection), computed exactly
over all drafts, and simulated for a chi-square test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from dspark_edge.runtime.scheduling import (
    Dense,
    EarlyStop,
    Lagged,
    LookAhead,
    Packed,
    Pricing,
    Proposal,
    Scheduler,
    Serial,
    Static,
    Threshold,
)
from dspark_edge.runtime.scheduling.history import survivals_of

Probs = npt.NDArray[np.float64]

TARGET = np.array([0.5, 0.3, 0.2])
DRAFT = np.array([0.2, 0.3, 0.5])
TOKENS = range(3)
FORECAST = (0.7, 0.5)  # what earlier rounds let expect
LAGGED = (0.8, 0.3)


def target_probs(prefix: Sequence[int]) -> Probs:
    """Depends on the last token, so that a wrong prefix shows."""
    return np.roll(TARGET, prefix[-1]) if prefix else TARGET


def draft_probs(prefix: Sequence[int]) -> Probs:
    return np.roll(DRAFT, prefix[-1]) if prefix else DRAFT


def confidences(draft: Sequence[int]) -> tuple[float, float]:
    """c_1 knows nothing; c_2 is computed from d_1, and gives it away."""
    return 0.7, (0.05, 0.5, 0.95)[(1, 2, 0)[draft[0]]]


def outcome_probs(draft: Sequence[int], length: int, committed: int) -> dict[tuple[int, ...], float]:
    """Chances of the first `committed` tokens, with `length` drafts verified and plain decoding behind the round."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for position in range(committed):
        following: dict[tuple[int, ...], float] = {}
        for path, chance in chances.items():
            target = target_probs(path)
            if position < length and path == tuple(draft[:position]):  # all before it were accepted
                proposed, token = draft_probs(path), draft[position]
                accept = min(1.0, target[token] / proposed[token])
                rest = np.maximum(target - proposed, 0)
                probs = (1 - accept) * rest / rest.sum()
                probs[token] += accept
            else:
                probs = target
            for one in TOKENS:
                extended = (*path, one)
                following[extended] = following.get(extended, 0.0) + chance * float(probs[one])
        chances = following
    return chances


@dataclass(frozen=True)
class Step:
    """The first draft token of a round makes the call twice as dear, the second costs nothing more."""

    plain: float = 1.0
    higher: float = 2.0

    def target_s(self, batch: int, width: int, context: int) -> float:
        return self.plain if batch * width <= batch else self.higher

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return 0.1

    def sampler_s(self, batch: int, width: int) -> float:
        return 0.0


def proposal(draft: Sequence[int], greedy: bool = False) -> Proposal:
    return Proposal(
        survivals_of(confidences(draft)), survivals_of(FORECAST), survivals_of(LAGGED), context=10, greedy=greedy
    )


def exact(choose: Callable[[tuple[int, ...]], int]) -> dict[tuple[int, ...], float]:
    """The distribution of the first two tokens under a rule."""
    total: dict[tuple[int, ...], float] = {}
    for draft in itertools.product(TOKENS, repeat=2):
        chance = float(draft_probs(())[draft[0]] * draft_probs(draft[:1])[draft[1]])
        for path, probability in outcome_probs(draft, choose(draft), 2).items():
            total[path] = total.get(path, 0.0) + chance * probability
    return total


def wanted() -> dict[tuple[int, ...], float]:
    return {(a, b): float(TARGET[a] * target_probs((a,))[b]) for a in TOKENS for b in TOKENS}


def distance(found: dict[tuple[int, ...], float], right: dict[tuple[int, ...], float]) -> float:
    assert sum(found.values()) == pytest.approx(1)
    return sum(abs(found[path] - right[path]) for path in right) / 2


def rule(scheduler: Scheduler, costs: Step, greedy: bool = False) -> Callable[[tuple[int, ...]], int]:
    return lambda draft: scheduler.lengths([proposal(draft, greedy)], Dense(costs), 1.0)[0]


# The search over all lengths is LookAhead, told that the request is greedy when it is not.
DEAR, CHEAP = Step(higher=2.0), Step(higher=1.65)
SOUND: list[Scheduler] = [EarlyStop(), LookAhead(), Lagged(), Threshold(0.5), Static(2)]


@pytest.mark.parametrize("costs", [DEAR, CHEAP, Step(higher=2.3)], ids=["dear", "cheap", "dearer"])
@pytest.mark.parametrize("scheduler", SOUND, ids=lambda one: type(one).__name__)
def test_rules_for_sampling_leave_the_distribution_alone(scheduler: Scheduler, costs: Step) -> None:
    assert distance(exact(rule(scheduler, costs)), wanted()) < 1e-12


def test_the_rules_do_verify_here() -> None:
    drafts = list(itertools.product(TOKENS, repeat=2))
    for scheduler in SOUND:
        assert {rule(scheduler, CHEAP)(draft) for draft in drafts} & {1, 2}, scheduler
    assert {rule(LookAhead(), CHEAP)(draft) for draft in drafts} == {2}  # an end of 2 pays, by the forecast
    assert {rule(EarlyStop(), Step(higher=1.9))(draft) for draft in drafts} == {0}


def test_a_search_over_live_confidences_is_found_out() -> None:
    choose = rule(LookAhead(), DEAR, greedy=True)
    assert {choose(draft) for draft in itertools.product(TOKENS, repeat=2)} == {0, 2}
    assert distance(exact(choose), wanted()) > 0.02


def draw(
    random: np.random.Generator, choose: Callable[[tuple[int, ...]], int], runs: int
) -> dict[tuple[int, ...], int]:
    """Counts of the first two tokens of simulated rounds."""
    counts = dict.fromkeys(wanted(), 0)
    for _ in range(runs):
        first = int(random.choice(3, p=DRAFT))
        draft = (first, int(random.choice(3, p=draft_probs((first,)))))
        path: list[int] = []
        for token in draft[: choose(draft)]:
            target, proposed = target_probs(path), draft_probs(path)
            if random.random() < min(1.0, target[token] / proposed[token]):
                path.append(token)
                continue
            rest = np.maximum(target - proposed, 0)
            path.append(int(random.choice(3, p=rest / rest.sum())))
            break
        while len(path) < 2:
            path.append(int(random.choice(3, p=target_probs(path))))
        counts[path[0], path[1]] += 1
    return counts


def chi_square_p_value(counts: dict[tuple[int, ...], int]) -> float:
    """Of 9 outcomes: 8 degrees of freedom, for which the tail is a finite sum."""
    runs = sum(counts.values())
    half = sum((counts[path] - runs * chance) ** 2 / (runs * chance) for path, chance in wanted().items()) / 2
    return math.exp(-half) * sum(half**power / math.factorial(power) for power in range(4))


@pytest.mark.parametrize("scheduler", [EarlyStop(), LookAhead(), Lagged()], ids=lambda one: type(one).__name__)
def test_simulated_rounds_pass_the_chi_square_test(scheduler: Scheduler) -> None:
    assert chi_square_p_value(draw(np.random.default_rng(7), rule(scheduler, CHEAP), 4000)) > 1e-3


def test_simulated_rounds_of_the_search_fail_it() -> None:
    assert chi_square_p_value(draw(np.random.default_rng(7), rule(LookAhead(), DEAR, greedy=True), 4000)) < 1e-6


# Two requests in a batch.

Choose = Callable[[tuple[int, ...], tuple[int, ...]], Sequence[int]]


def joint_distance(choose: Choose) -> float:
    """How far two requests' first two tokens are from independent draws of the target."""
    drafts = list(itertools.product(TOKENS, repeat=2))
    right = wanted()
    paths = list(right)
    total = np.zeros((len(paths), len(paths)))
    rows = {
        (draft, length): np.array([outcome_probs(draft, length, 2).get(path, 0.0) for path in paths])
        for draft in drafts
        for length in range(3)
    }
    for one, other in itertools.product(drafts, repeat=2):
        chance = math.prod(float(DRAFT[draft[0]] * draft_probs(draft[:1])[draft[1]]) for draft in (one, other))
        lengths = choose(one, other)
        total += chance * np.outer(rows[one, lengths[0]], rows[other, lengths[1]])
    single = np.array([right[path] for path in paths])
    return float(np.abs(total - np.outer(single, single)).sum() / 2)


@pytest.mark.parametrize("kind", [Dense, Serial, Packed])
@pytest.mark.parametrize("scheduler", SOUND, ids=lambda one: type(one).__name__)
def test_two_requests_stay_independent(scheduler: Scheduler, kind: type[Dense] | type[Serial] | type[Packed]) -> None:
    @dataclass(frozen=True)
    class Rising(Step):
        def target_s(self, batch: int, width: int, context: int) -> float:
            return 1.0 + 0.22 * batch * width

    pricing: Pricing = kind(Rising())
    seen = set()

    def choose(one: tuple[int, ...], other: tuple[int, ...]) -> Sequence[int]:
        lengths = scheduler.lengths([proposal(one), proposal(other)], pricing, 1.0)
        seen.add(lengths)
        return lengths

    assert joint_distance(choose) < 1e-12
    assert seen != {(0, 0)}


def test_looking_at_each_other_correlates_two_requests() -> None:
    """Each request's length rests on the *other* draft only. Each answer alone is right, the pair is not."""

    def choose(one: tuple[int, ...], other: tuple[int, ...]) -> Sequence[int]:
        return (1 if other[0] == 0 else 0, 1 if one[0] == 0 else 0)

    assert joint_distance(choose) > 0.01
    right = wanted()
    alone: dict[tuple[int, ...], float] = dict.fromkeys(right, 0.0)
    for one, other in itertools.product(itertools.product(TOKENS, repeat=2), repeat=2):
        chance = math.prod(float(DRAFT[draft[0]] * draft_probs(draft[:1])[draft[1]]) for draft in (one, other))
        for path, probability in outcome_probs(one, choose(one, other)[0], 2).items():
            alone[path] += chance * probability
    assert distance(alone, right) < 1e-12
