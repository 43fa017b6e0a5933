"""What follows a build while TensorRT works: how far it is, and the memory that it has let go of."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

__all__ = ["make_monitor"]


def make_monitor(trt: Any, report: Callable[[float], None]) -> Any:
    """Follows the builder's phases. They nest; the share that is done is the outermost one's, with its child's.

    `error` is what `report` has raised, which also ends the build. Made here, because the base class comes with the
    flavour.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._phases: dict[str, list[int]] = {}  # name → steps done, and in all; outer ones first
            self._most = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases[name] = [0, steps]

        def step_complete(self, name: str, step: int) -> bool:
            self._phases.setdefault(name, [0, 1])[0] = step + 1
            return self._tell()

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)
            self._tell()
            _return_free_memory()

        def _tell(self) -> bool:
            """Whether to go on. An exception must not pass through TensorRT's frames: it is kept for the caller."""
            try:
                share, scale = 0.0, 1.0
                for done, steps in [*self._phases.values()][:3]:
                    scale /= max(steps, 1)
                    share += done * scale
                self._most = max(self._most, min(share, 1.0))
                report(self._most)
            except BaseException as error:
                self.error = error
            return self.error is None

    return Monitor()


def _return_free_memory() -> None:
    """Give what is freed back to the system. A phase frees much in small pieces, which glibc would keep, and which
    what the next phase asks for does not fit into: a sixth of a build's peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
