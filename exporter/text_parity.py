"""What a bundle makes of real text, beside its checkpoint: perplexity, and how far apart their predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine, HostArray
from dspark_edge.engines.errors import InvalidInputError, MissingDependencyError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.pair import Pair, open_pair
from dspark_edge.exporter.parity_reference import check_fit
from dspark_edge.exporter.parity_report import LogitComparison, TextReport
from dspark_edge.exporter.weights import load_module

__all__ = ["PERPLEXITY_TOLERANCES", "compare_on_text", "tokenize_file"]

PERPLEXITY_TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 2e-2, "int4": 3e-1, "w4a16": 5e-1}
"""Precision → how much a bundle's perplexity may exceed its checkpoint's, as a fraction of that."""

WINDOW = 512
# Rows that get logits at once: of a large vocabulary a whole window's would be gigabytes.
_CHUNK = 64

EngineFactory = Callable[[Bundle], Engine]
Report = Callable[[str, int, int], None]


def tokenize_file(bundle: Bundle, path: str | Path, limit: int | None = None) -> list[int]:
    """The first `limit` token ids of a text file, by the bundle's tokenizer, without special tokens.

    Raises:
        InvalidInputError: the file is no text, or the bundle has no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "reading a text") from error
    source = bundle.path / "tokenizer.json"
    if not source.is_file():
        raise InvalidInputError(
            f"{bundle.path} has no tokenizer.json, so it cannot read a text; export with --tokenizer"
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read as text ({error}); give a UTF-8 file") from None
    ids: list[int] = Tokenizer.from_file(str(source)).encode(text, add_special_tokens=False).ids
    return ids[:limit]


def compare_on_text(
    bundle: Bundle | str | Path,
    target: str | Path,
    drafter: str | Path,
    token_ids: Sequence[int],
    *,
    window: int = WINDOW,
    engine_factory: EngineFactory | None = None,
    tolerance: float | None = None,
    report: Report = lambda what, done, total: None,
) -> TextReport:
    """Perplexity of a bundle and of its checkpoint, in torch and fp32, on the same tokens.

    The text is cut into windows, each read from its own first token on; that one is not predicted.

    Args:
        bundle: the bundle, or its folder.
        target: the checkpoint that it was exported from.
        drafter: the same, or "ngram".
        token_ids: of the text.
        window: tokens that are read together, at most the bundle's capacity.
        engine_factory: makes the engine; None: ONNX Runtime on the CPU.
        tolerance: instead of `PERPLEXITY_TOLERANCES`.
        report: progress.

    Raises:
        InvalidInputError: there are fewer than two tokens, or ids outside the vocabulary.
        MismatchError, BundleError, CheckpointError, EngineError: see there.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    ids = np.asarray(token_ids, np.int64)
    if len(ids) < 2 or ids.min() < 0 or ids.max() >= manifest.target.vocab_size:
        raise InvalidInputError(
            f"{len(ids)} token ids are given; expected at least 2, below the vocabulary of {manifest.target.vocab_size}"
        )
    window = min(window, manifest.limits.capacity)
    tolerance = PERPLEXITY_TOLERANCES[manifest.precision] if tolerance is None else tolerance
    comparison, losses = LogitComparison(), np.zeros(2)
    with ExitStack() as stack:
        pair = open_pair(stack, target, drafter)
        check_fit(manifest, pair)
        engine = stack.enter_context((engine_factory or OnnxRuntimeEngine)(opened))
        runner, module = GraphRunner(engine, window), _TorchTarget(pair, window)
        for begin in range(0, len(ids) - 1, window):
            report("text", begin, len(ids))
            runner.lengths = np.zeros(1, np.int64)
            module.length = 0
            for inputs, following in _chunks(ids[begin : begin + window]):
                sides = runner.extend(inputs)[0, : len(following)], module.extend(inputs)[0, : len(following)]
                comparison.add(*sides)
                losses += [_loss(logits, following) for logits in sides]
        report("text", len(ids), len(ids))
    perplexities = np.exp(losses / comparison.positions)
    return TextReport(comparison.result(), float(perplexities[0]), float(perplexities[1]), tolerance)


def _chunks(window: HostArray) -> Iterator[tuple[HostArray, HostArray]]:
    """Pieces of a window [1, W], each with the tokens that follow its rows; the last row has none."""
    for begin in range(0, len(window) - 1, _CHUNK):
        inputs = window[begin : begin + _CHUNK]
        yield inputs[None], window[begin + 1 : begin + 1 + len(inputs)]


def _loss(logits: HostArray, following: HostArray) -> float:
    """Negative log-likelihood of tokens [R] under logits [R, V], summed, nats."""
    wide = logits.astype(np.float64)
    highest = wide.max(-1)
    normalisers = np.log(np.exp(wide - highest[:, None]).sum(-1)) + highest
    return float((normalisers - wide[np.arange(len(following)), following]).sum())


class _TorchTarget:
    """The checkpoint's target in torch and fp32, with its caches."""

    def __init__(self, pair: Pair, slots: int) -> None:
        with torch.device("meta"):
            module = pair.build_target(slots, torch.float32)
        self.length = 0
        self._module: Target = load_module(module, pair.target_sources(slots))  # type: ignore[assignment]
        self._past = [
            torch.zeros(1, config.num_key_value_heads, slots, config.head_dim)
            for config in (pair.target_config, *([pair.drafter_config.backbone] if pair.drafter_config else []))
            for _ in range(2 * config.num_layers)
        ]
        self._own = 2 * pair.target_config.num_layers

    @torch.no_grad()
    def extend(self, token_ids: HostArray) -> HostArray:
        """Logits of all rows [1, W, V]."""
        width = token_ids.shape[1]
        logits, own, context = self._module(
            torch.from_numpy(token_ids),
            torch.tensor([self.length]),
            torch.arange(width)[None],
            self._past[: self._own],
            self._past[self._own :],
        )
        self._past = [*own, *context]
        self.length += width
        result: HostArray = logits.numpy()
        return result
