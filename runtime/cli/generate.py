"""dspark-edge generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import Message
from dspark_edge.runtime.cli.options import (
    bundle_argument,
    engine_options,
    open_generator,
    sampling_options,
    sampling_params,
    summary,
)
from dspark_edge.runtime.generator import Generation, Generator, Prompt
from dspark_edge.runtime.sampling import SamplingParams

__all__ = ["generate", "parse_token_ids", "read_prompts"]


def parse_token_ids(text: str) -> list[int]:
    """Token ids written as "1,2,3".

    Raises:
        InvalidInputError: a part is no number.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInputError(f"--token-ids is {text!r}, expected numbers with commas, such as 1,2,3") from None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON Lines file: `prompt`, the first of `turns`, `messages`, or `token_ids` a line.

    Raises:
        InvalidInputError: the file cannot be read, or a line is broken; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the prompts {path}: {error}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_parse_prompt(json.loads(line)))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise InvalidInputError(
                    f"{path}, line {number}: {error}; expected an object with a text 'prompt', a list of texts "
                    "'turns', a list 'messages' of {role, content}, or a list of numbers 'token_ids'"
                ) from None
    if not prompts:
        raise InvalidInputError(f"{path} holds no prompts")
    return prompts


def _parse_prompt(entry: Any) -> Prompt:
    if not isinstance(entry, dict):
        raise ValueError(f"it holds {type(entry).__name__}")
    if "token_ids" in entry:
        return [int(token) for token in entry["token_ids"]]
    if "messages" in entry:
        return [Message(message["role"], message["content"]) for message in entry["messages"]]
    text = entry["prompt"] if "prompt" in entry else entry["turns"][0]
    if not isinstance(text, str):
        raise ValueError(f"the prompt is {text!r}")
    return text


def _prompts(prompt: str | None, token_ids: str | None, prompts: Path | None) -> Iterator[Prompt]:
    given = [
        name for name, value in (("--prompt", prompt), ("--token-ids", token_ids), ("--prompts", prompts)) if value
    ]
    if len(given) != 1:
        raise InvalidInputError(
            f"give exactly one of --prompt, --token-ids and --prompts; given: {', '.join(given) or 'none'}"
        )
    if prompts is not None:
        yield from read_prompts(prompts)
    elif token_ids is not None:
        yield parse_token_ids(token_ids)
    elif prompt is not None:
        yield prompt


def _answer(generator: Generator, prompt: Prompt, params: SamplingParams, raw: bool, as_json: bool) -> Generation:
    """Print one answer: as it comes, or as one JSON object at the end."""
    generation: Generation | None = None
    for piece in generator.stream(prompt, params, raw=raw):
        if not as_json:
            shown = piece.text if generator.tokenizer else "".join(f"{token} " for token in piece.token_ids)
            click.echo(shown, nl=False)
        generation = piece.generation
    if generation is None:
        raise RuntimeError("a stream ended without its generation")
    return generation


@click.command(no_args_is_help=True)
@bundle_argument
@click.option("--prompt", help="A text.")
@click.option("--token-ids", metavar="1,2,3", help="A prompt as token ids.")
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="One prompt a line.")
@click.option("--raw", is_flag=True, help="Feed texts without the chat template.")
@engine_options
@sampling_options
@click.option("--log-probs", is_flag=True, help="With --json: each token's log-probability under the target.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a prompt, a line each.")
def generate(
    bundle: Path,
    prompt: str | None,
    token_ids: str | None,
    prompts: Path | None,
    raw: bool,
    log_probs: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer prompts with BUNDLE, streaming to the terminal or as JSON."""
    wanted = list(_prompts(prompt, token_ids, prompts))
    params = sampling_params(given)
    with open_generator(bundle, given) as generator:
        for one in wanted:
            generation = _answer(generator, one, params, raw, as_json)
            if as_json:
                extra = {"log_probs": list(generation.log_probs)} if log_probs else {}
                click.echo(json.dumps({**generation.to_json(), **extra}, ensure_ascii=False))
            else:
                click.echo()
                click.echo(summary(generation.statistics), err=True)
