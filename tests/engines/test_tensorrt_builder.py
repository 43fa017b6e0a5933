"""Engines are really built, by TensorRT for RTX, which needs no GPU for that."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="building engines needs the [tensorrt-rtx] extra")

from click.testing import CliRunner

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, EngineError, InvalidInputError
from dspark_edge.engines.replace_file import replacing
from dspark_edge.engines.tensorrt import builder
from dspark_edge.engines.tensorrt.builder import BuildOptions, build_engines
from dspark_edge.engines.tensorrt.flavour import Flavour, load_flavour
from dspark_edge.engines.tensorrt.network import GraphNetwork, parse_graph
from dspark_edge.engines.tensorrt.profiles import BuildSizes
from dspark_edge.engines.tensorrt.records import EngineRecord
from dspark_edge.runtime.cli.build import build as build_command

from ..conftest import ReferenceBundle

BUNDLES = Path(__file__).parents[1] / "data" / "bundles"
SIZES = BuildSizes(1, 8, (1, 2, 8))


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return load_flavour("tensorrt-rtx")


@pytest.fixture
def decomposed(tmp_path: Path) -> Bundle:
    shutil.copytree(BUNDLES / "qwen3_rnn_decomposed", tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def parsed(flavour: Flavour, bundle: Bundle, role: str) -> GraphNetwork:
    log = flavour.trt.Logger(flavour.trt.Logger.ERROR)
    return parse_graph(flavour, log, role, bundle.manifest.graphs[role], bundle.graph_path(role))


def test_every_graph_becomes_an_engine(decomposed: Bundle, flavour: Flavour) -> None:
    told: dict[str, list[float]] = {}
    folder = build_engines(
        decomposed, flavour, BuildOptions(SIZES, ("8.6",)), lambda role, share: told.setdefault(role, []).append(share)
    )
    assert folder == decomposed.path / "devices" / "tensorrt-rtx-8.6"
    record = EngineRecord.load(decomposed, folder.name)
    assert record is not None
    assert record.engines.keys() == decomposed.manifest.graphs.keys() == told.keys()
    for engine in record.engines.values():
        data = (folder / engine.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (engine.size, engine.sha256)
    assert [profile.name for profile in record.engines["target"].profiles] == ["prefill", "verify"]
    for shares in told.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    record.check(decomposed, "tensorrt-rtx", flavour.version, "8.6")
    Bundle.open(decomposed.path).verify()  # the bundle itself is as it was


def test_weights_of_4_bits_become_an_engine(tmp_path: Path, flavour: Flavour) -> None:
    """DequantizeLinear of int4 is read as such, and the numbers stay what they are: the engine is small."""
    shutil.copytree(BUNDLES / "qwen3_rnn_w4a16", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    network = parsed(flavour, bundle, "target").network
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    weights = 4 * bundle.manifest.target.num_layers  # of each layer's projections
    assert kinds.count(flavour.trt.LayerType.DEQUANTIZE) == weights + 1  # and the drafter's context
    record = EngineRecord.load(bundle, build_engines(bundle, flavour, BuildOptions(SIZES)).name)
    assert record is not None and record.precision == "w4a16"


def test_what_target_and_drafter_share_is_an_input_of_both(decomposed: Bundle, flavour: Flavour) -> None:
    """The target's embedding is its head as well, and the drafter's: one matrix under three names."""
    shared = {"target": ("embed_tokens.weight",), "drafter": ("embed_tokens.weight", "lm_head.weight")}
    for role, names in shared.items():
        network = parsed(flavour, decomposed, role)
        assert sorted(network.free_weights({*names, "no.such.weight"})) == sorted(names)
        added = {name: tensor for name, tensor in network.inputs.items() if name in names}
        assert {tuple(tensor.shape) for tensor in added.values()} == {(260, 96)}
        assert {str(tensor.dtype) for tensor in added.values()} == {"DataType.FLOAT"}
        layers = [network.network.get_layer(index) for index in range(network.network.num_layers)]
        read = [
            layer.get_input(place).name
            for layer in layers
            for place in range(layer.num_inputs)
            if layer.get_input(place) is not None
        ]
        constants = {layer.get_output(0).name for layer in layers if layer.name in names}
        assert not constants & {*read} and set(names) <= {*read}
    weight = decomposed.manifest.shared_weights[0]
    matrix = decomposed.file(weight.file).read_bytes()[weight.offset : weight.offset + weight.size]
    for share in (False, True):
        folder = build_engines(decomposed, flavour, BuildOptions(SIZES, share_weights=share))
        record = EngineRecord.load(decomposed, folder.name)
        assert record is not None
        for role, engine in record.engines.items():
            assert sorted(engine.weight_inputs) == (sorted(shared.get(role, ())) if share else [])
            assert (matrix in (folder / engine.file).read_bytes()) == (role in shared and not share)


@pytest.mark.needs_export
def test_caches_are_updated_in_place(reference_bundle: ReferenceBundle, flavour: Flavour) -> None:
    bundle = Bundle.open(reference_bundle("qwen3_target", "qwen3_vanilla", "onnx"))
    for role in ("target", "drafter"):
        network = parsed(flavour, bundle, role)
        network.check()
        graph = bundle.manifest.graphs[role]
        assert network.cache_updates() == dict(graph.aliases)
        assert network.inputs.keys() == {spec.name for spec in graph.inputs}
        assert network.outputs.keys() == {spec.name for spec in graph.outputs}
    assert network.decompose_attention() == bundle.manifest.drafter.num_layers


@pytest.mark.needs_export
def test_attention_without_a_kernel_is_built_of_single_operators(
    reference_bundle: ReferenceBundle, tmp_path: Path, flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 there is none. Taken for a half precision, the build finds out by itself."""
    shutil.copytree(reference_bundle("qwen3_target", "qwen3_vanilla", "onnx"), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    monkeypatch.setattr(builder, "_HALF", ("fp16", "bf16", "fp32"))
    record = EngineRecord.load(bundle, build_engines(bundle, flavour, BuildOptions(SIZES)).name)
    assert record is not None
    assert [role for role, engine in record.engines.items() if engine.decomposed_attention] == ["target", "drafter"]


@pytest.mark.needs_export
@pytest.mark.parametrize("precision", ["fp16", "bf16", "w4a16"])
def test_half_precision_is_built_with_kernels_for_whole_attention(
    precision: str, export_once: Callable[..., Path], reference_dir: Path, tmp_path: Path, flavour: Flavour
) -> None:
    made = export_once(
        precision,
        reference_dir / "qwen3_target",
        reference_dir / "qwen3_rnn",
        lowering="onnx",
        precision=precision,
        capacity=128,
    )
    shutil.copytree(made, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    record = EngineRecord.load(bundle, build_engines(bundle, flavour, BuildOptions(SIZES)).name)
    assert record is not None
    assert record.precision == precision
    assert not any(engine.decomposed_attention for engine in record.engines.values())


def test_a_build_that_is_interrupted_leaves_nothing_that_looks_whole(decomposed: Bundle, flavour: Flavour) -> None:
    def interrupt(role: str, share: float) -> None:
        if role == "drafter" and share > 0.2:
            raise KeyboardInterrupt

    folder = decomposed.path / "devices" / "tensorrt-rtx-any"
    folder.mkdir(parents=True)
    (folder / "engines.json").write_text("of an older build")
    with pytest.raises(KeyboardInterrupt):
        build_engines(decomposed, flavour, BuildOptions(SIZES), interrupt)
    assert EngineRecord.load(decomposed, folder.name) is None
    assert [path.name for path in folder.iterdir()] == ["target.engine"]


def test_other_graphs_than_the_manifest_says_are_refused(decomposed: Bundle, flavour: Flavour) -> None:
    graphs = decomposed.manifest.graphs
    log = flavour.trt.Logger(flavour.trt.Logger.ERROR)
    other = parse_graph(flavour, log, "sampler", graphs["sampler"], decomposed.graph_path("sampler_greedy"))
    with pytest.raises(EngineError, match="differ in the inputs"):
        other.check()
    broken = decomposed.graph_path("sampler")
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(EngineError, match=r"cannot read sampler\.onnx"):
        parse_graph(flavour, log, "sampler", graphs["sampler"], broken)


def test_what_this_flavour_cannot_build_is_told(flavour: Flavour) -> None:
    with pytest.raises(InvalidInputError, match="only ONNX Runtime reads"):
        build_engines(Bundle.open(BUNDLES / "qwen3_rnn_ort"), flavour, BuildOptions(SIZES))
    bundle = Bundle.open(BUNDLES / "qwen3_rnn_decomposed")
    with pytest.raises(InvalidInputError, match=r"does not build for '5\.0'"):
        build_engines(bundle, flavour, BuildOptions(SIZES, ("5.0",)))
    with pytest.raises(InvalidInputError, match="keeps no timing cache"):
        build_engines(bundle, flavour, BuildOptions(SIZES, timing_cache=Path("timing.cache")))


def test_the_command(decomposed: Bundle) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(build_command, [str(decomposed.path), "--backend", "tensorrt-rtx", *options])

    done = run("--widths", "1,2", "--prefill-chunk", "4", "--compute-capability", "8.9", "--workspace", "1")
    assert done.exit_code == 0, done.output
    assert "building takes about" in done.output
    assert "5 engines" in done.output
    record = EngineRecord.load(decomposed, "tensorrt-rtx-8.9")
    assert record is not None
    assert record.sizes == BuildSizes(1, 4, (1, 2))
    assert record.engines["drafter"].weight_inputs
    done = run("--widths", "1", "--prefill-chunk", "4", "--compute-capability", "8.9", "--no-share-weights")
    assert done.exit_code == 0, done.output
    record = EngineRecord.load(decomposed, "tensorrt-rtx-8.9")
    assert record is not None and not record.engines["drafter"].weight_inputs
    assert isinstance(run("--widths", "1,x").exception, InvalidInputError)
    assert isinstance(run("--workspace", "0").exception, InvalidInputError)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), BundleError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_engine_that_cannot_be_written_leaves_nothing(
    decomposed: Bundle,
    flavour: Flavour,
    raised: BaseException,
    expected: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error passes through TensorRT, which calls the writer."""

    class Broken(io.RawIOBase):
        def write(self, data: Any) -> int:
            raise raised

    @contextmanager
    def replacing_by_broken(path: Path) -> Iterator[Any]:
        with replacing(path):
            yield Broken()

    monkeypatch.setattr(builder, "replacing", replacing_by_broken)
    with pytest.raises(expected):
        build_engines(decomposed, flavour, BuildOptions(SIZES))
    assert not [*(decomposed.path / "devices" / "tensorrt-rtx-any").iterdir()]
