"""The device that a profile was measured on: what decides its costs, and its fingerprint.

The fingerprint names a folder under a bundle's `devices/`. It stands for what a device is (processor or GPU, usable
cores, provider); what may change on it (versions, threads, clocks) is recorded beside it and makes a profile stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dspark_edge.engines.machine import (
    probe_jetson,
    probe_nvidia_driver,
    probe_onnxruntime,
    probe_processor,
    probe_tensorrt,
)
from dspark_edge.engines.onnxruntime_engine import PROVIDERS
from dspark_edge.engines.records import Positive, Record, non_empty

__all__ = ["Device", "changes", "probe_device"]

Text = Annotated[str, non_empty]

_FINGERPRINT_DIGITS = 12
_TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # engine → module
_CPUFREQ = "sys/devices/system/cpu/cpu{core}/cpufreq"


@dataclass(frozen=True, slots=True)
class Device(Record):
    """A device and how a bundle runs on it. What cannot be read is null."""

    processor: Text  # its model; the board or the architecture where it has no name
    gpu: Text | None  # None where the provider runs on the CPU
    cores: Positive  # usable by this process
    provider: Text  # full name of the execution provider; of other engines their name
    engine: Text  # "onnxruntime", "tensorrt" or "tensorrt-rtx"
    threads: Positive  # of each graph on the CPU
    governor: Text | None  # of the processor's clock: "performance", "schedutil", …
    max_clock_mhz: Positive | None  # what the governor may raise the clock to
    power_mode: Text | None  # of a Jetson
    libraries: Mapping[str, str]  # package → version, of those that execute graphs

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that stay the same as long as the device does."""
        facts = json.dumps([self.processor, self.gpu, self.cores, self.provider])
        return hashlib.sha256(facts.encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def probe_device(provider: str, threads: int | None = None, root: Path = Path("/")) -> Device:
    """This machine, as an engine uses it.

    Args:
        provider: of ONNX Runtime "cpu", "cuda", or an execution provider's full name; or "tensorrt" or "tensorrt-rtx".
        threads: threads of each graph; None for all usable cores, as the engine takes it.
        root: where the system's files lie.
    """
    processor, jetson = probe_processor(root), probe_jetson(root)
    provider = PROVIDERS.get(provider, provider)
    gpus = () if provider == PROVIDERS["cpu"] else probe_nvidia_driver(root).gpus
    clocks = [clock for text in _cpufreq(root, "scaling_max_freq") if (clock := _megahertz(text))]
    governors = sorted(set(_cpufreq(root, "scaling_governor")))
    module = _TENSORRT.get(provider)
    library = "onnxruntime" if module is None else module
    version = probe_onnxruntime().version if module is None else probe_tensorrt(module).version
    return Device(
        processor=processor.model or (jetson.model if jetson else None) or processor.architecture or "unknown",
        gpu=gpus[0].name if gpus else None,
        cores=processor.usable_cores,
        provider=provider,
        engine="onnxruntime" if module is None else provider,
        threads=threads or (processor.usable_cores if module is None else 1),
        governor=" and ".join(governors) or None,
        max_clock_mhz=max(clocks, default=None),
        power_mode=jetson.power_mode if jetson else None,
        libraries={} if version is None else {library: version},
    )


def changes(then: Device, now: Device) -> tuple[str, ...]:
    """What is different now from what it was, one sentence each."""
    named = (
        ("the processor", then.processor, now.processor),
        ("the GPU", then.gpu, now.gpu),
        ("the number of usable cores", then.cores, now.cores),
        ("the provider", then.provider, now.provider),
        ("the engine", then.engine, now.engine),
        ("the number of threads", then.threads, now.threads),
        ("the processor's clock governor", then.governor, now.governor),
        ("the processor's highest clock in MHz", then.max_clock_mhz, now.max_clock_mhz),
        ("the power mode", then.power_mode, now.power_mode),
        *(
            (f"the version of {name}", then.libraries.get(name), now.libraries.get(name))
            for name in sorted(then.libraries.keys() | now.libraries.keys())
        ),
    )
    return tuple(
        f"{what} was {'unknown' if before is None else before} and is {'unknown' if after is None else after}"
        for what, before, after in named
        if before != after
    )


def _cpufreq(root: Path, name: str) -> Iterable[str]:
    """A file of cpufreq, of each core this process may use; none in most virtual machines."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for core in sorted(cores):
        try:
            text = (root / _CPUFREQ.format(core=core) / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            yield text


def _megahertz(kilohertz: str) -> int | None:
    return int(kilohertz) // 1000 if kilohertz.isdigit() else None
