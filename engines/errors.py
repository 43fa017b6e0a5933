"""The errors of DSpark Edge.

    DSparkError
    ├── InvalidInputError       what the user gave cannot be used: options, prompts, token ids
    │   └── CapacityError       it does not fit the bundle's cache capacity
    ├── CheckpointError         a target or drafter checkpoint is missing, damaged or unsupported
    │   └── MismatchError       target and drafter do not belong together
    ├── BundleError             a bundle is missing, damaged, incomplete, newer, or cannot be written
    ├── EngineError             the backend that executes the graphs refuses or fails
    ├── QueueFullError          as many requests wait as may; send it again later
    ├── ClosedError             a generator was closed before a request's end
    └── MissingDependencyError  an optional package is needed; the message holds the install command

Every message names what was given, what was expected and what to do. The command line maps every
``DSparkError`` to one line on stderr and exit code 2.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "ClosedError",
    "DSparkError",
    "EngineError",
    "InvalidInputError",
    "MismatchError",
    "MissingDependencyError",
    "QueueFullError",
]


class DSparkError(Exception):
    """Base of every error that DSpark Edge raises on purpose."""


class InvalidInputError(DSparkError, ValueError):
    """An option, a prompt or a token id cannot be used."""


class CapacityError(InvalidInputError):
    """A prompt or a sequence does not fit the capacity of the caches."""


class CheckpointError(DSparkError):
    """A checkpoint is missing, damaged, or of an unsupported kind."""


class MismatchError(CheckpointError):
    """Target and drafter do not belong together."""


class BundleError(DSparkError):
    """A bundle is missing, damaged, incomplete, newer than this version, or cannot be written."""


class EngineError(DSparkError):
    """The backend that executes the graphs refuses or fails."""


class QueueFullError(DSparkError):
    """As many requests wait as may. Nothing is wrong with the request: send it again later (HTTP 429)."""


class ClosedError(DSparkError):
    """The generator was closed before the request's end, or before it was sent."""


class MissingDependencyError(DSparkError, ImportError):
    """An optional package is missing; the message holds the command that installs it."""

    def __init__(self, package: str, job: str, extra: str | None = None) -> None:
        command = f"pip install 'dspark-edge[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{job} needs the package {package!r}; install it with: {command}")
