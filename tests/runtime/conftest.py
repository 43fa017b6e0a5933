"""A tiny bundle that is kept with the tests, so that the runtime is tested where torch is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dspark_edge.runtime.generator import Generator
from tests.conftest import runs_lowering


@pytest.fixture(scope="session")
def bundle_dir() -> Path:
    """The reference pair qwen3_target + qwen3_rnn, capacity 256, no tokenizer."""
    lowering = "ort" if runs_lowering("ort", "dspark") else "decomposed"
    return Path(__file__).parents[1] / "data" / "bundles" / f"qwen3_rnn_{lowering}"


@pytest.fixture(scope="session")
def packed_bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pair with graphs for 4 packed sequences."""
    if not runs_lowering("ort", "dspark"):
        pytest.skip("this ONNX Runtime is too old for the lowering")
    kept, folder = Path(__file__).parents[1] / "data" / "bundles", tmp_path_factory.mktemp("bundles") / "packed"
    shutil.copytree(kept / "qwen3_rnn_packed", folder)
    for data in (kept / "qwen3_rnn_ort").glob("*.data"):
        shutil.copy(data, folder)
    return folder


@pytest.fixture(scope="session")
def record(reference_dir: Path) -> Any:
    """What DeepSpec's own evaluation recorded for that pair."""
    return json.loads((reference_dir / "qwen3_rnn" / "reference.json").read_text())


def byte_tokenizer() -> tokenizers.Tokenizer:
    """The reference models' vocabulary: token i is byte i, 256 ends the text, 257 is the mask."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<mask>"])
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="session")
def text_bundle_dir(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with a tokenizer and a chat template beside it."""
    folder = tmp_path_factory.mktemp("bundles") / "text"
    shutil.copytree(bundle_dir, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def generator(bundle_dir: Path) -> Iterator[Generator]:
    with Generator.open(bundle_dir, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_generator(bundle_dir: Path) -> Iterator[Generator]:
    with Generator.open(bundle_dir, mode="plain", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def text_generator(text_bundle_dir: Path) -> Iterator[Generator]:
    with Generator.open(text_bundle_dir, threads=1) as opened:
        yield opened
