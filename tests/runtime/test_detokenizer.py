from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.detokenizer import IncrementalDetokenizer, StopMatcher
from dspark_edge.runtime.tokenizer import Tokenizer


def make_byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "h"), ("e", "l"), ("â", "Ĥ"), ("¬", "a"), ("ð", "Ł"), ("ï", "¿"), ("½", "ï")]
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


def make_byte_fallback() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁helowrdab. ", "▁h", "lo", "▁▁", "é", "\ufffd"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "h"), ("l", "o"), ("▁", "▁")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


BYTE_LEVEL, BYTE_FALLBACK = make_byte_level(), make_byte_fallback()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
either = st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK])
# Plain random text hardly ever holds what is hard: spaces, U+FFFD, characters of several bytes side by side.
text_strategy = st.text() | st.text(st.sampled_from("hello ab.é€🤖\ufffd\u200d\x00▁"), max_size=40)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def stream(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> IncrementalDetokenizer:
    """Push one id at a time; what is emitted must at every moment be the beginning of what decode() says."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    whole = tokenizer.decode(ids)
    emitted = ""
    for token_id in ids:
        emitted += detokenizer.push([token_id])
        assert detokenizer.text == emitted
        assert whole.startswith(emitted)
    emitted += detokenizer.finish()
    assert detokenizer.text == emitted
    return detokenizer


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Begin and end of the stop string that is completed first; of several the longest."""
    found = [(i + len(stop), i) for stop in stops if (i := text.find(stop)) >= 0]
    return (min(found)[1], min(found)[0]) if found else None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tokenizer=either, text=text_strategy)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = encode(tokenizer, text)
    assert stream(tokenizer, ids).text == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=60))
def test_any_ids_stream_exactly_with_a_byte_level_tokenizer(ids: list[int]) -> None:
    assert stream(BYTE_LEVEL, ids).text == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(raw=st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xFF, 0xF0, 0x9F, 0xEF, 0xBF, 0xBD]), max_size=80))
def test_long_broken_runs_stream_exactly_with_a_byte_level_tokenizer(raw: list[int]) -> None:
    alphabet = bytes_to_tokens()
    ids = [BYTE_LEVEL.token_id(alphabet[byte]) or 0 for byte in raw]
    assert stream(BYTE_LEVEL, ids).text == bytes(raw).decode("utf-8", errors="replace")


def bytes_to_tokens() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, BYTE_FALLBACK.vocab_size + 3), max_size=60))
def test_any_ids_stream_the_same_characters_with_byte_fallback(ids: list[int]) -> None:
    # In a run of bytes that turns invalid, decode() also replaces the characters that were complete: those
    # may differ. Everything else may not.
    detokenizer = IncrementalDetokenizer(BYTE_FALLBACK)
    text = "".join([detokenizer.push([token_id]) for token_id in ids]) + detokenizer.finish()
    whole = BYTE_FALLBACK.decode(ids)
    ascii_of = [[c for c in some if c in "helowrdab."] for some in (text, whole)]
    if "\ufffd" not in whole:
        assert text == whole
    else:
        assert len(ascii_of[0]) >= len(ascii_of[1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokenizer=either, text=text_strategy, cuts=st.lists(st.integers(0, 200), max_size=5))
def test_pieces_of_any_size_give_the_same_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = encode(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for begin, end in itertools.pairwise(places):
        detokenizer.push(ids[begin:end])
    detokenizer.finish()
    assert detokenizer.text == tokenizer.decode(ids)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    tokenizer=either,
    text=st.text("abh €", max_size=30),
    stops=st.lists(st.text("abh €", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_where_the_first_one_begins(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = encode(tokenizer, text)
    whole = tokenizer.decode(ids)
    detokenizer = stream(tokenizer, ids, stops)
    found = first_stop(whole, stops)
    assert detokenizer.stopped == (found is not None)
    if found is None:
        assert detokenizer.text == whole
        assert detokenizer.stop_token_count is None
        return
    begin, end = found
    assert detokenizer.text == whole[:begin]
    assert detokenizer.stop_string == whole[begin:end]
    count = detokenizer.stop_token_count
    assert count is not None
    assert len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) >= end
    assert len(tokenizer.decode(ids[: count - 1]).rstrip("\ufffd")) < end


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=5))
def test_one_stop_string_splits_like_str_split(text: str, stop: str) -> None:
    assert stream(BYTE_LEVEL, encode(BYTE_LEVEL, text), [stop]).text == text.split(stop)[0]


@BOTH
def test_no_half_character_is_emitted(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in encode(tokenizer, "🤖a")]
    assert [piece for piece in pieces if piece] == ["🤖", "a"]


@BOTH
def test_an_unfinished_character_ends_as_decode_says(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, "a🤖")[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids) == "a"
    assert "\ufffd" not in detokenizer.text
    assert detokenizer.finish() == tokenizer.decode(ids)[1:] != ""
    assert detokenizer.finish() == ""


def test_a_real_replacement_character_comes_once_it_is_certain() -> None:
    ids = encode(BYTE_LEVEL, "a\ufffdb")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert detokenizer.push(ids[:-1]) == "a"
    assert detokenizer.push(ids[-1:]) == "\ufffdb"


def test_byte_fallback_keeps_characters_before_a_run_turns_invalid() -> None:
    byte_ids = {byte: token_id for token_id, byte in BYTE_FALLBACK.byte_values.items()}
    euro = [byte_ids[byte] for byte in "€".encode()]
    a = BYTE_FALLBACK.token_id("a") or 0
    detokenizer = IncrementalDetokenizer(BYTE_FALLBACK)
    assert detokenizer.push(euro) == "€"
    assert detokenizer.push([byte_ids[0xFF], a]) == "\ufffda"
    assert detokenizer.push([*euro, a]) == "€a"


def test_the_space_before_a_word_survives_special_tokens_and_unknown_ids() -> None:
    hello, world = encode(BYTE_FALLBACK, "hello"), encode(BYTE_FALLBACK, "world")
    ids = [1, *hello, *[2] * 40, *[BYTE_FALLBACK.vocab_size] * 40, *world]
    assert stream(BYTE_FALLBACK, ids).text == "hello world"


def test_special_tokens_can_be_kept() -> None:
    ids = [*encode(BYTE_LEVEL, "a€"), BYTE_LEVEL.token_id("</s>") or 0]
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["</s"], skip_special_tokens=False)
    assert detokenizer.push(ids) == "a€"
    assert detokenizer.stop_string == "</s"


def test_a_stop_string_over_several_tokens_and_pushes() -> None:
    ids = encode(BYTE_LEVEL, "one\n\nUser: two")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["\n\nUser:"])
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == "one"
    assert detokenizer.stopped
    assert BYTE_LEVEL.decode(ids[: detokenizer.stop_token_count]) == "one\n\nUser:"
    assert detokenizer.push(ids) == detokenizer.finish() == ""


def test_ids_after_the_stop_in_one_push_are_dropped() -> None:
    ids = encode(BYTE_LEVEL, "ab.cd")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["."])
    assert detokenizer.push(ids) == "ab"
    assert (detokenizer.stop_token_count, detokenizer.token_count) == (3, 3)


def test_the_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    matcher = StopMatcher(["###"])
    assert [matcher.push(piece) for piece in ["a#", "#", "b##", "c#"]] == ["a", "", "##b", "##c"]
    assert matcher.finish() == "#"
    assert matcher.matched is None


def test_of_two_stops_the_one_completed_first_counts() -> None:
    for pieces in (["abc"], ["a", "b", "c"], ["ab", "c"]):
        matcher = StopMatcher(["abc", "b"])
        assert "".join(matcher.push(piece) for piece in pieces) == "a"
        assert matcher.matched == "b"
    longest = StopMatcher(["c", "abc"])
    assert (longest.push("xabc"), longest.matched) == ("x", "abc")


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""], [None], [3]])
def test_impossible_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="stop string"):
        IncrementalDetokenizer(BYTE_LEVEL, stop)


def test_pushing_after_the_end_is_refused() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    detokenizer.finish()
    with pytest.raises(InvalidInputError, match="finished"):
        detokenizer.push([1])


class _Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, inner: Tokenizer) -> None:
        self.vocab_size, self.special_ids, self.byte_values = (
            inner.vocab_size,
            inner.special_ids,
            inner.byte_values,
        )
        self._inner, self.decoded = inner, 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return self._inner.decode(ids, skip_special_tokens)


@pytest.mark.parametrize(
    ("tokenizer", "make_ids", "most"),
    [
        (BYTE_LEVEL, lambda: encode(BYTE_LEVEL, "hello €🤖 " * 200), 8),
        (BYTE_FALLBACK, lambda: encode(BYTE_FALLBACK, "hello €🤖 " * 200), 8),
        (BYTE_LEVEL, lambda: [BYTE_LEVEL.token_id("ÿ") or 0] * 2000, 40),
        (BYTE_FALLBACK, lambda: [3 + 0xFF] * 2000, 40),
        (BYTE_FALLBACK, lambda: [3 + 0xE2] * 2000, 40),
    ],
    ids=["text", "fallback-text", "broken", "fallback-broken", "fallback-unfinished"],
)
def test_a_token_costs_the_same_however_long_the_text(
    tokenizer: Tokenizer, make_ids: Callable[[], list[int]], most: int
) -> None:
    counting = _Counting(tokenizer)
    ids = make_ids()
    detokenizer = IncrementalDetokenizer(counting)
    start = time.perf_counter()
    detokenizer.push(ids)
    detokenizer.finish()
    assert counting.decoded <= most * len(ids)
    assert detokenizer.text == tokenizer.decode(ids)
    assert time.perf_counter() - start < 5
