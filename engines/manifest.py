"""What a bundle's ``manifest.json`` says: its graphs, the facts of its models, its files.

The dataclasses are the manifest, and are read strictly (``records.py``). The same contract stands in
``docs/bundle.schema.json`` for other languages, and in ``docs/bundle-format.md`` in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from dspark_edge.engines.bundle_paths import check_path, is_recorded
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.records import (
    Count,
    Flag,
    Positive,
    Record,
    at_least,
    matching,
    non_empty,
    one_number_of,
    one_of,
)

__all__ = [
    "ACCURACY_LEVELS",
    "DTYPES",
    "LOWERINGS",
    "MARKOV_HEADS",
    "ONNX_RUNTIME_PRECISIONS",
    "PRECISIONS",
    "QUANTIZED_PRECISIONS",
    "REQUIRED_ROLES",
    "ROLES",
    "SCHEMA_VERSION",
    "VOCABULARY_BITS",
    "WEIGHT_BLOCK_SIZES",
    "DrafterFacts",
    "DrafterKind",
    "FileRecord",
    "GraphSpec",
    "Limits",
    "Lowering",
    "Manifest",
    "Precision",
    "Provenance",
    "Quantization",
    "SharedWeight",
    "TargetFacts",
    "TensorSpec",
]

SCHEMA_VERSION = 1

Lowering = Literal["ort", "onnx", "decomposed"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "w4a16"]
DrafterKind = Literal["dspark", "ngram"]

LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTIZED_PRECISIONS: tuple[Precision, ...] = ("int8", "int4", "w4a16")
ONNX_RUNTIME_PRECISIONS: tuple[Precision, ...] = ("int8", "int4")  # blocks in ONNX Runtime's own operators
VOCABULARY_BITS = (4, 8, 16)
WEIGHT_BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (1, 4)  # of MatMulNBits: activations are multiplied as float32, or rounded to int8
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")
MARKOV_HEADS = ("vanilla", "gated", "rnn", "none")
ROLES = (
    "target",
    "drafter",
    "sampler",
    "sampler_greedy",
    "sampler_filtered",
    "drafter_short",
    "target_packed",
    "drafter_packed",
)
REQUIRED_ROLES = ("target", "sampler", "sampler_greedy")  # and "drafter" where drafter.kind is "dspark"

_SYMBOL = r"[A-Za-z_][A-Za-z0-9_]*"
_SHA256 = r"[0-9a-f]{64}"
_UTC_TIME = r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(\.\d{1,6})?(Z|\+00:00)"


def _dimension(value: object, where: str) -> int | str:
    if isinstance(value, str):
        return matching(_SYMBOL, "a name such as 'batch'")(value, where)
    return at_least(1)(value, where)


Tap = Annotated[int, at_least(-1)]
Dimension = Annotated[int | str, _dimension]
BundlePath = Annotated[str, lambda value, where: check_path(non_empty(value, where), where)]
Sha256 = Annotated[str, matching(_SHA256, "64 lower-case hexadecimal digits")]
UtcTime = Annotated[str, matching(_UTC_TIME, "a UTC time such as 2025-01-31T12:00:00Z")]


@dataclass(frozen=True, slots=True)
class TensorSpec(Record):
    """One input or output of a graph."""

    name: str
    dtype: Annotated[str, one_of(DTYPES)]
    shape: tuple[Dimension, ...]  # sizes, and names of symbolic dimensions: "batch", "width", "capacity", …


@dataclass(frozen=True, slots=True)
class GraphSpec(Record):
    """One ONNX graph and its contract."""

    file: BundlePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]  # output → the input whose buffer it must share (caches updated in place)

    def _check(self, where: str) -> None:
        inputs = {tensor.name: tensor for tensor in self.inputs}
        outputs = {tensor.name: tensor for tensor in self.outputs}
        if len(inputs) < len(self.inputs) or len(outputs) < len(self.outputs):
            raise BundleError(f"{where}: two inputs or two outputs have the same name")
        if not outputs:
            raise BundleError(f"{where}.outputs is empty; a graph has at least one output")
        for output, source in self.aliases.items():
            at = f"{where}.aliases[{output!r}] is {source!r}"
            if output not in outputs or source not in inputs:
                raise BundleError(f"{at}; expected an output and an input of this graph")
            if (outputs[output].dtype, outputs[output].shape) != (inputs[source].dtype, inputs[source].shape):
                raise BundleError(f"{at}; they share one buffer but differ in dtype or shape")
        if len(set(self.aliases.values())) < len(self.aliases):
            raise BundleError(f"{where}.aliases gives one input's buffer to two outputs")


@dataclass(frozen=True, slots=True)
class TargetFacts(Record):
    """What the runtime must know of the target model."""

    architecture: str  # as the checkpoint's config.json names it: "Qwen3ForCausalLM"
    vocab_size: Positive
    hidden_size: Positive
    num_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    max_position_embeddings: Positive
    parameters: Positive  # number of weights, tied ones counted once
    bos_token_id: Count | None
    eos_token_ids: tuple[Count, ...]

    def _check(self, where: str) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise BundleError(f"{where}.num_attention_heads is {heads}, not a multiple of {groups} K/V heads")
        for token in (self.bos_token_id or 0, *self.eos_token_ids):
            if token >= self.vocab_size:
                raise BundleError(f"{where}: the token id {token} is not below vocab_size, {self.vocab_size}")


@dataclass(frozen=True, slots=True)
class DrafterFacts(Record):
    """What the runtime must know of the drafter.

    A drafter of the kind "ngram" has no model: all but ``block_size`` is zero, empty, null, false or "none".
    """

    kind: DrafterKind
    block_size: Positive  # γ, draft tokens per block
    num_layers: Count
    num_key_value_heads: Count
    head_dim: Count
    tap_layers: tuple[Tap, ...]  # target layers whose outputs feed the drafter, in `fc`'s order; -1: the embedding
    markov_rank: Count
    markov_head: Annotated[str, one_of(MARKOV_HEADS)]
    mask_token_id: Count | None
    confidence: Flag  # whether there is a confidence head
    candidates: Count  # K, tokens per step that the drafter samples from; all that it drafts, or some
    candidate_pool: Count  # tokens of a position that the Markov bias may lift; 0 for all of them
    draft_vocab_size: Positive | None = None  # P, the target's tokens that it drafts; None for all of them

    @classmethod
    def ngram(cls, block_size: int) -> DrafterFacts:
        """The facts of a drafter without a model, which looks its drafts up in the text so far."""
        return cls("ngram", block_size, 0, 0, 0, (), 0, "none", None, False, 0, 0)

    def _check(self, where: str) -> None:
        if self.kind == "ngram":
            if self != self.ngram(self.block_size):
                raise BundleError(f"{where}: 'ngram' has no model; expected only block_size to be set")
            return
        if 0 in (self.num_layers, self.num_key_value_heads, self.head_dim, self.candidates):
            raise BundleError(f"{where}: a drafter with a model needs layers, K/V heads, head_dim, candidates")
        if not self.tap_layers or len(set(self.tap_layers)) < len(self.tap_layers):
            raise BundleError(f"{where}.tap_layers is {list(self.tap_layers)}; expected distinct layers")
        if (self.markov_rank > 0) != (self.markov_head != "none"):
            raise BundleError(f"{where}.markov_rank is {self.markov_rank}, markov_head {self.markov_head!r}")


@dataclass(frozen=True, slots=True)
class Limits(Record):
    """The sizes that the bundle was exported for."""

    capacity: Positive  # C, cache slots per sequence, in tokens
    max_batch: Positive  # sequences decoded together


@dataclass(frozen=True, slots=True)
class Quantization(Record):
    """How the weights of a quantized bundle are stored, and multiplied with."""

    block_size: Annotated[int, one_number_of(WEIGHT_BLOCK_SIZES)]  # weights that share a scale (int8, int4: and a zero)
    vocabulary_bits: Annotated[int, one_number_of(VOCABULARY_BITS)]  # of embedding and head; 16: not in blocks
    accuracy_level: Annotated[int, one_number_of(ACCURACY_LEVELS)] | None = None  # of MatMulNBits; int8 and int4 only
    kept_blocks: Flag = False  # whether a checkpoint's own blocks, where they fit, were taken as they are


@dataclass(frozen=True, slots=True)
class FileRecord(Record):
    """One file of the bundle as it was exported."""

    path: BundlePath
    size: Count  # bytes
    sha256: Sha256

    def _check(self, where: str) -> None:
        if not is_recorded(self.path):
            raise BundleError(f"{where}.path is {self.path!r}, which a manifest never records")


@dataclass(frozen=True, slots=True)
class SharedWeight(Record):
    """A matrix that several graphs have: the embedding or the head, which a drafter takes from its target."""

    file: BundlePath  # where it lies
    offset: Count  # bytes
    size: Positive  # bytes
    initializers: Mapping[str, tuple[Annotated[str, non_empty], ...]]  # role → its names in that graph


@dataclass(frozen=True, slots=True)
class Provenance(Record):
    """Where the bundle comes from."""

    created_at: UtcTime  # ISO 8601: "2025-01-31T12:00:00Z"
    tool_versions: Mapping[str, str]  # package → version
    target: str  # as the user named it; of a local path, the base name
    drafter: str


@dataclass(frozen=True, slots=True)
class Manifest(Record):
    """Everything that a bundle says of itself."""

    schema_version: Positive
    lowering: Lowering
    precision: Precision
    opsets: Mapping[str, Positive]  # operator-set domain → version; "" is ONNX's own domain
    target: TargetFacts
    drafter: DrafterFacts
    limits: Limits
    graphs: Mapping[str, GraphSpec]  # role, one of ROLES → graph
    files: tuple[FileRecord, ...]
    provenance: Provenance
    quantization: Quantization | None = None  # of the quantized precisions
    shared_weights: tuple[SharedWeight, ...] = ()  # of target and drafter

    @property
    def packed_sequences(self) -> int:
        """Most sequences of a packed call; 0 where the bundle has no packed graphs."""
        return self._stated_size("target_packed", "cache_lengths", 0)

    @property
    def short_block_size(self) -> int:
        """Tokens of the block that the short drafter's graph drafts; 0 where there is none."""
        return self._stated_size("drafter_short", "draft_ids", 1)

    @property
    def widest_verification(self) -> int:
        """Tokens of the widest call that verifies: an anchor and a block of each sequence that may share it."""
        return max(self.packed_sequences, 1) * (self.drafter.block_size + 1)

    def _stated_size(self, role: str, name: str, axis: int) -> int:
        """A dimension of a graph's input or output, which is a number there; 0 where there is no such graph."""
        graph = self.graphs.get(role)
        if graph is None:
            return 0
        return next(int(spec.shape[axis]) for spec in (*graph.inputs, *graph.outputs) if spec.name == name)

    def shared_weights_of(self, role: str) -> dict[str, SharedWeight]:
        """A graph's shared weights, by the names of its initializers."""
        return {name: weight for weight in self.shared_weights for name in weight.initializers.get(role, ())}

    @classmethod
    def from_text(cls, text: str | bytes, where: str = "manifest") -> Manifest:
        """The manifest in the text of a ``manifest.json``.

        Raises:
            BundleError: it is not JSON, newer than this version, or breaks the schema.
        """
        try:
            data = json.loads(text, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is damaged, not valid JSON ({error}); export it again") from error
        return cls.from_json(data, where)

    def to_text(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def _check_version(cls, data: Mapping[str, object], where: str) -> None:
        version = data.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise BundleError(f"{where}: made by a newer version (schema {version}), upgrade dspark-edge")

    def _check(self, where: str) -> None:
        for role in REQUIRED_ROLES + (("drafter",) if self.drafter.kind == "dspark" else ()):
            if role not in self.graphs:
                raise BundleError(f"{where}.graphs: the role {role!r} is missing")
        for role in self.graphs:
            if role not in ROLES:
                raise BundleError(f"{where}.graphs: {role!r} is not one of the roles {', '.join(ROLES)}")
        self._check_packed(where)
        self._check_short(where)
        if not self.opsets:
            raise BundleError(f"{where}.opsets is empty; expected at least ONNX's own domain, ''")
        if len({record.path for record in self.files}) < len(self.files):
            raise BundleError(f"{where}.files records a path twice")
        for index, weight in enumerate(self.shared_weights):
            self._check_shared(weight, f"{where}.shared_weights[{index}]")
        if self.quantization is not None:
            self._check_quantization(self.quantization, f"{where}.quantization")
        drafted, vocab_size = self.drafter.draft_vocab_size, self.target.vocab_size
        if drafted is not None and drafted > vocab_size:
            raise BundleError(f"{where}.drafter.draft_vocab_size exceeds vocab_size, {vocab_size}")
        limit, size = ("vocab_size", vocab_size) if drafted is None else ("draft_vocab_size", drafted)
        if max(self.drafter.candidates, self.drafter.candidate_pool) > size:
            raise BundleError(f"{where}.drafter.candidates exceeds {limit}, {size}")
        if max(self.drafter.tap_layers, default=0) >= self.target.num_layers:
            raise BundleError(f"{where}.drafter.tap_layers: the target has {self.target.num_layers} layers")

    def _check_packed(self, where: str) -> None:
        """Packed graphs come together, and tell for how many sequences they are: as many in all."""
        found = {role: graph for role, graph in self.graphs.items() if role.endswith("_packed")}
        sizes: set[int | str] = set()
        for role, graph in found.items():
            counts = [spec.shape for spec in graph.inputs if spec.name == "cache_lengths"]
            if len(counts) != 1 or len(counts[0]) != 1 or not isinstance(counts[0][0], int):
                raise BundleError(f"{where}.graphs: {role!r} does not say for how many sequences it is")
            sizes.add(counts[0][0])
        if len(sizes) > 1:
            raise BundleError(
                f"{where}.graphs: the packed graphs are for {' and '.join(map(str, sorted(sizes)))} sequences"
            )
        wanted = {f"{role}_packed" for role in ("target", "drafter") if role in self.graphs}
        if found and found.keys() != wanted:
            raise BundleError(f"{where}.graphs: expected all of {', '.join(sorted(wanted))}, or none")

    def _check_short(self, where: str) -> None:
        """The short drafter's graph tells how many tokens it drafts: fewer than a block."""
        graph = self.graphs.get("drafter_short")
        if graph is None:
            return
        sizes = [spec.shape[1] for spec in graph.outputs if spec.name == "draft_ids" and len(spec.shape) == 2]
        if len(sizes) != 1 or not isinstance(sizes[0], int):
            raise BundleError(f"{where}.graphs: 'drafter_short' does not say how many tokens it drafts")
        if "drafter" not in self.graphs or sizes[0] >= self.drafter.block_size:
            raise BundleError(
                f"{where}.graphs: 'drafter_short' drafts {sizes[0]} tokens, expected fewer than a drafter's block"
            )

    def _check_shared(self, weight: SharedWeight, where: str) -> None:
        """A shared weight lies within its file, and belongs to graphs that there are."""
        end = weight.offset + weight.size
        for record in self.files:
            if record.path == weight.file and record.size < end:
                raise BundleError(f"{where} ends at byte {end} of {weight.file!r}, which has {record.size}")
        for role in weight.initializers:
            if role not in self.graphs:
                raise BundleError(f"{where}.initializers: there is no graph {role!r}")

    def _check_quantization(self, quantization: Quantization, where: str) -> None:
        if self.precision not in QUANTIZED_PRECISIONS:
            raise BundleError(f"{where} is given, but the precision is {self.precision!r}")
        own = self.precision in ONNX_RUNTIME_PRECISIONS
        if own == (quantization.vocabulary_bits == 16):
            expected = "4 or 8" if own else "16"
            raise BundleError(
                f"{where}.vocabulary_bits is {quantization.vocabulary_bits}, but the precision is {self.precision!r}; "
                f"expected {expected}"
            )
        if own == (quantization.accuracy_level is None):
            raise BundleError(
                f"{where}.accuracy_level is {'missing' if own else 'given'}, but the precision is {self.precision!r}"
            )
        if quantization.kept_blocks and not own:
            raise BundleError(f"{where}.kept_blocks is true, but the precision is {self.precision!r}")


def _without_duplicates(members: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(members)
    if len(data) < len(members):  # readers differ in which of two equal keys wins
        raise ValueError("an object has the same key twice")
    return data
