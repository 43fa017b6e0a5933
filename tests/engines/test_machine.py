from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dspark_edge.engines import machine as module
from dspark_edge.engines.machine import (
    Gpu,
    Jetson,
    Memory,
    NvidiaDriver,
    Package,
    Processor,
    parse_version,
    probe_jetson,
    probe_machine,
    probe_memory,
    probe_nvidia_driver,
    probe_onnxruntime,
    probe_processor,
    probe_tensorrt,
    query_cuda,
)

MEMINFO = "MemTotal:       16000 kB\nMemFree:         2000 kB\nMemAvailable:    8000 kB\nHugePages_Total:   0\n"
KIB = 1024


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.29.1", (1, 29, 1)),
        ("1.32.0rc1", (1, 32, 0)),
        ("10.3.0.30+cuda12", (10, 3, 0, 30)),
        (" 11 ", (11,)),
        ("", ()),
        ("unknown", ()),
    ],
)
def test_parse_version(text: str, expected: tuple[int, ...]) -> None:
    assert parse_version(text) == expected


def test_an_empty_root_gives_unknowns_not_errors(tmp_path: Path) -> None:
    assert probe_memory(tmp_path) == Memory(None, None, None)
    assert probe_jetson(tmp_path) is None
    processor = probe_processor(tmp_path)
    assert (processor.model, processor.quota) == (None, None)
    assert processor.cores >= 1


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert probe_memory(lay_out(tmp_path, {"proc/meminfo": MEMINFO})) == Memory(16000 * KIB, 8000 * KIB, None)


def test_memory_under_a_version_2_limit_counts_reclaimable_cache(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": str(4000 * KIB),
        "sys/fs/cgroup/a/memory.current": str(3000 * KIB),
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {500 * KIB}\nactive_file 7\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert probe_memory(lay_out(tmp_path, files)) == Memory(4000 * KIB, 1500 * KIB, 4000 * KIB)


def test_memory_under_version_1_and_in_a_container_that_hides_the_path(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(6000 * KIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1000 * KIB),
    }
    assert probe_memory(lay_out(tmp_path, files)) == Memory(6000 * KIB, 5000 * KIB, 6000 * KIB)
    lay_out(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert probe_memory(tmp_path) == Memory(16000 * KIB, 8000 * KIB, None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_processor_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    files = {"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 9\nflags\t: sse\n", **files}
    processor = probe_processor(lay_out(tmp_path, files))
    assert (processor.quota, processor.model) == (quota, "AMD Ryzen 9")


@pytest.mark.parametrize(("quota", "usable"), [(None, 4), (2.5, 2), (0.5, 1), (64.0, 4)])
def test_usable_cores(quota: float | None, usable: int) -> None:
    assert Processor("x86_64", None, 4, quota).usable_cores == usable


def tegra(release: int, revision: str) -> str:
    return f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed\n"


@pytest.mark.parametrize(
    ("release", "revision", "l4t", "jetpack"),
    [
        (36, "3.0", "36.3.0", "6.0"),
        (36, "4.3", "36.4.3", "6.2"),
        (36, "4.0", "36.4.0", "6.1"),
        (36, "4.9", "36.4.9", "6.x"),
        (38, "2.0", "38.2.0", "7.0 or 7.1"),
        (39, "0", "39.0", "7.2 or later"),
        (35, "4.1", "35.4.1", "5.x"),
        (99, "1.0", "99.1.0", None),
    ],
)
def test_jetson_release(tmp_path: Path, release: int, revision: str, l4t: str, jetpack: str | None) -> None:
    lay_out(tmp_path, {"etc/nv_tegra_release": tegra(release, revision)})
    assert probe_jetson(tmp_path) == Jetson("NVIDIA Jetson", l4t, jetpack, None)


def test_jetson_with_everything_readable(tmp_path: Path) -> None:
    dpkg = (
        "Package: nvidia-jetpack-dev\nStatus: install ok installed\nVersion: 1.0\n\n"
        "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2.1+b38\n\nPackage: zsh\n"
    )
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "etc/nv_tegra_release": tegra(36, "4.7"),
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nx\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0002 fmode:fanNull\n",
        "var/lib/dpkg/status": dpkg,
    }
    jetson = probe_jetson(lay_out(tmp_path, files))
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert jetson == Jetson(model, "36.4.7", "6.2.1", "MAXN_SUPER")
    (tmp_path / "etc/nvpmodel.conf").unlink()
    removed = dpkg.replace("jetpack\nStatus: install ok installed", "jetpack\nStatus: deinstall ok config-files")
    lay_out(tmp_path, {"var/lib/dpkg/status": removed})
    jetson = probe_jetson(tmp_path)
    assert jetson is not None
    assert (jetson.jetpack, jetson.power_mode) == ("6.x", "mode 2")


def test_another_board_is_no_jetson(tmp_path: Path) -> None:
    assert probe_jetson(lay_out(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})) is None


class FakeCuda:
    """The CUDA driver library, as far as it is asked; ``failing`` returns an error code."""

    FUNCTIONS: ClassVar[dict[str, str]] = {
        "cuDriverGetVersion": "driver_version",
        "cuInit": "initialize",
        "cuDeviceGetCount": "device_count",
        "cuDeviceGetName": "device_name",
        "cuDeviceGetAttribute": "device_attribute",
        "cuDeviceTotalMem_v2": "device_memory",
        "cuDeviceGet": "device",
    }

    def __init__(self, gpus: tuple[Gpu, ...], failing: str = "") -> None:
        self.gpus, self.failing = gpus, failing

    def __getattr__(self, name: str) -> Any:
        if name not in self.FUNCTIONS or (name == "cuDeviceTotalMem_v2" and self.failing == "symbol"):
            raise AttributeError(name)
        return (lambda *arguments: 999) if name == self.failing else getattr(self, self.FUNCTIONS[name])

    def driver_version(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def initialize(self, flags: int) -> int:
        return flags

    def device_count(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def device(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def device_name(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = self.gpus[device.value].name.encode()[: size - 1]
        return 0

    def device_attribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = self.gpus[device.value].compute_capability[attribute - 75]
        return 0

    def device_memory(self, size: Any, device: ctypes.c_int) -> int:
        size._obj.value = self.gpus[device.value].memory
        return 0


GPUS = (Gpu("Orin", (8, 7), 8 << 30), Gpu("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30))


def test_query_cuda() -> None:
    assert query_cuda(FakeCuda(GPUS), "580.1") == NvidiaDriver((13, 1), "580.1", GPUS, None)
    assert query_cuda(FakeCuda(())) == NvidiaDriver((13, 1), None, (), None)


@pytest.mark.parametrize(
    ("failing", "cuda_version", "problem"),
    [
        ("cuDriverGetVersion", None, "cuDriverGetVersion failed with CUDA error 999"),
        ("cuInit", (13, 1), "cuInit failed with CUDA error 999"),
        ("cuDeviceGetCount", (13, 1), "cuDeviceGetCount failed with CUDA error 999"),
        ("cuDeviceGetName", (13, 1), "GPU 0: cuDeviceGetName failed with CUDA error 999"),
        ("symbol", (13, 1), "GPU 0: the CUDA driver library has no cuDeviceTotalMem_v2"),
    ],
)
def test_a_failing_driver_says_where(failing: str, cuda_version: tuple[int, int] | None, problem: str) -> None:
    assert query_cuda(FakeCuda(GPUS, failing)) == NvidiaDriver(cuda_version, None, (), problem)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\nGCC version: 12.3.0\n",
            "535.183.01",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
        ("nonsense", None),
    ],
)
def test_kernel_module_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str | None) -> None:
    def no_library(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    lay_out(tmp_path, {"proc/driver/nvidia/version": text})
    problem = "libcuda.so.1: cannot open shared object file" if version else None
    assert probe_nvidia_driver(tmp_path) == NvidiaDriver(None, version, (), problem)


def test_onnxruntime_installed_broken_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe_onnxruntime()
    assert found.problem is None
    assert "CPUExecutionProvider" in found.providers
    assert [package.version for package in found.distributions] == [found.version]

    def broken(name: str) -> object:
        raise ImportError("libcudart.so.12:\ncannot open")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = probe_onnxruntime()
    assert found.version is None
    assert found.problem == "importing onnxruntime failed: ImportError: libcudart.so.12: cannot open"
    monkeypatch.setattr(module, "_is_present", lambda name: False)
    assert probe_onnxruntime().problem == "onnxruntime is not installed"


def test_tensorrt_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "raise OSError('libnvinfer.so.10: cannot open shared object file')"
    lay_out(tmp_path, {"tensorrt/__init__.py": source, "tensorrt_rtx/__init__.py": "__version__ = '1.7.1'"})
    metadata = "Metadata-Version: 2.1\nName: tensorrt-cu13\nVersion: 10.15.1\n"
    lay_out(tmp_path, {"tensorrt_cu13-10.15.1.dist-info/METADATA": metadata})
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = probe_tensorrt("tensorrt")
    assert (found.present, found.version, found.problem) == (True, "10.15.1", None)
    assert "tensorrt" not in sys.modules
    found = probe_tensorrt("tensorrt", load=True)
    assert found.problem is not None
    assert "OSError: libnvinfer.so.10" in found.problem
    assert probe_tensorrt("tensorrt_rtx", load=True).version == "1.7.1"
    sys.modules.pop("tensorrt_rtx", None)


def test_tensorrt_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert probe_tensorrt("tensorrt_rtx") == module.TensorRT("tensorrt_rtx", False, None, None)


def test_probe_machine_here_and_over_a_fake_root(tmp_path: Path) -> None:
    here = probe_machine()
    assert here.python.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert here.memory.total is None or here.memory.total > 0
    fake = probe_machine(lay_out(tmp_path, {"proc/meminfo": MEMINFO}), folder=tmp_path)
    assert fake.memory.available == 8000 * KIB
    assert fake.free_disk is not None
    assert probe_machine(tmp_path, folder=tmp_path / "nowhere").free_disk is None
    assert fake.version_of("no such package") is None


def test_version_of(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(packages=(Package("torch", "2.13.0"), Package("onnx", None)))
    assert module.Machine.version_of(fake, "torch") == "2.13.0"  # type: ignore[arg-type]
    assert module.Machine.version_of(fake, "onnx") is None  # type: ignore[arg-type]


def test_importing_the_module_is_light() -> None:
    code = (
        "import sys, dspark_edge.engines.machine, dspark_edge.runtime.doctor, dspark_edge.runtime.tokenizer, "
        "dspark_edge.runtime.detokenizer, dspark_edge.runtime.chat_template\n"
        "heavy = {'onnxruntime', 'torch', 'onnx', 'transformers', 'rich', 'jinja2', 'tokenizers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
