"""What needs a GPU: every test here is skipped, with the reason, where there is none. Nothing here needs torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import DSparkError
from dspark_edge.engines.tensorrt.builder import BuildOptions, build_engines
from dspark_edge.engines.tensorrt.cuda import Cuda, open_cuda
from dspark_edge.engines.tensorrt.flavour import BACKENDS, Flavour, load_flavour
from dspark_edge.engines.tensorrt.profiles import BuildSizes

SIZES = BuildSizes(1, 64, (1, 2, 3, 4, 5, 6, 7, 8))


@pytest.fixture(scope="session")
def cuda() -> Cuda:
    try:
        return open_cuda("tensorrt")
    except DSparkError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=BACKENDS)
def flavour(request: pytest.FixtureRequest, cuda: Cuda) -> Flavour:
    try:
        flavour = load_flavour(request.param)
        flavour.check_device(cuda.compute_capability)
    except DSparkError as error:
        pytest.skip(str(error))
    return flavour


@pytest.fixture(scope="session")
def built(flavour: Flavour, cuda: Cuda, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The reference pair in fp32 and the `decomposed` lowering, capacity 256, with engines for this GPU."""
    return build_kept("qwen3_rnn_decomposed", flavour, cuda, tmp_path_factory.mktemp(flavour.backend))


@pytest.fixture(scope="session")
def built_w4a16(flavour: Flavour, cuda: Cuda, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same pair with weights of 4 bits, in the `onnx` lowering."""
    return build_kept("qwen3_rnn_w4a16", flavour, cuda, tmp_path_factory.mktemp(f"{flavour.backend}-w4a16"))


def build_kept(name: str, flavour: Flavour, cuda: Cuda, folder: Path) -> Bundle:
    """A bundle of the repository, copied to a folder, with engines for this GPU."""
    kept = Path(__file__).parents[1] / "data" / "bundles" / name
    bundle = Bundle.open(shutil.copytree(kept, folder / "bundle"))
    capabilities: tuple[str, ...] = (cuda.compute_capability,)
    try:
        if flavour.cross_builds:
            flavour.compute_capabilities(capabilities)
    except DSparkError:
        capabilities = ()  # it does not name this GPU: does what it builds for all run here?
    build_engines(bundle, flavour, BuildOptions(SIZES, capabilities))
    return bundle
