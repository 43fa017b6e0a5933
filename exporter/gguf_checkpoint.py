"""GGUF files (llama.cpp's format) read as Hugging Face checkpoints.

Names and configuration are translated, quantised tensors are dequantised one by one when they are read, and
what llama.cpp's converter changed about the weights is undone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import Self

from dspark_edge.engines.errors import CheckpointError, MissingDependencyError
from dspark_edge.exporter.gguf_blocks import block_form, read_blocks
from dspark_edge.exporter.gguf_config import Metadata, hugging_face_config
from dspark_edge.exporter.gguf_tokenizer import tokenizer_files
from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

__all__ = ["GGUFCheckpoint", "hugging_face_name", "interleaved_to_halves"]

_MAGIC = b"GGUF"
_ROPE_FACTORS = "rope_freqs.weight"
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GGUFCheckpoint:
    """A ``.gguf`` file of one of `gguf_config.ARCHITECTURES`, as a `Checkpoint`.

    Opening maps the file, checks that it is whole and that every tensor can be dequantised, and translates
    its metadata; no weights are read. The tokenizer is rebuilt only by `text_files`, so that weights whose
    tokenizer cannot be rebuilt still open. Raises `CheckpointError`.
    """

    def __init__(self, path: Path, *, source: str | None = None) -> None:
        self.source: str = str(path) if source is None else source
        reader = _read(path)
        try:
            values = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: its metadata is damaged ({error}); download it again") from error
        self._metadata = Metadata(str(path), values)
        if self._metadata.integer("split.count", 1) > 1:
            raise CheckpointError(
                f"{path}: is one part of a split model; join the parts first (llama-gguf-split --merge)"
            )
        _check_types(path, reader.tensors)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = tensors.pop(_ROPE_FACTORS, None)
        self._tensors: dict[str, ReaderTensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            translated = hugging_face_name(name)
            if translated is None:
                unknown.append(name)
            else:
                self._tensors[translated] = tensor
        shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}
        # The configuration first: "this architecture is not supported" says more than a list of names.
        self.config: Mapping[str, Any] = hugging_face_config(
            self._metadata, shapes, None if factors is None else _dequantise(path, factors).tolist()
        )
        if unknown:
            raise CheckpointError(
                f"{path}: holds tensors that a plain {self._metadata.architecture} model does not have: "
                f"{', '.join(sorted(unknown)[:3])}; pass the Hugging Face checkpoint instead"
            )
        _check_shapes(path, self.config, shapes)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return _shape(self._tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in fp32, or as stored where it is fp16 or bf16."""
        stored = self._tensor(name)
        value = _dequantise(self._metadata.path, stored)
        heads = self._interleaved_heads(name)
        return interleaved_to_halves(value, heads) if heads else value

    def integers(self, name: str) -> torch.Tensor:
        """Raises `CheckpointError`: a GGUF file holds weights only."""
        raise CheckpointError(f"{self.source}: has no integer tensor {name!r}")

    def block_form(self, name: str) -> BlockForm | None:
        return block_form(self._tensor(name).tensor_type.name)

    def blocks(self, name: str) -> StoredBlocks:
        """The matrix as it is stored, its rows in the order of `tensor`."""
        stored = self._tensor(name)
        kind = stored.tensor_type.name
        if block_form(kind) is None:
            raise CheckpointError(f"{self.source}: tensor {name!r} is of type {kind}, which has no such blocks")
        try:
            blocks = read_blocks(kind, np.array(stored.data, dtype=np.uint8), _shape(stored))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.source}: cannot read tensor {name!r}: {error}") from error
        heads = self._interleaved_heads(name)
        if not heads:
            return blocks
        order = interleaved_to_halves(torch.arange(len(blocks.numbers)), heads)
        return blocks.rows(order.numpy())

    def _interleaved_heads(self, name: str) -> int:
        """Heads of a matrix whose rows llama.cpp's converter has reordered; 0 for any other."""
        if self.config["model_type"] != "llama" or ".self_attn." not in name:
            return 0
        if ".q_proj." in name:
            return int(self.config["num_attention_heads"])
        return int(self.config["num_key_value_heads"]) if ".k_proj." in name else 0

    def text_files(self) -> dict[str, bytes]:
        """The tokenizer's files, rebuilt. Raises `CheckpointError` for a tokenizer that cannot be."""
        return tokenizer_files(self._metadata)

    def close(self) -> None:
        self._tensors = {}  # the file is unmapped with its last view

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> ReaderTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            state = "has no tensor" if self._tensors else "is closed; open it again to read"
            raise CheckpointError(f"{self.source}: {state} {name!r}")
        return tensor


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of GGUF's tensor `name`; `None` when it has none."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def interleaved_to_halves(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of a Llama q_proj or k_proj, [heads * head_dim, ...].

    llama.cpp rotates pairs (2i, 2i+1) of a head, Hugging Face (i, i + head_dim / 2); its converter moves the
    rows to fit.
    """
    return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape).contiguous()


def _read(path: Path) -> GGUFReader:
    try:
        reader = _bounded_reader()
    except ImportError as error:
        raise MissingDependencyError("gguf", f"reading {path.name}", "export") from error
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            raise CheckpointError(
                f"{path}: is not a GGUF file; pass a .gguf file, or a folder with config.json and safetensors"
            )
        return reader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    # The reader has no errors of its own: a file cut short shows as a bad slice, view, reshape or enum.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: is truncated or damaged ({reason}); download it again") from error


def _bounded_reader() -> type[GGUFReader]:
    """The package's reader, made to stop at the end of the file.

    It takes what lies beyond as empty, so that one damaged array length keeps it busy for ever.
    """
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, but promises more up to byte {end}")
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader


def _check_types(path: Path, tensors: Sequence[ReaderTensor]) -> None:
    """Refuse a type that the gguf package cannot dequantise, before any weight is read."""
    from gguf import GGMLQuantizationType

    supported: dict[GGMLQuantizationType, bool] = {}
    for tensor in tensors:
        kind = tensor.tensor_type
        if kind not in supported:
            supported[kind] = _can_dequantise(kind)
        if not supported[kind]:
            names = ", ".join(other.name for other in GGMLQuantizationType if _can_dequantise(other))
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} is of type {kind.name}, which cannot be dequantised; "
                f"supported are {names}"
            )


def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    """Asked of the package itself, with one block of zeros: its list grows from release to release."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts from the innermost axis


def _dequantise(path: Path | str, tensor: ReaderTensor) -> torch.Tensor:
    from gguf import GGMLQuantizationType, dequantize

    # Copies, never views: the file is mapped read-only and may be closed before the tensor is used.
    try:
        if tensor.tensor_type == GGMLQuantizationType.F16:
            return torch.from_numpy(np.array(tensor.data, dtype=np.float16))
        if tensor.tensor_type == GGMLQuantizationType.BF16:
            stored = np.ascontiguousarray(tensor.data).view("<u2").astype(np.int16)
            return torch.from_numpy(stored).view(torch.bfloat16).reshape(_shape(tensor))
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read tensor {tensor.name!r}: {error}") from error


def _check_shapes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, expected in _expected_shapes(config):
        if name not in shapes:
            raise CheckpointError(f"{path}: lacks the tensor for {name!r}; download it again")
        if shapes[name] != expected:
            raise CheckpointError(
                f"{path}: the tensor for {name!r} has shape {shapes[name]}, its metadata says {expected}; "
                "convert the model to GGUF again"
            )


def _expected_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shapes of every weight that a model of this configuration must have; biases are optional."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query = config["num_attention_heads"] * head_dim
    key_value = config["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape
