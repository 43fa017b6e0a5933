"""What a bundle's TensorRT engines say of themselves: `devices/<folder>/engines.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, EngineError
from dspark_edge.engines.manifest import LOWERINGS, PRECISIONS, Sha256, UtcTime
from dspark_edge.engines.profile import graphs_digest
from dspark_edge.engines.records import Count, Flag, Positive, Record, matching, non_empty, one_of
from dspark_edge.engines.tensorrt.flavour import BACKENDS
from dspark_edge.engines.tensorrt.profiles import BuildSizes, ShapeProfile

__all__ = ["RECORD_NAME", "EngineFile", "EngineRecord", "engine_folder", "rebuild_command"]

SCHEMA_VERSION = 1
RECORD_NAME = "engines.json"

Text = Annotated[str, non_empty]
Capability = Annotated[str, matching(r"\d+\.\d+", "a compute capability such as 8.7")]


@dataclass(frozen=True, slots=True)
class EngineFile(Record):
    """One engine."""

    file: Text  # beside the record
    size: Count  # bytes
    sha256: Sha256
    profiles: tuple[ShapeProfile, ...]  # in the engine's order
    decomposed_attention: Flag  # built of single operators, where TensorRT has no kernel for it as a whole
    weight_inputs: tuple[Text, ...] = ()  # initializers of the graph that are bound as inputs; see `shared_weights`


@dataclass(frozen=True, slots=True)
class EngineRecord(Record):
    """All engines of a bundle for a device, built together."""

    schema_version: Positive
    backend: Annotated[str, one_of(BACKENDS)]
    version: Text  # of TensorRT
    compute_capabilities: tuple[Capability, ...]  # built for; none: all that the backend builds for by itself
    lowering: Annotated[str, one_of(LOWERINGS)]
    precision: Annotated[str, one_of(PRECISIONS)]
    bundle: Sha256  # see `graphs_digest`
    built_at: UtcTime
    tool_version: Text
    sizes: BuildSizes
    engines: Mapping[str, EngineFile]  # role → engine

    @classmethod
    def load(cls, bundle: Bundle, folder: str) -> EngineRecord | None:
        """The record in a folder under `devices/`; None where it has none.

        Raises:
            BundleError: it is damaged, or of a newer version.
        """
        name = f"devices/{folder}/{RECORD_NAME}"
        if not bundle.has(name):
            return None
        where = str(bundle.path / name)
        data = bundle.read_json(name, "build the engines again")
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is int and version > SCHEMA_VERSION:
            raise BundleError(f"{where} was made by a newer version (schema {version}); upgrade dspark-edge")
        return cls.from_json(data, where)

    def to_text(self) -> str:
        """The text of `engines.json`."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    def check(self, bundle: Bundle, backend: str, version: str, capability: str | None) -> None:
        """See that the engines run here: a plan is good for one release, the GPUs it was built for, and its graphs.

        Args:
            backend, version: of the TensorRT that is to run them.
            capability: of the GPU, such as "8.7"; None: not known.

        Raises:
            EngineError: they do not; the message has the command that rebuilds them.
        """
        reasons = []
        if backend != self.backend:
            reasons.append(f"they are {self.backend}'s, not {backend}'s")
        if version != self.version:
            reasons.append(f"they were built with {self.backend} {self.version}, and {version} is installed")
        if capability is not None and self.compute_capabilities and capability not in self.compute_capabilities:
            built = ", ".join(self.compute_capabilities)
            reasons.append(f"they were built for compute capability {built}, and this GPU has {capability}")
        if self.bundle != graphs_digest(bundle.manifest):
            reasons.append("the bundle's graphs have changed since")
        if reasons:
            raise EngineError(
                f"the engines of {bundle.path} do not run here: {'; '.join(reasons)}; build them again with: "
                f"{rebuild_command(bundle, backend)}"
            )


def engine_folder(backend: str, compute_capabilities: tuple[str, ...]) -> str:
    """The folder's name under `devices/`."""
    return f"{backend}-{'+'.join(compute_capabilities) or 'any'}"


def rebuild_command(bundle: Bundle, backend: str) -> str:
    return f"dspark-edge build {bundle.path} --backend {backend}"
