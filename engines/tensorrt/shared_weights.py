"""Embedding and head that target and drafter share: in the device's memory once, bound to both engines as inputs.

A build makes inputs of these matrices instead of constants (`network.GraphNetwork.free_weights`); here they are read
from the bundle when the first engine that has them is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BufferedReader

import numpy as np

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import SharedWeight
from dspark_edge.engines.tensorrt.cuda import Cuda, Stream

__all__ = ["SharedWeights"]

_PIECE = 16 << 20  # bytes of pinned memory on the way to the device


class SharedWeights:
    """The shared weights of a bundle that are on the device."""

    def __init__(self, bundle: Bundle, cuda: Cuda, stream: Stream) -> None:
        self._bundle, self._cuda, self._stream = bundle, cuda, stream
        self._pointers: dict[tuple[str, int], int] = {}  # by file and offset

    def addresses(self, role: str, names: Iterable[str]) -> dict[str, int]:
        """Where a graph's weights are.

        Args:
            role: of the graph.
            names: of the initializers that its engine wants.

        Raises:
            BundleError: they are not among the manifest's shared weights, or cannot be read.
            EngineError: the device has no room.
        """
        known = self._bundle.manifest.shared_weights_of(role)
        for name in names:
            if name not in known:
                raise BundleError(f"{self._bundle.path}: the manifest does not say where {role}'s {name} is")
        return {name: self._pointer(known[name]) for name in names}

    def free(self) -> None:
        for pointer in self._pointers.values():
            self._cuda.free(pointer)
        self._pointers.clear()

    def _pointer(self, weight: SharedWeight) -> int:
        place = (weight.file, weight.offset)
        if place not in self._pointers:
            path = self._bundle.file(weight.file)
            pointer = self._cuda.allocate(weight.size, "weights that target and drafter share")
            self._pointers[place] = pointer
            try:
                with open(path, "rb") as file:
                    file.seek(weight.offset)
                    self._upload(file, pointer, weight.size)
            except OSError as error:
                raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
        return self._pointers[place]

    def _upload(self, file: BufferedReader, pointer: int, size: int) -> None:
        staging = self._cuda.allocate_host(min(size, _PIECE), mapped=False)
        try:
            for done in range(0, size, _PIECE):
                piece = staging.part(0, min(_PIECE, size - done))
                data = np.frombuffer(file.read(piece.bytes.nbytes), np.uint8)
                if data.nbytes < piece.bytes.nbytes:
                    raise BundleError(f"{file.name} is shorter than the manifest says; export the bundle again")
                piece.bytes[...] = data
                self._stream.wait(self._stream.to_device(pointer + done, piece))
        finally:
            self._cuda.free_host(staging)
