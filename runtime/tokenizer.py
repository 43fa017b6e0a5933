"""Text to token ids and back, over the ``tokenizers`` package.

A tokenizer lies in a folder as Hugging Face lays it out: ``tokenizer.json`` holds all of it;
``tokenizer_config.json`` and ``special_tokens_map.json``, where present, say which tokens begin and end it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dspark_edge.engines.errors import BundleError, InvalidInputError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "read_json_object", "read_special_tokens"]

_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; a file that is not there reads as an empty one.

    Raises:
        BundleError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"cannot read {path}: {error}; copy the file again from the checkpoint") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds a JSON {type(content).__name__}, but an object was expected")
    return content


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's configuration names, such as ``{"bos_token": "<s>"}``.

    ``tokenizer_config.json`` decides; ``special_tokens_map.json`` only adds names that it does not mention,
    so a ``null`` there means that the model has no such token.

    Raises:
        BundleError: one of the two files is damaged.
    """
    found: dict[str, str] = {}
    settled: set[str] = set()
    for name in (_CONFIG, _MAP):
        entries = {key: value for key, value in read_json_object(folder / name).items() if key.endswith("_token")}
        for key, value in entries.items():
            text = value.get("content") if isinstance(value, dict) else value
            # Switches such as add_bos_token end in _token too; their values are no strings.
            if key not in settled and isinstance(text, str):
                found[key] = text
        settled.update(entries)
    return found


class Tokenizer:
    """Encodes and decodes text with a ``tokenizers.Tokenizer``.

    Args:
        backend: the tokenizer; it is switched to neither truncate nor pad.
        special_tokens: role to text, such as ``{"eos_token": "</s>"}``. Tokens named here that are in the
            vocabulary count as special even where ``tokenizer.json`` forgot to say so.
        name: how errors call it, usually the file it came from.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        *,
        name: str = "the tokenizer",
    ) -> None:
        self._backend = backend
        self._name = name
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens))
        # A tokenizer saved during training cuts and pads; a prompt must arrive whole.
        backend.no_truncation()
        backend.no_padding()
        self._mark_special(special_tokens.values())
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_size = max(backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added), 0)
        self._byte_values = _byte_values(backend)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """Read the tokenizer of a folder; None where it holds no ``tokenizer.json``.

        Raises:
            BundleError: ``tokenizer.json`` or a file beside it is damaged.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for whatever it cannot read
            raise BundleError(
                f"cannot read {path}: {error}; copy the file again, or update the reader with: "
                f"pip install -U tokenizers (installed: {tokenizers.__version__})"
            ) from error
        return cls(backend, read_special_tokens(folder), name=str(path))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model's own vocabulary may be padded beyond it."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that mark structure, not text, and that ``decode`` leaves out unless told otherwise."""
        return self._special_ids

    @property
    def byte_values(self) -> Mapping[int, int]:
        """Token id to byte for ``<0x00>`` … ``<0xFF>`` of a byte-fallback vocabulary; empty for others."""
        return self._byte_values

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, or None."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a sequence, or None."""
        return self.special_tokens.get("eos_token")

    def token_id(self, token: str) -> int | None:
        """The id of one token given as the vocabulary spells it, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: any Unicode text; special tokens written out in it become their ids.
            add_special_tokens: add what the tokenizer puts around a text, such as a leading ``<s>``. False
                for text from a chat template, which holds them already.

        Raises:
            InvalidInputError: the text is not a string, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise InvalidInputError(f"a text to encode must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"the text holds a lone surrogate {text[error.start]!a} at character {error.start}, which no "
                "UTF-8 text can; replace it"
            ) from error
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # such as a word outside a vocabulary without an unknown token
            raise InvalidInputError(f"{self._name} cannot encode the text: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the vocabulary does not name add nothing.

        Raises:
            InvalidInputError: an id is negative, too large, or not an integer.
        """
        try:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(f"{self._name} cannot decode these token ids: {error}") from error

    def token_text(self, token_id: int) -> str:
        """What one token adds in the middle of a text, for display; special tokens appear as written.

        A token that is part of a character shows as U+FFFD, an id without a token as an empty string.
        """
        alone = self.decode([token_id], skip_special_tokens=False)
        # A decoder may strip the leading space of a text, so the second of two shows what the token really
        # adds.
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :] if twice.startswith(alone) else alone

    def _mark_special(self, tokens: Iterable[str]) -> None:
        from tokenizers import AddedToken

        known = [text for text in dict.fromkeys(tokens) if self._backend.token_to_id(text) is not None]
        special = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        forgotten = [AddedToken(text, special=True, normalized=False) for text in known if text not in special]
        if forgotten:
            self._backend.add_special_tokens(forgotten)


def _byte_values(backend: tokenizers.Tokenizer) -> Mapping[int, int]:
    """Ids of ``<0x00>`` … ``<0xFF>`` with their bytes, where all 256 are there."""
    values: dict[int, int] = {}
    for byte in range(256):
        token_id = backend.token_to_id(f"<0x{byte:02X}>")
        if token_id is None:
            return MappingProxyType({})
        values[token_id] = byte
    return MappingProxyType(values)
