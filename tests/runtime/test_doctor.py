from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from dspark_edge.engines.machine import (
    Gpu,
    Jetson,
    Machine,
    Memory,
    NvidiaDriver,
    OnnxRuntime,
    Package,
    Processor,
    TensorRT,
    probe_machine,
)
from dspark_edge.runtime.doctor import Report, diagnose, render

GIB = 1 << 30
NO_DRIVER = NvidiaDriver(None, None, (), None)
RTX = NvidiaDriver((13, 1), "580.65.06", (Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB),), None)
ORIN = NvidiaDriver((12, 6), "540.4.0", (Gpu("Orin", (8, 7), 8 * GIB),), None)
JETSON = Jetson("NVIDIA Jetson Orin Nano", "36.4.3", "6.2", "15W")
CPU_ORT = OnnxRuntime("1.32.0", ("CPUExecutionProvider",), (Package("onnxruntime", "1.32.0"),), None)
CUDA_ORT = OnnxRuntime(
    "1.32.0", ("CUDAExecutionProvider", "CPUExecutionProvider"), (Package("onnxruntime-gpu", "1.32.0"),), None
)
PACKAGES = tuple(
    Package(name, "1.0")
    for name in ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "gguf", "huggingface_hub", "matplotlib")
)


def flavours(tensorrt: str | None = None, rtx: str | None = None) -> tuple[TensorRT, ...]:
    return (
        TensorRT("tensorrt", tensorrt is not None, tensorrt, None),
        TensorRT("tensorrt_rtx", rtx is not None, rtx, None),
    )


PLAIN = Machine(
    python="3.12.1",
    system="Linux",
    processor=Processor("x86_64", "AMD Ryzen", 8, None),
    memory=Memory(32 * GIB, 20 * GIB, None),
    free_disk=100 * GIB,
    driver=NO_DRIVER,
    jetson=None,
    onnxruntime=CPU_ORT,
    tensorrt=flavours(),
    packages=tuple(Package(package.name, None) for package in PACKAGES),
)


def statuses(report: Report) -> dict[str, str]:
    return {job.name: job.status for job in report.jobs}


def notes(machine: Machine) -> list[str]:
    return [note.text for note in diagnose(machine).notes]


def test_a_plain_computer() -> None:
    report = diagnose(PLAIN)
    assert statuses(report) == {
        "cpu": "ok",
        "tensorrt": "unavailable",
        "tensorrt-rtx": "unavailable",
        "cuda": "unavailable",
        "export": "missing",
        "train": "missing",
        "fetch": "missing",
    }
    assert report.notes == ()
    assert report.job("cpu").detail == "ONNX Runtime 1.32.0, 8 cores"
    assert report.job("export").command == "pip install 'dspark-edge[export]'"
    assert report.job("train").command == "pip install 'dspark-edge[train]'"
    assert report.job("fetch").command == "pip install 'dspark-edge[export]'"
    assert report.job("cuda").detail == "no NVIDIA driver"
    with pytest.raises(KeyError):
        report.job("fly")


def test_commands_come_with_missing_jobs_only() -> None:
    machines = [PLAIN, replace(PLAIN, driver=RTX), replace(PLAIN, driver=ORIN, jetson=JETSON)]
    machines += [replace(machine, packages=PACKAGES, tensorrt=flavours("11.4.1", "1.7.1")) for machine in machines]
    for machine in machines:
        for job in diagnose(machine).jobs:
            assert (job.command is not None) == (job.status == "missing"), job
            assert job.title
            assert job.detail


def test_a_computer_with_a_gpu_and_nothing_installed_for_it() -> None:
    report = diagnose(replace(PLAIN, driver=RTX))
    assert report.job("tensorrt").command == "pip install 'dspark-edge[tensorrt]'"
    assert report.job("tensorrt-rtx").command == "pip install 'dspark-edge[tensorrt-rtx]'"
    assert report.job("cuda").command == "pip install 'dspark-edge[cuda]'"


def test_a_computer_with_a_gpu_and_everything() -> None:
    machine = replace(
        PLAIN, driver=RTX, onnxruntime=CUDA_ORT, tensorrt=flavours("11.4.1", "1.7.1.116"), packages=PACKAGES
    )
    report = diagnose(machine)
    assert set(statuses(report).values()) == {"ok"}
    assert [note.text for note in report.notes] == [
        "TensorRT and TensorRT for RTX are both installed; an engine of one does not load in the other"
    ]


def test_a_jetson_takes_tensorrt_from_jetpack() -> None:
    machine = replace(PLAIN, driver=ORIN, jetson=JETSON, python="3.10.12")
    report = diagnose(machine)
    assert report.job("tensorrt").command == "sudo apt-get install python3-libnvinfer"
    assert "--system-site-packages" in report.job("tensorrt").detail
    assert report.job("tensorrt-rtx").status == "unavailable"
    with_tensorrt = replace(machine, tensorrt=flavours("10.3.0"))
    assert diagnose(with_tensorrt).job("tensorrt").status == "ok"
    text = "\n".join(notes(with_tensorrt))
    assert "decomposed lowering" in text
    assert "power mode 15W" in text
    assert "share the memory" in text
    assert any("does not support Jetson" in note for note in notes(replace(machine, tensorrt=flavours("11.2.0"))))
    assert not any("does not support Jetson" in note for note in notes(replace(machine, tensorrt=flavours("11.4.1"))))


def test_without_a_gpu_tensorrt_rtx_still_builds() -> None:
    job = diagnose(replace(PLAIN, tensorrt=flavours(rtx="1.7.1"))).job("tensorrt-rtx")
    assert job.status == "unavailable"
    assert job.detail == "no NVIDIA driver; TensorRT for RTX 1.7.1 is installed: it can build engines"


def test_tensorrt_without_its_libraries_is_missing() -> None:
    broken = TensorRT("tensorrt", True, "10.15.1", "importing tensorrt failed: OSError: libnvinfer.so.10")
    job = diagnose(replace(PLAIN, driver=RTX, tensorrt=(broken,))).job("tensorrt")
    assert (job.status, job.detail) == ("missing", broken.problem)


@pytest.mark.parametrize(
    ("driver", "detail"),
    [
        (NvidiaDriver((13, 1), None, (), "cuInit failed with CUDA error 100"), "cuInit failed"),
        (NvidiaDriver((13, 1), "580.1", (), None), "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_driver_without_gpus_says_why(driver: NvidiaDriver, detail: str) -> None:
    job = diagnose(replace(PLAIN, driver=driver, onnxruntime=CUDA_ORT)).job("cuda")
    assert job.status == "unavailable"
    assert detail in job.detail


def test_onnxruntime_for_cuda_13_on_an_older_driver() -> None:
    old = replace(RTX, cuda_version=(12, 8))
    job = diagnose(replace(PLAIN, driver=old, onnxruntime=CUDA_ORT)).job("cuda")
    assert job.status == "unavailable"
    assert "this one is for 12.8" in job.detail
    older = replace(CUDA_ORT, version="1.23.0")
    assert diagnose(replace(PLAIN, driver=old, onnxruntime=older)).job("cuda").status == "ok"


def test_both_onnxruntime_distributions() -> None:
    both = (Package("onnxruntime", "1.32.0"), Package("onnxruntime-gpu", "1.32.0"))
    machine = replace(PLAIN, driver=RTX, onnxruntime=replace(CPU_ORT, distributions=both))
    job = diagnose(machine).job("cuda")
    assert job.command == "pip install --force-reinstall --no-deps onnxruntime-gpu"
    assert notes(machine) == [
        "onnxruntime and onnxruntime-gpu are both installed and write the same files; the one in effect is without CUDA"
    ]
    machine = replace(machine, onnxruntime=replace(CUDA_ORT, distributions=both))
    assert diagnose(machine).job("cuda").status == "ok"
    assert notes(machine)[0].endswith("with CUDA")


def test_onnxruntime_absent_or_broken() -> None:
    absent = OnnxRuntime(None, (), (), "onnxruntime is not installed")
    job = diagnose(replace(PLAIN, onnxruntime=absent)).job("cpu")
    assert (job.status, job.command) == ("missing", "pip install onnxruntime")
    broken = replace(absent, distributions=CPU_ORT.distributions, problem="importing onnxruntime failed: x")
    assert diagnose(replace(PLAIN, onnxruntime=broken)).job("cpu").command == (
        "pip install --force-reinstall onnxruntime"
    )


@pytest.mark.parametrize(
    ("version", "python", "advice"),
    [
        ("1.29.0", "3.12.1", "pip install -U onnxruntime"),
        ("1.23.2", "3.10.12", "decomposed lowering"),
        ("1.29.1", "3.12.1", None),
        ("1.32.0", "3.12.1", None),
    ],
)
def test_an_old_onnxruntime_cannot_run_the_ort_lowering(version: str, python: str, advice: str | None) -> None:
    found = notes(replace(PLAIN, python=python, onnxruntime=replace(CPU_ORT, version=version)))
    assert len(found) == (advice is not None)
    assert advice is None or advice in found[0]


def test_scarce_resources_are_noted() -> None:
    machine = replace(
        PLAIN,
        memory=Memory(4 * GIB, GIB, 4 * GIB),
        free_disk=2 * GIB,
        processor=Processor("x86_64", None, 8, 1.5),
    )
    text = "\n".join(notes(machine))
    assert "only 1.0 GiB of memory" in text
    assert "only 2.0 GiB of disk" in text
    assert "a quota of 1.5 cores limits the 8" in text
    unknown = replace(PLAIN, memory=Memory(None, None, None), free_disk=None)
    assert notes(unknown) == []


def test_the_report_as_json() -> None:
    content = json.loads(diagnose(replace(PLAIN, driver=RTX)).to_json())
    assert list(content) == ["machine", "jobs", "notes"]
    assert content["machine"]["driver"]["gpus"][0]["compute_capability"] == [8, 9]
    assert content["jobs"][0] == {
        "name": "cpu",
        "title": "Run a bundle on the CPU",
        "status": "ok",
        "detail": "ONNX Runtime 1.32.0, 8 cores",
        "command": None,
    }


def printed(machine: Machine, width: int = 120) -> str:
    stream = io.StringIO()
    render(diagnose(machine), Console(file=stream, width=width))
    return stream.getvalue()


def test_the_printed_report_keeps_commands_whole() -> None:
    machine = replace(PLAIN, driver=RTX, free_disk=GIB, tensorrt=flavours("10.15.1", "1.7.1"))
    for width in (40, 120):
        lines = [line.strip() for line in printed(machine, width).splitlines()]
        assert lines.count("pip install 'dspark-edge[export]'") == 1
        assert "pip install 'dspark-edge[cuda]'" in lines
    text = printed(machine)
    for part in (
        "AMD Ryzen, 8 cores",
        "CUDA 13.1",
        "compute capability 8.9",
        "warning: only 1.0 GiB of disk",
    ):
        assert part in text


def test_the_printed_report_of_a_jetson() -> None:
    text = printed(replace(PLAIN, driver=ORIN, jetson=JETSON), width=200)
    assert "NVIDIA Jetson Orin Nano, Jetson Linux 36.4.3, JetPack 6.2, power mode 15W" in text
    assert "sudo apt-get install python3-libnvinfer" in text


def test_this_very_machine_can_be_diagnosed() -> None:
    machine = probe_machine()
    assert diagnose(machine).job("cpu").status == "ok"
    assert "Run a bundle on the CPU" in printed(machine)
    json.loads(diagnose(machine).to_json())
