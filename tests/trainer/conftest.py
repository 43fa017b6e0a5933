"""The tiny bundle that the runtime's tests keep, and prompts for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.conftest import bundle_dir, record, text_bundle_dir

__all__ = ["bundle_dir", "record", "reference_entries", "text_bundle_dir"]

WritePrompts = Callable[..., Path]


@pytest.fixture
def write_prompts(tmp_path: Path) -> WritePrompts:
    """`write_prompts([{...}, …], name="prompts.jsonl")`: a prompts file."""

    def write(entries: list[Any], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    return write


def reference_entries(record: Any) -> list[dict[str, Any]]:
    """The reference record's prompts as entries of a prompts file, of two domains."""
    return [
        {"domain": ("prose", "code")[index % 2], "token_ids": sample["prompt"]}
        for index, sample in enumerate(record["samples"])
    ]


@pytest.fixture
def reference_prompts(record: Any) -> list[dict[str, Any]]:
    return reference_entries(record)


@pytest.fixture
def bundle_copy(bundle_dir: Path, tmp_path: Path) -> Path:
    """The tiny bundle, to be written to."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
