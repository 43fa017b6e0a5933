"""Which TensorRT: that of data centres and Jetson (`tensorrt`), or that for RTX (`tensorrt_rtx`).

Both have the same interface. This is the only module that imports one of them; everything else is given a `Flavour`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dspark_edge.engines.errors import EngineError, InvalidInputError, MissingDependencyError
from dspark_edge.engines.machine import parse_version

__all__ = ["BACKENDS", "Flavour", "load_flavour", "make_network"]

_MODULES: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BACKENDS = tuple(_MODULES)

_OLDEST = (10, 3)  # of `tensorrt`: JetPack 6
# What the lowerings need beyond what every release has.
_OPERATORS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("TensorScatter", "Attention", "RotaryEmbedding", "RMSNormalization"),
    "decomposed": (),
}


@dataclass(frozen=True, slots=True)
class Flavour:
    """An imported TensorRT."""

    backend: str  # one of BACKENDS
    trt: Any  # the module
    version: str

    @property
    def cross_builds(self) -> bool:
        """Whether it builds engines for GPUs that are not here."""
        return self.backend == "tensorrt-rtx"

    @property
    def times_tactics(self) -> bool:
        """Whether building measures kernels, which a timing cache then keeps."""
        return self.backend == "tensorrt"

    @property
    def compiles_late(self) -> bool:
        """Whether kernels are compiled where an engine runs, which a runtime cache then keeps."""
        return self.backend == "tensorrt-rtx"

    def check_lowering(self, lowering: str) -> None:
        """See that this release reads graphs of a lowering.

        Raises:
            InvalidInputError: it does not; the message says which lowering to export with.
        """
        if lowering not in _OPERATORS:
            raise InvalidInputError(
                f"the bundle's lowering is {lowering!r}, which only ONNX Runtime reads; export it with "
                f"--lowering {'onnx' if not self._missing('onnx') else 'decomposed'} --precision fp16"
            )
        if missing := self._missing(lowering):
            raise InvalidInputError(
                f"{self.backend} {self.version} does not know the operator {missing[0]} of the lowering {lowering!r}, "
                "which 10.15 and later do; export with --lowering decomposed, or upgrade TensorRT"
            )

    def compute_capabilities(self, wanted: tuple[str, ...]) -> tuple[Any, ...]:
        """The members of the module's ComputeCapability for "8.6" and the like.

        Raises:
            InvalidInputError: this flavour does not build for one of them.
        """
        known = self._capabilities()
        for text in wanted:
            if text not in known:
                able = ", ".join(known) or "the GPU that is present alone"
                raise InvalidInputError(
                    f"{self.backend} {self.version} does not build for {text!r}; it does for: {able}"
                )
        return tuple(known[text] for text in wanted)

    def check_device(self, capability: str) -> None:
        """See that engines run on a GPU: TensorRT for RTX knows GPUs with RTX cores alone, and those to come.

        Raises:
            EngineError: they do not; the message says what does run there.
        """
        known = self._capabilities() if self.cross_builds else {}  # the others build for the GPU that is there
        if not known or capability in known or _number(capability) > max(map(_number, known)):
            return
        raise EngineError(
            f"{self.backend} {self.version} does not run on this GPU, which has compute capability {capability}; it "
            f"does on {', '.join(known)} and later. Build the bundle for TensorRT itself (--backend tensorrt), or use "
            "ONNX Runtime (--provider cuda)"
        )

    def _capabilities(self) -> dict[str, Any]:
        """Members of the module's ComputeCapability by "8.6" and the like; none where it has no such choice."""
        kinds = getattr(self.trt, "ComputeCapability", None)
        members = {} if kinds is None else kinds.__members__
        return {f"{name[2:-1]}.{name[-1]}": kind for name, kind in members.items() if name[2:].isdigit()}

    def _missing(self, lowering: str) -> list[str]:
        trt = self.trt
        parser = trt.OnnxParser(make_network(self, trt.Builder(trt.Logger(trt.Logger.ERROR))), trt.Logger())
        return [name for name in _OPERATORS[lowering] if not parser.supports_operator(name)]


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def load_flavour(backend: str) -> Flavour:
    """Import a TensorRT.

    Raises:
        InvalidInputError: the backend is unknown.
        MissingDependencyError: it is not installed.
        EngineError: it cannot be loaded, or is too old.
    """
    if backend not in _MODULES:
        raise InvalidInputError(f"unknown backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    module = _MODULES[backend]
    try:
        trt = import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(backend, "building engines", backend) from error
    except (ImportError, OSError) as error:  # the module is there, its libraries are not
        raise EngineError(f"{module} cannot be loaded: {error}; `dspark-edge doctor` says what is missing") from error
    flavour = Flavour(backend, trt, str(trt.__version__))
    if backend == "tensorrt" and (parse_version(flavour.version) or _OLDEST)[:2] < _OLDEST:
        raise EngineError(f"TensorRT {flavour.version} is too old; 10.3 is the oldest that bundles are made for")
    return flavour


def make_network(flavour: Flavour, builder: Any) -> Any:
    """An empty network in which every tensor has the type that the graph gives it."""
    strongly_typed = getattr(flavour.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where implied
    return builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
