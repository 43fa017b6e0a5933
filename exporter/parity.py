"""Parity: does a bundle compute what its checkpoints say?

The torch modules, in fp32 whatever the bundle's precision, are the reference; an engine runs the bundle's graphs on
the same tokens. A sequence is fed in chunks of uneven width, a block is drafted behind every chunk, and the sampler
graphs judge those drafts, so that every graph is met at several widths and cache lengths, as in decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine, HostArray
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.manifest import Manifest, TensorSpec
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.modules.sampler import FilteredAcceptance, GreedyAcceptance, SamplingAcceptance
from dspark_edge.exporter.pair import Pair, open_pair
from dspark_edge.exporter.parity_reference import DraftCase, Reference, check_fit, chunks, make_reference, run_target
from dspark_edge.exporter.parity_report import (
    LogitComparison,
    LogitShift,
    OutputErrors,
    ParityReport,
    ParityRow,
    render,
)
from dspark_edge.exporter.quantization import weight_formats

__all__ = ["LEAST_AGREEMENT", "TOLERANCES", "ParityReport", "ParityRow", "compare_bundle", "render"]

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1, "w4a16": 2e-2}
"""Precision → largest error, as a fraction of the output's largest magnitude where that is above 1.

fp32 leaves room for another order of summation only. The others are some forty roundings of their type (2⁻¹¹, 2⁻⁸): a
model of a few dozen layers keeps a tenth of that, a wrong graph is off by far more.
"""

_INT8_ACTIVATIONS = 1.5e-1
"""The same where accuracy level 4 rounds activations to int8, block by block: as coarse as bfloat16 (2⁻⁸)."""

LEAST_AGREEMENT: Mapping[str, float] = {"int8": 0.8}
"""Precision → least fraction of positions at which quantised weights choose as fp32 weights do, on random tokens.

Int4 has none: how much it changes is the model's, and a model is far less certain of noise than of text, by which
`compare_on_text` judges.
"""

_DEFAULT_POSITIONS = 54  # three times the widths
_SAMPLERS: Mapping[str, type[nn.Module]] = {
    "sampler_greedy": GreedyAcceptance,
    "sampler": SamplingAcceptance,
    "sampler_filtered": FilteredAcceptance,
}
# A draw at the border between two tokens may fall on either side of it: one judgement in ten may differ.
_SAMPLER_AGREEMENT = 0.9

EngineFactory = Callable[[Bundle], Engine]
Report = Callable[[str, int, int], None]


def compare_bundle(
    bundle: Bundle | str | Path,
    target: str | Path,
    drafter: str | Path,
    *,
    positions: int | None = None,
    seed: int = 0,
    engine_factory: EngineFactory | None = None,
    tolerance: float | None = None,
    layers: bool = False,
    report: Report = lambda what, done, total: None,
) -> ParityReport:
    """Compare a bundle's graphs, run by an engine, with the torch modules of its checkpoints in fp32.

    Where the bundle's weights are quantised, the modules get them as they were rounded, so that the graphs themselves
    are judged; what the rounding changes is reported beside that.

    Args:
        bundle: the bundle, or its folder.
        target: the checkpoint that it was exported from.
        drafter: the same, or "ngram".
        positions: tokens to compare; None: 54, or what the capacity holds.
        seed: of the token ids and the noise.
        engine_factory: makes the engine; None: ONNX Runtime on the CPU.
        tolerance: instead of `TOLERANCES`.
        layers: a row for the keys and values of each layer, in order, and not one for all. They are the first that a
            layer computes, so what is wrong in layer n shows in the rows of layer n (its keys and values) or n + 1.
        report: progress: what is being done, how much of it is done, how much there is.

    Raises:
        MismatchError: the bundle was not made from these checkpoints.
        InvalidInputError: `positions` does not fit the capacity.
        BundleError, CheckpointError, EngineError: see there.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    limit = manifest.limits.capacity - manifest.drafter.block_size
    positions = min(_DEFAULT_POSITIONS, limit) if positions is None else positions
    if not 1 <= positions <= limit:
        raise InvalidInputError(f"positions is {positions}, expected 1 to {limit}, what the bundle's caches hold")
    tolerance = _tolerance(manifest) if tolerance is None else tolerance
    with ExitStack() as stack:
        pair = open_pair(stack, target, drafter)
        check_fit(manifest, pair)
        # The engine first: what it cannot run is known before the weights are read.
        engine = stack.enter_context((engine_factory or OnnxRuntimeEngine)(opened))
        report("torch", 0, 1)
        reference = make_reference(pair, manifest, positions, seed)
        report("torch", 1, 1)
        runner = GraphRunner(engine, positions + manifest.drafter.block_size)
        rows, logits = _compare_models(runner, reference, tolerance, layers, report)
        rows += _compare_packed(runner, reference, tolerance)
        shift = _quantization_shift(pair, manifest, reference, logits)
        samplers = [role for role in _SAMPLERS if role in manifest.graphs]
        for number, role in enumerate(samplers):
            report("samplers", number, len(samplers))
            rows.append(_compare_sampler(runner, reference, role, seed))
        report("samplers", len(samplers), len(samplers))
    return ParityReport(opened.path.name, manifest.lowering, manifest.precision, positions, tuple(rows), shift)


def _tolerance(manifest: Manifest) -> float:
    quantization = manifest.quantization
    if quantization is None or quantization.accuracy_level is None:
        return TOLERANCES[manifest.precision]
    return TOLERANCES["fp32"] if quantization.accuracy_level == 1 else _INT8_ACTIVATIONS


def _quantization_shift(pair: Pair, manifest: Manifest, reference: Reference, logits: HostArray) -> LogitShift | None:
    """What quantising changed about the bundle's logits; None where nothing is quantised."""
    if weight_formats(manifest.precision, manifest.quantization) is None:
        return None
    comparison = LogitComparison()
    token_ids = reference.token_ids[:, :-1]
    slots = token_ids.shape[1] + manifest.drafter.block_size
    expected, _ = run_target(pair, pair.target_sources(slots), manifest, token_ids)
    comparison.add(logits[0], expected[0])
    return comparison.result(LEAST_AGREEMENT.get(manifest.precision, 0.0))


def _compare_models(
    runner: GraphRunner, reference: Reference, tolerance: float, layers: bool, report: Report
) -> tuple[list[ParityRow], HostArray]:
    """Rows of the target's and the drafter's outputs, and the target's logits [1, P, V]."""
    manifest = runner.engine.bundle.manifest
    positions = reference.logits.shape[1]
    logits, parts = OutputErrors("logits"), list[HostArray]()
    drafted = {spec.name: OutputErrors(spec.name) for spec in _draft_outputs(manifest)}
    shortly = {name: OutputErrors(f"short.{name}") for name in drafted} if reference.short_drafts else {}
    drafters = (
        ("drafter", reference.drafts, drafted),
        ("drafter_short", reference.short_drafts, shortly),
    )
    for begin, end in chunks(positions):
        report("engine", begin, positions)
        given, expected = runner.extend(reference.token_ids[:, begin:end]), reference.logits[:, begin:end]
        parts.append(given)
        logits.add(given, expected)
        logits.agree(given.argmax(-1) == expected.argmax(-1))
        anchors = reference.token_ids[:, end]
        for role, cases, errors in drafters:
            for case in cases:
                if case.length == end:
                    _add_draft(errors, runner.draft(anchors, case.temperature, case.noise, role), case)
    report("engine", positions, positions)
    caches: dict[str, OutputErrors] = {}
    for output, name in manifest.graphs["target"].aliases.items():
        prefix, _, kind = output.rpartition(".")
        label = output if layers else f"{prefix.rpartition('.')[0]}.{kind}"
        valid = np.asarray(runner.caches[name].read())[:, :, :positions]
        caches.setdefault(label, OutputErrors(label)).add(valid, reference.caches[name][:, :, :positions], output)
    rows = [errors.row(tolerance) for errors in (logits, *caches.values(), *drafted.values(), *shortly.values())]
    return rows, np.concatenate(parts, axis=1)


def _compare_packed(runner: GraphRunner, reference: Reference, tolerance: float) -> list[ParityRow]:
    """Rows of the packed graphs, where there are any: their sequences run the last tokens, or blocks, again.

    Once all sequences are there, and once the last one is not. Neighbours have different lengths, as far as the
    reference goes: those that were mixed up would not show otherwise.
    """
    manifest = runner.engine.bundle.manifest
    if not manifest.packed_sequences:
        return []
    logits = OutputErrors("packed.logits")
    drafted = {spec.name: OutputErrors(f"packed.{spec.name}") for spec in _draft_outputs(manifest)}
    for absent in (0, 1):
        batch, nothing = manifest.packed_sequences - absent, [0] * absent
        _add_packed_logits(logits, runner, reference, batch, nothing)
        if not drafted:
            continue
        # There are two of each length, drafted greedily and drawn: each sequence takes one of them, by turns.
        backwards = reference.drafts[::-1]
        cases = [backwards[(2 * s + s % 2) % len(backwards)] for s in range(batch)]
        blocks = runner.run_packed(
            "drafter_packed",
            {
                "anchor_ids": np.array([reference.token_ids[0, case.length] for case in cases]),
                "cache_lengths": np.array([case.length for case in cases] + nothing),
                "temperature": np.array([case.temperature for case in cases], np.float32),
                "noise": np.concatenate([case.noise for case in cases]),
            },
        )
        for s, case in enumerate(cases):
            _add_draft(drafted, {name: values[s : s + 1] for name, values in blocks.items()}, case)
    return [errors.row(tolerance) for errors in (logits, *drafted.values())]


def _add_packed_logits(
    errors: OutputErrors, runner: GraphRunner, reference: Reference, batch: int, nothing: list[int]
) -> None:
    """The target's logits of one to three tokens of each of the sequences that are there, each a token shorter."""
    positions = reference.logits.shape[1]
    widths = [min(1 + s % 3, positions) for s in range(batch)]
    ends = [max(positions - s, width) for s, width in enumerate(widths)]
    starts = [end - width for end, width in zip(ends, widths, strict=True)]
    tokens = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    inputs = {
        "input_ids": reference.token_ids[:, tokens],
        "widths": np.array(widths + nothing),
        "cache_lengths": np.array(starts + nothing),
        "logit_rows": np.arange(len(tokens))[None],
    }
    given, expected = runner.run_packed("target_packed", inputs)["logits"], reference.logits[:, tokens]
    errors.add(given, expected)
    errors.agree(given.argmax(-1) == expected.argmax(-1))


def _draft_outputs(manifest: Manifest) -> list[TensorSpec]:
    """What is compared of a block; candidate ids are, with their probabilities."""
    if "drafter" not in manifest.graphs:
        return []
    graph = manifest.graphs["drafter"]
    return [spec for spec in graph.outputs if spec.name not in graph.aliases and spec.name != "candidate_ids"]


def _add_draft(errors: Mapping[str, OutputErrors], given: Mapping[str, HostArray], case: DraftCase) -> None:
    """Compare a block, as far as both sides saw the same draft tokens: each step depends on the one before.

    A draft may differ at a near tie. What must hold is that it is the best of its own candidates, and that their
    probabilities are right; the error of `draft_ids` is by how much another candidate was better.
    """
    expected = case.expected
    where = f"block at {case.length}, temperature {case.temperature:g}"
    same = given["draft_ids"][0] == expected["draft_ids"][0]
    steps = len(same) if same.all() else int(same.argmin()) + 1
    errors["draft_ids"].agree(same[:steps])
    for name in ("confidence_logits", "base_logits"):
        if name in errors:
            compared = steps if name == "confidence_logits" else len(same)
            errors[name].add(given[name][:, :compared], expected[name][:, :compared], where)
    best = [values["base_logits"].argmax(-1) for values in (given, expected)]
    errors["base_logits"].agree(best[0] == best[1])
    for step in range(steps):
        ids, probs = given["candidate_ids"][0, step], given["candidate_probs"][0, step]
        wanted = (expected["candidate_ids"][0, step], expected["candidate_probs"][0, step])
        errors["candidate_probs"].add(*_by_token(ids, probs, *wanted), where)
        scores = np.log(np.maximum(probs, 1e-30)) + case.noise[0, step]
        own = scores[ids == given["draft_ids"][0, step]]
        lead = scores.max() - own[0] if len(own) == 1 else np.inf
        errors["draft_ids"].add(np.array([lead]), np.zeros(1), where)


def _by_token(
    ids: HostArray, probs: HostArray, expected_ids: HostArray, expected_probs: HostArray
) -> tuple[HostArray, HostArray]:
    """Both sides' probabilities of all tokens that either has among its candidates [K].

    A token that only one side has was a near tie with the other's least likely candidate, and counts as that there.
    """
    tokens = np.union1d(ids, expected_ids)
    sides = []
    for side_ids, side_probs in ((ids, probs), (expected_ids, expected_probs)):
        values = np.full(len(tokens), side_probs.min(), np.float64)
        values[np.searchsorted(tokens, side_ids)] = side_probs
        sides.append(values)
    return sides[0], sides[1]


def _judged(reference: Reference, block: int, seed: int) -> Iterator[dict[str, HostArray]]:
    """Inputs of the sampler graphs: rows of target logits, and drafts to judge by them."""
    generator = np.random.default_rng(seed)
    _, positions, vocabulary = reference.logits.shape
    width = min(block, positions - 1)
    for case in reference.drafts or (None,) * 8:
        begin = int(generator.integers(0, positions - width))
        logits = reference.logits[:, begin : begin + width + 1]
        if case is None:  # a drafter without probabilities: often the target's own choice, always certain
            ids = np.where(generator.random((1, block)) < 0.7, logits.argmax(-1)[:, :1], 0).astype(np.int64)
            candidates, probs = ids[..., None], np.ones((1, block, 1), np.float32)
        else:
            ids, candidates = case.expected["draft_ids"], case.expected["candidate_ids"]
            probs = case.expected["candidate_probs"]
        yield {
            "logits": logits,
            "draft_ids": ids,
            "verify_lengths": np.array([width]),
            "candidate_ids": candidates,
            "candidate_probs": probs,
            "accept_uniforms": generator.random((1, width + 1), np.float32),
            "sample_uniforms": generator.random(1, np.float32),
            "temperature": np.array([generator.choice([0.0, 0.7, 1.0])], np.float32),
            "top_k": np.array([generator.choice([0, 5, 40])]),
            "top_p": np.array([generator.choice([0.8, 0.95, 1.0])], np.float32),
            "min_p": np.array([generator.choice([0.0, 0.05])], np.float32),
            "pool": np.array([min(256, vocabulary)]),
        }


@torch.no_grad()
def _compare_sampler(runner: GraphRunner, reference: Reference, role: str, seed: int) -> ParityRow:
    """One row: log-probabilities, and whether accepted length and next token agree. fp32 in every bundle."""
    manifest = runner.engine.bundle.manifest
    graph = manifest.graphs[role]
    errors = OutputErrors(role)
    for inputs in _judged(reference, manifest.drafter.block_size, seed):
        taken = {spec.name: inputs[spec.name] for spec in graph.inputs}
        given = runner.run(role, taken)
        values = _SAMPLERS[role]()(*(torch.from_numpy(np.ascontiguousarray(array)) for array in taken.values()))
        expected = {spec.name: tensor.numpy() for spec, tensor in zip(graph.outputs, values, strict=True)}
        names = expected.keys() - {"log_probs"}
        same = all(np.array_equal(given[name], expected[name]) for name in names)
        errors.agree(np.array([same]))
        if same:
            rows = int(expected["accepted_lengths"][0]) + 1
            errors.add(given["log_probs"][:, :rows], expected["log_probs"][:, :rows])
    return errors.row(TOLERANCES["fp32"], _SAMPLER_AGREEMENT)
