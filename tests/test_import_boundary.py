"""The arrows between the folders, and that engines/ and runtime/ run where torch is not installed."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder -> what it may import of dspark_edge. The trainer stands on top and may import everything.
ARROWS = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "exporter": {"engines", "exporter"},
}
TORCH_FREE = ("engines", "runtime")
FORBIDDEN = {
    "gguf",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "torch",
    "torchvision",
    "transformers",
}
# Packages that cost start-up time: whoever needs one imports it at that moment.
LAZY = ("click", "jinja2", "onnxruntime", "rich", "tokenizers")


def imported_names(source: str) -> Iterator[str]:
    """Every module that a source imports anywhere: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dynamic_names(source: str) -> Iterator[str]:
    """Every module named by a literal in `import_module("…")` or `__import__("…")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def violations(folder: str, source: str) -> list[str]:
    """What a file of `folder` imports against the rules."""
    found = []
    for name in imported_names(source):
        parts = name.split(".")
        if parts[0] == "dspark_edge" and len(parts) > 1 and parts[1] not in ARROWS[folder]:
            found.append(name)
        if not parts[0]:
            found.append("a relative import")
    if folder in TORCH_FREE:
        # The command line names the exporter's commands in strings, and loads the chosen one.
        names = [*imported_names(source), *dynamic_names(source)]
        found += [name for name in names if name.split(".")[0] in FORBIDDEN]
    return found


def sources() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in ARROWS for path in sorted((ROOT / folder).rglob("*.py"))]


def run_python(code: str, *arguments: str) -> str:
    # Not in the repository's root: its folders are no packages of their own.
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sources())
def test_imports_follow_the_arrows(path: str) -> None:
    found = violations(path.split("/")[0], (ROOT / path).read_text(encoding="utf-8"))
    assert not found, f"{path} imports {', '.join(found)}"


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("engines", "import torch"),
        ("engines", "import torch.nn as nn"),
        ("engines", "def f():\n    from onnx import helper"),
        ("engines", "from importlib import import_module\nimport_module('transformers')"),
        ("engines", "from dspark_edge.runtime import round"),
        ("engines", "from dspark_edge import exporter"),
        ("engines", "from . import manifest"),
        ("runtime", "if True:\n    import safetensors.numpy"),
        ("runtime", "import dspark_edge.exporter.export"),
        ("runtime", "import dspark_edge.trainer"),
        ("exporter", "from dspark_edge.runtime import Generator"),
    ],
)
def test_violations_are_seen(folder: str, source: str) -> None:
    assert violations(folder, source)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("engines", "import numpy\nfrom dspark_edge.engines.manifest import Manifest"),
        ("runtime", "from dspark_edge.engines import bundle\nCOMMAND = 'dspark_edge.exporter.cli:export'"),
        ("exporter", "import torch, onnx\nfrom dspark_edge.engines.bundle import Bundle"),
    ],
)
def test_what_is_allowed_passes(folder: str, source: str) -> None:
    assert violations(folder, source) == []


@pytest.mark.parametrize("module", ["torch", "onnx", "onnxscript", "safetensors", "transformers", "pickle"])
def test_the_lint_rule_agrees(module: str) -> None:
    ruff = pytest.importorskip("ruff", reason="ruff is not installed").find_ruff_bin()

    def rules(path: str) -> list[str]:
        command = [ruff, "check", "--output-format", "json", "--no-cache", "--stdin-filename", path, "-"]
        source = f"import {module}\n\nprint({module})\n"
        result = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, timeout=60)
        return [finding["code"] for finding in json.loads(result.stdout)]

    assert rules("engines/new.py") == rules("runtime/cli/new.py") == ["TID251"]
    assert rules("exporter/new.py") == rules("trainer/new.py") == rules("tests/runtime/test_new.py") == []


IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise SystemExit(f"{name} was imported")  # no ImportError: a module might catch that

sys.meta_path.insert(0, Refuse())
names = []
for part in ("engines", "runtime"):
    package = importlib.import_module(f"dspark_edge.{part}")
    names.append(package.__name__)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=sys.exit):
        if module.name.endswith(".__main__"):
            continue  # runs when it is imported
        importlib.import_module(module.name)
        names.append(module.name)
print(json.dumps(names))
"""


def test_every_module_imports_without_torch() -> None:
    blocked = FORBIDDEN - {"huggingface_hub"}  # tokenizers depends on it, so it is there anyway
    names = json.loads(run_python(IMPORT_EVERYTHING, ",".join(sorted(blocked))))
    expected = {
        "dspark_edge." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources()
        if path.split("/")[0] in TORCH_FREE and not path.endswith("__main__.py")
    }
    assert expected <= set(names)


@pytest.mark.parametrize("package", ["dspark_edge.engines", "dspark_edge.runtime", "dspark_edge.runtime.cli"])
def test_importing_a_package_is_light(package: str) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code, package).split()}
    # The command line is click and rich; the rest waits for the chosen command.
    allowed = {"click", "rich"} if package.endswith(".cli") else set()
    assert not loaded & (set(LAZY) - allowed)
