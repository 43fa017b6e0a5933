"""A GGUF file's tokenizer, rebuilt as the files that Hugging Face tokenizers are kept in.

Only byte-level BPE (``tokenizer.ggml.model`` = "gpt2") can be: its vocabulary, merges and special tokens are
all in the file, and ``tokenizer.ggml.pre`` names the rule that splits text into words before merging.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dspark_edge.engines.errors import CheckpointError, MissingDependencyError
from dspark_edge.exporter.gguf_config import Metadata

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "TokenType", "tokenizer_files"]


class TokenType(IntEnum):
    """What ``tokenizer.ggml.token_type`` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text becomes words: each pattern splits further what the ones before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as a whole is not put together from merges
    composed: bool = False  # text is brought to Unicode's NFC first
    adds_bos: bool = False  # where the file does not say


_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2 = PreTokenizer((_GPT2_PATTERN,))
_DIGITS_THEN_GPT2 = PreTokenizer((r"\p{N}", _GPT2_PATTERN))
_LLAMA3 = PreTokenizer((_TIKTOKEN_PATTERN % "{1,3}",), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer((_TIKTOKEN_PATTERN % "",), composed=True)
# llama.cpp's rule for files that name none, from before the metadata existed.
_UNNAMED = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]"))

# `tokenizer.ggml.pre` -> rule; the groups are llama.cpp's
PRE_TOKENIZERS = {
    "default": _UNNAMED,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mellum": _GPT2,
    "gigachat": _GPT2,
    "a.x-4.0": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "command-r": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "exaone": _DIGITS_THEN_GPT2,
    "minerva-7b": _DIGITS_THEN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
}

_PASS_TOKENIZER = "pass the model's own tokenizer files with --tokenizer DIR"


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """The tokenizer files of a GGUF file's metadata, by name.

    Raises `CheckpointError` for a kind of tokenizer, or a pre-tokenizer, that is not supported.
    """
    model = metadata.string("tokenizer.ggml.model", "none")
    if model != "gpt2":
        raise CheckpointError(
            f"{metadata.path}: its tokenizer is of kind {model!r}, and only byte-level BPE ('gpt2') can be "
            f"read from a GGUF file; {_PASS_TOKENIZER}"
        )
    name = metadata.string("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{metadata.path}: its pre-tokenizer {name!r} is not known, only {', '.join(PRE_TOKENIZERS)}; "
            f"{_PASS_TOKENIZER}"
        )
    rule = PRE_TOKENIZERS[name]
    tokens = metadata.strings("tokenizer.ggml.tokens")
    files = {
        "tokenizer.json": _tokenizer(metadata, tokens, rule),
        "tokenizer_config.json": _tokenizer_config(metadata, tokens, rule),
        "generation_config.json": _generation_config(metadata),
    }
    result = {name: (json.dumps(value, ensure_ascii=False) + "\n").encode() for name, value in files.items()}
    template = _chat_template(metadata)
    if template is not None:
        result["chat_template.jinja"] = template.encode()
    return result


def _tokenizer(metadata: Metadata, tokens: list[str], rule: PreTokenizer) -> dict[str, Any]:
    types = _token_types(metadata, tokens)
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        # Unused tokens pad the vocabulary to the size of the embedding; the original tokenizer has none.
        if types[token_id] != TokenType.UNUSED:
            vocabulary.setdefault(token, token_id)
    added = [
        _added_token(token_id, tokens[token_id], special=kind != TokenType.USER_DEFINED)
        for token_id, kind in enumerate(types)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]
    words = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in rule.patterns
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if rule.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "post_processor": _post_processor(metadata, tokens, rule) or byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": vocabulary,
            "merges": [_split_merge(merge) for merge in metadata.strings("tokenizer.ggml.merges")],
        },
    }
    _check_loads(metadata, value)
    return value


def _token_types(metadata: Metadata, tokens: list[str]) -> list[int]:
    """A `TokenType` for each token; the tokens that the metadata names by role are never normal ones."""
    key = "tokenizer.ggml.token_type"
    types = list(metadata.integers(key)) if key in metadata.values else [int(TokenType.NORMAL)] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{metadata.path}: has {len(tokens)} tokens but {len(types)} token types; download it again"
        )
    for role in ("bos", "eos", "eot", "eom"):
        token_id = _token_id(metadata, role, tokens)
        if token_id is not None and types[token_id] == TokenType.NORMAL:
            types[token_id] = int(TokenType.CONTROL)
    return types


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _split_merge(merge: str) -> list[str]:
    at = merge.find(" ", 1)  # the first half is never empty
    return [merge[:at], merge[at + 1 :]]


def _post_processor(metadata: Metadata, tokens: list[str], rule: PreTokenizer) -> dict[str, Any] | None:
    """The template that puts the first and last token around a text; `None` when there are neither."""
    before = [_required_token(metadata, "bos", tokens)] if _adds_bos(metadata, rule) else []
    after = [_required_token(metadata, "eos", tokens)] if _flag(metadata, "add_eos_token") else []
    if not before and not after:
        return None

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        around = [[{"SpecialToken": {"id": tokens[i], "type_id": type_id}} for i in ids] for ids in (before, after)]
        return [*around[0], text, *around[1]]

    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": special,
    }


def _check_loads(metadata: Metadata, value: dict[str, Any]) -> None:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", f"rebuilding the tokenizer of {metadata.path}") from error
    try:
        Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"{metadata.path}: its tokenizer is damaged ({error}); {_PASS_TOKENIZER}") from error


def _tokenizer_config(metadata: Metadata, tokens: list[str], rule: PreTokenizer) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata, rule),
        "add_eos_token": _flag(metadata, "add_eos_token"),
        "clean_up_tokenization_spaces": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = _token_id(metadata, role, tokens)
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    length = metadata.values.get(f"{metadata.architecture}.context_length")
    if length is not None:
        config["model_max_length"] = length
    template = _chat_template(metadata)
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    # End of text, of turn and of message: generation ends at any of them.
    ends = [metadata.token_id(role) for role in ("eos", "eot", "eom")]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    bos = metadata.token_id("bos")
    if bos is not None:
        config["bos_token_id"] = bos
    return config


def _chat_template(metadata: Metadata) -> str | None:
    key = "tokenizer.chat_template"
    return metadata.string(key) if key in metadata.values else None


def _adds_bos(metadata: Metadata, rule: PreTokenizer) -> bool:
    # Like llama.cpp, a default without a first token to add is no error.
    return _flag(metadata, "add_bos_token", default=rule.adds_bos and metadata.token_id("bos") is not None)


def _flag(metadata: Metadata, name: str, *, default: bool = False) -> bool:
    return bool(metadata.values.get(f"tokenizer.ggml.{name}", default))


def _token_id(metadata: Metadata, role: str, tokens: list[str]) -> int | None:
    token_id = metadata.token_id(role)
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise CheckpointError(
            f"{metadata.path}: its {role} token is {token_id}, but it has {len(tokens)} tokens; {_PASS_TOKENIZER}"
        )
    return token_id


def _required_token(metadata: Metadata, role: str, tokens: list[str]) -> int:
    token_id = _token_id(metadata, role, tokens)
    if token_id is None:
        raise CheckpointError(
            f"{metadata.path}: adds a {role} token to every text but does not say which; {_PASS_TOKENIZER}"
        )
    return token_id
