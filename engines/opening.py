"""Which engine runs a bundle, as a user names it."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import PROVIDERS, OnnxRuntimeEngine
from dspark_edge.engines.profile_device import Device, probe_device

__all__ = ["ENGINES", "EngineChoice"]

ENGINES = ("onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and where it runs.

    Args:
        engine: one of ENGINES.
        provider: of ONNX Runtime: "cpu", "cuda", or the full name of an execution provider. TensorRT's only device is
            "cuda", which may be given.
        threads: of each graph on the CPU; None: all cores. TensorRT takes none.

    Raises:
        InvalidInputError: the engine is unknown, or is given what it does not take.
    """

    engine: str = "onnxruntime"
    provider: str | None = None  # None: the engine's own
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InvalidInputError(f"unknown engine {self.engine!r}; choose one of: {', '.join(ENGINES)}")
        if self.engine == "onnxruntime":
            return
        if self.provider not in (None, "cuda"):
            raise InvalidInputError(
                f"{self.engine} runs on NVIDIA GPUs, not with the provider {self.provider!r}; leave --provider out"
            )
        if self.threads is not None:
            raise InvalidInputError(f"{self.engine} runs on the GPU and takes no threads; leave --threads out")

    @property
    def where(self) -> str:
        """The provider, the engine's own where none was given."""
        return self.provider or ("cpu" if self.engine == "onnxruntime" else "cuda")

    @property
    def on_cpu(self) -> bool:
        return self.where in ("cpu", PROVIDERS["cpu"])

    @property
    def name(self) -> str:
        """For reports: "onnxruntime cpu", "tensorrt-rtx cuda"."""
        return f"{self.engine} {self.where}"

    def open(self, bundle: Bundle) -> Engine:
        """The engine with a bundle's graphs.

        Raises:
            EngineError, MissingDependencyError, BundleError: see the engines.
        """
        if self.engine == "onnxruntime":
            return OnnxRuntimeEngine(bundle, self.where, self.threads)
        from dspark_edge.engines.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(bundle, self.engine)

    def device(self) -> Device:
        """The device that it runs on, as profiles know it."""
        if self.engine == "onnxruntime":
            return probe_device(self.where, self.threads)
        return probe_device(self.engine)
