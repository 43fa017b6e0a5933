"""config.json in both of Hugging Face's dialects, and the one line for what is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dspark_edge.engines.errors import CheckpointError, MismatchError
from dspark_edge.exporter.configuration import (
    DrafterConfig,
    RotaryConfig,
    check_fit,
    read_decoder_config,
    read_drafter_config,
    read_eos_token_ids,
    read_stored_dtype,
)

TARGET: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
DRAFTER: Mapping[str, Any] = {
    **TARGET,
    "architectures": ["Qwen3DSparkModel"],
    "num_target_layers": 4,
    "num_hidden_layers": 2,
    "block_size": 7,
    "mask_token_id": 257,
    "target_layer_ids": [0, 2],
    "markov_rank": 8,
    "markov_head_type": "gated",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "layer_types": ["full_attention"] * 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def drafter(**changes: Any) -> DrafterConfig:
    return read_drafter_config({**DRAFTER, **changes}, "drafter")


def test_a_target() -> None:
    config = read_decoder_config({**TARGET, "bos_token_id": 256, "tie_word_embeddings": True}, "target")
    assert (config.family, config.qk_norm) == ("qwen3", True)
    assert (config.query_size, config.key_value_size) == (64, 32)
    assert config.tie_word_embeddings and not config.attention_bias
    assert config.bos_token_id == 256
    llama = read_decoder_config({**TARGET, "architectures": ["LlamaForCausalLM"]}, "target")
    assert (llama.family, llama.qk_norm) == ("llama", False)


@pytest.mark.parametrize("absent", [{}, {"head_dim": None, "num_key_value_heads": None, "attention_bias": None}])
def test_what_older_files_leave_out(absent: dict[str, None]) -> None:
    values = {key: value for key, value in TARGET.items() if key not in ("head_dim", "num_key_value_heads")}
    config = read_decoder_config({**values, **absent}, "target")
    assert (config.head_dim, config.num_key_value_heads, config.attention_bias) == (8, 4, False)


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ({}, RotaryConfig(10000.0)),
        ({"rope_theta": 1e6}, RotaryConfig(1e6)),
        ({"rope_theta": 1e6, "rope_scaling": None}, RotaryConfig(1e6)),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, RotaryConfig(1e6)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RotaryConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, RotaryConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RotaryConfig(10000.0, "linear", 4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 4}},
            RotaryConfig(7.0, "linear", 4.0),
        ),
        (
            {"rope_scaling": {"rope_type": "factors", "factors": [1, 2] * 4}},
            RotaryConfig(10000.0, "factors", factors=(1.0, 2.0) * 4),
        ),
    ],
)
def test_rope_in_both_dialects(dialect: dict[str, Any], expected: RotaryConfig) -> None:
    assert read_decoder_config({**TARGET, **dialect}, "target").rotary == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is no supported target architecture"),
        ({"architectures": []}, "is no supported target architecture"),
        ({"architectures": None}, "None is no supported target architecture"),
        ({"architectures": ["Qwen3DSparkModel"]}, "no supported target architecture"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"hidden_size": "large"}, "'hidden_size' in config.json is 'large', expected a number"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' in config.json is 0, expected a whole number ≥ 1"),
        ({"num_hidden_layers": 2.5}, "expected a whole number"),
        ({"num_hidden_layers": float("nan")}, "expected a number"),
        ({"vocab_size": float("inf")}, "expected a number"),
        ({"vocab_size": True}, "expected a number"),
        ({"attention_bias": "yes"}, "expected true or false"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"head_dim": 15}, "rotary embedding needs an even number"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention is not supported"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantized"),
        ({"partial_rotary_factor": 0.5}, "partial rotary embedding is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope scaling .* is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "'high_freq_factor' in config.json is 1, expected more",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "has no 'factor'"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "1 rope factors for head size 16"),
        ({"rope_scaling": "linear"}, "expected an object"),
    ],
)
def test_a_target_that_is_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_decoder_config({**TARGET, **changes}, "models/target")
    assert str(caught.value).startswith("models/target") and "\n" not in str(caught.value)


def test_a_drafter() -> None:
    config = drafter()
    assert (config.block_size, config.mask_token_id, config.tap_layers) == (7, 257, (0, 2))
    assert (config.markov_rank, config.markov_head) == (8, "gated")
    assert config.confidence and config.confidence_with_markov
    assert config.backbone.num_layers == 2 and config.num_target_layers == 4
    assert drafter(target_layer_ids=[2, -1, 0]).tap_layers == (2, -1, 0)  # their order is `fc`'s


def test_a_draft_vocabulary() -> None:
    config = drafter(draft_vocab_size=40)
    assert (config.draft_vocab_size, config.head_size, config.backbone.vocab_size) == (40, 40, 260)
    for whole in (None, 260):  # the same as none: not even the graph tells them apart
        assert drafter(draft_vocab_size=whole) == drafter()
    assert (drafter().draft_vocab_size, drafter().head_size) == (None, 260)


def test_a_drafter_without_heads() -> None:
    values = {key: value for key, value in DRAFTER.items() if not key.startswith(("markov", "confidence", "enable"))}
    config = read_drafter_config({**values, "markov_rank": 0}, "drafter")
    assert (config.markov_rank, config.markov_head, config.confidence) == (0, "none", False)
    without = drafter(enable_confidence_head=False)  # the other flag means nothing then
    assert not without.confidence and not without.confidence_with_markov


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "no supported drafter architecture; supported: Qwen3DSparkModel"),
        ({"target_layer_ids": []}, "'target_layer_ids' in config.json is \\[\\]"),
        ({"target_layer_ids": None}, "'target_layer_ids'"),
        ({"target_layer_ids": [0, 1.5]}, "'target_layer_ids'"),
        ({"target_layer_ids": [0, True]}, "'target_layer_ids'"),
        ({"target_layer_ids": [1, 1]}, "'target_layer_ids'"),
        ({"block_size": 0}, "'block_size' in config.json is 0"),
        ({"markov_head_type": "lstm"}, "Markov head 'lstm' is not supported; supported: vanilla, gated, rnn"),
        ({"markov_head_type": "none"}, "Markov head 'none' is not supported"),
        ({"markov_rank": -1}, "'markov_rank' in config.json is -1"),
        ({"markov_rank": 0}, "confidence_head_with_markov needs a markov_rank above 0"),
        ({"mask_token_id": 260}, "mask_token_id 260 is outside the vocabulary of 260"),
        ({"mask_token_id": None}, "has no 'mask_token_id'"),
        ({"num_target_layers": None}, "has no 'num_target_layers'"),
        ({"draft_vocab_size": 0}, "'draft_vocab_size' in config.json is 0, expected a whole number ≥ 1"),
        ({"draft_vocab_size": 261}, "'draft_vocab_size' in config.json is 261, more than the vocabulary of 260"),
        ({"draft_vocab_size": "8k"}, "'draft_vocab_size' in config.json is '8k', expected a number"),
    ],
)
def test_a_drafter_that_is_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        drafter(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "was made for vocabulary size 300, the target has 260"),
        ({"hidden_size": 64}, "was made for hidden size 64, the target has 32"),
        ({"num_target_layers": 6}, "was made for number of target layers 6, the target has 4"),
        ({"target_layer_ids": [0, 4]}, "taps target layer 4; taps go from -1 \\(the embedding\\) to 2"),
        ({"target_layer_ids": [3]}, "taps target layer 3; .* the last layer \\(3\\) cannot be tapped"),
        ({"target_layer_ids": [-2]}, "taps target layer -2"),
    ],
)
def test_a_drafter_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    target = read_decoder_config(TARGET, "target")
    with pytest.raises(MismatchError, match=message):
        check_fit(target, drafter(**changes))


def test_drafters_that_fit() -> None:
    target = read_decoder_config(TARGET, "target")
    check_fit(target, drafter())
    check_fit(target, drafter(target_layer_ids=[-1, 2]))
    # The backbone is the drafter's own affair.
    check_fit(target, replace(drafter(), backbone=replace(drafter().backbone, num_attention_heads=8, head_dim=4)))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {}, (5,)),
        ({"eos_token_id": [7, 5, 7]}, {}, (5, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": [9, 8]}, (8, 9)),
        ({}, {}, ()),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_eos_token_ids(config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert read_eos_token_ids(config, generation) == expected


def test_stored_dtype() -> None:
    assert read_stored_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) == "bfloat16"
    assert read_stored_dtype({"torch_dtype": "float16"}) == "float16"
    assert read_stored_dtype({}) is None
