"""Engines written to a file as TensorRT serializes them: at no time is a serialized engine in memory as a whole."""

from __future__ import annotations

import hashlib
from typing import Any, BinaryIO

__all__ = ["serialize_network"]


def serialize_network(trt: Any, builder: Any, network: Any, config: Any, file: BinaryIO) -> tuple[int, str] | None:
    """Build a network's engine, into a file.

    Returns:
        The engine's size in bytes and its SHA-256; None where TensorRT fails.

    Raises:
        OSError: the file cannot be written.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):  # TensorRT before 10.13
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return None
        data = memoryview(plan)
        file.write(data)
        return data.nbytes, hashlib.sha256(data).hexdigest()
    stream = _make_stream(trt, file)
    built = builder.build_serialized_network_to_stream(network, config, stream)
    if stream.error is not None:
        raise stream.error
    return (stream.size, stream.digest.hexdigest()) if built else None


def _make_stream(trt: Any, file: BinaryIO) -> Any:
    """Made here, because its base class comes with the flavour."""

    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.digest = hashlib.sha256()
            self.error: BaseException | None = None

        def write(self, data: Any) -> int:
            """An exception must not pass through TensorRT's frames: it is kept for the caller."""
            try:
                piece = memoryview(data)
                file.write(piece)
                self.digest.update(piece)
                self.size += piece.nbytes
            except BaseException as error:
                self.error = error
            return piece.nbytes if self.error is None else 0

    return Stream()
