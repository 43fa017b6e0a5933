"""Chat messages to one prompt text, by the template that comes with a model.

Templates are Jinja as Hugging Face runs it: blocks trimmed, ``break`` and ``continue``, ``raise_exception``,
``strftime_now``, and a ``tojson`` that leaves non-ASCII text alone. A template comes from strangers, so it
runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from dspark_edge.engines.errors import BundleError, InvalidInputError
from dspark_edge.runtime.tokenizer import read_json_object, read_special_tokens

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["ChatTemplate", "Message"]

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who speaks, such as ``system``, ``user`` or ``assistant``; which exist, the template says.
        content: the text.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        for name in ("role", "content"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidInputError(f"a message's {name} must be a str, not {type(value).__name__}")
        if not self.role:
            raise InvalidInputError("a message's role is empty; expected one such as 'user'")


class _MessagesRefusedError(Exception):
    """A template called ``raise_exception``: it does not want these messages."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: role to text, such as ``{"bos_token": "<s>"}``; the template sees each as a variable.
        name: how errors call it, usually the file it came from.

    Raises:
        BundleError: the source is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        *,
        name: str = "the chat template",
    ) -> None:
        import jinja2

        self.source = source
        self.name = name
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise BundleError(f"{name} is not a valid Jinja template{where}: {_one_line(error)}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Read a folder's template: ``chat_template.jinja``, else ``chat_template`` in
        ``tokenizer_config.json``.

        Of several named templates the one called ``default`` is taken. None where the folder holds none.

        Raises:
            BundleError: a file is damaged, the template is not valid Jinja, or none of several is
                ``default``.
        """
        path = folder / _FILE
        try:
            source: str | None = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            path = folder / _CONFIG
            source = _configured_template(path)
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"cannot read {path}: {error}; copy the file again from the checkpoint") from error
        if source is None:
            return None
        return cls(source, read_special_tokens(folder), name=f"the chat template in {path}")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: the conversation so far, at least one message.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: more values for the template, such as ``{"enable_thinking": False}``; plain JSON data,
                as a template from strangers should meet no object that has methods.

        Raises:
            InvalidInputError: there are no messages, ``variables`` is not plain JSON data, or the template
                refuses the messages (``raise_exception``).
            BundleError: the template itself fails.
        """
        if not messages:
            raise InvalidInputError("a chat needs at least one message, none was given")
        values: dict[str, object] = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **_plain(variables),
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except _MessagesRefusedError as error:
            raise InvalidInputError(f"{self.name} refuses these messages: {_one_line(error)}") from error
        except Exception as error:  # a template is a program: it can fail in any way
            kind = type(error).__name__
            raise BundleError(f"{self.name} failed with {kind}: {_one_line(error)}") from error


def _configured_template(path: Path) -> str | None:
    """The template that ``tokenizer_config.json`` holds, as one text or as a list of named ones."""
    entry = read_json_object(path).get("chat_template")
    if entry is None or isinstance(entry, str):
        return entry
    named: dict[str, str] = {}
    if isinstance(entry, list):
        for item in entry:
            if not (isinstance(item, dict) and isinstance(item.get("template"), str)):
                break
            named[str(item.get("name"))] = item["template"]
        else:
            if "default" in named:
                return named["default"]
            raise BundleError(
                f"{path} names the chat templates {sorted(named)}, none of them 'default'; "
                f"write the one to use to {_FILE} beside it"
            )
    raise BundleError(
        f"'chat_template' in {path} must be a text or a list of {{'name', 'template'}} objects; "
        f"write the template to {_FILE} beside it"
    )


def _plain(variables: Mapping[str, object]) -> dict[str, object]:
    try:
        plain: dict[str, object] = json.loads(json.dumps(dict(variables)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"template variables must be plain JSON data: {_one_line(error)}") from error
    return plain


def _new_dict(*items: Any, **named: Any) -> dict[Any, Any]:
    return dict(*items, **named)


def _raise_exception(message: object) -> NoReturn:
    raise _MessagesRefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own ``tojson`` escapes HTML and non-ASCII, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment of all templates; built on first use, as importing Jinja takes a while."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """A ``namespace`` without underscore names, through which Python's internals could be reached."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace must not hold the name {name!r}")
            super().__setitem__(name, value)

    class GenerationBlock(Extension):
        """``{% generation %}`` marks what an assistant said, for training; rendering just shows it."""

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A scope of its own, as in training: what is set inside does not leak out.
            return nodes.Scope(body, lineno=line)

    GenerationBlock.tags = {"generation"}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    additions: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": PlainNamespace,
        "dict": _new_dict,  # a function has no class attributes to climb from
    }
    environment.globals.update(additions)
    environment.filters["tojson"] = _tojson
    return environment


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
