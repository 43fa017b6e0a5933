"""Functions of Python's standard library as stubs to be completed: `def name(parameters)` and the docstring.

python library_stubs.py stubs.jsonl

Prompts in the form of HumanEval's are rare in other sources, and none of these is HumanEval's. Which functions there
are depends on Python's version; the answers in this folder are to those of 3.11.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

MODULES = """
ast base64 bisect calendar cmath codecs collections colorsys configparser contextlib copy csv dataclasses datetime
decimal difflib dis email.utils enum filecmp fileinput fnmatch fractions functools genericpath getopt gettext glob
graphlib hashlib heapq hmac html imghdr inspect io ipaddress itertools json keyword linecache locale mailcap math
mimetypes numbers operator os os.path pathlib pickle pickletools pkgutil platform plistlib posixpath pprint profile
queue quopri random re reprlib sched secrets shelve shlex shutil smtplib socket sqlite3 stat statistics string
stringprep struct subprocess sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace
traceback turtle types typing unicodedata unittest urllib.parse urllib.request uuid warnings wave weakref webbrowser
xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils zipfile zlib
"""
DOCSTRING = range(60, 701)  # characters
LONGEST_DEFAULT = 20  # characters of a parameter's default


def routines(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Functions of a module, then methods of its classes."""
    classes = [found for _, found in inspect.getmembers(module, inspect.isclass) if found.__module__ == module.__name__]
    for owner in (module, *classes):
        yield from inspect.getmembers(owner, inspect.isroutine)


def stub(name: str, routine: object, docstring: str | None = None) -> str | None:
    """The prompt, or None for a routine that makes no good one; `docstring` stands for its own."""
    docstring = (inspect.getdoc(routine) or "") if docstring is None else docstring
    if name.startswith("_") or len(docstring) not in DOCSTRING or '"""' in docstring:
        return None
    try:
        signature = inspect.signature(routine)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    parameters = [
        one.replace(annotation=inspect.Parameter.empty)
        for one in signature.parameters.values()
        if one.name not in ("self", "cls", "mcls")
    ]
    defaults = [one.default for one in parameters if one.default is not inspect.Parameter.empty]
    if not parameters or any(len(repr(default)) > LONGEST_DEFAULT for default in defaults):
        return None
    written = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    written = written.replace("/, ", "").replace(", /", "")
    body = docstring.replace("\n", "\n    ")
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f'```python\n\ndef {name}{written}:\n    """{body}\n    """\n\n```'
    )


def main() -> None:
    warnings.simplefilter("ignore")  # of modules that will go
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, routine in routines(module):
            if name not in found and (prompt := stub(name, routine)) is not None:
                found[name] = prompt
    lines = [json.dumps({"domain": "code", "turns": [found[name]]}) + "\n" for name in sorted(found)]
    random.Random(3).shuffle(lines)
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
