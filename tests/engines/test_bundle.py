"""Opening and verifying bundles, whole ones and damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle, hash_file, is_bundle, walk_files
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import (
    DrafterFacts,
    FileRecord,
    GraphSpec,
    Limits,
    Manifest,
    Provenance,
    TargetFacts,
    TensorSpec,
)

CONTENT = {
    "target.onnx": b"target",
    "sampler.onnx": b"sampler",
    "weights/target.data": bytes(3 << 20),  # three megabytes: hashed in several steps
    "config.json": '{"ä": 1}'.encode(),
    "empty": b"",
}


def manifest() -> Manifest:
    def graph(file: str) -> GraphSpec:
        return GraphSpec(file, (), (TensorSpec("logits", "float32", ("batch", 10)),), {})

    return Manifest(
        schema_version=1,
        lowering="onnx",
        precision="fp32",
        opsets={"": 24},
        target=TargetFacts("Qwen3ForCausalLM", 10, 8, 2, 2, 1, 4, 64, 1000, None, (2,)),
        drafter=DrafterFacts.ngram(4),
        limits=Limits(64, 1),
        graphs={
            "target": graph("target.onnx"),
            "sampler": graph("sampler.onnx"),
            "sampler_greedy": graph("sampler.onnx"),
        },
        files=tuple(FileRecord(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in CONTENT.items()),
        provenance=Provenance("2025-01-31T12:00:00Z", {"dspark-edge": "0.1.0"}, "target", "ngram"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole bundle."""
    folder = tmp_path / "bundle"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(manifest().to_text(), encoding="utf-8")
    return folder


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    data = json.loads((folder / "manifest.json").read_bytes())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def test_opens_a_whole_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest == manifest()
    assert bundle.path == folder
    assert bundle.graph_path("sampler_greedy") == folder / "sampler.onnx"
    assert bundle.file("weights/target.data").read_bytes() == CONTENT["weights/target.data"]
    assert bundle.read_text("config.json") == '{"ä": 1}'
    assert bundle.has("empty") and not bundle.has("tokenizer.json") and not bundle.has("weights")
    assert bundle.verify() == ()
    assert is_bundle(folder)


def test_a_relative_path_stays_valid_when_the_process_moves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    bundle = Bundle.open("bundle")
    monkeypatch.chdir("/")
    assert bundle.verify() == ()


def test_verify_reports_progress_in_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    Bundle.open(folder).verify(lambda done, total: seen.append((done, total)))
    size = sum(map(len, CONTENT.values()))
    assert len(seen) >= 5
    assert seen == sorted(seen) and seen[-1] == (size, size) and {total for _, total in seen} == {size}


def test_later_files_belong_and_others_are_listed(folder: Path) -> None:
    (folder / "devices" / "gpu").mkdir(parents=True)
    (folder / "devices" / "gpu" / "profile.json").write_text("{}")
    (folder / "calibration.json").write_text("[1]")
    (folder / "weights" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("weights")
    bundle = Bundle.open(folder)
    assert bundle.verify() == ("link", "weights/notes.txt")
    assert bundle.read_text("calibration.json") == "[1]"
    assert bundle.has("devices/gpu/profile.json")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path, message in [
        (tmp_path / "nowhere", "there is no bundle at"),
        (file, "is not a folder"),
        (tmp_path, "not a bundle, or an incomplete one"),
    ]:
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)
        assert not is_bundle(path)
    (tmp_path / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match="is missing"):
        Bundle.open(tmp_path)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json is not a file"):
        Bundle.open(tmp_path)


def test_a_truncated_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(text[: len(text) // 2])
    with pytest.raises(BundleError, match="is damaged, not valid JSON"):
        Bundle.open(folder)


def test_a_newer_manifest(folder: Path) -> None:
    edit(folder, lambda data: data.update(schema_version=2, novelty=True))
    with pytest.raises(BundleError, match=r"made by a newer version .*upgrade dspark-edge"):
        Bundle.open(folder)


def test_all_missing_and_truncated_files_are_named_at_opening(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "target.onnx").write_bytes(b"targ")
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    for part in ("config.json is missing", "target.onnx has 4 bytes instead of 6", "empty is not a file"):
        assert part in str(caught.value)


def test_verify_names_all_damaged_files_of_the_right_size(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "target.onnx").write_bytes(b"tarGet")
    data = bytearray(CONTENT["weights/target.data"])
    data[-1] = 1
    (folder / "weights/target.data").write_bytes(data)
    Bundle.open(folder)  # sizes alone do not show it
    (folder / "empty").unlink()  # after opening
    with pytest.raises(BundleError) as caught:
        bundle.verify()
    for part in ("target.onnx is not what", "weights/target.data is not what", "empty is missing"):
        assert part in str(caught.value)
    assert "sampler.onnx" not in str(caught.value)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "weights/../../secret"])
def test_a_path_that_leads_outside(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_text("secret")
    edit(folder, lambda data: data["files"][0].update(path=path))
    with pytest.raises(BundleError, match="points outside its folder"):
        Bundle.open(folder)
    edit(folder, lambda data: data["files"][0].update(path="target.onnx"))
    edit(folder, lambda data: data["graphs"]["target"].update(file=path))
    with pytest.raises(BundleError, match="points outside its folder"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["target.onnx", "weights", "manifest.json"])
def test_a_link_that_leads_outside(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match="points outside its folder"):
        Bundle.open(folder)


def test_a_link_put_there_after_opening(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "calibration.json").symlink_to("/etc/hostname")
    for use in (bundle.file, bundle.has, bundle.read_text):
        with pytest.raises(BundleError, match="points outside its folder"):
            use("calibration.json")
    (folder / "target.onnx").rename(folder.parent / "elsewhere")
    (folder / "target.onnx").symlink_to("../elsewhere")
    with pytest.raises(BundleError, match="points outside its folder"):
        bundle.verify()


def test_links_that_stay_inside_or_lead_to_the_bundle(folder: Path) -> None:
    (folder / "sampler.onnx").rename(folder / "weights" / "s")
    (folder / "sampler.onnx").symlink_to("weights/s")
    (folder.parent / "shortcut").symlink_to("bundle")
    bundle = Bundle.open(folder.parent / "shortcut")
    assert bundle.verify() == ("weights/s",)


def test_a_dangling_and_a_circular_link(folder: Path) -> None:
    for target, message in (("nowhere", "empty is missing"), ("empty", "empty (cannot be read|is missing)")):
        (folder / "empty").unlink()
        (folder / "empty").symlink_to(target)
        with pytest.raises(BundleError, match=message):
            Bundle.open(folder)


def test_a_graph_that_is_not_recorded(folder: Path) -> None:
    (folder / "other.onnx").write_bytes(b"x")
    edit(folder, lambda data: data["graphs"]["target"].update(file="other.onnx"))
    with pytest.raises(BundleError, match=r"graphs\.target\.file, 'other\.onnx', is not among its files"):
        Bundle.open(folder)


def test_asking_for_what_is_not_there(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match="has no graph 'drafter'; it has sampler, sampler_greedy, target"):
        bundle.graph_path("drafter")
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        bundle.read_text("tokenizer.json")
    with pytest.raises(BundleError, match="points outside its folder"):
        bundle.file("../x")
    (folder / "calibration.json").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="cannot read"):
        bundle.read_text("calibration.json")


def test_hash_and_walk(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    assert walk_files(tmp_path) == ["a", "b/c"]
    assert hash_file(tmp_path / "b" / "c") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(OSError, match=os.strerror(2)):
        walk_files(tmp_path / "nowhere")
