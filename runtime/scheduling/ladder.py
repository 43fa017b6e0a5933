"""A round's candidates, and the order in which verification may be extended to them.

A `Proposal` is what is known of one request's draft: how likely it is that its first k tokens are all accepted, by its
own confidences and by what earlier rounds let expect. A `Ladder` lines the draft tokens of one or more requests up:
rung k adds some of them to what is verified, and has a price. A schedule is then one number a ladder, the rung to
stop at; which tokens a rung adds, and what it costs, follows from what the engine charges (`pricing.py`).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Ladder", "Proposal"]

# Both are made anew in every round; a frozen dataclass would take three times as long to make.


class Proposal(NamedTuple):
    """One request in a round. All rows have as many positions as can be verified; none where nothing was drafted."""

    survivals: tuple[float, ...]  # [n] chance that drafts 1 … k are all accepted, by live confidences; never rises
    expected: tuple[float, ...]  # [n] the same as forecast from earlier rounds only
    lagged: tuple[float, ...]  # [n] live survivals of two rounds ago, else the forecast; () where no rule asks for it
    context: int  # cached tokens
    greedy: bool  # temperature 0: the draft is a function of the text, nothing in it is drawn
    block: int | None = None  # tokens that the drafter was run for, all of a group alike; None: of a whole block


class Ladder(NamedTuple):
    """Draft tokens in the order of their admission. Rung 0 verifies none."""

    extends: tuple[tuple[int, ...], ...]  # [n] the requests, by index in the group, that rung k gives one more token
    gains: tuple[float, ...]  # [n] tokens that rung k is expected to commit, by live confidences
    expected: tuple[float, ...]  # [n] the same by the forecasts
    seconds: tuple[float, ...]  # [n + 1] of verification that ends at rung 0 … n

    def add_lengths(self, rung: int, lengths: list[int]) -> None:
        """Add the verify lengths of stopping at `rung` to `lengths`, one for each request of the group."""
        if not rung:
            return
        if self.extends[rung - 1] is self.extends[0]:  # one tuple for all rungs, where none of the requests ends before
            for request in self.extends[0]:
                lengths[request] += rung
            return
        for requests in self.extends[:rung]:
            for request in requests:
                lengths[request] += 1
