"""From a bundle on an engine and options to the parts of a batch generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime.batching.executor import ModelExecutor, choose_grouping
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.policy import GroupPolicy, GroupScheduling
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.scheduled_policy import profiled_costs
from dspark_edge.runtime.scheduling import Costs

__all__ = ["Parts", "assemble"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a batch generator is made of."""

    options: BatchOptions
    executor: ModelExecutor
    policy: GroupPolicy | None  # None: fixed lengths


def assemble(
    engine: OnnxRuntimeEngine,
    options: BatchOptions,
    mode: str | None,
    verify_length: int | None,
    costs: Costs | Mapping[str, Costs] | None,
    provider: str,
) -> Parts:
    """Settle the mode, and make what it needs.

    Args:
        engine: with the bundle.
        options: all but the mode and the verify length.
        mode, verify_length, costs: see `BatchGenerator.open`.
        provider: as the engine was opened with; it is part of a device.

    Raises:
        BundleError, EngineError, InvalidInputError: see there.
    """
    bundle = engine.bundle
    if costs is None and mode in (None, "scheduled") and verify_length is None:
        device = probe_device(provider, engine.threads)
        costs = profiled_costs(bundle, device, needed=mode is not None)
    if mode is None:
        mode = "static" if costs is None or verify_length is not None else "scheduled"
    options = replace(options, mode=mode, verify_length=verify_length)
    grouping = choose_grouping(engine, options.execution)
    drafting = mode != "plain"
    calibration = Calibration.load(bundle) if drafting else None
    executor = ModelExecutor(engine, options.slots, grouping, drafting, options.prefill_chunk, calibration)
    policy: GroupPolicy | None = None
    if mode == "scheduled" and costs is not None:
        policy = GroupScheduling(costs, executor.pricing, bundle.manifest.drafter.block_size, calibration=calibration)
    return Parts(options, executor, policy)
