"""Confidence-scheduled decoding of single requests: the scheduler's decisions, as rounds ask for them.

`scheduling/` decides from numbers; here the numbers come from rounds and go back: confidences of drafts, observed
times for the costs, what was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.profile import SAMPLER_ROLES, Profile, stale_reasons
from dspark_edge.engines.profile_device import Device
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.round import Draft, Prediction, Round
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduling import (
    Controller,
    CorrectedCosts,
    Costs,
    FixedWidth,
    LookAhead,
    Offer,
    ParkingOptions,
    Plan,
    Pricing,
    Scheduler,
    Serial,
)

__all__ = ["Kind", "ScheduledPolicy", "StreamScheduling", "kinds_of", "mean_conditionals", "profiled_costs"]


def mean_conditionals(calibration: Calibration | None, temperature: float) -> tuple[float, ...] | None:
    """[γ] mean conditional acceptance by position on the calibration's prompts; None without a calibration.

    A position is judged in as many rounds as the one before it was accepted in, so the numbers of samples tell. The
    last position has no successor: it is taken to be accepted as often as the one before it.
    """
    if calibration is None:
        return None
    fit = min(calibration.fits, key=lambda one: abs(one.sampling_temperature - temperature))
    samples = fit.samples
    if not samples or samples[0] == 0:
        return None
    means = [after / before if before else 0.0 for before, after in pairwise(samples)]
    means.append(means[-1] if means else 0.5)
    return tuple(min(max(mean, 0.01), 0.999) for mean in means)


def profiled_costs(bundle: Bundle, device: Device, *, needed: bool) -> Mapping[str, Costs] | None:
    """The costs of a bundle's profile of a device, by sampler role; None where there is no valid one.

    Raises:
        BundleError: the profile is damaged.
        InvalidInputError: there is no valid one and it is needed.
    """
    profile = Profile.load(bundle, device)
    reasons = stale_reasons(profile, device, bundle) if profile is not None else ("it has not been measured here",)
    if profile is not None and not reasons:
        return {role: profile.of_sampler(role) for role in SAMPLER_ROLES}
    if not needed:
        return None
    raise InvalidInputError(
        f"mode 'scheduled' needs to know what {bundle.path.name} costs on this device, but {'; '.join(reasons)}; "
        f"run: dspark-edge profile {bundle.path}"
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests whose rounds cost alike: one kind of sampler."""

    controller: Controller
    costs: CorrectedCosts


def kinds_of(
    costs: Mapping[str, Costs],
    pricing: Callable[[Costs], Pricing],
    block_size: int,
    scheduler: Scheduler | None,
    parking: ParkingOptions | None,
    calibration: Calibration | None,
    short_block: int = 0,
) -> dict[str, Kind]:
    """A controller, with costs that follow the machine, for each kind of sampler that costs are given of.

    Args:
        costs: by sampler role, as profiled on this device.
        pricing: how the engine verifies requests, at given costs.
        block_size: γ.
        scheduler: chooses verify lengths; None: the default.
        parking: when not to draft; None: the default.
        calibration: the drafter's; its acceptance is what the first requests start from.
        short_block: tokens of the drafter's short block; 0: it has none.
    """
    kinds = {}
    for role, profiled in costs.items():
        corrected = CorrectedCosts(profiled)
        controller = Controller(
            scheduler or LookAhead(),
            pricing(corrected),
            block_size,
            parking or ParkingOptions(),
            mean_conditionals(calibration, 0.0 if role == "sampler_greedy" else 1.0),
            corrected.target_doubt,
            short_block,
        )
        kinds[role] = Kind(controller, corrected)
    return kinds


class StreamScheduling:
    """What is known of an engine's rounds; makes a policy for each request.

    Args:
        costs: by sampler role (`sampler_greedy`, `sampler`, `sampler_filtered`), as profiled on this device.
        block_size: γ.
        scheduler: chooses verify lengths.
        parking: when not to draft.
        calibration: the drafter's; its acceptance is what the first request starts from.
        width: tokens of every verification, in bit-exact mode; None: as many as there are to verify.
        short_block: tokens of the drafter's short block; 0: it has none.
    """

    def __init__(
        self,
        costs: Mapping[str, Costs],
        block_size: int,
        scheduler: Scheduler | None = None,
        parking: ParkingOptions | None = None,
        calibration: Calibration | None = None,
        width: int | None = None,
        short_block: int = 0,
    ) -> None:
        self.width = width
        pricing: Callable[[Costs], Pricing] = Serial if width is None else partial(FixedWidth, width=width)
        self._kinds = kinds_of(costs, pricing, block_size, scheduler, parking, calibration, short_block)

    @classmethod
    def of_device(
        cls, bundle: Bundle, device: Device, *, needed: bool, width: int | None = None
    ) -> StreamScheduling | None:
        """By the bundle's profile of a device and its calibration; None where there is no valid profile.

        Raises:
            BundleError: profile or calibration are damaged.
            InvalidInputError: there is no valid profile and it is needed.
        """
        costs = profiled_costs(bundle, device, needed=needed)
        if costs is None:
            return None
        return cls(
            costs,
            bundle.manifest.drafter.block_size,
            calibration=Calibration.load(bundle),
            width=width,
            short_block=bundle.manifest.short_block_size,
        )

    def policy(self, params: SamplingParams) -> ScheduledPolicy:
        """For one request."""
        kind = self._kinds[params.sampler_role]
        return ScheduledPolicy(kind.controller, kind.costs, params.greedy, self.width)


class ScheduledPolicy:
    """The policy of one request; see `round.Policy`.

    Lossless at any temperature: see `scheduling/schedulers.py`. What is learned of a round serves later ones only.

    Args:
        controller, costs: of the request's kind.
        greedy: temperature 0.
        width: tokens of every verification; None: as many as there are to verify.
    """

    def __init__(self, controller: Controller, costs: CorrectedCosts, greedy: bool, width: int | None = None) -> None:
        self._controller, self._costs, self._greedy, self._width = controller, costs, greedy, width
        self._states = (controller.join(),)
        self._plan: Plan | None = None
        self._prediction: Prediction | None = None
        self._rest = 0  # rounds to come that are as the last one was
        self._rested = 0  # that the controller was not told of
        self._block: int | None = None  # tokens of the draft of this round; None: a whole block's

    def draft_length(self, context: int) -> int:
        if self._rest:
            return 0
        if self._rested:
            self._controller.rested(self._states, self._rested)
            self._rested = 0
        if not self._controller.drafting(self._states, (context,))[0]:
            return 0
        self._block = self._controller.short_block(self._states[0], context)
        return self._block or self._controller.block_size

    def verify_length(self, draft: Draft, room: int, context: int) -> int:
        if self._rest:
            return 0
        offer = Offer(min(len(draft.token_ids), room), draft.confidences, context, self._greedy, self._block)
        plan = self._controller.plan(self._states, (offer,))
        self._plan, self._prediction = plan, Prediction(plan.draft_s, plan.verify_s, plan.plain_s)
        return plan.lengths[0]

    def predicted_s(self) -> Prediction | None:
        return self._prediction

    def learn(self, record: Round) -> None:
        if self._rest:
            self._rest -= 1
            self._rested += 1
            return
        if self._plan is None:
            return
        started = perf_counter()
        if record.drafted:
            self._costs.observe_draft(1, record.position, record.draft_s, self._block)
        width = self._width or 1 + record.verify_length
        self._costs.observe_verification(1, width, record.position, record.verify_s)
        self._rest = self._controller.record(self._states, self._plan, (record.accepted_length - 1,))
        if record.drafted:
            self._controller.observe_overhead(record.schedule_s + perf_counter() - started)
