"""benchmarks/offline_kit.py: pieces come in any order and again, and nothing is unpacked before all are whole."""

from __future__ import annotations

from pathlib import Path

import offline_kit
import pytest


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "one.whl", tmp_path / "model.gguf"]
    for number, file in enumerate(found):
        file.write_bytes(bytes(range(256)) * (40 + number))
    return found


def test_what_is_packed_comes_out(files: list[Path], tmp_path: Path) -> None:
    folders = offline_kit.pack(tmp_path / "kit", files, 10_000)
    assert len(folders) > 2
    assert all(sum(file.stat().st_size for file in folder.iterdir()) < 11_000 for folder in folders)
    store, last = tmp_path / "store", folders[0]
    for folder in reversed(folders[1:]):
        assert f"piece.{last.name}" in offline_kit.take(folder, store)
        assert not (store / "files").exists()
    offline_kit.take(folders[1], store)  # once more
    assert offline_kit.main(["take", str(last), "--store", str(store)]) == 0
    for file in files:
        assert (store / "files" / file.name).read_bytes() == file.read_bytes()


def test_damage_and_confusion_are_told(files: list[Path], tmp_path: Path) -> None:
    folders = offline_kit.pack(tmp_path / "kit", files, 10_000)
    piece = folders[0] / "piece.00"
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit, match=r"piece\.00 is damaged; send it again"):
        offline_kit.take(folders[0], tmp_path / "store")
    others = offline_kit.pack(tmp_path / "other", files[:1], 10_000)
    offline_kit.take(folders[1], tmp_path / "store")
    with pytest.raises(SystemExit, match="pieces of another kit"):
        offline_kit.take(others[0], tmp_path / "store")
    with pytest.raises(SystemExit, match="two files have the same name"):
        offline_kit.pack(tmp_path / "third", [files[0], tmp_path / "elsewhere" / files[0].name], 100)
