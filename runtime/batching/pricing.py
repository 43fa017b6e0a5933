"""What serial verification charges when plain steps share a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_edge.runtime.scheduling import Costs, Ladder, Proposal
from dspark_edge.runtime.scheduling.costs import verification_row

__all__ = ["SerialDrafts", "Shared"]

_NEAR = 128  # cached tokens within which contexts cost as good as the same


@dataclass(frozen=True, slots=True)
class SerialDrafts:
    """Costs where the drafter runs once for each request."""

    costs: Costs

    def target_s(self, batch: int, width: int, context: int) -> float:
        return self.costs.target_s(batch, width, context)

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return batch * self.costs.draft_s(1, context, block)

    def sampler_s(self, batch: int, width: int) -> float:
        return self.costs.sampler_s(batch, width)


class Shared:
    """Requests that verify nothing share one call at width 1; every other one has a call of its own.

    A shared call costs little more for eight requests than for one, so what a request saves by leaving it depends on
    how many others leave. A ladder for each request has one price a rung, though. It is made for the number of leavers
    that is best by the *forecasts*: each is credited the mean saving of so many. The forecasts are of earlier rounds,
    so the prices are constants of the round, as the schedulers' proofs of losslessness need them.

    Args:
        costs: of calls; `draft_s(batch, …)` of drafting one after another.
    """

    def __init__(self, costs: Costs) -> None:
        self._base = costs
        self._costs = SerialDrafts(costs)

    @property
    def costs(self) -> Costs:
        return self._costs

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        if not any(lengths):
            return self._shared_s(len(lengths), max(contexts))
        pairs = list(zip(lengths, contexts, strict=True))
        staying = [context for length, context in pairs if length == 0]
        return self._shared_s(len(staying), max(staying, default=0)) + sum(
            self._alone_s(length, context) for length, context in pairs if length > 0
        )

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        return len(contexts), 1, max(contexts)

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """One for each request. Their seconds add up to the group's where as many leave as was forecast, or none."""
        batch, context = len(proposals), max(one.context for one in proposals)
        shared = [self._shared_s(size, context) for size in range(batch + 1)]
        alone = self._alone_rows(proposals)
        leaving = max(_best_leavers([one.expected for one in proposals], alone, shared), 1)
        saving = (shared[batch] - shared[batch - leaving]) / leaving
        share = shared[batch] / batch
        return tuple(
            Ladder(
                extends=((index,),) * len(one.survivals),
                gains=one.survivals,
                expected=one.expected,
                seconds=(share, *(share - saving + seconds for seconds in of_one)),
            )
            for index, (one, of_one) in enumerate(zip(proposals, alone, strict=True))
        )

    def _shared_s(self, batch: int, context: int) -> float:
        return self._base.target_s(batch, 1, context) + self._base.sampler_s(batch, 1) if batch else 0.0

    def _alone_rows(self, proposals: Sequence[Proposal]) -> list[list[float]]:
        """By request, [n] seconds of verifying 1 … n tokens in a call of its own.

        Contexts that are close are priced alike: a row takes longer to find than all that is decided with it.
        """
        widest = 1 + max(len(one.survivals) for one in proposals)
        rows: dict[int, list[float]] = {}
        found: list[list[float]] = []
        for one in proposals:
            count = len(one.survivals)
            if not count:
                found.append([])
                continue
            row = rows.get(near := one.context // _NEAR)
            if row is None:
                row = rows[near] = verification_row(self._base, 1, widest, one.context)
            found.append(row[1 : 1 + count])
        return found

    def _alone_s(self, length: int, context: int) -> float:
        return self._base.target_s(1, 1 + length, context) + self._base.sampler_s(1, 1 + length)


def _best_leavers(
    expected: Sequence[Sequence[float]], alone: Sequence[Sequence[float]], shared: Sequence[float]
) -> int:
    """How many requests would best leave the shared call, by the tokens a second that the forecasts promise.

    Args:
        expected: by request, [n] survivals as forecast.
        alone: by request, [n] seconds of verifying 1 … n tokens.
        shared: [B + 1] seconds of a call for so many.
    """
    batch = len(expected)
    rate = batch / shared[batch]  # of plain decoding; what a second is worth at least
    best = []  # of each request that has a draft: the most that leaving is worth, its call paid
    for survivals, seconds in zip(expected, alone, strict=True):
        total, worths = 0.0, []
        for survival, price in zip(survivals, seconds, strict=True):
            total += survival
            worths.append(total - rate * price)
        if worths:
            best.append(max(worths))
    best.sort(reverse=True)
    leavers, most, worth = 0, -rate * shared[batch], 0.0
    for count, value in enumerate(best, start=1):
        worth += value
        if worth - rate * shared[batch - count] > most:
            leavers, most = count, worth - rate * shared[batch - count]
    return leavers
