"""An evaluation's report as tables of text: what the terminal shows, and the HTML report repeats."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_edge.runtime.reporting.text_table import TextTable, number, share
from dspark_edge.trainer.evaluation.measures import ConfidenceMeasures, Measures
from dspark_edge.trainer.evaluation.report import EvaluationReport

__all__ = ["tables"]


def tables(report: EvaluationReport) -> list[TextTable]:
    """Domains, positions and depths, as far as there is something to show."""
    found = [_domains(report), _positions(report.overall)]
    if report.overall.raw is not None:
        found.append(_confidences(report.overall.raw, report.overall.calibrated, report.overall.samples_by_position))
    found.append(_depths(report.overall))
    return [table for table in found if table.rows]


def _domains(report: EvaluationReport) -> TextTable:
    header = ("domain", "prompts", "rounds", "τ", "accepted", "tokens/s", "plain", "speed-up", "ECE", "calibrated")
    named = [*report.domains.items(), ("overall", report.overall)]
    return TextTable("By domain", header, tuple(_domain(name, measures) for name, measures in named))


def _domain(name: str, measures: Measures) -> tuple[str, ...]:
    plain, raw, calibrated = measures.plain_speed, measures.raw, measures.calibrated
    return (
        name,
        str(measures.prompts),
        str(measures.rounds),
        number(measures.accepted_length),
        share(measures.acceptance_rate),
        number(measures.speed.total, 1),
        number(plain.total if plain else None, 1),
        number(measures.speedup) + ("" if measures.speedup is None else " ×"),
        share(raw.ece if raw else None),
        share(calibrated.ece if calibrated else None),
    )


def _positions(measures: Measures) -> TextTable:
    rows = zip(
        measures.acceptance_by_position,
        measures.rounds_by_position,
        measures.conditional_acceptance_by_position,
        measures.samples_by_position,
        strict=True,
    )
    return TextTable(
        "By position in the draft",
        ("position", "accepted", "of rounds", "given those before", "of samples"),
        tuple(
            (str(position), share(accepted), str(rounds), share(conditional), str(samples))
            for position, (accepted, rounds, conditional, samples) in enumerate(rows, start=1)
        ),
    )


def _confidences(raw: ConfidenceMeasures, calibrated: ConfidenceMeasures | None, samples: Sequence[int]) -> TextTable:
    def cells(measures: ConfidenceMeasures, index: int) -> tuple[str, ...]:
        return (
            share(measures.ece_by_position[index]),
            share(measures.ece_noise_by_position[index]),
            share(measures.survival_ece_by_position[index]),
            number(measures.brier_by_position[index], 3),
        )

    header = ["position", "samples", "AUROC", "ECE", "chance", "survival", "Brier"]
    if calibrated is not None:
        header += ["calibrated: ECE", "chance", "survival", "Brier"]
    rows = []
    for index, count in enumerate(samples):
        row = [str(index + 1), str(count), number(raw.auroc_by_position[index], 3), *cells(raw, index)]
        rows.append((*row, *(cells(calibrated, index) if calibrated is not None else ())))
    return TextTable("Confidence, where all drafts before were accepted", tuple(header), tuple(rows))


def _depths(measures: Measures) -> TextTable:
    rows = tuple(
        (
            f"{depth.begin} …" if depth.end is None else f"{depth.begin} … {depth.end - 1}",
            str(depth.rounds),
            number(depth.accepted_length),
            share(depth.acceptance_rate),
            share(depth.first_position_acceptance),
        )
        for depth in measures.acceptance_by_depth
    )
    return TextTable("By depth in the context", ("anchor", "rounds", "τ", "accepted", "first position"), rows)
