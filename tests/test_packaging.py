"""What the installed wheel and the source distribution hold."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engines", "exporter", "runtime", "trainer")
EXTRAS = {"export", "tensorrt", "tensorrt-rtx", "cuda", "serve", "train", "bench", "peers", "dev"}
TEXTS = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".ci/run")


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    """The distribution under test, as pip installed it from a wheel."""
    try:
        found = metadata.distribution("dspark-edge")
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        problem = "" if found.read_text("WHEEL") else "it is not installed from a wheel"
        if origin.get("dir_info", {}).get("editable"):
            problem = "it is installed in editable mode"
    except metadata.PackageNotFoundError:
        problem = "it is not installed"
    if problem:
        # In CI nothing may pass by not being looked at.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"dspark-edge: {problem}; run `make test`")
    return found


@pytest.fixture(scope="module")
def files(distribution: metadata.Distribution) -> list[str]:
    """Its files, relative to site-packages, without the byte code that pip compiles."""
    return [file.as_posix() for file in distribution.files or () if "__pycache__" not in file.parts]


def in_tree() -> set[str]:
    """The files that the wheel must have, by the folders of the repository."""
    return {
        f"dspark_edge/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for pattern in ("*.py", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }


def test_the_wheel_holds_exactly_the_packages(files: list[str]) -> None:
    installed = {file for file in files if file.startswith("dspark_edge/")}
    assert installed == in_tree(), "list every package in pyproject.toml, then run `make test`"


def test_it_adds_one_name_to_site_packages(files: list[str]) -> None:
    names = {file.split("/")[0] for file in files if not file.startswith("../")}
    assert {name for name in names if not name.endswith(".dist-info")} == {"dspark_edge"}
    assert "dspark_edge/__init__.py" not in files  # a namespace: parts can be distributed on their own


def test_types_are_declared(files: list[str]) -> None:
    packages = [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").is_file()]
    assert len(packages) >= 3
    for folder in packages:
        assert f"dspark_edge/{folder}/py.typed" in files


def test_the_licence_is_in_the_metadata(distribution: metadata.Distribution, files: list[str]) -> None:
    fields = distribution.metadata
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields.get_all("License-File") == ["LICENSE"]
    (licence,) = (file for file in files if file.endswith(".dist-info/licenses/LICENSE"))
    assert Path(str(distribution.locate_file(licence))).read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_command_is_installed(distribution: metadata.Distribution, files: list[str]) -> None:
    (script,) = (entry for entry in distribution.entry_points if entry.group == "console_scripts")
    assert (script.name, script.value) == ("dspark-edge", "dspark_edge.runtime.cli:main")
    (path,) = (file for file in files if file.endswith("/bin/dspark-edge"))
    command = [str(distribution.locate_file(path)), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in (
        "export",
        "inspect",
        "parity",
        "generate",
        "chat",
        "respond",
        "train",
        "evaluate",
        "calibrate",
        "doctor",
    ):
        assert name in result.stdout


def test_extras(distribution: metadata.Distribution) -> None:
    assert set(distribution.metadata.get_all("Provides-Extra") or ()) == EXTRAS
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    base = [line for line in distribution.requires or () if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0] for line in base}
    assert names == {"click", "jinja2", "numpy", "onnxruntime", "rich", "tokenizers"}


def test_torch_is_pinned_wherever_it_is_needed(distribution: metadata.Distribution) -> None:
    lines = [line for line in distribution.requires or () if re.match(r"torch\b", line)]
    assert lines
    for line in lines:
        assert re.match(r"torch==2\.13\.0\s*;", line)


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="the build package is not installed")
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "__pycache__", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis"
    )
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    result = subprocess.run(
        [*build, "--outdir", str(tmp_path), str(tree)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = tmp_path.glob("dspark_edge-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {member.name.split("/", 1)[-1] for member in opened.getmembers() if member.isfile()}
    expected = {name.removeprefix("dspark_edge/") for name in in_tree()} | set(TEXTS)
    for folder in ("tests", "docs", "examples", "benchmarks"):
        paths = (path for path in (tree / folder).rglob("*") if path.is_file())
        expected |= {path.relative_to(tree).as_posix() for path in paths}
    assert not expected - held
