"""Functions of installed packages as stubs to be completed, shorter than they are documented.

python package_stubs.py stubs.jsonl PACKAGE …

In the form of `library_stubs.py`; of a docstring only the first paragraph and the first examples are kept, as
HumanEval's are a few lines. Which functions there are depends on the packages' versions; the drafter in this folder has
seen 8314 of those of numpy, scipy, sympy, networkx, mpmath, matplotlib, fontTools, torch, transformers, onnx,
onnxscript, click, rich, jinja2, hypothesis, requests, pygments, pyparsing, sortedcontainers, urllib3, yaml, anyio,
huggingface_hub and setuptools as of November 2026.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from library_stubs import routines, stub

MOST_MODULES = 400  # of a package
LONGEST = 900  # characters
SHORT = 60  # characters of a first paragraph that the second is added to
SECTIONS = re.compile(r"(Parameters|Returns|Args|Raises|Attributes|Notes|See Also)\b")
EXAMPLES = re.compile(r"((?:^\s*>>> .*\n(?:.*\n){0,2}){1,3})", re.MULTILINE)
LEFT_OUT = ("test", "setup", "_pyinstaller", "conftest", "__main__")


def shorten(docstring: str) -> str:
    """The first paragraph and the first examples."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    text = paragraphs[0]
    if len(text) < SHORT and len(paragraphs) > 1 and not SECTIONS.match(paragraphs[1]):
        text += "\n\n" + paragraphs[1]
    examples = EXAMPLES.search(docstring)
    if examples and len(examples.group(1)) < 250:
        text += "\n" + inspect.cleandoc(examples.group(1))
    return text


def modules(package: str) -> Iterator[ModuleType]:
    """A package's modules that can be imported."""
    names = [package]
    top = importlib.import_module(package)
    for info in pkgutil.walk_packages(getattr(top, "__path__", ()), f"{package}.", onerror=lambda name: None):
        if not any(part in info.name for part in LEFT_OUT):
            names.append(info.name)
        if len(names) > MOST_MODULES:
            break
    for name in names:
        with suppress(BaseException):  # a module may do anything when it is imported, and exit
            yield importlib.import_module(name)


def main() -> None:
    warnings.simplefilter("ignore")
    found: dict[str, str] = {}
    for package in sys.argv[2:]:
        for module in modules(package):
            with suppress(Exception):  # attributes that fail when they are looked at
                for name, routine in routines(module):
                    docstring = inspect.getdoc(routine)
                    if name in found or not docstring:
                        continue
                    prompt = stub(name, routine, shorten(docstring))
                    if prompt is not None and len(prompt) < LONGEST and ".. " not in prompt:
                        found[name] = prompt
    lines = (json.dumps({"domain": "code", "turns": [found[name]]}) + "\n" for name in sorted(found))
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
