"""benchmarks/gpu_session.py: what it would run exists, and what it has run is brought home whatever happens."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path

import click
import gpu_session
import pytest
from gpu_session import Step

from dspark_edge.runtime.cli import cli


def step(name: str, code: str, most_s: float = 60.0) -> Step:
    return Step(name, (sys.executable, "-c", code), most_s)


def outcomes(out: Path) -> dict[str, str]:
    return {name: one["outcome"] for name, one in json.loads((out / "summary.json").read_text()).items()}


def test_a_session_goes_on_where_it_was(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    steps = [
        step("a-first", f"open({str(tmp_path / 'count')!r}, 'a').write('1'); print('of a')"),
        step("b-fails", "import sys; sys.stderr.write('why'); sys.exit(3)"),
        step("b-next", "print('never')"),
        step("c-hangs", "import time; time.sleep(60)", 0.5),
        step("d-last", "print('of d')"),
    ]
    assert not gpu_session.run(steps, work, out, 1.0)
    expected = ["done", "exit code 3", "not tried, since an earlier step failed", "killed after 0 s", "done"]
    assert [*outcomes(out).values()] == expected
    with tarfile.open(out / "results.tar.gz") as tar:
        texts = {name: tar.extractfile(name) for name in ("results/a-first.out", "results/b-fails.log")}
        assert [stream.read() for stream in texts.values() if stream] == [b"of a\n", b"why"]
    steps[1] = step("b-fails", "")
    assert gpu_session.run([*steps[:3], steps[4]], work, out, 1.0)
    assert [*outcomes(out).values()] == ["done before", "done", "done", "done before"]
    assert (tmp_path / "count").read_text() == "1"
    assert gpu_session.run([step("e-late", "")], work, out, 0.1)
    assert outcomes(out) == {"e-late": "no time left"}


def test_every_command_has_the_options_that_it_is_given(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the commands that export need the [export] extra")
    (tmp_path / "a.whl").touch()
    arguments = argparse.Namespace(
        work=tmp_path, backend="tensorrt-rtx", target="target", drafter="drafter", wheels=tmp_path, prompts="prompts"
    )
    steps = gpu_session.plan(arguments)
    assert len({one.name for one in steps}) == len(steps)
    parsed = 0
    for one in steps:
        if gpu_session._COMMAND in one.command:
            name, *given = one.command[one.command.index(gpu_session._COMMAND) + 1 :]
            command = cli.get_command(click.Context(cli), name)
            assert command is not None, name
            command.make_parser(click.Context(command)).parse_args(list(given))
            parsed += 1
        scripts = [Path(word) for word in one.command if word.endswith(".py")]
        assert all(script.exists() for script in scripts)
    assert parsed > 15
    with pytest.raises(SystemExit):
        gpu_session.main([str(tmp_path), "--target", "t", "--only", "fp17"])
