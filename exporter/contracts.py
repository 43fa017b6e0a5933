"""The contracts of a bundle's graphs (docs/graph-contracts.md), as data."""

from __future__ import annotations

from collections.abc import Iterator

from dspark_edge.engines.manifest import TensorSpec
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.tracing import GraphContract, Tensors

__all__ = ["drafter_contract", "sampler_contracts", "target_contract"]


def _caches(prefix: str, layers: int, heads: int, capacity: int | str, size: int, dtype: str) -> Tensors:
    return tuple(
        TensorSpec(f"{prefix}.{layer}.{kind}", dtype, ("batch", heads, capacity, size))
        for layer in range(layers)
        for kind in ("key", "value")
    )


def _target_caches(prefix: str, config: DecoderConfig, capacity: int | str, dtype: str) -> Tensors:
    return _caches(prefix, config.num_layers, config.num_key_value_heads, capacity, config.head_dim, dtype)


def _aliases(outputs: Tensors, inputs: Tensors) -> Iterator[tuple[str, str]]:
    for output, given in zip(outputs, inputs, strict=True):
        yield output.name, given.name


def target_contract(
    config: DecoderConfig, drafter: DrafterConfig | None, capacity: int | str, dtype: str
) -> GraphContract:
    """target.onnx: prefill, plain decoding and verification."""
    past = _target_caches("past_key_values", config, capacity, dtype)
    present = _target_caches("present", config, capacity, dtype)
    drafter_past = _target_caches("drafter.past", drafter.backbone, capacity, dtype) if drafter else ()
    drafter_present = _target_caches("drafter.present", drafter.backbone, capacity, dtype) if drafter else ()
    return GraphContract(
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "width")),
            TensorSpec("cache_lengths", "int64", ("batch",)),
            TensorSpec("logit_rows", "int64", ("batch", "rows")),
            past,
            drafter_past,
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "rows", config.vocab_size)),
            *present,
            *drafter_present,
        ),
        aliases=dict([*_aliases(present, past), *_aliases(drafter_present, drafter_past)]),
    )


def drafter_contract(drafter: DrafterConfig, candidates: int, capacity: int | str, dtype: str) -> GraphContract:
    """drafter.onnx: one call drafts a block."""
    backbone, block = drafter.backbone, drafter.block_size
    past = _target_caches("drafter.past", backbone, capacity, dtype)
    present = _target_caches("drafter.present", backbone, capacity, dtype)
    confidence = (TensorSpec("confidence_logits", "float32", ("batch", block)),) if drafter.confidence else ()
    return GraphContract(
        inputs=(
            TensorSpec("anchor_ids", "int64", ("batch",)),
            TensorSpec("cache_lengths", "int64", ("batch",)),
            TensorSpec("temperature", "float32", ("batch",)),
            TensorSpec("noise", "float32", ("batch", block, candidates)),
            past,
        ),
        outputs=(
            TensorSpec("draft_ids", "int64", ("batch", block)),
            *confidence,
            TensorSpec("candidate_ids", "int64", ("batch", block, candidates)),
            TensorSpec("candidate_probs", "float32", ("batch", block, candidates)),
            TensorSpec("base_logits", "float32", ("batch", block, drafter.head_size)),
            *present,
        ),
        aliases=dict(_aliases(present, past)),
    )


def sampler_contracts(vocab_size: int) -> dict[str, GraphContract]:
    """The three sampler graphs by role."""
    judged = (
        TensorSpec("logits", "float32", ("batch", "rows", vocab_size)),
        TensorSpec("draft_ids", "int64", ("batch", "block")),
        TensorSpec("verify_lengths", "int64", ("batch",)),
    )
    drawn = (
        TensorSpec("candidate_ids", "int64", ("batch", "block", "candidates")),
        TensorSpec("candidate_probs", "float32", ("batch", "block", "candidates")),
        TensorSpec("accept_uniforms", "float32", ("batch", "rows")),
        TensorSpec("sample_uniforms", "float32", ("batch",)),
        TensorSpec("temperature", "float32", ("batch",)),
    )
    filters = (
        TensorSpec("top_k", "int64", ("batch",)),
        TensorSpec("top_p", "float32", ("batch",)),
        TensorSpec("min_p", "float32", ("batch",)),
        TensorSpec("pool", "int64", (1,)),
    )
    outputs = (
        TensorSpec("accepted_lengths", "int64", ("batch",)),
        TensorSpec("next_ids", "int64", ("batch",)),
        TensorSpec("log_probs", "float32", ("batch", "rows")),
    )
    covered = TensorSpec("covered", "bool", ("batch",))
    return {
        "sampler_greedy": GraphContract(judged, outputs, {}),
        "sampler": GraphContract((*judged, *drawn), outputs, {}),
        "sampler_filtered": GraphContract((*judged, *drawn, *filters), (*outputs, covered), {}),
    }
