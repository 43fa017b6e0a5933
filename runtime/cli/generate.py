"""dspark-edge generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.cli.options import (
    bundle_argument,
    engine_options,
    open_generator,
    sampling_options,
    sampling_params,
    summary,
)
from dspark_edge.runtime.generator import Generation, Generator, Prompt
from dspark_edge.runtime.prompts import read_prompt_records
from dspark_edge.runtime.sampling import SamplingParams

__all__ = ["generate", "parse_token_ids"]


def parse_token_ids(text: str) -> list[int]:
    """Token ids written as "1,2,3".

    Raises:
        InvalidInputError: a part is no number.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInputError(f"--token-ids is {text!r}, expected numbers with commas, such as 1,2,3") from None


def _prompts(prompt: str | None, token_ids: str | None, prompts: Path | None) -> Iterator[Prompt]:
    given = [
        name for name, value in (("--prompt", prompt), ("--token-ids", token_ids), ("--prompts", prompts)) if value
    ]
    if len(given) != 1:
        raise InvalidInputError(
            f"give exactly one of --prompt, --token-ids and --prompts; given: {', '.join(given) or 'none'}"
        )
    if prompts is not None:
        yield from (record.opening for record in read_prompt_records(prompts))
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
