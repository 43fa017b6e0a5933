"""What a bundle's ``manifest.json`` says: its graphs, the facts of its models, its files.

The dataclasses are the manifest. ``from_json`` reads it strictly, guided by the fields' types: an unknown or
missing key, a wrong type or a value out of range is a ``BundleError`` that names the key's path. The same
contract stands in ``docs/bundle.schema.json`` for other languages, and in ``docs/bundle-format.md`` in words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dspark_edge.engines.errors import BundleError

__all__ = [
    "DTYPES",
    "LOWERINGS",
    "MANIFEST_NAME",
    "MARKOV_HEADS",
    "PRECISIONS",
    "REQUIRED_ROLES",
    "ROLES",
    "SCHEMA_VERSION",
    "DrafterFacts",
    "DrafterKind",
    "FileRecord",
    "GraphSpec",
    "Limits",
    "Lowering",
    "Manifest",
    "Precision",
    "Provenance",
    "TargetFacts",
    "TensorSpec",
    "check_path",
    "is_recorded",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

Lowering = Literal["ort", "onnx", "decomposed"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
DrafterKind = Literal["dspark", "ngram"]

LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")
MARKOV_HEADS = ("vanilla", "gated", "rnn", "none")
ROLES = ("target", "drafter", "sampler", "sampler_greedy", "sampler_filtered")
REQUIRED_ROLES = ("target", "sampler", "sampler_greedy")  # and "drafter" where drafter.kind is "dspark"

_SYMBOL = r"[A-Za-z_][A-Za-z0-9_]*"
_SHA256 = r"[0-9a-f]{64}"
_UTC_TIME = r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(\.\d{1,6})?(Z|\+00:00)"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

R = TypeVar("R", bound="_Record")


def check_path(path: str, where: str) -> str:
    """``path`` itself, if it is relative, normalised and stays inside the bundle.

    Raises:
        BundleError: it does not; ``where`` names what holds the path.
    """
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\\" in path or path[1:2] == ":":
        raise BundleError(f"{where} is {path!r}, which points outside its folder; do not trust this bundle")
    if any(part in ("", ".") for part in parts) or _UNPRINTABLE.search(path):
        raise BundleError(f"{where} is {path!r}; expected a normalised relative path such as 'target.onnx'")
    return path


def is_recorded(path: str) -> bool:
    """Whether the manifest records a file of this path: all but itself and what is written after export."""
    return path not in (MANIFEST_NAME, "calibration.json", "devices") and not path.startswith("devices/")


# Readers of one JSON value. ``Annotated[type, reader]`` attaches one to a field; ``where`` is the key's path.
def _matching(pattern: str, expected: str) -> Callable[[object, str], str]:
    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII | re.DOTALL):
            raise BundleError(f"{where} is {_shown(value)}; expected {expected}")
        return value

    return read


def _at_least(least: int) -> Callable[[object, str], int]:
    def read(value: object, where: str) -> int:
        if type(value) is not int or value < least:  # not isinstance: to Python a bool is an int
            raise BundleError(f"{where} is {_shown(value)}; expected an integer of at least {least}")
        return value

    return read


def _one_of(allowed: Sequence[str]) -> Callable[[object, str], str]:
    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            raise BundleError(f"{where} is {_shown(value)}; expected {choices}")
        return value

    return read


_text = _matching(".+", "a non-empty string")


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise BundleError(f"{where} is {_shown(value)}; expected true or false")
    return value


def _dimension(value: object, where: str) -> int | str:
    if isinstance(value, str):
        return _matching(_SYMBOL, "a name such as 'batch'")(value, where)
    return _at_least(1)(value, where)


Count = Annotated[int, _at_least(0)]
Positive = Annotated[int, _at_least(1)]
Tap = Annotated[int, _at_least(-1)]
Flag = Annotated[bool, _flag]
Dimension = Annotated[int | str, _dimension]
BundlePath = Annotated[str, lambda value, where: check_path(_text(value, where), where)]
Sha256 = Annotated[str, _matching(_SHA256, "64 lower-case hexadecimal digits")]
UtcTime = Annotated[str, _matching(_UTC_TIME, "a UTC time such as 2025-01-31T12:00:00Z")]


class _Record:
    """A part of the manifest: a dataclass that is read from and written to a JSON object."""

    __slots__ = ()

    @classmethod
    def from_json(cls: type[R], data: object, where: str = "manifest") -> R:
        """The part in a parsed JSON value; ``where`` is its path in messages.

        Raises:
            BundleError: it breaks the schema; the message names the key's path.
        """
        data = _object(data, where)
        version = data.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:  # before its keys, which may be unknown here
            raise BundleError(f"{where}: made by a newer version (schema {version}), upgrade dspark-edge")
        hints = get_type_hints(cls, include_extras=True)
        for key in sorted(hints.keys() ^ data.keys()):
            problem = "is missing" if key in hints else "is not known to this version"
            raise BundleError(f"{where}: the key {key!r} {problem}")
        record = cls(**{key: _read(hint, data[key], f"{where}.{key}") for key, hint in hints.items()})
        record._check(where)
        return record

    def to_json(self) -> dict[str, object]:
        """The part as JSON values; ``from_json`` gives an equal one back."""
        return cast("dict[str, object]", _plain(self))

    def _check(self, where: str) -> None:
        """Raise ``BundleError`` where fields that are right alone contradict each other."""


@dataclass(frozen=True, slots=True)
class TensorSpec(_Record):
    """One input or output of a graph."""

    name: str
    dtype: Annotated[str, _one_of(DTYPES)]
    shape: tuple[Dimension, ...]  # sizes, and names of symbolic dimensions: "batch", "width", "capacity", …


@dataclass(frozen=True, slots=True)
class GraphSpec(_Record):
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
class TargetFacts(_Record):
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
class DrafterFacts(_Record):
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
    markov_head: Annotated[str, _one_of(MARKOV_HEADS)]
    mask_token_id: Count | None
    confidence: Flag  # whether there is a confidence head
    candidates: Count  # K, tokens per step that the drafter samples from; vocab_size for all of them
    candidate_pool: Count  # tokens of a position that the Markov bias may lift; 0 for all of them

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
class Limits(_Record):
    """The sizes that the bundle was exported for."""

    capacity: Positive  # C, cache slots per sequence, in tokens
    max_batch: Positive  # sequences decoded together


@dataclass(frozen=True, slots=True)
class FileRecord(_Record):
    """One file of the bundle as it was exported."""

    path: BundlePath
    size: Count  # bytes
    sha256: Sha256

    def _check(self, where: str) -> None:
        if not is_recorded(self.path):
            raise BundleError(f"{where}.path is {self.path!r}, which a manifest never records")


@dataclass(frozen=True, slots=True)
class Provenance(_Record):
    """Where the bundle comes from."""

    created_at: UtcTime  # ISO 8601: "2025-01-31T12:00:00Z"
    tool_versions: Mapping[str, str]  # package → version
    target: str  # as the user named it; of a local path, the base name
    drafter: str


@dataclass(frozen=True, slots=True)
class Manifest(_Record):
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

    def _check(self, where: str) -> None:
        for role in REQUIRED_ROLES + (("drafter",) if self.drafter.kind == "dspark" else ()):
            if role not in self.graphs:
                raise BundleError(f"{where}.graphs: the role {role!r} is missing")
        for role in self.graphs:
            if role not in ROLES:
                raise BundleError(f"{where}.graphs: {role!r} is not one of the roles {', '.join(ROLES)}")
        if not self.opsets:
            raise BundleError(f"{where}.opsets is empty; expected at least ONNX's own domain, ''")
        if len({record.path for record in self.files}) < len(self.files):
            raise BundleError(f"{where}.files records a path twice")
        if max(self.drafter.candidates, self.drafter.candidate_pool) > self.target.vocab_size:
            raise BundleError(f"{where}.drafter.candidates exceeds vocab_size, {self.target.vocab_size}")
        if max(self.drafter.tap_layers, default=0) >= self.target.num_layers:
            raise BundleError(f"{where}.drafter.tap_layers: the target has {self.target.num_layers} layers")


def _read(hint: object, value: object, where: str) -> object:
    """``value`` as the type ``hint`` says, or a ``BundleError``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return args[1](value, where)
    if origin is Literal:
        return _one_of(args)(value, where)
    if origin is Union:  # only ever ``X | None``
        return None if value is None else _read(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} is {_shown(value)}; expected a list")
        return tuple(_read(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if hint is str:
        return _text(value, where)
    if isinstance(hint, type) and issubclass(hint, _Record):
        return hint.from_json(value, where)
    raise TypeError(f"{where} has a type that manifests cannot hold: {hint}")


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {_shown(value)}; expected an object with named members")
    return value


def _plain(value: object) -> object:
    """Records, mappings and tuples as JSON values."""
    if isinstance(value, _Record):
        return {key: _plain(getattr(value, key)) for key in get_type_hints(type(value))}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _without_duplicates(members: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(members)
    if len(data) < len(members):  # readers differ in which of two equal keys wins
        raise ValueError("an object has the same key twice")
    return data


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
