"""Engines go to a file piece by piece, or as a whole where TensorRT is older. TensorRT itself is played here."""

from __future__ import annotations

import hashlib
import io
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_edge.engines.tensorrt.plan_stream import serialize_network

PIECES = (b"one", b"", b"and another")
WHOLE = b"".join(PIECES)
TRT = SimpleNamespace(IStreamWriter=object)


class Streams:
    """A builder that gives an engine in pieces, until one is refused."""

    def __init__(self, built: bool) -> None:
        self.built = built

    def build_serialized_network_to_stream(self, network: Any, config: Any, stream: Any) -> bool:
        return all(stream.write(piece) == len(piece) for piece in PIECES) and self.built


class Whole:
    """A builder of TensorRT 10.3."""

    def __init__(self, built: bool) -> None:
        self.built = built

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        return WHOLE if self.built else None


@pytest.mark.parametrize("kind", [Streams, Whole])
def test_size_and_hash_are_those_of_the_file(kind: type[Streams | Whole]) -> None:
    file = io.BytesIO()
    expected = len(WHOLE), hashlib.sha256(WHOLE).hexdigest()
    assert serialize_network(TRT, kind(True), None, None, file) == expected
    assert file.getvalue() == WHOLE
    assert serialize_network(TRT, kind(False), None, None, io.BytesIO()) is None


def test_a_file_that_cannot_be_written_is_the_callers_error_and_ends_the_build() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if bytes(data) == PIECES[2]:
                raise OSError("full")
            return super().write(data)

    file = Full()
    with pytest.raises(OSError, match="full"):
        serialize_network(TRT, Streams(True), None, None, file)
    assert file.getvalue() == PIECES[0]
