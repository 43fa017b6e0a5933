"""For which shapes engines are built, and what they say of themselves: without any TensorRT."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import (
    BundleError,
    CapacityError,
    EngineError,
    InvalidInputError,
    MissingDependencyError,
)
from dspark_edge.engines.profile import graphs_digest
from dspark_edge.engines.tensorrt import builder
from dspark_edge.engines.tensorrt.builder import BuildOptions, build_engines, estimate_needs
from dspark_edge.engines.tensorrt.flavour import Flavour, load_flavour
from dspark_edge.engines.tensorrt.profiles import BuildSizes, profiles_of, resolve_sizes, top_k_values
from dspark_edge.engines.tensorrt.records import EngineFile, EngineRecord, engine_folder

BUNDLES = Path(__file__).parents[1] / "data" / "bundles"
SIZES = BuildSizes(2, 16, (1, 2, 4))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(BUNDLES / "qwen3_rnn_decomposed")


def make_record(bundle: Bundle) -> EngineRecord:
    return EngineRecord(
        schema_version=1,
        backend="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.6", "8.9"),
        lowering="decomposed",
        precision="fp32",
        bundle=graphs_digest(bundle.manifest),
        built_at="2026-01-31T12:00:00Z",
        tool_version="0.1.0",
        sizes=SIZES,
        engines={
            role: EngineFile(f"{role}.engine", 7, "0" * 64, profiles_of(role, bundle.manifest, SIZES), False)
            for role in bundle.manifest.graphs
        },
    )


def test_each_way_of_running_a_target_has_a_profile(bundle: Bundle) -> None:
    prefill, decode, verify = profiles_of("target", bundle.manifest, SIZES)
    assert [profile.name for profile in (prefill, decode, verify)] == ["prefill", "decode", "verify"]
    ids, rows = (spec for spec in bundle.manifest.graphs["target"].inputs if spec.name in ("input_ids", "logit_rows"))
    assert prefill.shapes(ids) == ((1, 1), (1, 16), (1, 16))
    assert decode.shapes(ids) == ((1, 1), (1, 1), (2, 1))
    assert verify.shapes(ids) == ((1, 2), (1, 4), (2, 4))
    assert verify.shapes(rows) == ((1, 2), (1, 4), (2, 4))
    assert prefill.shapes(rows) == ((1, 1), (1, 1), (1, 1))
    assert len(profiles_of("target", bundle.manifest, BuildSizes(1, 16, (1,)))) == 2  # nothing is verified
    prefill, verify = profiles_of("target", bundle.manifest, SIZES, compiles_late=True)
    assert verify.name == "verify" and verify.shapes(ids) == ((1, 1), (1, 4), (2, 4))
    assert prefill.shapes(ids) == ((1, 1), (1, 16), (2, 16))  # of several, as the other: weights are packed once
    single, _ = profiles_of("target", bundle.manifest, BuildSizes(1, 16, (1, 4)), compiles_late=True)
    assert single.shapes(ids) == ((1, 1), (1, 16), (1, 16))
    plain = profiles_of("target", bundle.manifest, BuildSizes(1, 16, (1,)), compiles_late=True)
    assert [profile.name for profile in plain] == ["prefill", "decode"]


def test_every_symbol_of_every_graph_has_a_size(bundle: Bundle) -> None:
    for role, graph in bundle.manifest.graphs.items():
        for profile in profiles_of(role, bundle.manifest, SIZES):
            for spec in graph.inputs:
                least, common, most = profile.shapes(spec)
                assert all(a <= b <= c for a, b, c in zip(least, common, most, strict=True))


def test_sizes_come_from_the_bundle(bundle: Bundle) -> None:
    limits, block = bundle.manifest.limits, bundle.manifest.drafter.block_size
    sizes = resolve_sizes(bundle.manifest, None, None, None)
    assert sizes == BuildSizes(limits.max_batch, min(512, limits.capacity), tuple(range(1, block + 2)))
    assert resolve_sizes(bundle.manifest, (4, 1, 2, 2), 1, 8) == BuildSizes(1, 8, (1, 2, 4))
    assert top_k_values(100) == (1, 100, 100)
    assert top_k_values(50_000) == (1, 1024, 3840)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (((2, 4), None, None), InvalidInputError, "must have 1"),
        (((1, 99), None, None), CapacityError, "widest width is 99"),
        ((None, 1000, None), CapacityError, "max_batch is 1000"),
        ((None, 0, None), InvalidInputError, "max_batch is 0"),
        ((None, None, 1 << 20), CapacityError, "prefill_chunk"),
    ],
)
def test_sizes_that_the_bundle_lacks(bundle: Bundle, given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        resolve_sizes(bundle.manifest, *given)


def test_what_is_needed_is_told_before(bundle: Bundle) -> None:
    needs = estimate_needs(bundle, SIZES, compiles_late=True)
    weights = sum(record.size for record in bundle.manifest.files if ".onnx" in record.path)
    assert needs.weights == weights
    assert needs.host > 200e6
    own = estimate_needs(bundle, SIZES, compiles_late=True, share_weights=False)
    assert own.weights == weights + sum(weight.size for weight in bundle.manifest.shared_weights) > weights
    twice = estimate_needs(bundle, SIZES, compiles_late=False)
    assert twice.weights > weights and twice.host > needs.host
    target = bundle.manifest.graphs["target"]
    one = sum(
        4 * spec.shape[1] * spec.shape[2] * spec.shape[3]  # type: ignore[operator]
        for spec in target.inputs
        if spec.name in target.aliases.values()
    )
    assert needs.caches == 2 * one
    assert needs.logits == 4 * 2 * 4 * bundle.manifest.target.vocab_size


def test_a_record_goes_to_disk_and_back(bundle: Bundle, tmp_path: Path) -> None:
    record = make_record(bundle)
    folder = tmp_path / "bundle"
    (folder / "devices" / "tensorrt-rtx-any").mkdir(parents=True)
    for file in bundle.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    copy = Bundle.open(folder)
    assert EngineRecord.load(copy, "tensorrt-rtx-any") is None
    path = folder / "devices" / "tensorrt-rtx-any" / "engines.json"
    path.write_text(record.to_text())
    assert EngineRecord.load(copy, "tensorrt-rtx-any") == record
    path.write_text(record.to_text()[:-20])
    with pytest.raises(BundleError, match="build the engines again"):
        EngineRecord.load(copy, "tensorrt-rtx-any")
    path.write_text(json.dumps({**record.to_json(), "schema_version": 9}))
    with pytest.raises(BundleError, match="newer version"):
        EngineRecord.load(copy, "tensorrt-rtx-any")


def test_stale_and_foreign_engines_are_refused_with_the_command_that_rebuilds_them(bundle: Bundle) -> None:
    record = make_record(bundle)
    record.check(bundle, "tensorrt-rtx", "1.7.1", "8.9")
    record.check(bundle, "tensorrt-rtx", "1.7.1", None)
    replace(record, compute_capabilities=()).check(bundle, "tensorrt-rtx", "1.7.1", "12.0")
    rebuild = f"dspark-edge build {bundle.path} --backend "
    for given, reason in (
        (("tensorrt", "1.7.1", "8.9"), "not tensorrt's"),
        (("tensorrt-rtx", "1.8.0", "8.9"), "1.8.0 is installed"),
        (("tensorrt-rtx", "1.7.1", "9.0"), "this GPU has 9.0"),
    ):
        with pytest.raises(EngineError, match=reason) as error:
            record.check(bundle, *given)
        assert rebuild + given[0] in str(error.value)
    with pytest.raises(EngineError, match="graphs have changed"):
        replace(record, bundle="1" * 64).check(bundle, "tensorrt-rtx", "1.7.1", "8.9")


def test_folders_are_named_by_what_they_are_for() -> None:
    assert engine_folder("tensorrt", ("8.7",)) == "tensorrt-8.7"
    assert engine_folder("tensorrt-rtx", ("8.6", "8.9")) == "tensorrt-rtx-8.6+8.9"
    assert engine_folder("tensorrt-rtx", ()) == "tensorrt-rtx-any"


def test_a_missing_tensorrt_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *rest: Any, **more: Any) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("dspark_edge.engines.tensorrt.flavour.import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"dspark-edge\[tensorrt-rtx\]"):
        load_flavour("tensorrt-rtx")
    with pytest.raises(InvalidInputError, match="choose one of"):
        load_flavour("openvino")

    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("dspark_edge.engines.tensorrt.flavour.import_module", broken)
    with pytest.raises(EngineError, match=r"libnvinfer.*dspark-edge doctor"):
        load_flavour("tensorrt")


def test_tensorrt_builds_where_the_gpu_is(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "check_lowering", lambda self, lowering: None)
    monkeypatch.setattr(builder, "probe_nvidia_driver", lambda root: type("Driver", (), {"gpus": ()})())
    flavour = Flavour("tensorrt", builtins, "10.3.0")
    with pytest.raises(EngineError, match="there is none here"):
        build_engines(bundle, flavour, BuildOptions(SIZES))
    gpu = type("Gpu", (), {"compute_capability": (8, 7)})()
    monkeypatch.setattr(builder, "probe_nvidia_driver", lambda root: type("Driver", (), {"gpus": (gpu,)})())
    with pytest.raises(InvalidInputError, match=r"which has 8\.7"):
        build_engines(bundle, flavour, BuildOptions(SIZES, ("9.0",)))
