"""Engines: a bundle's graphs, built by TensorRT into `devices/<backend>-<compute capabilities>/`.

One graph after another: `<role>.engine`, and in the end `engines.json`, which makes the folder valid. All is written
under other names first and the record of older engines goes first, so that a build that is killed leaves none that
look valid, and the timing cache keeps what was measured until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import sized
from dspark_edge.engines.errors import BundleError, EngineError, InvalidInputError
from dspark_edge.engines.machine import installed_version, probe_memory, probe_nvidia_driver
from dspark_edge.engines.manifest import ONNX_RUNTIME_PRECISIONS, Manifest
from dspark_edge.engines.profile import graphs_digest
from dspark_edge.engines.replace_file import replace_file, replacing, write_problem
from dspark_edge.engines.tensorrt.build_monitor import make_monitor
from dspark_edge.engines.tensorrt.flavour import Flavour
from dspark_edge.engines.tensorrt.logs import make_log
from dspark_edge.engines.tensorrt.network import GraphNetwork, parse_graph
from dspark_edge.engines.tensorrt.plan_stream import serialize_network
from dspark_edge.engines.tensorrt.profiles import BuildSizes, profiles_of
from dspark_edge.engines.tensorrt.records import (
    RECORD_NAME,
    SCHEMA_VERSION,
    EngineFile,
    EngineRecord,
    engine_folder,
)

__all__ = ["BuildNeeds", "BuildOptions", "Report", "build_engines", "estimate_needs"]

Report = Callable[[str, float], None]
"""Progress: the graph's role, and the share of it that is done."""

_TIMING_CACHE = "timing.cache"
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_NO_KERNEL = "dedicated kernel"  # what TensorRT says of attention that it can only build of single operators
_HALF = ("fp16", "bf16", "w4a16")  # activations are
# Of the largest graph's weights, at the peak: the mapped file, what the builder makes of it, and its engine. Measured
# with TensorRT for RTX 1.7, in one packing; where `decode` has its own there are two.
_HOST_COPIES = 4
_HOST_COPIES_PACKED_TWICE = 8
_HOST_BASE = 200 << 20  # TensorRT's own libraries and kernels


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How engines are built."""

    sizes: BuildSizes
    compute_capabilities: tuple[str, ...] = ()  # such as ("8.6",); none: the flavour's own choice
    timing_cache: Path | None = None  # None: beside the engines
    workspace: int | None = None  # bytes that a layer may use for scratch; None: all there is
    share_weights: bool = True  # what target and drafter share is bound to their engines, and in memory once


@dataclass(frozen=True, slots=True)
class BuildNeeds:
    """Bytes that building and running takes, before anything is built."""

    host: int  # main memory while building
    available: int | None  # of it at present
    weights: int  # of all engines on the device
    caches: int  # of all sequences at full capacity
    logits: int  # of the widest call


def estimate_needs(bundle: Bundle, sizes: BuildSizes, *, compiles_late: bool, share_weights: bool = True) -> BuildNeeds:
    """What building and running the engines will take.

    Args:
        compiles_late: see `profiles_of`; otherwise the target's weights are in its engine twice.
        share_weights: see `BuildOptions`.
    """
    manifest = bundle.manifest
    stored = {record.path: record.size for record in manifest.files}
    weights = [stored.get(f"{graph.file}.data", 0) + stored[graph.file] for graph in manifest.graphs.values()]
    target = manifest.graphs["target"]
    caches = sum(  # the drafter's are among them
        prod(sized(spec, {"batch": sizes.max_batch, "capacity": manifest.limits.capacity})) * _BYTES[spec.dtype]
        for spec in target.inputs
        if spec.name in target.aliases.values()
    )
    logits = 4 * sizes.max_batch * sizes.widest * manifest.target.vocab_size
    available = probe_memory(Path("/")).available
    copies = _HOST_COPIES if compiles_late else _HOST_COPIES_PACKED_TWICE
    on_device = sum(weights) if compiles_late else sum(weights) + max(weights)
    if not share_weights:  # the files have them once
        on_device += sum(weight.size * (len(weight.initializers) - 1) for weight in manifest.shared_weights)
    return BuildNeeds(copies * max(weights) + _HOST_BASE, available, on_device, caches, logits)


def build_engines(
    bundle: Bundle, flavour: Flavour, options: BuildOptions, report: Report = lambda role, share: None
) -> Path:
    """Build every graph of a bundle.

    Args:
        bundle: of the lowering `onnx` or `decomposed`, in a float precision or w4a16.
        flavour: which TensorRT builds.
        options: for which shapes and devices.
        report: progress.

    Returns:
        The folder with the engines and their record.

    Raises:
        InvalidInputError: the bundle or an option is not for this flavour.
        EngineError: there is no GPU where one is needed, or TensorRT fails.
        BundleError: a file cannot be written.
    """
    manifest = bundle.manifest
    if manifest.precision in ONNX_RUNTIME_PRECISIONS:
        raise InvalidInputError(
            f"the bundle's weights are {manifest.precision} in ONNX Runtime's own blocks, which TensorRT does not "
            "read; export with --precision w4a16 or fp16"
        )
    if options.timing_cache is not None and not flavour.times_tactics:
        raise InvalidInputError(
            f"{flavour.backend} chooses kernels on the device and keeps no timing cache; leave --timing-cache out"
        )
    flavour.check_lowering(manifest.lowering)
    capabilities = _target_devices(flavour, options.compute_capabilities)
    folder = bundle.path / "devices" / engine_folder(flavour.backend, capabilities)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_NAME).unlink(missing_ok=True)  # it would speak of engines that are replaced one by one
    except OSError as error:
        raise BundleError(write_problem(folder, error)) from error
    builder = _Builder(bundle, flavour, options, capabilities, folder, report)
    engines = {role: builder.build(role) for role in manifest.graphs}
    record = EngineRecord(
        schema_version=SCHEMA_VERSION,
        backend=flavour.backend,
        version=flavour.version,
        compute_capabilities=capabilities,
        lowering=manifest.lowering,
        precision=manifest.precision,
        bundle=graphs_digest(manifest),
        built_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tool_version=installed_version("dspark-edge") or "unknown",
        sizes=options.sizes,
        engines=engines,
    )
    replace_file(folder / RECORD_NAME, record.to_text().encode())
    return folder


def _target_devices(flavour: Flavour, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Compute capabilities to build for, as text; none: the flavour's own choice."""
    if flavour.cross_builds:
        flavour.compute_capabilities(wanted)
        return wanted
    gpus = probe_nvidia_driver(Path("/")).gpus
    if not gpus:
        raise EngineError(
            "TensorRT builds on the GPU that will run the engines, and there is none here; build on the device, or "
            "ahead of time for a GPU with RTX cores with --backend tensorrt-rtx"
        )
    present = ".".join(map(str, gpus[0].compute_capability))
    if wanted and wanted != (present,):
        raise InvalidInputError(
            f"compute capability {', '.join(wanted)} was asked for, but TensorRT builds for the GPU that is here, "
            f"which has {present}; build there, or use --backend tensorrt-rtx"
        )
    return (present,)


class _Builder:
    """Builds one graph after another with what they share."""

    def __init__(
        self,
        bundle: Bundle,
        flavour: Flavour,
        options: BuildOptions,
        capabilities: tuple[str, ...],
        folder: Path,
        report: Report,
    ) -> None:
        self._bundle, self._flavour, self._options = bundle, flavour, options
        self._manifest: Manifest = bundle.manifest
        self._kinds = flavour.compute_capabilities(capabilities) if flavour.cross_builds else ()
        self._folder, self._report = folder, report
        self._timing_cache = options.timing_cache or folder / _TIMING_CACHE
        self._log = make_log(flavour.trt)

    def build(self, role: str) -> EngineFile:
        graph = self._manifest.graphs[role]
        network = parse_graph(self._flavour, self._log, role, graph, self._bundle.graph_path(role))
        network.check()
        weights: tuple[str, ...] = ()
        if self._options.share_weights:
            weights = network.free_weights(self._manifest.shared_weights_of(role))
        profiles = profiles_of(role, self._manifest, self._options.sizes, compiles_late=self._flavour.compiles_late)
        # There are kernels for whole attention in half precision only, and not for every head size.
        decomposed = self._manifest.precision not in _HALF and network.decompose_attention() > 0
        name = f"{role}.engine"
        with replacing(self._folder / name) as file:
            written = self._serialize(network, profiles, file)
            if written is None and not decomposed and _NO_KERNEL in self._log.text() and network.decompose_attention():
                decomposed = True
                file.truncate(file.seek(0))
                written = self._serialize(network, profiles, file)
            if written is None:
                raise EngineError(self._failure(role))
        self._report(role, 1.0)
        return EngineFile(name, *written, profiles, decomposed, weights)

    def _serialize(self, network: GraphNetwork, profiles: tuple[Any, ...], file: BinaryIO) -> tuple[int, str] | None:
        """Write the engine: its size and hash, or None where TensorRT fails."""
        trt, builder = self._flavour.trt, network.builder
        config = builder.create_builder_config()
        for profile in profiles:
            network.add_profile(config, profile, self._manifest.target.vocab_size)
        if self._kinds:
            config.num_compute_capabilities = len(self._kinds)
            for index, kind in enumerate(self._kinds):
                config.set_compute_capability(kind, index)
        user_memory = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # of TensorRT for RTX
        if user_memory is not None:
            config.set_flag(user_memory)  # or its runs could not be captured as CUDA graphs
        if self._options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._options.workspace)
        cache = None
        if self._flavour.times_tactics:
            cache = config.create_timing_cache(self._cached_timings())
            config.set_timing_cache(cache, True)  # another device's are left out, not refused
        monitor = make_monitor(trt, lambda share: self._report(network.role, share))
        config.progress_monitor = monitor
        self._log.clear()
        written = serialize_network(trt, builder, network.network, config, file)
        if cache is not None:  # what was timed before a failure or Ctrl-C need not be timed again
            replace_file(self._timing_cache, bytes(cache.serialize()))
        if monitor.error is not None:  # of ours, from inside of TensorRT: Ctrl-C for instance
            raise monitor.error
        return written

    def _cached_timings(self) -> bytes:
        try:
            return self._timing_cache.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise BundleError(f"cannot read {self._timing_cache}: {error.strerror}") from error

    def _failure(self, role: str) -> str:
        text = self._log.reason()
        short = any(word in text.lower() for word in ("out of memory", "insufficient memory", "bad_alloc", "workspace"))
        advice = (
            "; there is too little memory: lower --max-batch, --prefill-chunk or --workspace, or export with a smaller "
            "--capacity"
            if short
            else ""
        )
        return f"{role}: {self._flavour.backend} {self._flavour.version} cannot build it: {text}{advice}"
