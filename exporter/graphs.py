"""All graphs of a bundle, traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import onnx_ir as ir
from torch import nn

from dspark_edge.engines.manifest import ONNX_RUNTIME_PRECISIONS, GraphSpec, Quantization
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.contracts import drafter_contract, sampler_contracts, target_contract
from dspark_edge.exporter.lowerings import get_lowering
from dspark_edge.exporter.modules.drafter import Drafter
from dspark_edge.exporter.modules.sampler import FilteredAcceptance, GreedyAcceptance, SamplingAcceptance
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.options import ExportOptions
from dspark_edge.exporter.packing import pack_drafter, pack_target
from dspark_edge.exporter.pair import Pair
from dspark_edge.exporter.quantization import weight_formats
from dspark_edge.exporter.tracing import TORCH_DTYPES, GraphContract, trace
from dspark_edge.exporter.weight_rewrites import quantize_graph
from dspark_edge.exporter.weights import Source

__all__ = ["Graph", "Report", "pack_graphs", "resolve_quantization", "shorten_drafter", "trace_graphs"]

Report = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, how much there is."""

_SAMPLERS: Mapping[str, type[nn.Module]] = {
    "sampler_greedy": GreedyAcceptance,
    "sampler": SamplingAcceptance,
    "sampler_filtered": FilteredAcceptance,
}


@dataclass(frozen=True, slots=True)
class Graph:
    """A traced graph, its contract and where its weights come from."""

    model: ir.Model
    contract: GraphContract
    sources: Mapping[str, Source]

    def spec(self, role: str) -> GraphSpec:
        """The graph's entry in the manifest."""
        return GraphSpec(f"{role}.onnx", self.contract.flat_inputs, self.contract.outputs, dict(self.contract.aliases))


def resolve_quantization(pair: Pair, options: ExportOptions) -> Quantization | None:
    """How the bundle's weights are stored, as the manifest says it; None for float ones.

    The target's blocks count as kept where some of them fit. Raises `InvalidInputError` as the options do.
    """
    quantization = options.resolve_quantization(pair.target_config, pair.drafter_config)
    if quantization is None or not options.keep_blocks or options.precision not in ONNX_RUNTIME_PRECISIONS:
        return quantization
    keeping = replace(quantization, kept_blocks=True)
    formats = weight_formats(options.precision, keeping)
    forms = [form for name in pair.target.names() if (form := pair.target.block_form(name)) is not None]
    return keeping if formats is not None and any(map(formats.keeps, forms)) else quantization


def _quantized(graph: Graph, pair: Pair, options: ExportOptions) -> Graph:
    """The graph with the weights that the options ask for."""
    quantization = resolve_quantization(pair, options)
    formats = weight_formats(options.precision, quantization)
    if formats is None or quantization is None:
        return graph
    sources = quantize_graph(graph.model, graph.sources, formats, quantization.accuracy_level)
    return Graph(graph.model, graph.contract, sources)


def _context_shape(drafter: DrafterConfig | None) -> DrafterConfig | None:
    """A drafter as far as a target's graph knows it: those that differ in their heads alone share its trace."""
    if drafter is None:
        return None
    return replace(
        drafter,
        block_size=1,
        mask_token_id=0,
        markov_rank=0,
        markov_head="none",
        confidence=False,
        confidence_with_markov=False,
        draft_vocab_size=None,
        confidence_with_draft_probs=False,
    )


@lru_cache(maxsize=8)
def _traced_target(
    config: DecoderConfig, drafter: DrafterConfig | None, capacity: int, dtype: str, lowering_name: str
) -> tuple[ir.Model, GraphContract]:
    """A target's graph without weights. Exporting it in another precision, or with a drafter of another head, traces it
    no second time. Do not change it."""
    lowering = get_lowering(lowering_name)
    contract = target_contract(config, drafter, "capacity" if lowering.dynamic_capacity else capacity, dtype)
    opset = lowering.opset if drafter is None else lowering.context_opset
    model = trace(lambda: Target(config, drafter, capacity, TORCH_DTYPES[dtype]), contract, lowering, opset)
    return model, contract


@lru_cache(maxsize=8)
def _traced_drafter(
    config: DrafterConfig, candidates: int, pool: int | None, capacity: int, dtype: str, lowering_name: str
) -> tuple[ir.Model, GraphContract]:
    """The same of a drafter."""
    lowering = get_lowering(lowering_name)
    contract = drafter_contract(config, candidates, "capacity" if lowering.dynamic_capacity else capacity, dtype)
    model = trace(lambda: Drafter(config, capacity, candidates, pool, TORCH_DTYPES[dtype]), contract, lowering)
    return model, contract


def _trace_target(pair: Pair, options: ExportOptions, capacity: int) -> Graph:
    config, drafter = pair.target_config, _context_shape(pair.drafter_config)
    model, contract = _traced_target(config, drafter, capacity, options.dtype, options.lowering)
    return _quantized(Graph(model.clone(), contract, pair.target_sources(capacity)), pair, options)


def _trace_drafter(pair: Pair, options: ExportOptions, capacity: int, block_size: int) -> Graph:
    """The drafter's graph for blocks of so many tokens; its weights are the same for all."""
    if pair.drafter_config is None:
        raise RuntimeError("an ngram drafter has no graph")
    config = replace(pair.drafter_config, block_size=block_size)
    candidates, pool = options.resolve_candidates(config), options.resolve_pool(config)
    model, contract = _traced_drafter(config, candidates, pool, capacity, options.dtype, options.lowering)
    return _quantized(Graph(model.clone(), contract, pair.drafter_sources(capacity)), pair, options)


@lru_cache(maxsize=12)
def _trace_sampler(role: str, vocab_size: int, lowering: str) -> ir.Model:
    """A sampler graph; it depends on nothing else, so that exporting many bundles traces it once. Do not change it."""
    return trace(_SAMPLERS[role], sampler_contracts(vocab_size)[role], get_lowering(lowering))


def trace_graphs(pair: Pair, options: ExportOptions, capacity: int, report: Report) -> dict[str, Graph]:
    """Every graph of the bundle by role, the target first."""
    jobs: dict[str, Callable[[], Graph]] = {"target": lambda: _trace_target(pair, options, capacity)}
    if (config := pair.drafter_config) is not None:
        jobs["drafter"] = lambda: _trace_drafter(pair, options, capacity, config.block_size)
    vocabulary = pair.target_config.vocab_size
    for role, contract in sampler_contracts(vocabulary).items():
        jobs[role] = lambda role=role, contract=contract: Graph(  # type: ignore[misc]
            _trace_sampler(role, vocabulary, options.lowering), contract, {}
        )
    graphs: dict[str, Graph] = {}
    for role, job in jobs.items():
        report("tracing", len(graphs), len(jobs))
        graphs[role] = job()
    report("tracing", len(jobs), len(jobs))
    return graphs


def shorten_drafter(graphs: Mapping[str, Graph], pair: Pair, options: ExportOptions, capacity: int) -> dict[str, Graph]:
    """The drafter's graph again for a short block, where the options ask for one; it refers to the other's weights."""
    short = options.resolve_short_block(pair.drafter_config)
    if not short:
        return {}
    graph = _trace_drafter(pair, options, capacity, short)
    weights = graphs["drafter"].model.graph.initializers
    for name in graph.sources:
        graph.model.graph.initializers[name].const_value = weights[name].const_value
    return {"drafter_short": Graph(graph.model, graph.contract, {})}


def pack_graphs(graphs: Mapping[str, Graph], sequences: int, block_size: int) -> dict[str, Graph]:
    """The graphs of target and drafter again, for several sequences in a call.

    Args:
        graphs: traced; the packed ones refer to weights where these do.
        sequences: S, most of them in a call; 0: none are made.
        block_size: γ.
    """
    packed: dict[str, Graph] = {}
    if sequences:
        target = graphs["target"]
        packed["target_packed"] = Graph(*pack_target(target.model, target.contract, sequences), {})
        if (drafter := graphs.get("drafter")) is not None:
            made = pack_drafter(drafter.model, drafter.contract, sequences, block_size)
            packed["drafter_packed"] = Graph(*made, {})
    return packed
