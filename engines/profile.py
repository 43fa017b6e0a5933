"""A device's profile: what target, drafter and sampler of a bundle cost there, as measured.

`dspark-edge profile` writes it to `devices/<fingerprint>/profile.json` in the bundle; whoever schedules asks it for
seconds. How costs between measured points come about is in `profile_costs.py`, and in words in `docs/profile.md`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import Manifest, UtcTime
from dspark_edge.engines.profile_costs import CostModel, CostTable, fit_table
from dspark_edge.engines.profile_device import Device, changes
from dspark_edge.engines.records import Count, Positive, Record, matching
from dspark_edge.engines.replace_file import replace_file, write_problem

__all__ = [
    "PROFILE_NAME",
    "SAMPLER_ROLES",
    "SCHEMA_VERSION",
    "CostPoint",
    "Profile",
    "SamplerRole",
    "check_writable",
    "graphs_digest",
    "profile_name",
    "stale_reasons",
]

SCHEMA_VERSION = 1
PROFILE_NAME = "profile.json"

SamplerRole = Literal["sampler_greedy", "sampler", "sampler_filtered"]
SAMPLER_ROLES: tuple[SamplerRole, ...] = get_args(SamplerRole)

_REQUIRED = ("target", "drafter", "sampler_greedy", "sampler")
# Drawing, the drafter needs random numbers, which the host makes; of a full vocabulary they are no small matter.
_ROLES = (*_REQUIRED, "drafter_drawing", "sampler_filtered")
_ADVICE = "measure it anew with `dspark-edge profile`"
# A median is known no better than to this share of it, however often it was measured and however alike the samples.
_LEAST_DEVIATION = 0.01
_LARGEST = 1e9  # seconds of a call, or its spread: what is beyond was not measured


def _not_negative(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
        raise BundleError(f"{where} is {json.dumps(value, default=repr):.60}; expected a number of at least 0")
    return float(value)


NotNegative = Annotated[float, _not_negative]


@dataclass(frozen=True, slots=True)
class CostPoint(Record):
    """A measured cost."""

    batch: Positive  # sequences in the call
    width: Positive  # tokens, or rows of logits, of each; of the drafter, its block
    context: Count  # cached tokens of each; 0 for the sampler, which does not depend on them
    median_s: NotNegative
    spread: NotNegative  # interquartile range, as a share of the median
    samples: Positive

    @property
    def deviation_s(self) -> float:
        """Standard error of the median, seconds, as of normally distributed samples; above 0."""
        spread = self.spread / 1.349  # a normal distribution's interquartile range is 1.349 deviations
        share = 1.2533 * math.hypot(spread, _LEAST_DEVIATION) / math.sqrt(self.samples)
        return max(self.median_s * share, 1e-12)


# Not slotted: the tables are made once, when they are first asked for, and kept in the instance.
@dataclass(frozen=True)
class Profile(Record):
    """What a bundle's rounds cost on a device.

    Its own costs are those of greedy rounds; `of_sampler` has those of every kind.
    """

    schema_version: Positive
    measured_at: UtcTime
    tool_version: str  # of dspark-edge
    bundle: Annotated[str, matching(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")]  # see `graphs_digest`
    device: Device
    points: Mapping[str, tuple[CostPoint, ...]]  # role, one of target, drafter, drafter_drawing, sampler… → points

    @classmethod
    def load(cls, bundle: Bundle, device: Device) -> Profile | None:
        """The bundle's profile for a device; None where it has none. May be stale: see `stale_reasons`.

        Raises:
            BundleError: it is damaged, or of a newer version.
        """
        name = profile_name(device)
        if not bundle.has(name):
            return None
        where = str(bundle.path / name)
        data = bundle.read_json(name, _ADVICE)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is int and version > SCHEMA_VERSION:
            newer = f"{where} was made by a newer version (schema {version}); upgrade dspark-edge"
            raise BundleError(f"{newer}, or {_ADVICE}")
        try:
            return cls.from_json(data, where)
        except BundleError as error:
            raise BundleError(f"{error}; {_ADVICE}") from error

    def save(self, bundle: Bundle) -> Path:
        """Write it into the bundle, under its device; what was there is replaced.

        Returns:
            The file.

        Raises:
            BundleError: it cannot be written; what was there before still is.
        """
        path = _path(bundle, self.device)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, self.to_text().encode())
        return path

    def to_text(self) -> str:
        """The text of `profile.json`."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    def of_sampler(self, role: SamplerRole) -> CostModel:
        """Costs of rounds that end in this sampler: greedy, drawing, or drawing with filters.

        Filtered rounds count as drawing where the bundle had no `sampler_filtered`.
        """
        return self._models[role]

    def target_s(self, batch: int, width: int, context: int) -> float:
        """Seconds of a target call: each of `batch` sequences has `context` cached tokens and runs `width` more."""
        return self._models["sampler_greedy"].target_s(batch, width, context)

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        """Seconds of a greedy drafter call for `batch` blocks of so many tokens; None: of the largest that it has."""
        return self._models["sampler_greedy"].draft_s(batch, context, block)

    def sampler_s(self, batch: int, width: int) -> float:
        """Seconds of greedy acceptance over `width` rows of logits a sequence."""
        return self._models["sampler_greedy"].sampler_s(batch, width)

    @cached_property
    def _models(self) -> Mapping[SamplerRole, CostModel]:
        # What drafts of more sequences cost is measured only where one call makes them.
        batches = {point.batch for point in self.points["target"]}
        tables = {role: _table(points, batches) for role, points in self.points.items()}
        drawing = tables.get("drafter_drawing", tables["drafter"])
        filtered = tables.get("sampler_filtered", tables["sampler"])
        return {
            "sampler_greedy": CostModel(tables["target"], tables["drafter"], tables["sampler_greedy"]),
            "sampler": CostModel(tables["target"], drawing, tables["sampler"]),
            "sampler_filtered": CostModel(tables["target"], drawing, filtered),
        }

    def _check(self, where: str) -> None:
        for role in _REQUIRED:
            if role not in self.points:
                raise BundleError(f"{where}.points: the role {role!r} is missing")
        for role, points in self.points.items():
            at = f"{where}.points.{role}"
            if role not in _ROLES:
                raise BundleError(f"{at} is not one of the roles {', '.join(_ROLES)}")
            if not points:
                raise BundleError(f"{at} is empty")
            grid = [(point.batch, point.width, point.context) for point in points]
            if (problem := _grid_problem(grid)) is not None:
                raise BundleError(f"{at}: {problem}")
            if role.startswith("sampler") and len({point.context for point in points}) > 1:
                raise BundleError(f"{at} has points of several contexts; expected one")


def profile_name(device: Device) -> str:
    """The name of a device's profile in a bundle."""
    return f"devices/{device.fingerprint}/{PROFILE_NAME}"


def graphs_digest(manifest: Manifest) -> str:
    """The sha256 of what a manifest records of its graphs and their weights: what a profile was measured of."""
    graphs = {role: graph.to_json() for role, graph in manifest.graphs.items()}
    prefixes = tuple(graph.file for graph in manifest.graphs.values())  # of "target.onnx", and of "target.onnx.data"
    hashes = {record.path: record.sha256 for record in manifest.files if record.path.startswith(prefixes)}
    return hashlib.sha256(json.dumps([graphs, hashes], sort_keys=True).encode()).hexdigest()


def stale_reasons(profile: Profile, device: Device, bundle: Bundle) -> tuple[str, ...]:
    """Why a profile may no longer hold, a sentence each; empty where nothing that matters has changed.

    Args:
        profile: measured some time ago.
        device: as it is now (`probe_device`).
        bundle: as it is now.
    """
    reasons = changes(profile.device, device)
    if profile.bundle != graphs_digest(bundle.manifest):
        reasons = ("the graphs of the bundle are not those that were measured", *reasons)
    return reasons


def check_writable(bundle: Bundle, device: Device) -> None:
    """Raise before a measurement, not behind it, where its profile cannot be written. Leaves nothing behind.

    Raises:
        BundleError: it cannot be written.
    """
    path = _path(bundle, device)
    probe = path.with_name(f".{path.name}.probe-{os.getpid()}")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(probe, "xb"):
                probe.unlink()
        finally:
            with suppress(OSError):  # only empty folders go, which are those that were made here
                path.parent.rmdir()
                path.parent.parent.rmdir()


def _path(bundle: Bundle, device: Device) -> Path:
    name = profile_name(device)
    bundle.has(name)  # raises where a link leads outside the bundle
    return bundle.path / name


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(write_problem(path, error)) from error


def _grid_problem(grid: Sequence[tuple[int, int, int]]) -> str | None:
    """What is wrong with the (batch, width, context) of a role's points; None where nothing is.

    Each batch has a full grid of widths and contexts, and none has what the smallest has not.
    """
    if len(set(grid)) < len(grid):
        return "a cost stands there twice"
    smallest = min(batch for batch, _, _ in grid)
    _, first_widths, first_contexts = _axes(grid, smallest)
    for batch in sorted({batch for batch, _, _ in grid}):
        count, widths, contexts = _axes(grid, batch)
        if len(widths) * len(contexts) != count:
            return (
                f"batch {batch} has {count} points, expected one for each of {len(widths)} widths x {len(contexts)} "
                "contexts"
            )
        if not widths <= first_widths or not contexts <= first_contexts:
            return f"batch {batch} has widths or contexts that batch {smallest} has not"
    return None


def _axes(grid: Sequence[tuple[int, int, int]], batch: int) -> tuple[int, set[int], set[int]]:
    """Points of a batch, its widths, its contexts."""
    of_batch = [(width, context) for one, width, context in grid if one == batch]
    return len(of_batch), {width for width, _ in of_batch}, {context for _, context in of_batch}


def _table(points: tuple[CostPoint, ...], wanted: Set[int]) -> CostTable:
    """A role's table, of the batches that were measured and those that are wanted."""
    measured = {(point.batch, point.width, point.context): point for point in points}
    of_points, widths, contexts = (sorted(set(axis)) for axis in zip(*measured, strict=True))
    batches = sorted({*of_points, *(batch for batch in wanted if batch > of_points[0])})
    grid = {
        (batch, width, context): _cost(measured, of_points[0], batch, width, context)
        for batch in batches
        for width in widths
        for context in contexts
    }
    cells = np.array([[[grid[b, w, c] for c in contexts] for w in widths] for b in batches])  # [B, W, C, 2]
    return fit_table(batches, widths, contexts, cells[..., 0], cells[..., 1])


def _cost(
    measured: Mapping[tuple[int, int, int], CostPoint], smallest: int, batch: int, width: int, context: int
) -> tuple[float, float]:
    """Seconds of a call and their deviation, as measured, or derived from the smallest batch's.

    A width that a larger batch lacks is run by one sequence after another. With contexts that it lacks it grows like
    as many small ones: attention is each sequence's own.
    """
    if (point := measured.get((batch, width, context))) is not None:
        return point.median_s, point.deviation_s
    one, times = measured[smallest, width, context], batch / smallest
    shorter = [c for b, w, c in measured if (b, w) == (batch, width) and c < context]
    if not shorter:
        return times * one.median_s, times * one.deviation_s
    known, from_one = measured[batch, width, max(shorter)], measured[smallest, width, max(shorter)]
    rise = times * (one.median_s - from_one.median_s)
    return known.median_s + max(rise, 0.0), math.hypot(known.deviation_s, times * one.deviation_s)
