"""Files that are added to a bundle: whole, or not at all."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.replace_file import replace_file, replacing, write_problem


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for content in (b"one", b"another"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["calibration.json"]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"cannot write .*calibration.json: the disk is full; free some space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["calibration.json"]


def test_what_is_written_in_pieces_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "target.engine"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"newer")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["target.engine"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot write .*gone/calibration.json: No such file or directory"):
        replace_file(tmp_path / "gone" / "calibration.json", b"")


def test_a_limit_on_file_sizes_is_an_error_in_words(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dspark_edge.engines.replace_file import replace_file\n"
        "try: replace_file(Path(sys.argv[1]), b'x' * 10_000)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.stdout.startswith("BundleError cannot write") and "ulimit -f" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_every_problem_is_one_line(number: int) -> None:
    problem = write_problem(Path("/a/b"), OSError(number, os.strerror(number)))
    assert problem.startswith("cannot write /a/b: ") and "\n" not in problem
