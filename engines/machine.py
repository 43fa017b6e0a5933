"""What this machine has: processor, memory, NVIDIA driver, Jetson board, and the installed backends.

Nothing here raises because something is absent: what cannot be read is None, or an empty tuple. Files are
read below a root folder, so that a test can lay out a Jetson or a container; what only the running process
knows (Python, installed packages, the CUDA driver) is asked of the process itself.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "TRACKED_PACKAGES",
    "Gpu",
    "Jetson",
    "Machine",
    "Memory",
    "NvidiaDriver",
    "OnnxRuntime",
    "Package",
    "Processor",
    "TensorRT",
    "installed_version",
    "parse_version",
    "probe_jetson",
    "probe_machine",
    "probe_memory",
    "probe_nvidia_driver",
    "probe_onnxruntime",
    "probe_processor",
    "probe_tensorrt",
    "query_cuda",
]

# Distributions that some job needs, as pip names them.
TRACKED_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "gguf", "huggingface_hub", "matplotlib")
_ORT_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_TENSORRT_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
# Releases whose pairing NVIDIA has published; others are named by their line only. L4T -> JetPack.
_JETPACK_OF = {"36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1"}
_JETPACK_LINE = {35: "5.x", 36: "6.x", 38: "7.0 or 7.1", 39: "7.2 or later"}
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_MEMORY_FIELDS = ("MemTotal", "MemAvailable")
# cgroup v1 writes a number close to 2**63 for "no limit".
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor and how much of it this process may use."""

    architecture: str  # such as x86_64 or aarch64
    model: str | None  # as /proc/cpuinfo names it; Arm kernels write none
    cores: int  # logical cores this process may be scheduled on
    quota: float | None  # processor time the control group allows, in cores; None is no limit

    @property
    def usable_cores(self) -> int:
        """Threads worth starting: the cores, or fewer under a quota, at least one."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes, as far as this process may use it; None where it cannot be read."""

    total: int | None
    available: int | None
    limit: int | None  # what the control group allows, or None where it sets no limit


@dataclass(frozen=True, slots=True)
class Package:
    """An installed distribution; ``version`` is None where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime as Python sees it."""

    version: str | None  # of the imported module
    providers: tuple[str, ...]  # compiled into it, which does not mean that each can run here
    distributions: tuple[Package, ...]  # that install the module; of several, the last installed won
    problem: str | None  # why it cannot be imported


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One flavour of TensorRT."""

    module: str  # tensorrt or tensorrt_rtx
    present: bool  # Python finds the module; its libraries may be missing all the same
    version: str | None  # of the distribution, or of the module once imported
    problem: str | None  # why it cannot be imported; only known when libraries were loaded


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. ``memory`` is in bytes; on a Jetson it is the main memory."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclass(frozen=True, slots=True)
class NvidiaDriver:
    """The NVIDIA driver and the GPUs it shows to this process."""

    cuda_version: tuple[int, int] | None  # the newest CUDA (major, minor) it runs; None without a driver
    kernel_version: str | None  # of the kernel module, such as 580.65.06
    gpus: tuple[Gpu, ...]
    problem: str | None  # why GPUs are missing although there is a driver


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson board; GPU and processor share its memory."""

    model: str  # as the device tree names it
    l4t: str | None  # Jetson Linux release, such as 36.4.3
    jetpack: str | None  # the installed version, else what the release tells of it, such as 6.x
    power_mode: str | None  # as nvpmodel names it, such as MAXN


@dataclass(frozen=True, slots=True)
class Machine:
    """All facts that the toolkit asks of a machine."""

    python: str
    system: str  # such as Linux
    processor: Processor
    memory: Memory
    free_disk: int | None  # bytes in the folder that was asked about
    driver: NvidiaDriver
    jetson: Jetson | None
    onnxruntime: OnnxRuntime
    tensorrt: tuple[TensorRT, ...]
    packages: tuple[Package, ...]

    def version_of(self, package: str) -> str | None:
        """The version of one of ``TRACKED_PACKAGES``, or None where it is not installed."""
        return next((found.version for found in self.packages if found.name == package), None)


def probe_machine(root: Path = Path("/"), *, folder: Path | None = None, load_libraries: bool = False) -> Machine:
    """Collect the facts of this machine; takes a few tenths of a second, mostly for importing ONNX Runtime.

    Args:
        root: where the system's files lie.
        folder: whose free disk space counts; the current one by default.
        load_libraries: also import TensorRT, which finds missing libraries but takes seconds.
    """
    return Machine(
        python=platform.python_version(),
        system=platform.system(),
        processor=probe_processor(root),
        memory=probe_memory(root),
        free_disk=_free_disk(folder or Path.cwd()),
        driver=probe_nvidia_driver(root),
        jetson=probe_jetson(root),
        onnxruntime=probe_onnxruntime(),
        tensorrt=tuple(probe_tensorrt(module, load=load_libraries) for module in _TENSORRT_DISTRIBUTIONS),
        packages=tuple(Package(name, installed_version(name)) for name in TRACKED_PACKAGES),
    )


def parse_version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``1.29.1rc2`` gives (1, 29, 1), ``10.3.0.30+cuda`` (10, 3, 0, 30)."""
    match = re.match(r"\d+(\.\d+)*", text.strip())
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def probe_processor(root: Path) -> Processor:
    """Cores and quota; the quota is the tightest of this process's control group and those around it."""
    quotas: list[float] = []
    for group in _control_groups(root, "cpu"):
        # Version 2 writes "quota period" or "max period", version 1 a file each and -1 for no limit.
        fields = (_read(group / "cpu.max") or "").split() or [
            _read(group / "cpu.cfs_quota_us") or "",
            _read(group / "cpu.cfs_period_us") or "",
        ]
        numbers = [number for field in fields if (number := _integer(field)) is not None and number > 0]
        if len(numbers) == 2:
            quotas.append(numbers[0] / numbers[1])
    model = _search(r"^model name\s*:\s*(.+)$", root / "proc/cpuinfo")
    return Processor(
        architecture=platform.machine(),
        model=model.group(1).strip() if model else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=min(quotas, default=None),
    )


def probe_memory(root: Path) -> Memory:
    """Memory as the kernel counts it, narrowed to what the control groups allow."""
    total, available = (
        int(found.group(1)) * 1024 if found else None
        for found in (_search(rf"^{name}:\s+(\d+) kB$", root / "proc/meminfo") for name in _MEMORY_FIELDS)
    )
    limits: list[int] = []
    for group in _control_groups(root, "memory"):
        allowed = _integer(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
        if allowed is None or allowed >= _NO_LIMIT:
            continue
        limits.append(allowed)
        used = _integer(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes"))
        if used is not None:
            # File cache counts as used, but the kernel gives the inactive part back when it is wanted.
            cache = _search(r"^(?:total_)?inactive_file (\d+)$", group / "memory.stat")
            left = max(0, allowed - used + (int(cache.group(1)) if cache else 0))
            available = left if available is None else min(available, left)
    total = min([*limits, *([] if total is None else [total])], default=None)
    return Memory(total=total, available=available, limit=min(limits, default=None))


def probe_jetson(root: Path) -> Jetson | None:
    """The Jetson board, or None on any other machine (and in a container that hides the board)."""
    model = (_read(root / "proc/device-tree/model") or "").rstrip("\0").strip()
    release = _search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", root / "etc/nv_tegra_release")
    if release is None and "jetson" not in model.lower():
        return None
    l4t = f"{release.group(1)}.{release.group(2)}" if release else None
    return Jetson(
        model=model or "NVIDIA Jetson",
        l4t=l4t,
        jetpack=_installed_jetpack(root) or (_jetpack_of(l4t) if l4t else None),
        power_mode=_power_mode(root),
    )


def probe_nvidia_driver(root: Path) -> NvidiaDriver:
    """The driver and its GPUs, asked through the CUDA driver library, without creating a context."""
    kernel = _search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", root / "proc/driver/nvidia/version")
    kernel_version = kernel.group(1) if kernel else None
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return NvidiaDriver(None, kernel_version, (), f"{error}" if kernel_version else None)
    return query_cuda(library, kernel_version)


def query_cuda(library: Any, kernel_version: str | None = None) -> NvidiaDriver:
    """Ask a loaded CUDA driver library for its version and GPUs."""

    def call(function: str, *arguments: object) -> str | None:
        try:
            code = getattr(library, function)(*arguments)
        except AttributeError:
            return f"the CUDA driver library has no {function}"
        return None if code == 0 else f"{function} failed with CUDA error {code}"

    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if problem := call("cuDriverGetVersion", ctypes.byref(version)):
        return NvidiaDriver(None, kernel_version, (), problem)
    cuda_version = (version.value // 1000, version.value % 1000 // 10)
    if problem := call("cuInit", 0) or call("cuDeviceGetCount", ctypes.byref(count)):
        return NvidiaDriver(cuda_version, kernel_version, (), problem)
    gpus: list[Gpu] = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        memory, name = ctypes.c_size_t(0), ctypes.create_string_buffer(256)
        problem = (
            call("cuDeviceGet", ctypes.byref(device), index)
            or call("cuDeviceGetName", name, len(name), device)
            or call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
            or call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
            or call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        )
        if problem:
            return NvidiaDriver(cuda_version, kernel_version, tuple(gpus), f"GPU {index}: {problem}")
        gpus.append(Gpu(name.value.decode("utf-8", "replace"), (major.value, minor.value), memory.value))
    return NvidiaDriver(cuda_version, kernel_version, tuple(gpus), None)


def probe_onnxruntime() -> OnnxRuntime:
    """ONNX Runtime's version and providers; imports it."""
    candidates = (Package(name, installed_version(name)) for name in _ORT_DISTRIBUTIONS)
    installed = tuple(package for package in candidates if package.version is not None)
    if not _is_present("onnxruntime"):
        return OnnxRuntime(None, (), installed, "onnxruntime is not installed")
    try:
        module = importlib.import_module("onnxruntime")
        return OnnxRuntime(str(module.__version__), tuple(module.get_available_providers()), installed, None)
    except Exception as error:  # a broken installation fails in many ways; all of them are the answer
        return OnnxRuntime(None, (), installed, f"importing onnxruntime failed: {_one_line(error)}")


def probe_tensorrt(module: str, *, load: bool = False) -> TensorRT:
    """One flavour of TensorRT; imports it only when asked to."""
    versions = (installed_version(name) for name in _TENSORRT_DISTRIBUTIONS[module])
    version = next((found for found in versions if found is not None), None)
    if not _is_present(module):
        return TensorRT(module, False, None, None)
    if not load:
        return TensorRT(module, True, version, None)
    try:
        return TensorRT(module, True, str(importlib.import_module(module).__version__), None)
    except Exception as error:  # as above: mostly a missing shared library
        return TensorRT(module, True, version, f"importing {module} failed: {_one_line(error)}")


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, in versions 2 and 1."""
    base = root / "sys/fs/cgroup"
    # In most containers the group's own folder is mounted as the root, so its path leads nowhere below it.
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = base / (controllers if (base / controllers).is_dir() else controller) if controllers else base
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _installed_jetpack(root: Path) -> str | None:
    """The version of the ``nvidia-jetpack`` Debian package, which says it exactly where it is installed."""
    package = r"^Package: nvidia-jetpack\nStatus: install ok installed\n(?:.+\n)*?Version: ([\d.]+)"
    found = _search(package, root / "var/lib/dpkg/status")
    return found.group(1) if found else None


def _jetpack_of(l4t: str) -> str | None:
    return _JETPACK_OF.get(l4t) or _JETPACK_LINE.get(parse_version(l4t)[0])


def _power_mode(root: Path) -> str | None:
    """The name of the mode that ``nvpmodel`` last set, or its number where the table cannot be read."""
    status = _search(r"pmode:(\d+)", root / "var/lib/nvpmodel/status")
    if status is None:
        return None
    number = int(status.group(1))
    name = _search(rf"POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+)", root / "etc/nvpmodel.conf")
    return name.group(1) if name else f"mode {number}"


def _free_disk(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a half-removed package can leave a module without a spec
        return False


def _read(path: Path) -> str | None:
    """A file's text, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _search(pattern: str, path: Path) -> re.Match[str] | None:
    """The first match in a file's lines, or None, also where it cannot be read."""
    return re.search(pattern, _read(path) or "", re.MULTILINE)


def _integer(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
