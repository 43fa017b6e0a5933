"""The reference of parity: the torch modules of a bundle's checkpoints, in fp32, on some tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
import torch
from torch import nn

from dspark_edge.engines.engine import HostArray
from dspark_edge.engines.errors import MismatchError
from dspark_edge.engines.manifest import Manifest
from dspark_edge.exporter.pair import Pair
from dspark_edge.exporter.quantization import DequantizedSource, weight_formats
from dspark_edge.exporter.weights import Source, load_module

__all__ = ["DraftCase", "Reference", "check_fit", "chunks", "make_reference", "run_target"]

_WIDTHS = (13, 1, 4)


@dataclass(frozen=True, slots=True)
class DraftCase:
    """One call of the drafter and what torch makes of it."""

    length: int  # the anchor's position
    temperature: float
    noise: HostArray  # [1, γ, K]
    expected: Mapping[str, HostArray]


@dataclass(frozen=True, slots=True)
class Reference:
    """What torch computes."""

    token_ids: HostArray  # [1, P + 1] int64; the last is only ever an anchor
    logits: HostArray  # [1, P, V]
    caches: Mapping[str, HostArray]  # by the names of the target graph's inputs, [1, heads, P + γ, D]
    drafts: tuple[DraftCase, ...]
    short_drafts: tuple[DraftCase, ...]  # of the short drafter's graph, where there is one


def check_fit(manifest: Manifest, pair: Pair) -> None:
    """Raise `MismatchError` unless the bundle can have been made from these checkpoints."""
    facts, config, drafter = manifest.target, pair.target_config, pair.drafter_config
    kind = "ngram" if drafter is None else "dspark"
    compared: list[tuple[str, object, object]] = [("kind of drafter", manifest.drafter.kind, kind)]
    for name in ("vocab_size", "hidden_size", "num_layers", "num_key_value_heads", "head_dim"):
        compared.append((f"target's {name}", getattr(facts, name), getattr(config, name)))
    if drafter is not None:
        for name in ("block_size", "tap_layers", "markov_rank", "markov_head", "confidence", "draft_vocab_size"):
            compared.append((f"drafter's {name}", getattr(manifest.drafter, name), getattr(drafter, name)))
        for name in ("num_layers", "num_key_value_heads", "head_dim"):
            compared.append((f"drafter's {name}", getattr(manifest.drafter, name), getattr(drafter.backbone, name)))
    for what, in_bundle, in_checkpoint in compared:
        if in_bundle != in_checkpoint:
            raise MismatchError(
                f"bundle and checkpoints do not fit: the {what} is {in_bundle} in the bundle, {in_checkpoint} in the "
                "checkpoints; give the target and the drafter that the bundle was exported from"
            )


def chunks(positions: int) -> Iterator[tuple[int, int]]:
    """Uneven pieces (begin, end) of a sequence."""
    begin = 0
    for width in cycle(_WIDTHS):
        if begin >= positions:
            return
        yield begin, min(begin + width, positions)
        begin += width


def _as_stored(sources: Mapping[str, Source], manifest: Manifest) -> dict[str, Source]:
    """Sources of the weights that the bundle's graphs multiply with, rounded where they are quantised."""
    formats = weight_formats(manifest.precision, manifest.quantization)
    if formats is None:
        return dict(sources)
    stored: dict[str, Source] = {}
    for name, source in sources.items():
        layout = formats.of(name)
        stored[name] = source if layout is None else DequantizedSource(source, layout)
    return stored


@torch.no_grad()
def run_target(
    pair: Pair, sources: Mapping[str, Source], manifest: Manifest, token_ids: HostArray
) -> tuple[HostArray, dict[str, torch.Tensor]]:
    """The target's logits [1, P, V] on token_ids [1, P], and its caches by the names of the graph's inputs."""
    positions = token_ids.shape[1]
    slots = positions + manifest.drafter.block_size
    specs = {spec.name: spec for spec in manifest.graphs["target"].inputs}
    shapes = {name: specs[name].shape for name in manifest.graphs["target"].aliases.values()}
    caches = [torch.zeros(1, int(shape[1]), slots, int(shape[3])) for shape in shapes.values()]
    count = 2 * pair.target_config.num_layers
    target = _loaded(lambda: pair.build_target(slots, torch.float32), sources)
    logits = []
    for begin, end in chunks(positions):
        ids = torch.from_numpy(token_ids[:, begin:end])
        rows = torch.arange(end - begin)[None]
        part, own, context = target(ids, torch.tensor([begin]), rows, caches[:count], caches[count:])
        caches = [*own, *context]
        logits.append(part)
    return torch.cat(logits, dim=1).numpy(), dict(zip(shapes, caches, strict=True))


def _loaded(build: Callable[[], nn.Module], sources: Mapping[str, Source]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    return load_module(module, sources)


@torch.no_grad()
def make_reference(pair: Pair, manifest: Manifest, positions: int, seed: int) -> Reference:
    """What torch computes; the target's weights are let go before the drafter's are read."""
    generator = np.random.default_rng(seed)
    token_ids = generator.integers(0, pair.target_config.vocab_size, (1, positions + 1))
    sources = pair.target_sources(positions + manifest.drafter.block_size)
    logits, caches = run_target(pair, _as_stored(sources, manifest), manifest, token_ids[:, :-1])
    drafts: tuple[DraftCase, ...] = ()
    short_drafts: tuple[DraftCase, ...] = ()
    if pair.drafter_config is not None:
        context = list(caches.values())[2 * pair.target_config.num_layers :]
        drafts = _reference_drafts(pair, manifest, token_ids, context, generator)
        if short := manifest.short_block_size:
            shortened = replace(pair, drafter_config=replace(pair.drafter_config, block_size=short))
            short_drafts = _reference_drafts(shortened, manifest, token_ids, context, generator)
    cached = {name: cache.numpy() for name, cache in caches.items()}
    return Reference(token_ids, logits, cached, drafts, short_drafts)


def _reference_drafts(
    pair: Pair, manifest: Manifest, token_ids: HostArray, context: list[torch.Tensor], generator: np.random.Generator
) -> tuple[DraftCase, ...]:
    """Blocks behind every chunk, greedy and drawn. The context may reach beyond an anchor: no block looks there."""
    facts, config, slots = manifest.drafter, pair.drafter_config, context[0].shape[2]
    if config is None:
        raise RuntimeError("an ngram drafter has no blocks")
    build = pair.build_drafter
    pool = facts.candidate_pool or None
    sources = _as_stored(pair.drafter_sources(slots), manifest)
    drafter = _loaded(lambda: build(slots, facts.candidates, pool, torch.float32), sources)
    names = [spec.name for spec in manifest.graphs["drafter"].outputs]
    shape = (1, config.block_size, facts.candidates)
    cases = []
    for _, length in chunks(token_ids.shape[1] - 1):
        noises = {0.0: np.zeros(shape, np.float32), 1.0: generator.gumbel(size=shape).astype(np.float32)}
        for temperature, noise in noises.items():
            ids, confidences, candidates, probs, base, _ = drafter(
                torch.from_numpy(token_ids[:, length]),
                torch.tensor([length]),
                torch.tensor([temperature]),
                torch.from_numpy(noise),
                context,
            )
            given = [ids, *([] if confidences is None else [confidences]), candidates, probs, base]
            # strict=False: the caches come last in the contract, and are compared after the whole sequence.
            expected = {name: tensor.numpy() for name, tensor in zip(names, given, strict=False)}
            cases.append(DraftCase(length, temperature, noise, expected))
    return tuple(cases)
