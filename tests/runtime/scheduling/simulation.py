"""Simulated devices and drafters: rounds without a model, for throughput in numbers.

A `World` fixes the luck: the true conditional acceptance of each position of each round, the confidences that the
drafter reports, and a uniform for each that decides. Every policy is run in the same world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_edge.runtime.scheduling import Controller, Offer, Pricing

CONTEXT = 200


@dataclass
class Device:
    """Costs from tables, in milliseconds; `slower` changes them while the simulation runs."""

    by_tokens: Callable[[int], float]  # of a target call with so many tokens (batch x width)
    draft: float
    slower: float = 1.0
    slower_wide: float = 1.0  # of calls with width > 1

    def target_s(self, batch: int, width: int, context: int) -> float:
        return self.by_tokens(batch * width) * self.slower * (self.slower_wide if width > 1 else 1.0)

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        share = 1.0 if block is None else 0.4 + 0.6 * block / 7
        return self.draft * share * self.slower * (1 + 0.1 * (batch - 1))

    def sampler_s(self, batch: int, width: int) -> float:
        return 0.02 * batch * width


def table(values: Sequence[float]) -> Callable[[int], float]:
    """Linear beyond the last step."""
    step = values[-1] - values[-2]
    return lambda tokens: values[tokens - 1] if tokens <= len(values) else values[-1] + step * (tokens - len(values))


DEVICES: dict[str, Callable[[], Device]] = {
    # a tile of 4 tokens at a time: nothing, then a step
    "staircase": lambda: Device(lambda tokens: 10.0 + 3.5 * ((tokens - 1) // 4), draft=1.5),
    # steps that only pay if most of the tile is accepted
    "high stairs": lambda: Device(lambda tokens: 10.0 + 9.0 * ((tokens + 1) // 4), draft=1.0),
    "flat": lambda: Device(lambda tokens: 20.0 + 0.05 * tokens, draft=3.0),
    "fp32": lambda: Device(table([19.7, 23.5, 25.0, 24.5, 25.6, 26.7, 29.2, 31.7]), draft=4.0),
    "steep": lambda: Device(table([6.4, 7.9, 9.4, 10.6, 12.1, 13.6, 15.9, 18.1]), draft=1.0),
    "very steep": lambda: Device(lambda tokens: 5.0 * tokens, draft=1.0),
}


@dataclass
class World:
    """Rounds by index."""

    truth: np.ndarray  # [R, G] conditional acceptance
    confidences: np.ndarray  # [R, G] as reported
    uniforms: np.ndarray  # [R, G]

    def accepted(self, round_: int, length: int) -> int:
        hits = self.uniforms[round_, :length] < self.truth[round_, :length]
        return length if hits.all() else int(hits.argmin())

    def expected(self, round_: int, length: int) -> float:
        """Committed tokens, in the mean over the uniforms."""
        return 1 + float(np.cumprod(self.truth[round_, :length]).sum())


def make_world(
    seed: int,
    means: Sequence[float],
    *,
    rounds: int = 600,
    spread: float = 1.2,
    told: float = 1.0,
    bias: float = 0.0,
) -> World:
    """A drafter whose acceptance varies from round to round (normal in the logit, half of it by the whole round).

    Args:
        means: [G] of a middling round.
        spread: of the logits.
        told: share of that variance which the confidences know; 0: they are the mean always. What they do not know is
            averaged over, so they are calibrated whatever is told.
        bias: added to the confidences' logits: then they are not.
    """
    random = np.random.default_rng(seed)
    size = (rounds, len(means))

    def normal() -> np.ndarray:
        return np.sqrt(0.5) * (random.normal(size=(rounds, 1)) + random.normal(size=size))

    middle = np.log(np.array(means) / (1 - np.array(means)))
    known = middle + spread * np.sqrt(told) * normal()
    hidden = spread * np.sqrt(1 - told)
    truth = sigmoid(known + hidden * normal())
    # the mean of a sigmoid over a normal, by Gauss-Hermite quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    confidences = (sigmoid(known[..., None] + hidden * nodes) * weights).sum(-1) / weights.sum()
    if bias:
        confidences = sigmoid(np.log(confidences / (1 - confidences)) + bias)
    return World(truth, confidences, random.random(size))


def sigmoid(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-values))
    return result


@dataclass
class Log:
    """What happened, round by round."""

    tokens: list[float] = field(default_factory=list)  # expected
    seconds: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    short: list[bool] = field(default_factory=list)

    def rate(self, begin: int = 0, end: int | None = None) -> float:
        return sum(self.tokens[begin:end]) / sum(self.seconds[begin:end])


def run_fixed(world: World, device: Device, length: int, rounds: range, short: int = 0) -> float:
    """Tokens a second of a fixed length, from a short block where it has so many; 0 is plain decoding, undrafted."""
    tokens = sum(world.expected(round_, length) for round_ in rounds)
    seconds = device.target_s(1, 1 + length, CONTEXT) + device.sampler_s(1, 1 + length)
    draft_s = device.draft_s(1, CONTEXT, short if length <= short else None) if length else 0.0
    return tokens / (len(rounds) * (seconds + draft_s))


def best_fixed(world: World, device: Device, rounds: range, short: int = 0) -> float:
    return max(run_fixed(world, device, length, rounds, short) for length in range(world.truth.shape[1] + 1))


def run(
    controller: Controller,
    world: World,
    device: Device,
    *,
    greedy: bool = False,
    tokens: float | None = None,
    informed: bool = True,
    before: Callable[[int], None] = lambda round_: None,
    after: Callable[[int, Log], None] = lambda round_, log: None,
) -> Log:
    """Decode one answer, of all rounds of the world or of so many tokens.

    Args:
        device: what the rounds really cost.
        informed: whether the drafter has confidences.
        before, after: called around every round.
    """
    state, log = controller.join(), Log()
    made = 0
    for round_ in range(len(world.truth)):
        if tokens is not None and made >= tokens:
            break
        before(round_)
        (drafts,) = controller.drafting([state], [CONTEXT])
        block = controller.short_block(state, CONTEXT) if drafts else None
        size = block or world.truth.shape[1]
        row = tuple(world.confidences[round_, :size].tolist()) if informed else None
        offer = Offer(size if drafts else 0, row if drafts else None, CONTEXT, greedy, block)
        plan = controller.plan([state], [offer])
        (length,) = plan.lengths
        accepted = world.accepted(round_, length)
        made += 1 + accepted
        seconds = device.target_s(1, 1 + length, CONTEXT) + device.sampler_s(1, 1 + length)
        if drafts:
            seconds += device.draft_s(1, CONTEXT, block)
        log.tokens.append(world.expected(round_, length))
        log.seconds.append(seconds)
        log.short.append(block is not None)
        log.predicted.append(plan.verify_s + plan.draft_s)
        log.lengths.append(length)
        log.drafted.append(drafts)
        controller.record([state], plan, [accepted])
        after(round_, log)
    return log


def group_seconds(pricing: Pricing, lengths: Sequence[int], drafted: int) -> float:
    seconds = pricing.verify_s(lengths, [CONTEXT] * len(lengths))
    return seconds + (pricing.costs.draft_s(drafted, CONTEXT) if drafted else 0.0)


def run_group(controller: Controller, pricing: Pricing, worlds: Sequence[World], greedy: bool) -> Log:
    """Decode as many requests together as there are worlds, for all of their rounds."""
    states, log = [controller.join() for _ in worlds], Log()
    for round_ in range(len(worlds[0].truth)):
        drafts = controller.drafting(states, [CONTEXT] * len(worlds))
        offers = [
            Offer(world.truth.shape[1] if drafted else 0, tuple(world.confidences[round_].tolist()), CONTEXT, greedy)
            for world, drafted in zip(worlds, drafts, strict=True)
        ]
        plan = controller.plan(states, offers)
        pairs = list(zip(worlds, plan.lengths, strict=True))
        controller.record(states, plan, [world.accepted(round_, length) for world, length in pairs])
        log.tokens.append(sum(world.expected(round_, length) for world, length in pairs))
        log.seconds.append(group_seconds(pricing, plan.lengths, sum(drafts)))
    return log


def best_fixed_group(pricing: Pricing, worlds: Sequence[World]) -> float:
    """Tokens a second of the best length that all requests have in all rounds."""
    rounds, size = worlds[0].truth.shape
    return max(
        sum(world.expected(round_, length) for world in worlds for round_ in range(rounds))
        / (rounds * group_seconds(pricing, [length] * len(worlds), len(worlds) if length else 0))
        for length in range(size + 1)
    )
