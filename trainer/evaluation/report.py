"""An evaluation's report: its numbers with all that is needed to understand and repeat them. docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspark_edge.engines.bundle import Bundle
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts
from dspark_edge.runtime.reporting.circumstances import machine_facts, versions_of
from dspark_edge.trainer.evaluation.evaluate import Difference, Evaluation, EvaluationOptions
from dspark_edge.trainer.evaluation.measures import Measures, measure

__all__ = ["EvaluationReport", "make_report"]

SCHEMA_VERSION = 1
_PACKAGES = ("dspark-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers")


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What `dspark-edge evaluate` says."""

    bundle: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    overall: Measures
    domains: Mapping[str, Measures]  # in the order of the prompts
    differences: tuple[Difference, ...]
    skipped_turns: int

    @property
    def repeated_prompts(self) -> int:
        """Evaluated prompts that the calibration was fitted on."""
        return self.calibration["repeated_prompts"] if self.calibration else 0

    @property
    def lossless(self) -> bool | None:
        """Whether all answers are those of plain decoding; None where that was not, or cannot be, compared."""
        if self.overall.different_answers is None or self.settings["temperature"] > 0:
            return None
        return not self.differences

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = []
        if self.lossless is False:
            found.append(f"{len(self.differences)} of {self.overall.turns} answers differ from plain decoding")
        if self.repeated_prompts:
            found.append(
                f"the calibration was fitted on {self.repeated_prompts} of these {self.overall.prompts} prompts: its "
                "calibrated figures are too good; evaluate on others"
            )
        if self.skipped_turns:
            found.append(f"{self.skipped_turns} later turns did not fit the bundle's capacity and are left out")
        return found

    def to_json(self) -> dict[str, Any]:
        """The report's JSON, as docs/evaluation.md describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "bundle": dict(self.bundle),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "calibration": dict(self.calibration) if self.calibration else None,
            "overall": self.overall.to_json(),
            "domains": {name: measures.to_json() for name, measures in self.domains.items()},
            "lossless": self.lossless,
            "differences": [asdict(difference) for difference in self.differences],
            "skipped_turns": self.skipped_turns,
            "warnings": self.warnings,
        }


def make_report(
    evaluation: Evaluation,
    bundle: Bundle,
    records: Sequence[PromptRecord],
    options: EvaluationOptions,
    engine: Mapping[str, Any],
) -> EvaluationReport:
    """Measure an evaluation, overall and by domain.

    Args:
        evaluation: the answers.
        bundle: what gave them.
        records: the prompts.
        options: how they were answered.
        engine: more settings to name, such as the engine.
    """
    calibrated = evaluation.calibration is not None
    names = dict.fromkeys(record.domain for record in records)
    domains = {name: [result for result in evaluation.results if result.record.domain == name] for name in names}
    settings = {
        "prompts": len(records),
        "prompts_sha256": hash_prompts(records),
        **asdict(options),
        "verify_length": options.verify_length or evaluation.block_size,
        **engine,
    }
    return EvaluationReport(
        bundle=_bundle_facts(bundle),
        settings=settings,
        versions=versions_of(_PACKAGES),
        machine=machine_facts(),
        calibration=_calibration(evaluation.calibration, records, options.temperature),
        overall=measure(evaluation.results, evaluation.block_size, calibrated),
        domains={name: measure(results, evaluation.block_size, calibrated) for name, results in domains.items()},
        differences=tuple(evaluation.differences),
        skipped_turns=evaluation.skipped_turns,
    )


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "target": manifest.provenance.target,
        "drafter": manifest.provenance.drafter,
        "drafter_kind": manifest.drafter.kind,
        "block_size": manifest.drafter.block_size,
        "confidence": manifest.drafter.confidence,
        "lowering": manifest.lowering,
        "precision": manifest.precision,
        "created_at": manifest.provenance.created_at,
    }


def _calibration(
    calibration: Calibration | None, records: Sequence[PromptRecord], temperature: float
) -> dict[str, Any] | None:
    if calibration is None:
        return None
    known = set(calibration.data.prompt_digests)
    return {
        "method": calibration.method,
        "sampling_temperatures": [fit.sampling_temperature for fit in calibration.fits],
        **asdict(calibration.at(temperature)),
        "data_sha256": calibration.data.sha256,
        "prompts": calibration.data.prompts,
        "repeated_prompts": sum(record.digest in known for record in records),
    }
