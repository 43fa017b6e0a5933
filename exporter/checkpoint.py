"""Checkpoints: the weights, the configuration and the tokenizer files of a model, wherever they lie.

`open_checkpoint` takes a folder in the Hugging Face layout, a ``.gguf`` file, or a Hugging Face name, and
checks at once, from headers alone, that everything it will need is there: a damaged or incomplete checkpoint
is refused in a second, not after minutes of tracing. Tensors are read one by one when they are asked for.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from typing_extensions import Self

from dspark_edge.engines.errors import CheckpointError, MissingDependencyError
from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks

__all__ = ["TEXT_FILES", "Checkpoint", "SafetensorsCheckpoint", "open_checkpoint"]

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "calibration.json",  # of a drafter that comes with one
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
# Tables of token ids, and buffers such as position ids and masks: they may lie beside the weights, but are none.
_BUFFER_SIZES = {"I64": 8, "BOOL": 1}
# safetensors itself refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000

_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer*")
# Other formats of the same model lie in subfolders; "consolidated" is Mistral's second copy of the weights.
_HUB_IGNORED = ("*/*", "consolidated*")
_HUB_TIMEOUT_S = 5.0


class Checkpoint(Protocol):
    """A model's weights under their Hugging Face names, its configuration and its tokenizer files."""

    @property
    def source(self) -> str:
        """What the user gave."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of a Hugging Face ``config.json``."""

    def names(self) -> frozenset[str]:
        """Every tensor's Hugging Face name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it. Raises `CheckpointError` for an unknown name."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, read now, in its stored float type. Raises `CheckpointError` when it cannot be."""

    def integers(self, name: str) -> torch.Tensor:
        """An int64 tensor, read now. Raises `CheckpointError` when it cannot be, or is of another type."""

    def block_form(self, name: str) -> BlockForm | None:
        """What blocks a matrix is stored in; None where its weights are floats, or in blocks of another kind."""

    def blocks(self, name: str) -> StoredBlocks:
        """A matrix that has a `block_form`, read now. Raises `CheckpointError` when it cannot be."""

    def text_files(self) -> dict[str, bytes]:
        """Content of those of `TEXT_FILES` that the checkpoint has."""

    def close(self) -> None:
        """Release the files. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_checkpoint(source: str | Path, *, offline: bool = False) -> Checkpoint:
    """Open a folder, a ``.gguf`` file, or a Hugging Face name (``owner/name``) as a checkpoint.

    A path that exists wins over a Hugging Face name. With `offline` a name is looked up only in the local
    Hugging Face cache. Raises `CheckpointError` with one line that names the file at fault and what to do,
    and `MissingDependencyError` when the source needs a package that is not installed.
    """
    text = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return SafetensorsCheckpoint(path, source=text)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{text}: is one weights file; pass the folder that also holds config.json")
        from dspark_edge.exporter.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path, source=text)
    if _HUB_NAME.fullmatch(text) and not text.endswith((".gguf", ".safetensors")):
        return SafetensorsCheckpoint(_download(text, offline=offline), source=text)
    raise CheckpointError(
        f"{text}: no such file or directory; pass a checkpoint folder, a .gguf file, "
        "or a Hugging Face name such as Qwen/Qwen3-4B"
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in one shard."""

    shard: Path
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]


class SafetensorsCheckpoint:
    """A folder with ``config.json`` and ``model.safetensors``, or an index and its shards.

    Opening reads the headers of all shards (and compares them with the files' sizes) but no weights.
    Raises `CheckpointError` for whatever is missing, damaged or of an unsupported type.
    """

    def __init__(self, directory: Path, *, source: str | None = None) -> None:
        self.source: str = str(directory) if source is None else source
        if not directory.is_dir():
            raise CheckpointError(f"{self.source}: no such directory")
        self._directory = directory
        self.config: Mapping[str, Any] = _read_config(directory)
        self._entries = _read_entries(directory)
        self._shards: dict[Path, Any] = {}  # opened when first read
        self._closed = False

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        if entry.dtype not in _ITEM_SIZES:
            raise _unsupported_dtype(entry.shard, name, entry.dtype)
        return self._read(entry, name)

    def integers(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        if entry.dtype != "I64":
            raise CheckpointError(f"{entry.shard}: tensor {name!r} is of type {entry.dtype}, expected I64 (int64)")
        return self._read(entry, name)

    def block_form(self, name: str) -> BlockForm | None:
        self._entry(name)
        return None

    def blocks(self, name: str) -> StoredBlocks:
        """Raises `CheckpointError`: the weights of these files are floats."""
        raise CheckpointError(f"{self._entry(name).shard}: tensor {name!r} is not in blocks")

    def _read(self, entry: _Entry, name: str) -> torch.Tensor:
        """The tensor, mapped: what is not touched of it is not read."""
        if self._closed:
            raise CheckpointError(f"{self.source}: the checkpoint is closed; open it again to read {name!r}")
        try:
            shard = self._shards.get(entry.shard)
            if shard is None:
                shard = self._shards[entry.shard] = safe_open(entry.shard, framework="pt")
            tensor: torch.Tensor = shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{entry.shard}: cannot read tensor {name!r}: {error}") from error
        return tensor

    def text_files(self) -> dict[str, bytes]:
        found = {}
        for name in TEXT_FILES:
            path = self._directory / name
            if path.is_file():
                found[name] = _read_bytes(path)
        return found

    def close(self) -> None:
        self._closed = True
        self._shards.clear()  # the handles unmap their files when collected

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.source}: has no tensor {name!r}; the checkpoint is incomplete, or of another "
                "architecture than its config.json says"
            )
        return entry


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no config.json; pass a folder in the Hugging Face layout "
            f"(config.json and {WEIGHTS_FILE} or {INDEX_FILE}) or a .gguf file"
        )
    return _read_json_object(path)


def _read_entries(directory: Path) -> dict[str, _Entry]:
    """Every tensor of the folder, after the headers of all shards were checked."""
    if (directory / WEIGHTS_FILE).is_file():
        return _read_shard(directory / WEIGHTS_FILE)
    index = directory / INDEX_FILE
    if index.is_file():
        return _read_sharded(index)
    pickled = sorted(path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory / pickled[0]}: pickled weights are not read, because loading a pickle can run code; "
            "convert them to safetensors (with transformers: model.save_pretrained(folder))"
        )
    raise CheckpointError(f"{directory}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; download it again")


def _read_sharded(index: Path) -> dict[str, _Entry]:
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files; download it again")
    shards: dict[str, dict[str, _Entry]] = {}
    entries = {}
    for name, file_name in weight_map.items():
        if file_name not in shards:
            shards[file_name] = _read_shard(_shard_path(index, file_name))
        entry = shards[file_name].get(name)
        if entry is None:
            raise CheckpointError(
                f"{index.parent / file_name}: lacks tensor {name!r}, which {index.name} says is there; "
                "download the checkpoint again"
            )
        entries[name] = entry
    return entries


def _shard_path(index: Path, file_name: object) -> Path:
    # The name is judged as text: a Hugging Face cache legitimately links its files to somewhere else.
    if (
        not isinstance(file_name, str)
        or not file_name
        or PurePosixPath(file_name).is_absolute()
        or PureWindowsPath(file_name).anchor
        or ".." in PureWindowsPath(file_name).parts
    ):
        raise CheckpointError(f"{index}: names the shard {file_name!r}, outside the checkpoint's folder")
    path = index.parent / file_name
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, but named in {index.name}; download the checkpoint again")
    return path


def _read_shard(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, whose header must agree with itself and with the file's size."""
    header, data_bytes = _read_header(path)
    entries = {}
    end_of_data = 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        entry, begin, end = _parse_entry(path, name, info)
        item_size = _ITEM_SIZES.get(entry.dtype) or _BUFFER_SIZES.get(entry.dtype)
        if item_size is not None and end - begin != item_size * math.prod(entry.shape):
            raise _damaged(path, f"tensor {name!r} has {end - begin} bytes for shape {entry.shape}")
        end_of_data = max(end_of_data, end)
        entries[name] = entry
    if end_of_data != data_bytes:
        raise _damaged(path, f"the header promises {end_of_data} bytes of tensors, not {data_bytes}")
    for name, entry in entries.items():
        if entry.dtype not in _ITEM_SIZES and entry.dtype not in _BUFFER_SIZES:
            raise _unsupported_dtype(path, name, entry.dtype)
    return entries


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and how many bytes follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"its {size} bytes do not hold the header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header, size - 8 - length


def _parse_entry(path: Path, name: str, info: Any) -> tuple[_Entry, int, int]:
    """A tensor's entry and where its data begins and ends."""
    try:
        begin, end = (int(offset) for offset in info["data_offsets"])
        entry = _Entry(path, str(info["dtype"]), tuple(int(size) for size in info["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header's entry for {name!r} is incomplete") from error
    if not 0 <= begin <= end or any(size < 0 for size in entry.shape):
        raise _damaged(path, f"the header's entry for {name!r} has impossible offsets or sizes")
    return entry, begin, end


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is truncated or damaged ({what}); download it again")


def _unsupported_dtype(path: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name!r} is of type {dtype}; supported are {', '.join(_ITEM_SIZES)}: "
        "pass the unquantised checkpoint"
    )


def _download(name: str, *, offline: bool) -> Path:
    """The folder of the Hugging Face snapshot `name`, downloaded when it is not in the cache yet."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", f"downloading {name!r}", "export") from error
    elsewhere = "or download it elsewhere and pass the folder"
    try:
        folder = snapshot_download(
            name,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
            local_files_only=offline,
            etag_timeout=_HUB_TIMEOUT_S,
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access is gated; accept its licence on huggingface.co and log in with `hf auth login`, "
            f"{elsewhere}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder here, and Hugging Face has no such model (or it is private: log in with "
            f"`hf auth login`); check the name, {elsewhere}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "offline mode is on" if offline else "Hugging Face cannot be reached"
        raise CheckpointError(
            f"{name}: no such folder here, not in the Hugging Face cache, and {reason}; connect, {elsewhere}"
        ) from error
    # `HTTPError` is httpx's or requests', by release; RuntimeError comes from the transfer engine.
    except (OSError, ValueError, RuntimeError, getattr(errors, "HTTPError", OSError)) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: the download failed ({reason}); try again, {elsewhere}") from error
    return Path(folder)
