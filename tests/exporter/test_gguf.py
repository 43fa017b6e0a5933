"""GGUF files: weights, configuration and tokenizer come out as the Hugging Face checkpoint had them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from dspark_edge.engines.errors import CheckpointError, MissingDependencyError
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.gguf_checkpoint import interleaved_to_halves

from .gguf_files import HEAD_DIM, HIDDEN, SIZES, llama_model, qwen3_model, weights_of, write

BYTES = sorted(ByteLevel.alphabet())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


# ---- weights and configuration ----


def test_llama_is_read_back_exactly(tmp_path: Path) -> None:
    model = llama_model(tie_word_embeddings=True)
    expected = weights_of(model)
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    with open_checkpoint(write(tmp_path / "m.gguf", expected, metadata=ids)) as checkpoint:
        assert checkpoint.names() == frozenset(expected)
        for name, weight in expected.items():
            assert checkpoint.shape(name) == weight.shape
            assert np.array_equal(checkpoint.tensor(name).numpy(), weight), name
        assert dict(checkpoint.config) == SIZES | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_built_from_it_has_the_same_logits(family: str, tmp_path: Path) -> None:
    model = llama_model() if family == "llama" else qwen3_model()
    path = write(tmp_path / "m.gguf", weights_of(model), family)
    with open_checkpoint(path) as checkpoint:
        rebuilt = type(model)(type(model.config)(**checkpoint.config)).eval()
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        rebuilt.load_state_dict(state, strict=False)
    token_ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(rebuilt(token_ids).logits, model(token_ids).logits)


def test_the_reordering_turns_one_rotary_form_into_the_other() -> None:
    """Scores of llama.cpp's interleaved rotation on its rows equal those of Hugging Face's on ours."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, HEAD_DIM, HIDDEN, generator=generator)
    hidden = torch.randn(HIDDEN, 2, generator=generator)
    angles = torch.tensor([3.0, 7.0]) * 5000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)[:, None]

    def interleaved(value: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        even, odd = value[0::2], value[1::2]
        return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()])

    def halves(value: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        low, high = value.chunk(2)
        return torch.cat([low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()])

    stored = interleaved(query @ hidden[:, 0], angles[:, 0]) @ interleaved(key @ hidden[:, 1], angles[:, 1])
    query, key = interleaved_to_halves(query, 1), interleaved_to_halves(key, 1)
    read = halves(query @ hidden[:, 0], angles[:, 0]) @ halves(key @ hidden[:, 1], angles[:, 1])
    torch.testing.assert_close(stored, read)


def test_types_are_dequantised_or_kept(tmp_path: Path) -> None:
    kinds = gguf.GGMLQuantizationType
    expected = weights_of(llama_model())
    prefix = "model.layers.0."
    types = {
        prefix + "mlp.up_proj.weight": kinds.Q8_0,
        prefix + "self_attn.q_proj.weight": kinds.Q4_1,
        prefix + "mlp.down_proj.weight": kinds.F16,
        prefix + "mlp.gate_proj.weight": kinds.BF16,
    }
    with open_checkpoint(write(tmp_path / "m.gguf", expected, types=types)) as checkpoint:
        read = {name: checkpoint.tensor(name) for name in types}
        shapes = {name: checkpoint.shape(name) for name in types}
    up, query, down, gate = read.values()
    assert shapes == {name: expected[name].shape for name in types}
    assert [tensor.dtype for tensor in (up, query)] == [torch.float32] * 2
    np.testing.assert_allclose(up.numpy(), expected[prefix + "mlp.up_proj.weight"], atol=1e-3)
    np.testing.assert_allclose(query.numpy(), expected[prefix + "self_attn.q_proj.weight"], atol=1e-2)
    assert torch.equal(down, torch.from_numpy(expected[prefix + "mlp.down_proj.weight"]).half())
    assert torch.equal(gate, torch.from_numpy(expected[prefix + "mlp.gate_proj.weight"]).bfloat16())


def test_biases_are_seen(tmp_path: Path) -> None:
    expected = weights_of(llama_model(attention_bias=True))
    rng = np.random.default_rng(0)
    expected = {name: rng.standard_normal(value.shape, np.float32) for name, value in expected.items()}
    with open_checkpoint(write(tmp_path / "m.gguf", expected)) as checkpoint:
        assert checkpoint.config["attention_bias"] is True
        assert checkpoint.config["mlp_bias"] is False
        name = "model.layers.1.self_attn.k_proj.bias"
        assert np.array_equal(checkpoint.tensor(name).numpy(), expected[name])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_type": "linear", "factor": 2.5},
        ),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling(metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), metadata=metadata)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["rope_parameters"] == {"rope_theta": 5000.0} | expected


def test_baked_in_factors_of_llama3_are_recognised(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    }
    model = llama_model(rope_parameters=parameters)
    plain = 5000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert np.ptp(factors) > 0
    path = write(
        tmp_path / "m.gguf",
        weights_of(model),
        metadata={"llama.rope.scaling.original_context_length": 2048},
        extra={"rope_freqs.weight": factors},
    )
    with open_checkpoint(path) as checkpoint:
        assert "rope_freqs.weight" not in checkpoint.names()
        assert checkpoint.config["rope_parameters"] == pytest.approx(parameters)


def test_other_baked_in_factors_are_kept(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 3.0, 2.0], np.float32)
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), extra={"rope_freqs.weight": factors})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["rope_parameters"] == {
            "rope_type": "factors",
            "rope_theta": 5000.0,
            "factors": [1.0, 1.5, 3.0, 2.0],
        }


# ---- what is refused ----


def test_not_a_gguf_file(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04" + b"\0" * 64):
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        assert "is not a GGUF file" in refusal(path)


def test_a_truncated_file_is_seen_at_open(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", weights_of(llama_model()))
    content = whole.read_bytes()
    for kept in (4, 10, 30, 100, 700, 1500, len(content) // 2, len(content) - 200):
        path = tmp_path / f"{kept}.gguf"
        path.write_bytes(content[:kept])
        assert "is truncated or damaged" in refusal(path), kept


def test_a_damaged_array_length_is_seen_at_once(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.token_type": [1, 1, 1]}
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), metadata=metadata)
    content = bytearray(path.read_bytes())
    length_at = content.index(b"token_type") + len(b"token_type") + 8  # after the two type codes
    assert content[length_at] == 3
    content[length_at + 7] = 0x7F
    path.write_bytes(content)
    assert "is truncated or damaged" in refusal(path)


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), "mamba")
    assert "architecture 'mamba' is not read from GGUF; supported are llama, qwen3" in refusal(path)


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    bad = {"rope_freqs.weight": np.ones(4, np.float64)}
    message = refusal(write(tmp_path / "m.gguf", weights_of(llama_model()), extra=bad))
    assert "'rope_freqs.weight' is of type F64" in message
    assert "Q4_K" in message


def test_tensors_missing_unknown_or_of_another_shape(tmp_path: Path) -> None:
    weights = weights_of(llama_model())
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in weights.items() if key != name}
    assert f"lacks the tensor for '{name}'" in refusal(write(tmp_path / "a.gguf", without))
    narrow = weights | {name: weights[name][:, :16]}
    assert "has shape (64, 16)" in refusal(write(tmp_path / "b.gguf", narrow))
    router = {"blk.0.ffn_gate_inp.weight": np.zeros((2, HIDDEN), np.float32)}
    message = refusal(write(tmp_path / "c.gguf", weights, extra=router))
    assert "blk.0.ffn_gate_inp.weight" in message
    del without["model.embed_tokens.weight"]
    assert "token_embd.weight" in refusal(write(tmp_path / "d.gguf", without))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "should be an integer"),
    ],
)
def test_metadata_that_is_not_supported(metadata: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(write(tmp_path / "m.gguf", weights_of(llama_model()), metadata=metadata))


def test_a_closed_file_and_an_unknown_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", weights_of(llama_model())))
    with pytest.raises(CheckpointError, match="has no tensor 'nothing'"):
        checkpoint.tensor("nothing")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("model.norm.weight")


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", weights_of(llama_model()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dspark-edge\[export\]'"):
        open_checkpoint(path)


# ---- the tokenizer ----

WORDS = ["ab", "Ġab", "12", "123", "1234", "ĠĠ"]
MERGES = ["a b", "Ġ ab", "1 2", "12 3", "123 4", "Ġ Ġ"]
TOKENS = ["<eos>", "<bos>", "<eot>", "<tool>", *BYTES, *WORDS, "[PAD266]"]
TYPES = [3, 3, 3, 4, *[1] * (len(BYTES) + len(WORDS)), 5]


def tokenizer_metadata(pre: str | None, **changes: Any) -> dict[str, Any]:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.{key}": value for key, value in changes.items()}


def text_files(tmp_path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), metadata=metadata)
    with open_checkpoint(path) as checkpoint:
        return checkpoint.text_files()


def tokens_of(files: Mapping[str, bytes], text: str) -> list[str]:
    return Tokenizer.from_str(files["tokenizer.json"].decode()).encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "numbers"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
        ("llama-bpe", ["123", "4"]),
        ("default", ["123", "4"]),
        (None, ["123", "4"]),
    ],
)
def test_each_pre_tokenizer_splits_numbers_its_own_way(pre: str | None, numbers: list[str], tmp_path: Path) -> None:
    files = text_files(tmp_path, tokenizer_metadata(pre))
    assert tokens_of(files, "ab ab 1234") == ["ab", "Ġab", "Ġ", *numbers]


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "gpt-2", "llama-bpe", "default"])
@pytest.mark.parametrize(
    "text",
    ["", "ab  ab\n\n\tc ", "it's 3.14!", "h\u00e9llo \U0001f600 \u4e2d\u6587", "<bos>user\n<tool>x<eos>"],
)
def test_text_comes_back_whole(pre: str, text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(text_files(tmp_path, tokenizer_metadata(pre))["tokenizer.json"].decode())
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_ids_and_special_tokens(tmp_path: Path) -> None:
    files = text_files(tmp_path, tokenizer_metadata("smollm"))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = tokenizer.encode("<bos>ab<tool>ab<eot>").ids
    assert ids == [1, TOKENS.index("ab"), 3, TOKENS.index("ab"), 2]
    assert tokenizer.decode(ids) == "ab<tool>ab"  # a user-defined token is text, a control token is not
    assert all(tokenizer.token_to_id(token) == index for index, token in enumerate(TOKENS[:-1]))
    assert tokenizer.token_to_id("[PAD266]") is None


def test_text_is_composed_first_for_qwen2_only(tmp_path: Path) -> None:
    for pre, expected in (("qwen2", 2), ("smollm", 3)):
        assert len(tokens_of(text_files(tmp_path, tokenizer_metadata(pre)), "e\u0301")) == expected


def test_first_and_last_tokens_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    both = tokenizer_metadata("gpt-2") | {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    files = text_files(tmp_path, both)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("ab").tokens == ["<bos>", "ab", "<eos>"]
    assert tokenizer.encode("ab", "ab").tokens == ["<bos>", "ab", "<eos>", "<bos>", "ab", "<eos>"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, True)


def test_llama3_adds_its_first_token_unless_told_otherwise(tmp_path: Path) -> None:
    metadata = tokenizer_metadata("llama-bpe")
    assert tokens_of(text_files(tmp_path, metadata), "ab") == ["ab"]
    del metadata["tokenizer.ggml.add_bos_token"]
    assert tokens_of(text_files(tmp_path, metadata), "ab") == ["<bos>", "ab"]


def test_configuration_files(tmp_path: Path) -> None:
    metadata = tokenizer_metadata("smollm", chat_template="{{ messages }}")
    files = text_files(tmp_path, metadata | {"tokenizer.ggml.padding_token_id": 2})
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eot>",
        "model_max_length": 64,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "kind 'none'"),
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        (tokenizer_metadata("klingon"), "pre-tokenizer 'klingon' is not known"),
        (tokenizer_metadata("smollm") | {"tokenizer.ggml.eos_token_id": 9999}, "its eos token is 9999"),
        (tokenizer_metadata("smollm") | {"tokenizer.ggml.merges": ["a zz"]}, "its tokenizer is damaged"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_still_leaves_the_weights(
    metadata: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", weights_of(llama_model()), metadata=metadata)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensor("model.norm.weight").shape == (HIDDEN,)
        with pytest.raises(CheckpointError, match="--tokenizer DIR") as caught:
            checkpoint.text_files()
    assert expected in str(caught.value)
