"""Costs between and beyond measured points: never falling, aware of staircases, cheap to ask for.

Pure functions on numbers. A grid of measured medians becomes a `CostTable` in three steps:

1. `monotone_fit` moves the medians as little as possible, each by its precision, until no cost falls with batch,
   width or context: more work does not take less time, so where measurements say so it is noise.
2. Widths that were not measured are filled in: on a straight line between their measured neighbours, or, where the
   measured costs are a staircase (`find_tile`), at the level of the step on which the width stands. A matrix product
   that is cut into tiles of rows costs the same up to a tile's edge; a straight line would promise widths just behind
   an edge too cheaply, and a scheduler would pick just these.
3. Batches in between are on a straight line, contexts too, when they are asked for. Beyond what was measured, a cost
   goes on with its last slope; below the narrowest it stays.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["CostModel", "CostTable", "Plane", "find_tile", "fit_table", "isotonic", "monotone_fit"]

Array = npt.NDArray[np.float64]

_TILES = (64, 32, 16, 8, 4, 2)  # rows of the tiles that kernels use; a batch of B divides them by B
_LEAST_JUMP = 0.03  # of the cost in front of it: what a step of a staircase must rise by,
_JUMP_TO_FLATNESS = 3.0  # and by how much more than the costs on any one step differ
_LEAST_WEIGHT = 1e-12  # of a point, against the most precise one
_MOST_PASSES = 100  # of the monotone fit; measured grids take one to three
_CONVERGED = 1e-9  # largest change in a pass, as a share of the largest cost


def isotonic(values: Array, weights: Array) -> Array:
    """The never falling sequence closest to `values` in weighted squares: pool adjacent violators.

    Source: Barlow, Bartholomew, Bremner and Brunk, *Statistical Inference under Order Restrictions* (1972).

    Args:
        values: [n].
        weights: [n], above 0.
    """
    means: list[float] = []
    totals: list[float] = []  # weight of each block
    sizes: list[int] = []
    for mean, total in zip(values.tolist(), weights.tolist(), strict=True):
        size = 1
        while means and means[-1] >= mean:
            other = totals.pop()
            mean = (mean * total + means.pop() * other) / (total + other)
            total += other
            size += sizes.pop()
        means.append(mean)
        totals.append(total)
        sizes.append(size)
    return np.repeat(np.array(means), sizes)


def monotone_fit(values: Array, weights: Array) -> Array:
    """The array closest to `values` in weighted squares that falls along none of its axes.

    Projects on one axis after the other with Dykstra's corrections, which converge to the projection on all of them
    (Dykstra and Robertson, *An Algorithm for Isotonic Regression for Two or More Independent Variables*, 1982).

    Args:
        values: of any shape.
        weights: of the same shape, above 0.
    """
    fitted = values.astype(np.float64)
    corrections = [np.zeros_like(fitted) for _ in range(fitted.ndim)]
    tolerance = _CONVERGED * float(np.abs(fitted).max())
    for _ in range(_MOST_PASSES):
        before = fitted
        for axis in range(fitted.ndim):
            corrected = fitted + corrections[axis]
            fitted = _isotonic_along(axis, corrected, weights)
            corrections[axis] = corrected - fitted
        if float(np.abs(fitted - before).max()) <= tolerance:
            break
    return _rising(fitted)  # what the last pass left in the last digits


def find_tile(widths: Sequence[int], costs: Sequence[float]) -> int:
    """The rows of a tile, where the costs are a staircase with an edge behind every multiple of it; 1 where not.

    A staircase is flat on each step (widths k·tile + 1 … (k + 1)·tile) and rises clearly from every step to the next.
    To tell it from a curve that merely bends once, at least two steps must have been measured at two widths each.

    Args:
        widths: measured, rising.
        costs: of each, never falling.
    """
    return next((tile for tile in _TILES if _is_staircase(tile, widths, costs)), 1)


@dataclass(frozen=True, slots=True)
class Plane:
    """Costs of one batch size by width and context, in seconds; rises in both."""

    contexts: tuple[int, ...]  # [C] rising
    rows: tuple[tuple[float, ...], ...]  # [W, C] of the widths 1 … W
    width_slopes: tuple[float, ...]  # [C] seconds per width beyond W
    context_slopes: tuple[float, ...]  # [W] seconds per token beyond the last context

    def at(self, width: int, context: int) -> float:
        widest = len(self.rows)
        row = self.rows[width - 1 if width < widest else widest - 1]
        cost = _between(self.contexts, row, context)
        beyond = context - self.contexts[-1]
        if beyond > 0:
            cost += beyond * self.context_slopes[width - 1 if width < widest else widest - 1]
        if width > widest:
            cost += (width - widest) * _between(self.contexts, self.width_slopes, context)
        return cost

    def row(self, widest: int, context: int) -> list[float]:
        """Of the widths 1 … widest: the same as `at`, one after the other."""
        contexts, rows = self.contexts, self.rows[:widest]
        index = bisect_right(contexts, context)
        if 0 < index < len(contexts):
            share = (context - contexts[index - 1]) / (contexts[index] - contexts[index - 1])
            costs = [row[index - 1] + (row[index] - row[index - 1]) * share for row in rows]
        elif index == 0:
            costs = [row[0] for row in rows]
        else:
            beyond = context - contexts[-1]
            costs = [row[-1] + beyond * slope for row, slope in zip(rows, self.context_slopes, strict=False)]
        costs += [self.at(width, context) for width in range(len(rows) + 1, widest + 1)]
        return costs


@dataclass(frozen=True, slots=True)
class CostTable:
    """Costs of a graph by batch, width and context."""

    planes: tuple[Plane, ...]  # of the batches 1 … B
    per_sequence: Plane  # seconds for each sequence beyond B

    @property
    def widest(self) -> int:
        """The widest that was measured."""
        return len(self.planes[0].rows)

    def at(self, batch: int, width: int, context: int) -> float:
        """Seconds of a call.

        Raises:
            InvalidInputError: batch or width is below 1.
        """
        if batch < 1 or width < 1:
            raise InvalidInputError(f"a cost was asked for batch {batch} and width {width}; both are at least 1")
        largest = len(self.planes)
        if batch <= largest:
            return self.planes[batch - 1].at(width, context)
        return self.planes[-1].at(width, context) + (batch - largest) * self.per_sequence.at(width, context)

    def row(self, batch: int, widest: int, context: int) -> list[float]:
        """Seconds of calls of the widths 1 … widest; the same as `at`, several times as fast.

        Raises:
            InvalidInputError: the batch is below 1.
        """
        if 1 <= batch <= len(self.planes):
            return self.planes[batch - 1].row(widest, context)
        return [self.at(batch, width, context) for width in range(1, widest + 1)]


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a round of one kind of sampling costs on a device."""

    target: CostTable
    drafter: CostTable  # of the widths that a drafter's blocks have
    sampler: CostTable  # of one context: the sampler does not depend on it

    def target_s(self, batch: int, width: int, context: int) -> float:
        """Seconds of a target call: each of `batch` sequences has `context` cached tokens and runs `width` more."""
        return self.target.at(batch, width, context)

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        """Seconds of a drafter call for `batch` blocks.

        Args:
            block: tokens of each; None: as many as the largest has.
        """
        return self.drafter.at(batch, block or self.drafter.widest, context)

    def target_row(self, batch: int, widest: int, context: int) -> list[float]:
        """`target_s` at the widths 1 … widest."""
        return self.target.row(batch, widest, context)

    def sampler_s(self, batch: int, width: int) -> float:
        """Seconds of acceptance over `width` rows of logits a sequence."""
        return self.sampler.at(batch, width, 0)


def fit_table(
    batches: Sequence[int], widths: Sequence[int], contexts: Sequence[int], medians: Array, deviations: Array
) -> CostTable:
    """A table from a full grid of measurements.

    Args:
        batches, widths, contexts: what was measured, rising.
        medians: [batches, widths, contexts] seconds, not negative.
        deviations: of the same shape: standard errors of the medians, above 0.
    """
    weights = np.maximum((float(deviations.min()) / deviations) ** 2, _LEAST_WEIGHT)
    fitted = monotone_fit(medians, weights)
    filled = np.stack([_fill_widths(widths, costs) for costs in fitted])  # [batches, W, contexts]
    beyond = np.stack([_last_slopes(widths, costs) for costs in fitted])  # [batches, contexts]
    wanted = np.arange(1, batches[-1] + 1)
    # A staircase can be found at one batch and not at the next, so filling in may break the order of batches.
    costs = np.maximum.accumulate(_along_batches(wanted, batches, filled), axis=0)
    slopes = _rising(_along_batches(wanted, batches, beyond))
    context_slopes = _rising(_context_slopes(contexts, costs))
    if len(batches) > 1:
        rise = (costs[-1] - costs[batches[-2] - 1]) / (batches[-1] - batches[-2])
        slopes_rise = (slopes[-1] - slopes[batches[-2] - 1]) / (batches[-1] - batches[-2])
    else:  # at worst sequences run one after another
        rise, slopes_rise = costs[-1] / batches[0], slopes[-1] / batches[0]
    rise, slopes_rise = _rising(rise), _rising(slopes_rise)
    planes = zip(costs, slopes, context_slopes, strict=True)
    return CostTable(
        tuple(_plane(contexts, *plane) for plane in planes),
        _plane(contexts, rise, slopes_rise, _rising(_context_slopes(contexts, rise))),
    )


def _isotonic_along(axis: int, values: Array, weights: Array) -> Array:
    if bool((np.diff(values, axis=axis) >= 0).all()):
        return values
    lines = np.moveaxis(values, axis, -1).copy()
    of_lines = np.moveaxis(weights, axis, -1)
    for index in np.ndindex(lines.shape[:-1]):
        lines[index] = isotonic(lines[index], of_lines[index])
    return np.moveaxis(lines, -1, axis)


def _rising(values: Array) -> Array:
    """The running maximum along every axis: an array that falls along none."""
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


def _is_staircase(tile: int, widths: Sequence[int], costs: Sequence[float]) -> bool:
    steps: dict[int, list[float]] = {}
    for width, cost in zip(widths, costs, strict=True):
        steps.setdefault((width - 1) // tile, []).append(cost)
    levels = list(steps.values())
    if sum(len(level) > 1 for level in levels) < 2:
        return False
    roughness = max(level[-1] - level[0] for level in levels)
    return all(
        after[0] - before[-1] >= max(_LEAST_JUMP * before[-1], _JUMP_TO_FLATNESS * roughness)
        for before, after in pairwise(levels)
    )


def _fill_widths(widths: Sequence[int], costs: Array) -> Array:
    """Costs of the widths 1 … the widest, [W, contexts], from those of the measured widths."""
    tile = find_tile(widths, costs.mean(axis=1).tolist())
    rows = []
    for width in range(1, widths[-1] + 1):
        index = bisect_left(widths, width)
        if index == 0 or widths[index] == width:
            rows.append(costs[index])
            continue
        low, high = widths[index - 1], widths[index]
        if -(-low // tile) != -(-high // tile):  # in steps, rounded up; widths where the tile is 1
            low, width, high = -(-low // tile), -(-width // tile), -(-high // tile)
        share = (width - low) / (high - low)
        rows.append(costs[index - 1] + share * (costs[index] - costs[index - 1]))
    return np.stack(rows)


def _last_slopes(widths: Sequence[int], costs: Array) -> Array:
    """Seconds per width behind the widest, [contexts]."""
    if len(widths) == 1:  # nothing tells how it goes on; at worst in proportion
        proportional: Array = costs[0] / widths[0]
        return proportional
    tile = find_tile(widths, costs.mean(axis=1).tolist())
    last = -(-widths[-1] // tile)
    index = max(index for index, width in enumerate(widths) if -(-width // tile) < last)
    slopes: Array = (costs[-1] - costs[index]) / (tile * (last - -(-widths[index] // tile)))
    return slopes


def _along_batches(wanted: npt.NDArray[np.int64], batches: Sequence[int], costs: Array) -> Array:
    """Costs at every batch size, on straight lines between the measured ones; the first one's below it."""
    flat = costs.reshape(len(batches), -1)
    lines = [np.interp(wanted, batches, line) for line in flat.T]
    return np.stack(lines, axis=1).reshape(len(wanted), *costs.shape[1:])


def _context_slopes(contexts: Sequence[int], costs: Array) -> Array:
    """Seconds per token behind the last context, of costs [..., contexts]; 0 where there is only one."""
    if len(contexts) == 1:
        return np.zeros(costs.shape[:-1])
    slopes: Array = (costs[..., -1] - costs[..., -2]) / (contexts[-1] - contexts[-2])
    return slopes


def _plane(contexts: Sequence[int], costs: Array, width_slopes: Array, context_slopes: Array) -> Plane:
    return Plane(
        tuple(contexts),
        tuple(tuple(row) for row in costs.tolist()),
        tuple(width_slopes.tolist()),
        tuple(context_slopes.tolist()),
    )


def _between(contexts: tuple[int, ...], values: tuple[float, ...], context: int) -> float:
    """A value on the straight line between two contexts; the first or the last one's outside of them."""
    index = bisect_right(contexts, context)
    if index == 0:
        return values[0]
    if index == len(contexts):
        return values[-1]
    low, high = contexts[index - 1], contexts[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (context - low) / (high - low)
