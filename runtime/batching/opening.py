"""From a bundle on an engine and options to the parts of a batch generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.profile_device import Device
from dspark_edge.runtime.batching.executor import ModelExecutor, choose_grouping
from dspark_edge.runtime.batching.grouping import Grouping, SingleGrouping
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.policy import GroupPolicy, GroupScheduling
from dspark_edge.runtime.bit_exact import exact_width
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.scheduled_policy import profiled_costs
from dspark_edge.runtime.scheduling import Costs

__all__ = ["Parts", "assemble", "device_costs"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a batch generator is made of."""

    options: BatchOptions
    executor: ModelExecutor
    policy: GroupPolicy | None  # None: fixed lengths


def device_costs(
    bundle: Bundle, device: Device, mode: str | None, verify_length: int | None
) -> Mapping[str, Costs] | None:
    """What calls cost here by the bundle's profile, where a mode asks for it.

    Args:
        bundle: has the profile.
        device: it runs on.
        mode, verify_length: see `BatchGenerator.open`.

    Raises:
        BundleError: the profile is damaged.
        InvalidInputError: the mode is "scheduled" and there is no valid profile.
    """
    if mode not in (None, "scheduled") or verify_length is not None:
        return None
    return profiled_costs(bundle, device, needed=mode is not None)


def assemble(
    engine: Engine,
    options: BatchOptions,
    mode: str | None,
    verify_length: int | None,
    costs: Costs | Mapping[str, Costs] | None,
) -> Parts:
    """Settle the mode, and make what it needs.

    Args:
        engine: with the bundle.
        options: all but the mode and the verify length.
        mode, verify_length: see `BatchGenerator.open`.
        costs: of calls; None: nothing is known of them.

    Raises:
        BundleError, EngineError, InvalidInputError: see there.
    """
    bundle = engine.bundle
    if mode is None:
        mode = "static" if costs is None or verify_length is not None else "scheduled"
    options = replace(options, mode=mode, verify_length=verify_length)
    drafting = mode != "plain"
    grouping: Grouping
    if options.bit_exact:
        grouping = SingleGrouping(exact_width(bundle.manifest))
    else:
        grouping = choose_grouping(engine, options.execution, options.slots, drafting)
    calibration = Calibration.load(bundle) if drafting else None
    executor = ModelExecutor(engine, options.slots, grouping, drafting, options.chunk, calibration)
    policy: GroupPolicy | None = None
    if mode == "scheduled" and costs is not None:
        policy = GroupScheduling(costs, executor.pricing, bundle.manifest.drafter.block_size, calibration=calibration)
    return Parts(options, executor, policy)
