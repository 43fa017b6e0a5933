"""The manifest: read strictly, written faithfully, and the same as docs/bundle.schema.json says."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines import manifest as module
from dspark_edge.engines.bundle_paths import check_path, is_recorded
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import (
    DrafterFacts,
    FileRecord,
    GraphSpec,
    Limits,
    Manifest,
    Provenance,
    Quantization,
    SharedWeight,
    TargetFacts,
    TensorSpec,
)

SCHEMA = Path(__file__).parents[2] / "docs" / "bundle.schema.json"
CACHE = ("batch", 2, "capacity", 8)
SHARED = {
    "file": "target.onnx",
    "offset": 2,
    "size": 8,
    "initializers": {"target": ["embedding"], "drafter": ["embedding", "head"]},
}
QUANTIZATION = {"block_size": 32, "accuracy_level": 4, "vocabulary_bits": 8}


def graph(file: str) -> GraphSpec:
    return GraphSpec(
        file=file,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "width")),
            TensorSpec("past.0.key", "float16", CACHE),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "rows", 100)),
            TensorSpec("present.0.key", "float16", CACHE),
        ),
        aliases={"present.0.key": "past.0.key"},
    )


def packed_graph(file: str) -> GraphSpec:
    """For two sequences, whose caches do not matter here."""
    whole = graph(file)
    return dataclasses.replace(whole, inputs=(*whole.inputs, TensorSpec("cache_lengths", "int64", (2,))))


def short_graph(file: str) -> GraphSpec:
    """Of three tokens."""
    whole = graph(file)
    return dataclasses.replace(whole, outputs=(*whole.outputs, TensorSpec("draft_ids", "int64", ("batch", 3))))


def made_graph(role: str) -> GraphSpec:
    make = packed_graph if role.endswith("_packed") else short_graph if role == "drafter_short" else graph
    return make(f"{role}.onnx")


def dspark_manifest() -> Manifest:
    return Manifest(
        schema_version=1,
        lowering="ort",
        precision="int4",
        opsets={"": 21, "com.microsoft": 1},
        target=TargetFacts("Qwen3ForCausalLM", 100, 64, 4, 8, 2, 8, 2048, 123456, None, (2, 7)),
        drafter=DrafterFacts("dspark", 7, 2, 2, 8, (1, 0, 3), 32, "gated", 99, True, 64, 0),
        limits=Limits(512, 4),
        graphs={role: made_graph(role) for role in module.ROLES},
        files=tuple(FileRecord(f"{role}.onnx", 10, "0" * 64) for role in module.ROLES),
        provenance=Provenance("2025-01-31T12:00:00Z", {"dspark-edge": "0.1.0"}, "Qwen/Qwen3-4B", "drafter"),
    )


def ngram_manifest() -> Manifest:
    whole = dspark_manifest()
    graphs = {role: whole.graphs[role] for role in module.REQUIRED_ROLES}
    return dataclasses.replace(whole, drafter=DrafterFacts.ngram(4), graphs=graphs)


def draft_vocabulary_manifest() -> Manifest:
    whole = dspark_manifest()
    return dataclasses.replace(whole, drafter=dataclasses.replace(whole.drafter, draft_vocab_size=64))


MANIFESTS = {
    "dspark": dspark_manifest(),
    "draft-vocabulary": draft_vocabulary_manifest(),
    "ngram": ngram_manifest(),
}


def changed(path: str, value: object) -> Any:
    """The manifest's JSON with the member at ``path`` ("a/0/b") set, or removed if ``value`` is ``...``."""
    data: Any = copy.deepcopy(dspark_manifest().to_json())
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    at = data
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_reads_what_it_writes(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_text(manifest.to_text()) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest  # engines may run in another process


def test_quantization_is_for_low_bit_precisions() -> None:
    """Manifests without the key are valid, and one is written only where there is something to say."""
    quantized = dataclasses.replace(dspark_manifest(), quantization=Quantization(32, 8, 4))
    data = changed("quantization", QUANTIZATION)
    assert quantized.to_json() == data and Manifest.from_json(data) == quantized
    assert "quantization" not in dspark_manifest().to_json()
    assert Manifest.from_json(changed("quantization", None)) == dspark_manifest()
    with pytest.raises(BundleError, match=r"manifest\.quantization is given, but the precision is 'fp32'"):
        Manifest.from_json({**data, "precision": "fp32"})
    assert Manifest.from_json({**data, "precision": "fp32", "quantization": None}).quantization is None
    wrong_values = (("block_size", 48), ("block_size", 32.0), ("accuracy_level", True), ("vocabulary_bits", 16))
    for name, value in wrong_values:
        wrong = changed("quantization", {**QUANTIZATION, name: value})
        with pytest.raises(BundleError, match=rf"manifest\.quantization\.{name} is .*expected"):
            Manifest.from_json(wrong)


def test_packed_sequences() -> None:
    manifest = dspark_manifest()
    assert (manifest.packed_sequences, manifest.widest_verification) == (2, 16)
    unpacked = {role: spec for role, spec in manifest.graphs.items() if not role.endswith("_packed")}
    without = dataclasses.replace(manifest, graphs=unpacked)
    assert (without.packed_sequences, without.widest_verification) == (0, 8)


def test_a_short_block_is_optional() -> None:
    manifest = dspark_manifest()
    assert manifest.short_block_size == 3
    without = {role: spec for role, spec in manifest.graphs.items() if role != "drafter_short"}
    assert dataclasses.replace(manifest, graphs=without).short_block_size == 0


@pytest.mark.parametrize(
    ("precision", "quantization", "problem"),
    [
        ("int4", {"block_size": 32, "vocabulary_bits": 8}, r"accuracy_level is missing, but the precision is 'int4'"),
        ("int8", {**QUANTIZATION, "vocabulary_bits": 16}, "vocabulary_bits is 16, but .* 'int8'; expected 4 or 8"),
        ("w4a16", {"block_size": 64, "vocabulary_bits": 8}, "vocabulary_bits is 8, but .* 'w4a16'; expected 16"),
        ("w4a16", {**QUANTIZATION, "vocabulary_bits": 16}, "accuracy_level is given, but the precision is 'w4a16'"),
        (
            "w4a16",
            {"block_size": 64, "vocabulary_bits": 16, "kept_blocks": True},
            "kept_blocks is true, but the precision is 'w4a16'",
        ),
        ("w4a16", {"block_size": 64, "vocabulary_bits": 16}, None),
    ],
)
def test_what_goes_with_which_precision(precision: str, quantization: dict[str, int], problem: str | None) -> None:
    """The reader and the schema agree."""
    data = {**changed("quantization", quantization), "precision": precision}
    assert validator().is_valid(data) == (problem is None)
    if problem is None:
        assert Manifest.from_json(data).quantization == Quantization(64, 16)
    else:
        with pytest.raises(BundleError, match=problem):
            Manifest.from_json(data)


def test_kept_blocks_are_optional() -> None:
    """Written only where some were kept."""
    data = changed("quantization", {**QUANTIZATION, "kept_blocks": True})
    kept = dataclasses.replace(dspark_manifest(), quantization=Quantization(32, 8, 4, True))
    assert Manifest.from_json(data) == kept and kept.to_json() == data and validator().is_valid(data)
    wrong = changed("quantization", {**QUANTIZATION, "kept_blocks": 1})
    assert not validator().is_valid(wrong)
    with pytest.raises(BundleError, match=r"kept_blocks is 1; expected true or false"):
        Manifest.from_json(wrong)


def test_the_schema_knows_quantization() -> None:
    check = validator()
    data = changed("quantization", QUANTIZATION)
    assert check.is_valid(data) and check.is_valid(changed("quantization", None))
    assert not check.is_valid({**data, "precision": "fp32"})
    assert check.is_valid({**data, "precision": "fp32", "quantization": None})
    assert not check.is_valid(changed("quantization", {**QUANTIZATION, "block_size": 48}))
    assert not check.is_valid(changed("quantization", {"block_size": 32}))


def test_a_draft_vocabulary_is_optional() -> None:
    """Manifests without the key are valid, and one is written only where there is something to say."""
    assert "draft_vocab_size" not in dspark_manifest().to_json()["drafter"]  # type: ignore[operator]
    assert Manifest.from_json(changed("drafter/draft_vocab_size", None)) == dspark_manifest()
    assert draft_vocabulary_manifest().to_json() == changed("drafter/draft_vocab_size", 64)
    assert validator().is_valid(changed("drafter/draft_vocab_size", None))


def test_shared_weights_are_optional() -> None:
    """Manifests without the key are valid, and one is written only where something is shared."""
    assert "shared_weights" not in dspark_manifest().to_json()
    weight = SharedWeight("target.onnx", 2, 8, {"target": ("embedding",), "drafter": ("embedding", "head")})
    data = changed("shared_weights", [SHARED])
    assert dataclasses.replace(dspark_manifest(), shared_weights=(weight,)).to_json() == data
    assert Manifest.from_json(data).shared_weights == (weight,)
    assert validator().is_valid(data)
    assert not validator().is_valid(changed("shared_weights", [{**SHARED, "size": 0}]))


def test_is_frozen_and_slotted() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        dspark_manifest().precision = "fp32"  # type: ignore[misc]
    assert not hasattr(dspark_manifest(), "__dict__")


HEAD = "manifest.graphs.target"
WRONG = [
    ("extra", 1, "manifest: the key 'extra' is not known"),
    ("lowering", ..., "manifest: the key 'lowering' is missing"),
    ("target/rope", 1, "manifest.target: the key 'rope' is not known"),
    ("graphs/target/inputs/0/dtype", ..., HEAD + ".inputs[0]: the key 'dtype' is missing"),
    ("schema_version", 0, "manifest.schema_version is 0; expected an integer of at least 1"),
    ("schema_version", "1", 'manifest.schema_version is "1"; expected an integer'),
    ("schema_version", True, "manifest.schema_version is true; expected an integer"),
    ("lowering", "tensorrt", 'manifest.lowering is "tensorrt"; expected "ort" or "onnx" or "decomposed"'),
    ("lowering", ["ort"], 'manifest.lowering is ["ort"]; expected "ort"'),
    ("precision", None, "manifest.precision is null"),
    ("opsets", {}, "manifest.opsets is empty"),
    ("opsets", {"": 1.5}, "manifest.opsets. is 1.5; expected an integer"),
    ("opsets", [], "manifest.opsets is []; expected an object"),
    ("target", [], "manifest.target is []; expected an object"),
    ("target/vocab_size", 0, "manifest.target.vocab_size is 0"),
    ("target/vocab_size", 100.0, "manifest.target.vocab_size is 100.0; expected an integer"),
    ("target/num_attention_heads", 7, "not a multiple of 2 K/V heads"),
    ("target/bos_token_id", -1, "manifest.target.bos_token_id is -1"),
    ("target/bos_token_id", 100, "the token id 100 is not below vocab_size"),
    ("target/eos_token_ids", 2, "manifest.target.eos_token_ids is 2; expected a list"),
    ("target/eos_token_ids/1", 100, "the token id 100 is not below vocab_size"),
    ("target/architecture", "", 'manifest.target.architecture is ""; expected a non-empty string'),
    ("drafter/kind", "eagle", 'manifest.drafter.kind is "eagle"'),
    ("drafter/kind", "ngram", "'ngram' has no model"),
    ("drafter/block_size", 0, "manifest.drafter.block_size is 0"),
    ("drafter/candidates", 0, "a drafter with a model needs"),
    ("drafter/candidates", 101, "candidates exceeds vocab_size"),
    ("drafter/candidate_pool", 101, "candidates exceeds vocab_size"),
    ("drafter/draft_vocab_size", 0, "manifest.drafter.draft_vocab_size is 0; expected an integer of at least 1"),
    ("drafter/draft_vocab_size", 101, "draft_vocab_size exceeds vocab_size, 100"),
    ("drafter/draft_vocab_size", 63, "candidates exceeds draft_vocab_size, 63"),
    ("drafter/tap_layers", [], "expected distinct layers"),
    ("drafter/tap_layers", [1, 1], "expected distinct layers"),
    ("drafter/tap_layers", [4], "the target has 4 layers"),
    ("drafter/markov_rank", 0, "markov_rank is 0, markov_head 'gated'"),
    ("drafter/markov_head", "none", "markov_rank is 32, markov_head 'none'"),
    ("drafter/confidence", 1, "manifest.drafter.confidence is 1; expected true or false"),
    ("limits/capacity", 0, "manifest.limits.capacity is 0"),
    ("graphs/sampler", ..., "manifest.graphs: the role 'sampler' is missing"),
    ("graphs/drafter", ..., "manifest.graphs: the role 'drafter' is missing"),
    ("graphs/verifier", graph("v.onnx").to_json(), "'verifier' is not one of the roles"),
    ("graphs/drafter_packed", ..., "manifest.graphs: expected all of drafter_packed, target_packed, or none"),
    ("graphs/target_packed/inputs/2/shape", ["batch"], "'target_packed' does not say for how many sequences it is"),
    ("graphs/target_packed/inputs/2/shape", [3], "the packed graphs are for 2 and 3 sequences"),
    ("graphs/drafter_short/outputs/2/shape/1", "block", "'drafter_short' does not say how many tokens it drafts"),
    ("graphs/drafter_short/outputs/2/name", "ids", "'drafter_short' does not say how many tokens it drafts"),
    ("graphs/drafter_short/outputs/2/shape/1", 7, "'drafter_short' drafts 7 tokens, expected fewer than"),
    ("graphs/target/inputs/0/dtype", "float8", HEAD + '.inputs[0].dtype is "float8"'),
    ("graphs/target/inputs/0/shape/0", 0, HEAD + ".inputs[0].shape[0] is 0"),
    ("graphs/target/inputs/0/shape/0", "a b", HEAD + '.inputs[0].shape[0] is "a b"'),
    ("graphs/target/inputs/0/shape/0", True, HEAD + ".inputs[0].shape[0] is true"),
    ("graphs/target/inputs/1/name", "input_ids", "have the same name"),
    ("graphs/target/outputs", [], HEAD + ".outputs is empty"),
    ("graphs/target/aliases/present.1.key", "past.0.key", "expected an output and an input"),
    ("graphs/target/aliases/present.0.key", "past.9.key", "expected an output and an input"),
    ("graphs/target/aliases/logits", "input_ids", "differ in dtype or shape"),
    ("files/0/size", -1, "manifest.files[0].size is -1"),
    ("files/0/sha256", "A" * 64, "expected 64 lower-case hexadecimal digits"),
    ("files/0/sha256", "0" * 64 + "\n", "expected 64 lower-case hexadecimal digits"),
    ("files/1/path", "target.onnx", "manifest.files records a path twice"),
    ("files/0/path", "manifest.json", "which a manifest never records"),
    ("files/0/path", "devices/x/profile.json", "which a manifest never records"),
    ("shared_weights", [{**SHARED, "size": 9}], "shared_weights[0] ends at byte 11 of 'target.onnx', which has 10"),
    ("shared_weights", [{**SHARED, "initializers": {"verifier": ["a"]}}], "there is no graph 'verifier'"),
    ("shared_weights", [{**SHARED, "file": "../x"}], "points outside its folder"),
    ("shared_weights", [{**SHARED, "initializers": {"target": [""]}}], "expected a non-empty string"),
    ("provenance/created_at", "yesterday", "expected a UTC time"),
    ("provenance/created_at", "2025-01-31T12:00:00+02:00", "expected a UTC time"),
    ("provenance/tool_versions/onnx", 1, "manifest.provenance.tool_versions.onnx is 1"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_refuses_what_breaks_the_schema(path: str, value: object, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_outputs_cannot_share_one_buffer() -> None:
    spec = graph("target.onnx")
    twice = dataclasses.replace(
        spec,
        outputs=(*spec.outputs, TensorSpec("present.1.key", "float16", CACHE)),
        aliases={**spec.aliases, "present.1.key": "past.0.key"},
    )
    with pytest.raises(BundleError, match="one input's buffer to two outputs"):
        GraphSpec.from_json(twice.to_json())


OUTSIDE = ["../x", "a/../../x", "..", "/etc/passwd", "a\\b", "C:/x", "c:x"]
SHAPELESS = ["a//b", "./a", "a/.", "a/", "a\nb", "a\x00b", "\ud800"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("key", ["files/0/path", "graphs/target/file"])
def test_refuses_paths_that_lead_outside(path: str, key: str) -> None:
    with pytest.raises(BundleError, match="points outside its folder"):
        Manifest.from_json(changed(key, path))


@pytest.mark.parametrize("path", SHAPELESS)
def test_refuses_paths_that_are_not_normalised(path: str) -> None:
    with pytest.raises(BundleError, match="expected a normalised relative path"):
        check_path(path, "here")


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "..a", "a..b/c", ".hidden", "ä.json", "a b"])
def test_takes_plain_paths(path: str) -> None:
    assert check_path(path, "here") == path


def test_what_a_manifest_records() -> None:
    assert [p for p in ("manifest.json", "calibration.json", "devices", "devices/a/b") if is_recorded(p)] == []
    assert all(is_recorded(p) for p in ("target.onnx", "x/manifest.json", "devices.json"))


@pytest.mark.parametrize("extra", [{}, {"something": "else"}])
def test_a_newer_version_asks_for_an_upgrade_whatever_its_keys(extra: dict[str, object]) -> None:
    data = {**changed("schema_version", 2), **extra}
    with pytest.raises(BundleError, match=r"made by a newer version .*upgrade dspark-edge"):
        Manifest.from_json(data)
    with pytest.raises(BundleError, match=r"made by a newer version .*upgrade dspark-edge"):
        Manifest.from_text(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff\xfe\x00",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "1" * 10_000,
        dspark_manifest().to_text()[:-9],
    ],
)
def test_damaged_text_is_no_json(text: str | bytes) -> None:
    with pytest.raises(BundleError, match="manifest"):
        Manifest.from_text(text)


@pytest.mark.parametrize("text", ["[]", "null", "NaN", '"x"'])
def test_json_that_is_no_object(text: str) -> None:
    with pytest.raises(BundleError, match="expected an object"):
        Manifest.from_text(text)


def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_the_schema_takes_what_is_written(manifest: Manifest) -> None:
    assert [error.message for error in validator().iter_errors(manifest.to_json())] == []


# Rules between two places, which a JSON schema cannot state; docs/bundle-format.md does.
BETWEEN = (
    "not a multiple",
    "not below vocab_size",
    "candidates exceeds",
    "draft_vocab_size exceeds",
    "the target has",
    "have the same name",
    "expected an output and an input",
    "differ in dtype or shape",
    "records a path twice",
    "expected all of",
    "for how many sequences",
    "the packed graphs are for",
    "'drafter_short'",
    "ends at byte",
    "there is no graph",
)


def refused() -> Iterator[tuple[str, object]]:
    for path, value, message in WRONG:
        if value != 100.0 and not any(rule in message for rule in BETWEEN):  # to a schema 100.0 is an integer
            yield path, value
    yield from (("files/0/path", path) for path in OUTSIDE + SHAPELESS[:-1])
    yield "schema_version", 2


@pytest.mark.parametrize(("path", "value"), list(refused()))
def test_the_schema_refuses_what_the_reader_refuses(path: str, value: object) -> None:
    assert not validator().is_valid(changed(path, value))


def test_the_schema_has_the_keys_of_the_dataclasses() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    definitions = {**schema["$defs"], "Manifest": schema}
    for cls in (
        Manifest,
        TensorSpec,
        GraphSpec,
        TargetFacts,
        DrafterFacts,
        Limits,
        Quantization,
        FileRecord,
        SharedWeight,
        Provenance,
    ):
        keys = [field.name for field in dataclasses.fields(cls)]
        assert list(definitions[cls.__name__]["properties"]) == keys
        optional = {
            DrafterFacts: ["draft_vocab_size"],
            Manifest: ["quantization", "shared_weights"],
            Quantization: ["accuracy_level", "kept_blocks"],
        }.get(cls, [])
        assert definitions[cls.__name__]["required"] == [key for key in keys if key not in optional]
        assert definitions[cls.__name__]["additionalProperties"] is False
    assert schema["properties"]["schema_version"]["const"] == module.SCHEMA_VERSION
    assert schema["properties"]["lowering"]["enum"] == list(module.LOWERINGS)
    assert schema["properties"]["precision"]["enum"] == list(module.PRECISIONS)
    assert list(schema["properties"]["graphs"]["properties"]) == list(module.ROLES)
    assert schema["properties"]["graphs"]["required"] == list(module.REQUIRED_ROLES)
    assert definitions["TensorSpec"]["properties"]["dtype"]["enum"] == list(module.DTYPES)
    assert definitions["DrafterFacts"]["properties"]["markov_head"]["enum"] == list(module.MARKOV_HEADS)
