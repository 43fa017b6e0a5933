"""Fixtures that several folders of tests share. Nothing here imports torch: runtime tests run where it is not."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import signal
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ReferenceBundle = Callable[..., Path]

# Workers that all use all cores wait for each other at every parallel loop of torch, up to ten times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run that was started in the background ignores Ctrl-C, and so would the processes to which tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _unhook_torch_trace() -> None:
    """pytest adds its handlers to loggers that do not propagate; with one, torch writes a trace of all it does."""
    logger = logging.getLogger("torch.__trace")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(scope="session", autouse=True)
def untraced_torch() -> None:
    """Tracing a graph takes half the time when torch does not log it."""
    _unhook_torch_trace()


def runs_lowering(lowering: str, drafter: str) -> bool:
    """Whether this machine's ONNX Runtime runs such a bundle; Python 3.10's last one is too old for most."""
    version = tuple(int(part) for part in metadata.version("onnxruntime").split(".")[:3])
    return version >= (1, 29, 1) or lowering == "decomposed" or (lowering == "ort" and drafter == "ngram")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The tiny reference checkpoints and their records; see the README.md there."""
    return Path(__file__).parent / "data" / "reference"


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that all pytest-xdist workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def _shape(checkpoint: str | Path) -> str:
    """What tells checkpoints apart, wherever a process has its copy."""
    config = Path(checkpoint) / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest()[:12] if config.exists() else Path(checkpoint).name


@pytest.fixture(scope="session")
def export_once(session_dir: Path) -> Callable[..., Path]:
    """`export_once(name, target, drafter, **options)`: the bundle, exported when a test first asks for the name.

    Asking for other checkpoints or options by the same name is an error, whichever test comes first.
    """

    def export(name: str, target: str | Path, drafter: str | Path, **options: Any) -> Path:
        pytest.importorskip("torch", reason="exporting needs the [export] extra")
        from dspark_edge.exporter.export import ExportOptions, export_bundle

        _unhook_torch_trace()  # it may have been imported just now
        folder, asked = session_dir / name, f"{_shape(target)} {_shape(drafter)} {sorted(options.items())}"
        with open(session_dir / f"{name}.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            before = lock.read()
            assert before in ("", asked), f"two tests call different bundles {name!r}: {before}; {asked}"
            if not before:
                lock.write(asked)
            if not folder.exists():  # appears as a whole or not at all
                export_bundle(target, drafter, folder, ExportOptions(**options))
        return folder

    return export


@pytest.fixture(scope="session")
def reference_bundle(export_once: Callable[..., Path], reference_dir: Path) -> ReferenceBundle:
    """`reference_bundle(target, drafter, lowering="ort")`: a reference pair's bundle of 512 cache slots.

    Target and drafter are folders of `reference_dir` (`drafter` may be "ngram").
    """

    def bundle(target: str, drafter: str, lowering: str = "ort") -> Path:
        if not runs_lowering(lowering, drafter):
            pytest.skip(f"this ONNX Runtime is too old for the lowering {lowering!r}")
        source = drafter if drafter == "ngram" else reference_dir / drafter
        name = f"{target}-{drafter}-{lowering}"
        return export_once(name, reference_dir / target, source, lowering=lowering, capacity=512)

    return bundle
