"""What this machine can do, and which command installs what is missing.

``diagnose`` is a pure function of the facts that :mod:`dspark_edge.engines.machine` collects; ``render``
prints its report for people, ``Report.to_json`` for programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from dspark_edge.engines.machine import Machine, TensorRT, parse_version

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Job", "Note", "Report", "Status", "diagnose", "render"]

Status = Literal["ok", "missing", "unavailable"]

_GIB = 1 << 30
_CAUSAL_SINCE = (1, 29, 1)  # ONNX Runtime: GroupQueryAttention's causal attribute
_CUDA_13_SINCE = (1, 31)  # ONNX Runtime's GPU packages are known to need CUDA 13 from here on
_TENSOR_SCATTER_SINCE = (10, 15)  # TensorRT: what the `onnx` lowering needs
_JETSON_SINCE = (11, 4)  # TensorRT 11.0 to 11.3 do not support Jetson
_LOW_MEMORY = 2 * _GIB
_LOW_DISK = 5 * _GIB
# What each job imports, as pip names it; the extra brings them.
_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors")
_TRAIN_PACKAGES = ("torch", "safetensors", "matplotlib")
_FETCH_PACKAGES = ("huggingface_hub",)
_TITLES = {
    "cpu": "Run a bundle on the CPU",
    "tensorrt": "Run with TensorRT",
    "tensorrt-rtx": "Run with TensorRT for RTX",
    "cuda": "Run with ONNX Runtime on the GPU",
    "export": "Export a bundle",
    "train": "Train a drafter",
    "fetch": "Fetch checkpoints by name",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One thing the toolkit does, and whether this machine can.

    Attributes:
        name: a short, stable key, such as ``tensorrt-rtx``.
        title: what it is, for people.
        status: ``ok``; ``missing`` when ``command`` would install what it needs; ``unavailable`` when this
            machine lacks something that no package brings.
        detail: what was found, or what is lacking.
        command: a shell command, for ``missing`` only.
    """

    name: str
    title: str
    status: Status
    detail: str
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing; a ``warning`` spoils a job or a measurement."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """Facts, jobs and notes of one machine."""

    machine: Machine
    jobs: tuple[Job, ...]
    notes: tuple[Note, ...]

    def job(self, name: str) -> Job:
        """The job with this name.

        Raises:
            KeyError: there is none.
        """
        for job in self.jobs:
            if job.name == name:
                return job
        raise KeyError(name)

    def to_json(self) -> str:
        """The report as an indented JSON object with the keys ``machine``, ``jobs`` and ``notes``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def diagnose(machine: Machine) -> Report:
    """Judge a machine's facts."""
    tensorrt, tensorrt_rtx = _flavour(machine, "tensorrt"), _flavour(machine, "tensorrt_rtx")
    jobs = (
        _cpu(machine),
        _tensorrt(machine, tensorrt),
        _tensorrt_rtx(machine, tensorrt_rtx),
        _cuda(machine),
        _packages(machine, "export", _EXPORT_PACKAGES, "export"),
        _packages(machine, "train", _TRAIN_PACKAGES, "train"),
        _packages(machine, "fetch", _FETCH_PACKAGES, "export"),
    )
    return Report(machine, jobs, tuple(_notes(machine, tensorrt, tensorrt_rtx)))


def render(report: Report, console: Console) -> None:
    """Print a report for people; commands stand on lines of their own, so that they can be copied."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "missing": "yellow", "unavailable": "dim", "info": "cyan", "warning": "yellow"}
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report.machine):
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    console.print()
    jobs = Table.grid(padding=(0, 2))
    for job in report.jobs:
        jobs.add_row(Text(job.status, style=styles[job.status]), Text(job.title), Text(job.detail))
    console.print(jobs)
    # Text, not str: rich would take the [extra] of a command for markup.
    commands = list(dict.fromkeys(job.command for job in report.jobs if job.command is not None))
    if commands:
        console.print()
        console.print(Text("To install what is missing:", style="bold"))
    for command in commands:
        console.print(Text(f"  {command}"), soft_wrap=True)
    if report.notes:
        console.print()
    for note in report.notes:
        console.print(Text.assemble((f"{note.level}: ", styles[note.level]), note.text))


def _install(extra: str) -> str:
    return f"pip install 'dspark-edge[{extra}]'"


def _job(name: str, status: Status, detail: str, command: str | None = None) -> Job:
    return Job(name, _TITLES[name], status, detail, command)


def _flavour(machine: Machine, module: str) -> TensorRT:
    absent = TensorRT(module, False, None, None)
    return next((found for found in machine.tensorrt if found.module == module), absent)


def _why_no_gpu(machine: Machine) -> str | None:
    """Why nothing can run on a GPU here, or None where one is there."""
    driver = machine.driver
    if driver.gpus:
        return None
    if driver.problem:
        return f"the NVIDIA driver shows no GPU: {driver.problem}"
    if driver.cuda_version is not None:
        return "the NVIDIA driver shows no GPU to this process (CUDA_VISIBLE_DEVICES, container settings)"
    return "no NVIDIA driver"


def _cpu(machine: Machine) -> Job:
    runtime = machine.onnxruntime
    if runtime.version is not None and "CPUExecutionProvider" in runtime.providers:
        cores = machine.processor.usable_cores
        return _job("cpu", "ok", f"ONNX Runtime {runtime.version}, {cores} core{'s' if cores != 1 else ''}")
    problem = runtime.problem or "onnxruntime has no CPUExecutionProvider"
    # A broken installation counts as installed to pip, so it has to be told to install again.
    command = "pip install --force-reinstall onnxruntime" if runtime.distributions else "pip install onnxruntime"
    return _job("cpu", "missing", problem, command)


def _tensorrt(machine: Machine, found: TensorRT) -> Job:
    if no_gpu := _why_no_gpu(machine):
        return _job("tensorrt", "unavailable", no_gpu)
    if found.present and found.problem is None:
        return _job("tensorrt", "ok", f"TensorRT {found.version or 'of unknown version'}")
    detail = found.problem or "the Python module tensorrt is not installed"
    if machine.jetson is not None:
        # The wheels of the package index do not fit a Jetson: JetPack's own Debian package does.
        detail += "; a virtual environment must see the system's packages (--system-site-packages)"
        return _job("tensorrt", "missing", detail, "sudo apt-get install python3-libnvinfer")
    return _job("tensorrt", "missing", detail, _install("tensorrt"))


def _tensorrt_rtx(machine: Machine, found: TensorRT) -> Job:
    name = "tensorrt-rtx"
    if no_gpu := _why_no_gpu(machine):
        builds = f"; TensorRT for RTX {found.version or ''}".rstrip() + " is installed: it can build engines"
        return _job(name, "unavailable", no_gpu + (builds if found.present and not found.problem else ""))
    if found.present and found.problem is None:
        return _job(name, "ok", f"TensorRT for RTX {found.version or 'of unknown version'}")
    if machine.jetson is not None:
        return _job(name, "unavailable", "on a Jetson use the TensorRT that comes with JetPack")
    return _job(name, "missing", found.problem or "the Python module tensorrt_rtx is not installed", _install(name))


def _cuda(machine: Machine) -> Job:
    if no_gpu := _why_no_gpu(machine):
        return _job("cuda", "unavailable", no_gpu)
    runtime = machine.onnxruntime
    if "CUDAExecutionProvider" not in runtime.providers:
        detail = runtime.problem or "the installed onnxruntime has no CUDAExecutionProvider"
        if any(package.name == "onnxruntime-gpu" for package in runtime.distributions):
            # Both distributions write the same files; the CPU one was installed last.
            command = "pip install --force-reinstall --no-deps onnxruntime-gpu"
            return _job("cuda", "missing", f"{detail}, although onnxruntime-gpu is installed", command)
        return _job("cuda", "missing", detail, _install("cuda"))
    cuda = machine.driver.cuda_version
    if parse_version(runtime.version or "") >= _CUDA_13_SINCE and cuda is not None and cuda < (13, 0):
        needs = f"ONNX Runtime {runtime.version} needs a driver for CUDA 13"
        return _job("cuda", "unavailable", f"{needs}, this one is for {_dotted(cuda)}; update the driver")
    return _job("cuda", "ok", f"ONNX Runtime {runtime.version} with CUDA")


def _packages(machine: Machine, name: str, needed: Sequence[str], extra: str) -> Job:
    missing = [package for package in needed if machine.version_of(package) is None]
    if missing:
        return _job(name, "missing", f"not installed: {', '.join(missing)}", _install(extra))
    return _job(name, "ok", ", ".join(f"{package} {machine.version_of(package)}" for package in needed))


def _notes(machine: Machine, tensorrt: TensorRT, tensorrt_rtx: TensorRT) -> Iterator[Note]:
    yield from _runtime_notes(machine)
    yield from _tensorrt_notes(machine, tensorrt, tensorrt_rtx)
    yield from _resource_notes(machine)


def _runtime_notes(machine: Machine) -> Iterator[Note]:
    runtime = machine.onnxruntime
    if runtime.version is not None and parse_version(runtime.version) < _CAUSAL_SINCE:
        way_out = (
            "export with the decomposed lowering, or use Python 3.11 or newer"
            if parse_version(machine.python) < (3, 11)
            else "update it with: pip install -U onnxruntime"
        )
        text = f"ONNX Runtime {runtime.version} cannot run a drafter in the ort lowering (1.29.1 can); {way_out}"
        yield Note("warning", text)
    if len(runtime.distributions) > 1:
        names = " and ".join(package.name for package in runtime.distributions)
        serves = "with" if "CUDAExecutionProvider" in runtime.providers else "without"
        text = f"{names} are both installed and write the same files; the one in effect is {serves} CUDA"
        yield Note("info", text)


def _tensorrt_notes(machine: Machine, tensorrt: TensorRT, tensorrt_rtx: TensorRT) -> Iterator[Note]:
    if tensorrt.present and tensorrt_rtx.present:
        text = "TensorRT and TensorRT for RTX are both installed; an engine of one does not load in the other"
        yield Note("info", text)
    version = parse_version(tensorrt.version or "")
    if version and version < _TENSOR_SCATTER_SINCE:
        text = f"TensorRT {tensorrt.version} is older than 10.15: export with the decomposed lowering for it"
        yield Note("info", text)
    if machine.jetson is not None and (11,) <= version < _JETSON_SINCE:
        yield Note("warning", f"TensorRT {tensorrt.version} does not support Jetson; 11.4.1 does, on JetPack 7.2.2")


def _resource_notes(machine: Machine) -> Iterator[Note]:
    memory, processor, jetson = machine.memory, machine.processor, machine.jetson
    if memory.available is not None and memory.available < _LOW_MEMORY:
        yield Note("warning", f"only {_gib(memory.available)} of memory are available: enough for small models")
    if machine.free_disk is not None and machine.free_disk < _LOW_DISK:
        yield Note("warning", f"only {_gib(machine.free_disk)} of disk are free; bundles and engines take several")
    if processor.quota is not None and processor.quota < processor.cores:
        text = f"a quota of {processor.quota:g} cores limits the {processor.cores} that are visible"
        yield Note("info", f"{text}; throttling makes measured times uneven")
    if jetson is not None:
        yield Note("info", "GPU and processor share the memory of a Jetson: a model counts once, in main memory")
        if jetson.power_mode is not None and not jetson.power_mode.upper().startswith("MAXN"):
            text = f"power mode {jetson.power_mode} is set, not MAXN; a profile only holds for the mode it was"
            yield Note("info", f"{text} measured in (sudo nvpmodel -q shows it)")


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    """Name and value of each fact for people."""
    processor, memory, driver = machine.processor, machine.memory, machine.driver
    yield "Python", f"{machine.python} on {machine.system} {processor.architecture}"
    name = f"{processor.model}, " if processor.model else ""
    quota = f", quota {processor.quota:g}" if processor.quota is not None else ""
    yield "Processor", f"{name}{processor.cores} core{'s' if processor.cores != 1 else ''}{quota}"
    if memory.total is not None:
        free = f", {_gib(memory.available)} available" if memory.available is not None else ""
        yield "Memory", f"{_gib(memory.total)}{free}"
    if machine.free_disk is not None:
        yield "Free disk", _gib(machine.free_disk)
    if machine.jetson is not None:
        jetson = machine.jetson
        parts = {"Jetson Linux": jetson.l4t, "JetPack": jetson.jetpack, "power mode": jetson.power_mode}
        known = [f"{key} {value}" for key, value in parts.items() if value]
        yield "Jetson", ", ".join([jetson.model, *known])
    if driver.cuda_version is not None or driver.kernel_version is not None:
        cuda = f"CUDA {_dotted(driver.cuda_version)}" if driver.cuda_version else "CUDA library not found"
        yield "NVIDIA driver", f"{driver.kernel_version or 'version unknown'}, {cuda}"
    for index, gpu in enumerate(driver.gpus):
        capability = f"compute capability {_dotted(gpu.compute_capability)}"
        yield f"GPU {index}", f"{gpu.name}, {capability}, {_gib(gpu.memory)}"
    if machine.onnxruntime.version is not None:
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in machine.onnxruntime.providers)
        yield "ONNX Runtime", f"{machine.onnxruntime.version} ({providers})"
    for flavour in machine.tensorrt:
        if flavour.present:
            title = "TensorRT for RTX" if flavour.module == "tensorrt_rtx" else "TensorRT"
            yield title, flavour.problem or flavour.version or "version unknown"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
