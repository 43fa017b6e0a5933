"""The errors of DSpark Edge.

    DSparkError
    ├── InvalidInputError       what the user gave cannot be used: options, prompts, token ids
    │   └── CapacityError       it does not fit the bundle's cache capacity
    ├── CheckpointError         a target or drafter checkpoint is missing, damaged or unsupported
    │   └── MismatchError       target and drafter do not belong together
    ├── BundleError             a bundle is missing, damaged, incomplete, newer, or cannot be written
    ├── EngineError             the backend that executes the graphs refuses or fails
    └── MissingDependencyError  an optional package is needed; the message holds the install command

Every message names what was given, what was expected and what to do. The command line maps every
``DSparkError`` to one line on stderr and exit code 2.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "DSparkError",
    "EngineError",
    "InvalidInputError",
    "MismatchError",
    "MissingDependencyError",
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


class MissingDependencyError(DSparkError, ImportError):
    """An optional package is missing; the message holds the command that installs it."""

    def __init__(self, package: str, job: str, extra: str | None = None) -> None:
        command = f"pip install 'dspark-edge[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{job} needs the package {package!r}; install it with: {command}")
