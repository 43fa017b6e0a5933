"""Writing bundles: whole or not at all, whatever goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_edge.engines import bundle_writer
from dspark_edge.engines.bundle import Bundle, hash_file
from dspark_edge.engines.bundle_writer import BundleWriter
from dspark_edge.engines.errors import BundleError
from dspark_edge.engines.manifest import (
    DrafterFacts,
    GraphSpec,
    Limits,
    Manifest,
    Provenance,
    TargetFacts,
    TensorSpec,
)

SPEC = GraphSpec("graph.onnx", (), (TensorSpec("logits", "float32", ("batch", 10)),), {})
MANIFEST = Manifest(
    schema_version=1,
    lowering="onnx",
    precision="fp32",
    opsets={"": 24},
    target=TargetFacts("Qwen3ForCausalLM", 10, 8, 2, 2, 1, 4, 64, 1000, None, (2,)),
    drafter=DrafterFacts.ngram(4),
    limits=Limits(64, 1),
    graphs={"target": SPEC, "sampler": SPEC, "sampler_greedy": SPEC},
    files=(),
    provenance=Provenance("2025-01-31T12:00:00Z", {"dspark-edge": "0.1.0"}, "target", "ngram"),
)


def write(output: Path, content: bytes = b"graph", overwrite: bool = False) -> Bundle:
    with BundleWriter(output, overwrite) as writer:
        writer.write_bytes("graph.onnx", content)
        return writer.finish(MANIFEST)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """An output whose parent must hold nothing hidden in the end."""
    yield tmp_path / "out"
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_writes_a_bundle_that_opens_and_verifies(output: Path) -> None:
    weights = np.arange(1000, dtype=np.float32).reshape(10, 100)
    with BundleWriter(output) as writer:
        assert writer.path.parent == output.parent and not output.exists()
        writer.reserve(10_000)
        writer.write_bytes("graph.onnx", b"graph")
        with writer.open_stream("weights/graph.data") as stream:
            assert stream.write(weights.data) == 4000
            assert stream.write(np.zeros((0, 3), dtype=np.float32).data) == 0
            stream.write(memoryview(b"tail"))
            assert stream.tell() == 4004
        (writer.path / "config.json").write_text("{}")
        (writer.path / "calibration.json").write_text("{}")
        bundle = writer.finish(MANIFEST)
    assert bundle == Bundle.open(output)
    assert bundle.verify() == ()
    records = {record.path: record for record in bundle.manifest.files}
    assert sorted(records) == ["config.json", "graph.onnx", "weights/graph.data"]
    data = weights.tobytes() + b"tail"
    assert records["weights/graph.data"].sha256 == hashlib.sha256(data).hexdigest()
    assert names(output.parent) == ["out"]
    assert output.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_was_streamed_is_not_read_again(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def spy(path: Path) -> str:
        read.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(bundle_writer, "hash_file", spy)
    with BundleWriter(output) as writer:
        writer.write_bytes("graph.onnx", b"graph")
        writer.write_bytes("changed", b"abc")
        (writer.path / "changed").write_bytes(b"abcd")
        (writer.path / "plain").write_bytes(b"x")
        bundle = writer.finish(MANIFEST)
    assert sorted(read) == ["changed", "plain"]
    bundle.verify()


def test_a_stream_gives_no_descriptor_away(output: Path) -> None:
    with BundleWriter(output) as writer, writer.open_stream("x") as stream:
        assert stream.writable() and not stream.seekable() and not stream.readable()
        with pytest.raises(OSError):
            stream.fileno()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_any_exception_leaves_nothing(output: Path, kind: type[BaseException]) -> None:
    nested = output / "a" / "b"
    with pytest.raises(kind), BundleWriter(nested) as writer, writer.open_stream("graph.onnx") as stream:
        stream.write(b"half")
        assert names(output / "a") == [writer.path.name]
        raise kind
    assert names(output.parent) == []  # the parents that were made for it are gone too


def test_leaving_without_finish_leaves_nothing(output: Path) -> None:
    with BundleWriter(output) as writer:
        writer.write_bytes("graph.onnx", b"graph")
    assert names(output.parent) == []
    for late in (lambda: writer.write_bytes("x", b""), lambda: writer.finish(MANIFEST)):
        with pytest.raises(RuntimeError):
            late()


def test_a_writer_that_is_forgotten_cleans_up(output: Path) -> None:
    writer = BundleWriter(output)
    writer.__enter__().write_bytes("x", b"x")  # an interrupt between __enter__ and the block
    del writer
    assert names(output.parent) == []


def test_a_forked_child_leaves_the_folder_alone(output: Path) -> None:
    with BundleWriter(output) as writer:
        writer.write_bytes("graph.onnx", b"graph")
        child = os.fork()
        if child == 0:
            try:
                writer.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert writer.finish(MANIFEST).verify() == ()


def test_finish_refuses_what_is_not_complete(output: Path) -> None:
    def graphless(writer: BundleWriter) -> Manifest:
        return MANIFEST

    def bad_manifest(writer: BundleWriter) -> Manifest:
        writer.write_bytes("graph.onnx", b"graph")
        return dataclasses.replace(MANIFEST, opsets={})

    def newer(writer: BundleWriter) -> Manifest:
        return dataclasses.replace(MANIFEST, schema_version=2)

    def still_open(writer: BundleWriter) -> Manifest:
        streams.append(writer.open_stream("graph.onnx"))
        return MANIFEST

    def cut_short(writer: BundleWriter) -> Manifest:
        with pytest.raises(ValueError), writer.open_stream("graph.onnx") as stream:
            stream.write(b"half")
            raise ValueError
        return MANIFEST

    def forgotten(writer: BundleWriter) -> Manifest:
        writer.open_stream("graph.onnx").write(b"half")
        return MANIFEST

    def link(writer: BundleWriter) -> Manifest:
        writer.write_bytes("graph.onnx", b"graph")
        (writer.path / "tokenizer.json").symlink_to("/etc/hostname")
        return MANIFEST

    streams: list[Any] = []
    for prepare, message in [
        (graphless, "is to be in 'graph.onnx', which was not written"),
        (bad_manifest, "manifest.opsets is empty"),
        (newer, "newer version"),
        (still_open, "not completely written: graph.onnx"),
        (cut_short, "not completely written: graph.onnx"),
        (forgotten, "not completely written: graph.onnx"),
        (link, "tokenizer.json is a link"),
    ]:
        with pytest.raises(BundleError, match=message), BundleWriter(output) as writer:
            writer.finish(prepare(writer))
        assert names(output.parent) == [], prepare.__name__


def test_a_file_begun_anew_counts(output: Path) -> None:
    with BundleWriter(output) as writer:
        with pytest.raises(ValueError), writer.open_stream("graph.onnx") as stream:
            stream.write(b"half of it")
            raise ValueError
        writer.write_bytes("graph.onnx", b"whole")
        assert writer.finish(MANIFEST).verify() == ()


@pytest.mark.parametrize("name", ["../x", "/x", "manifest.json", "a//b", ""])
def test_names_that_are_refused(output: Path, name: str) -> None:
    with pytest.raises(BundleError), BundleWriter(output) as writer:
        writer.write_bytes(name, b"")


# Outputs that exist


def test_an_empty_folder_is_fine_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/real")
    for name in ("empty", "a/b/c", "link", "trailing/"):
        write(Path(f"{tmp_path}/{name}"))
        assert Bundle.open(tmp_path / name).verify() == ()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "real" / "manifest.json").exists()


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a shell that stands in it would be left in a deleted folder
    with pytest.raises(BundleError, match="this folder; give one inside it"):
        write(Path("."))
    assert write(Path("inside")).path == tmp_path / "here" / "inside"


def test_outputs_that_are_refused(output: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("my only copy")
    (output / "manifest.json").write_text('{"name": "a web page"}')
    file = output.parent / "file"
    file.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(BundleError, match="files of no bundle; choose another output"):
            write(output, overwrite=overwrite)
        with pytest.raises(BundleError, match="is a file; give a folder"):
            write(file, overwrite=overwrite)
        with pytest.raises(BundleError, match="Not a directory"):
            write(file / "below", overwrite=overwrite)
        with pytest.raises(BundleError, match="mount point"):
            write(Path("/"), overwrite=overwrite)
        with pytest.raises(BundleError, match="mount point"):
            write(Path("/proc"), overwrite=overwrite)
    assert (output / "thesis.tex").read_text() == "my only copy"
    assert names(output.parent) == ["file", "out"]


def test_a_bundle_is_replaced_only_when_told(output: Path) -> None:
    write(output, b"old")
    (output / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match="pass --overwrite"):
        write(output, b"new")
    assert (output / "graph.onnx").read_bytes() == b"old"
    with pytest.raises(ZeroDivisionError), BundleWriter(output, overwrite=True) as writer:
        writer.write_bytes("graph.onnx", b"new")
        1 / 0  # noqa: B018
    assert (output / "graph.onnx").read_bytes() == b"old"
    assert write(output, b"new", overwrite=True).verify() == ()
    assert names(output) == ["graph.onnx", "manifest.json"]
    assert (output / "graph.onnx").read_bytes() == b"new"


def test_the_old_bundle_comes_back_when_the_new_one_cannot_take_its_place(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(output, b"old")
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(BundleError, match="input/output error"):
        write(output, b"new", overwrite=True)
    assert Bundle.open(output).verify() == ()
    assert (output / "graph.onnx").read_bytes() == b"old"


def test_an_output_that_appears_meanwhile_is_kept(output: Path) -> None:
    with (
        pytest.raises(BundleError, match="files of no bundle"),
        BundleWriter(output, overwrite=True) as writer,
    ):
        writer.write_bytes("graph.onnx", b"graph")
        output.mkdir()
        (output / "other").write_text("x")
        writer.finish(MANIFEST)
    assert names(output) == ["other"]


# Disks that are full, read-only or broken


def test_reserve_says_what_is_needed_and_free(output: Path) -> None:
    with pytest.raises(BundleError, match=r"needs 1000000000\.0 GB, \d+\.\d GB free at "):  # noqa: SIM117
        with BundleWriter(output) as writer:
            writer.reserve(10**18)
    assert names(output.parent) == []


class FailingFile:
    """A file whose write, or flush, fails as the system reports it."""

    def __init__(self, file: Any, number: int, at: str) -> None:
        self._file, self._number, self._at = file, number, at

    def __getattr__(self, name: str) -> Any:
        if name == self._at:
            raise OSError(self._number, os.strerror(self._number))
        return getattr(self._file, name)


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "larger than the file system"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission is denied"),
        (errno.EIO, "input/output error"),
        (errno.ENODEV, "No such device"),
    ],
)
def test_failing_writes_in_words(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, at: str
) -> None:
    def failing_open(*args: Any, **options: Any) -> FailingFile:
        return FailingFile(open(*args, **options), number, at)

    monkeypatch.setattr(bundle_writer, "open", failing_open, raising=False)
    with pytest.raises(BundleError, match=words) as caught:
        write(output)
    assert str(output) in str(caught.value) and "\n" not in str(caught.value)
    assert names(output.parent) == []


def test_the_callers_own_failing_writes_in_words_but_not_its_reads(output: Path) -> None:
    with pytest.raises(BundleError, match="disk is full"), BundleWriter(output):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BundleError, match="Is a directory"), BundleWriter(output) as writer:
        (writer.path / "folder").mkdir()
        (writer.path / "folder").write_bytes(b"")
    with pytest.raises(FileNotFoundError), BundleWriter(output):
        (output.parent / "checkpoint").read_bytes()
    assert names(output.parent) == []


def test_a_read_only_file_system(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, *rest: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(BundleError, match="the place is read-only; choose another output"):
        write(output)


RUN = [sys.executable, "-c"]
PRELUDE = """
import os, resource, sys, time
from pathlib import Path
from dspark_edge.engines.bundle_writer import BundleWriter
from dspark_edge.engines.errors import BundleError
output = Path(sys.argv[1])
"""


def run(script: str, output: Path) -> str:
    done = subprocess.run(
        [*RUN, PRELUDE + script, str(output)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout


WRITE_MEGABYTES = """
try:
    with BundleWriter(output) as writer:
        with writer.open_stream("graph.onnx") as stream:
            for _ in range(8):
                stream.write(bytes(1 << 20))
except BundleError as error:
    print(error)
"""


def test_a_file_size_limit(output: Path) -> None:
    # Python ignores SIGXFSZ, so that the write past the limit fails with EFBIG: a real failure anywhere.
    script = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))" + WRITE_MEGABYTES
    assert "larger than the file system or the process's limit" in run(script, output)
    assert names(output.parent) == []


def test_a_place_without_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which other users cannot reach
        os.chmod(folder, 0o755 if os.geteuid() == 0 else 0o555)
        drop = "if os.geteuid() == 0: os.seteuid(65534)\n"
        assert "permission is denied; choose another output" in run(drop + WRITE_MEGABYTES, Path(folder, "out"))
        assert names(Path(folder)) == []
        os.chmod(folder, 0o755)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root and mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    assert "the disk is full" in run(WRITE_MEGABYTES, small_disk / "out")
    assert names(small_disk) == []
    with (
        pytest.raises(BundleError, match=r"needs 0\.1 GB, 0\.0 GB free"),
        BundleWriter(small_disk / "out") as w,
    ):
        w.reserve(100_000_000)
    with pytest.raises(BundleError, match="is a mount point"):
        write(small_disk)


# Processes that are killed

HALF_WAY = """
with BundleWriter(output, overwrite=True) as writer:
    stream = writer.open_stream("graph.onnx")
    stream.write(bytes(1000))
    print("half way", flush=True)
    time.sleep(60)
"""


def stopped_half_way(output: Path, number: signal.Signals, script: str = HALF_WAY) -> int:
    child = subprocess.Popen(
        [*RUN, PRELUDE + script, str(output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "half way\n"
        child.send_signal(number)
        return child.wait(timeout=30)


def test_an_interrupt_leaves_nothing(output: Path) -> None:
    started = time.perf_counter()
    assert stopped_half_way(output, signal.SIGINT) != 0
    assert time.perf_counter() - started < 30
    assert names(output.parent) == []


def test_what_a_killed_process_left_is_removed_by_the_next(output: Path) -> None:
    assert stopped_half_way(output, signal.SIGKILL) == -signal.SIGKILL
    (left,) = names(output.parent)
    assert left.startswith(".out.partial-")
    write(output.parent / "other")  # another output is not concerned
    assert left in names(output.parent)
    write(output)
    assert names(output.parent) == ["other", "out"]


def test_only_leftovers_of_dead_processes_for_this_very_output_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        dead = process.pid
    process.wait()
    kept = [
        f".out.partial-{os.getpid()}-00000000",  # alive
        f".other.partial-{dead}-00000000",
        f".xout.partial-{dead}-00000000",
        f".out.partial-{dead}-0000000g",
        f".out.partial-{dead}-00000000.bak",
        f"out.partial-{dead}-00000000",
        ".out.partial-99999999999-00000000",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("x")
    (tmp_path / f".out.partial-{dead}-11111111").symlink_to("precious")
    (tmp_path / f".out.partial-{dead}-22222222").write_text("a file")
    (tmp_path / f".out.partial-{dead}-33333333").mkdir()
    before = names(tmp_path)
    write(tmp_path / "out")
    before.remove(f".out.partial-{dead}-33333333")
    assert names(tmp_path) == sorted([*before, "out"])
    assert (tmp_path / "precious" / "x").exists()


def test_a_writer_of_another_container_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process id means nothing here, but its lock holds."""
    monkeypatch.setattr(bundle_writer, "_is_alive", lambda pid: False)
    with BundleWriter(tmp_path / "out") as first:
        first.write_bytes("graph.onnx", b"first")
        write(tmp_path / "out", b"second")
        assert first.path.is_dir()


def test_a_process_killed_between_the_two_renames_loses_nothing(output: Path) -> None:
    write(output, b"old")
    script = """
rename = os.rename
def killed(source, target):
    if ".partial-" in str(source):
        print("half way", flush=True)
        time.sleep(60)
    rename(source, target)
os.rename = killed
from dspark_edge.engines.manifest import Manifest
import json
manifest = Manifest.from_text((output / "manifest.json").read_bytes())
with BundleWriter(output, overwrite=True) as writer:
    writer.write_bytes("graph.onnx", b"new")
    writer.finish(manifest)
"""
    assert stopped_half_way(output, signal.SIGKILL, script) == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(BundleError, match="pass --overwrite"):  # the old bundle is back, and respected
        write(output, b"newer")
    assert (output / "graph.onnx").read_bytes() == b"old"
    assert names(output.parent) == ["out"]


def test_the_manifest_is_written_last(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(path: Path) -> str:
        assert not (path.parent / "manifest.json").exists()
        return hash_file(path)

    monkeypatch.setattr(bundle_writer, "hash_file", check)
    with BundleWriter(output) as writer:
        (writer.path / "graph.onnx").write_bytes(b"graph")
        writer.finish(MANIFEST)


def test_what_is_written_follows_the_schema(output: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the jsonschema package is not installed")
    schema = Path(__file__).parents[2] / "docs" / "bundle.schema.json"
    write(output)
    jsonschema.Draft202012Validator(json.loads(schema.read_bytes())).validate(
        json.loads((output / "manifest.json").read_bytes())
    )
