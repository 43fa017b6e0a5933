from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dspark_edge.engines.errors import BundleError, InvalidInputError
from dspark_edge.runtime.tokenizer import Tokenizer, read_json_object, read_special_tokens

SPECIAL = ["<s>", "</s>"]


def byte_level(
    merges: Iterable[tuple[str, str]] = (("Ġ", "h"), ("Ã", "©"), ("â", "Ĥ")),
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: 256 bytes, a few merges, two special tokens, no spare ids."""
    merges = list(merges)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: letters of ▁helowrd, two merges, bytes for everything else."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "lo"]:
        vocab[token] = len(vocab)
    model = models.BPE(
        vocab=vocab, merges=[("▁", "h"), ("l", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ["<unk>", *SPECIAL]])
    return backend


def save(folder: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def test_round_trip_with_and_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()))
    plain = tokenizer.encode("hé €!", add_special_tokens=False)
    bos = tokenizer.token_id("<s>")
    assert bos is not None
    assert tokenizer.encode("hé €!", add_special_tokens=True) == [bos, *plain]
    assert tokenizer.decode([bos, *plain]) == "hé €!"
    assert tokenizer.decode([bos, *plain], skip_special_tokens=False) == "<s>hé €!"
    assert tokenizer.special_ids == {bos, tokenizer.token_id("</s>")}
    assert tokenizer.vocab_size == 256 + 3 + 2


def test_no_tokenizer_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    path = tmp_path / "tokenizer.json"
    for content in ["", "{", "{}", '{"model": {"type": "Nonsense"}}']:
        path.write_text(content)
        with pytest.raises(BundleError, match=r"tokenizer\.json") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "\x00"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_json_file_reads_as_empty(tmp_path: Path) -> None:
    assert read_json_object(tmp_path / "nothing.json") == {}


def test_special_tokens_as_text_object_null_and_from_the_map(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    mapping = {"bos_token": "<s>", "eos_token": "<other>", "pad_token": {"content": "<s>"}}
    save(tmp_path, byte_level(), tokenizer_config=config, special_tokens_map=mapping)
    assert read_special_tokens(tmp_path) == {"eos_token": "</s>", "pad_token": "<s>"}
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (None, "</s>")


def test_a_configured_token_counts_as_special_even_if_the_tokenizer_forgot(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<end>", special=False)])
    size = backend.get_vocab_size()
    save(tmp_path, backend, tokenizer_config={"eos_token": "<end>", "pad_token": "<nowhere>"})
    tokenizer = load(tmp_path)
    end = tokenizer.token_id("<end>") or 0
    assert end in tokenizer.special_ids
    assert tokenizer.decode([end]) == ""
    assert tokenizer.vocab_size == size, "a token outside the vocabulary must not be given an id"


def test_a_stored_truncation_or_padding_is_undone(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=2)
    assert len(load(save(tmp_path, backend)).encode("abcdef", add_special_tokens=False)) == 6


def test_token_text_shows_the_space_that_decode_strips() -> None:
    tokenizer = Tokenizer(byte_fallback())

    def shown(token: str) -> str:
        return tokenizer.token_text(tokenizer.token_id(token) or 0)

    assert shown("▁h") == " h"
    assert shown("lo") == "lo"
    assert shown("</s>") == "</s>"
    assert shown("<0xE2>") == "\ufffd"
    assert tokenizer.token_text(10**6) == ""
    assert Tokenizer(byte_level()).token_text(byte_level().token_to_id("Ġh") or 0) == " h"


def test_byte_values_of_both_kinds() -> None:
    fallback = Tokenizer(byte_fallback())
    assert fallback.byte_values[fallback.token_id("<0xE2>") or 0] == 0xE2
    assert len(fallback.byte_values) == 256
    assert not Tokenizer(byte_level()).byte_values


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5], [None]])
def test_impossible_ids_are_invalid_input(ids: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="decode"):
        Tokenizer(byte_level()).decode(ids)


def test_impossible_texts_are_invalid_input() -> None:
    tokenizer = Tokenizer(byte_level())
    with pytest.raises(InvalidInputError, match=r"surrogate .* character 2"):
        tokenizer.encode("ab\ud800", add_special_tokens=False)
    with pytest.raises(InvalidInputError, match="bytes"):
        tokenizer.encode(b"ab", add_special_tokens=False)  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.decode([ids[0], tokenizer.vocab_size + 5, ids[1]]) == "ab"
