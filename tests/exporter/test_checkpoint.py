"""Checkpoint folders and Hugging Face names: what opens, and the one line for what does not."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from dspark_edge.engines.errors import CheckpointError, MissingDependencyError
from dspark_edge.exporter.checkpoint import open_checkpoint

CONFIG = {"model_type": "qwen3", "hidden_size": 4}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(6, 4, generator=generator),
        "model.norm.weight": torch.randn(4, generator=generator).to(torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator).to(torch.float16),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, (name, tensor) in enumerate(weights().items(), start=1):
        weight_map[name] = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(source: str | Path, *, offline: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, offline=offline)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_reads_what_was_written(layout: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(layout)
    expected = weights()
    with open_checkpoint(str(source)) as checkpoint:
        assert checkpoint.source == str(source)
        assert checkpoint.config == CONFIG
        assert checkpoint.names() == frozenset(expected)
        for name, tensor in expected.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            read = checkpoint.tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_a_tensor_outlives_its_checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        norm = checkpoint.tensor("model.norm.weight")
    checkpoint.close()  # twice is fine
    assert torch.equal(norm, weights()["model.norm.weight"])
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("model.norm.weight")


def test_text_files_are_those_present(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}".encode())
    (folder / "README.md").write_bytes(b"not asked for")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.text_files() == {
            "tokenizer.json": b"{}",
            "chat_template.jinja": "{{ 'é' }}".encode(),
        }


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for read in (checkpoint.tensor, checkpoint.shape):
            with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
                read("lm_head.weight")


@pytest.mark.parametrize("source", ["foo/bar/baz", "./x", "nothing-here", "models/missing.gguf", "../up"])
def test_a_path_that_does_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(source).startswith(f"{source}: no such file or directory")


def test_config_missing_or_broken(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text('{"model_type": ')
    assert "config.json: is not valid JSON" in refusal(folder)
    config.write_text("[1]")
    assert "expected an object" in refusal(folder)
    config.unlink()
    assert "has no config.json" in refusal(folder)


def test_a_weights_file_instead_of_its_folder(folder: Path) -> None:
    assert "pass the folder" in refusal(folder / "model.safetensors")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "convert them to safetensors" in message


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file_is_seen_at_open(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: is truncated or damaged" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": 3}',
    ],
)
def test_a_damaged_header_is_seen_at_open(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "model.safetensors: is truncated or damaged" in refusal(folder)


def test_bytes_too_many_are_seen_at_open(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "is truncated or damaged" in refusal(folder)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8")])
def test_an_unsupported_type_is_seen_at_open(folder: Path, dtype: torch.dtype, name: str) -> None:
    save_file({"lm_head.weight": torch.zeros(2, dtype=dtype)}, folder / "model.safetensors")
    message = refusal(folder)
    assert f"'lm_head.weight' is of type {name}; supported are F32, F16, BF16" in message


def test_an_integer_buffer_does_no_harm_until_read(folder: Path) -> None:
    save_file(weights() | {"position_ids": torch.arange(3)}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensor("model.norm.weight").shape == (4,)
        with pytest.raises(CheckpointError, match="'position_ids' is of type I64"):
            checkpoint.tensor("position_ids")


def test_integers(folder: Path) -> None:
    save_file(weights() | {"draft_vocab_ids": torch.tensor([2, 5])}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.integers("draft_vocab_ids").tolist() == [2, 5]
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is of type BF16, expected I64"):
            checkpoint.integers("model.norm.weight")
        with pytest.raises(CheckpointError, match="has no tensor 'other'"):
            checkpoint.integers("other")
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        checkpoint.integers("draft_vocab_ids")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: is missing" in refusal(sharded)


def test_a_truncated_shard_is_seen_at_open(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    assert "model-00003-of-00003.safetensors: is truncated" in refusal(sharded)


def test_an_index_that_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    write_index(sharded, {"lm_head.weight": "model-00001-of-00003.safetensors"})
    assert "model-00001-of-00003.safetensors: lacks tensor 'lm_head.weight'" in refusal(sharded)


@pytest.mark.parametrize("file_name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "", 3])
def test_an_index_must_stay_in_its_folder(sharded: Path, file_name: object) -> None:
    write_index(sharded, {"lm_head.weight": file_name})
    assert "outside the checkpoint's folder" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    assert "has no weight_map" in refusal(sharded)


def test_shards_may_be_links_to_elsewhere(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A Hugging Face cache keeps its snapshots as links into a folder of blobs."""
    blobs = tmp_path_factory.mktemp("blobs")
    for path in sharded.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.tensor("model.norm.weight").shape == (4,)


def test_a_hugging_face_name_opens_the_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with open_checkpoint("owner/name", offline=True) as checkpoint:
        assert checkpoint.source == "owner/name"
        assert checkpoint.config == CONFIG
    assert asked["name"] == "owner/name"
    assert asked["local_files_only"] is True
    assert "*.safetensors" in asked["allow_patterns"]


def test_a_path_wins_over_a_hugging_face_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    with open_checkpoint(name) as checkpoint:
        assert checkpoint.config == CONFIG


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "access is gated"),
        ("RepositoryNotFoundError", "Hugging Face has no such model"),
        ("LocalEntryNotFoundError", "Hugging Face cannot be reached"),
        ("HFValidationError", "the download failed (first line second line)"),
    ],
)
def test_a_failed_download_is_one_line(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error_type = getattr(huggingface_hub.errors, kind)
    # Some of these take the HTTP response they come from, and differ between releases in how.
    error = error_type.__new__(error_type)
    error.args = ("first line\nsecond line",)

    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal("owner/name")
    assert message.startswith("owner/name: ")
    assert expected in message
    assert "download it elsewhere and pass the folder" in message


def test_offline_and_not_in_the_cache() -> None:
    assert "offline mode is on" in refusal("dspark-edge-tests/never-downloaded", offline=True)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dspark-edge\[export\]'"):
        open_checkpoint("owner/name")
