"""What TensorRT says, kept for error messages."""

from __future__ import annotations

from typing import Any

__all__ = ["make_log"]


def make_log(trt: Any) -> Any:
    """A logger that keeps errors: `text()` has them in one line, `reason()` also says where there are none, `clear()`
    forgets them.

    Made here, because its base class comes with the flavour.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self._errors.clear()

        def text(self) -> str:
            return "; ".join(self._errors)

        def reason(self) -> str:
            return self.text() or "it gives no reason"

    return Log()
