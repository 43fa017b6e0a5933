"""Ours against other runtimes: same model, prompts, machine and run; interleaved, greedy, one stream.

    python benchmarks/peers.py PROMPTS.jsonl --bundle DIR [--transformers TARGET] [--genai DIR] [--llama FILE.gguf]

Every contender is an option, and only those named take part: bundles in each of `--modes`, transformers, model folders
of onnxruntime-genai (benchmarks/make_genai.py), a GGUF in llama.cpp. One that cannot run is reported with the reason,
and the exit code is 1. Compares tokens/s behind the first token, and answers token by token with plain decoding of
ours. How it is measured, and what that is fair to, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from peer_contenders import Contender, ContenderError, Setup
from peer_report import Run, Timing, draw, summarise, table, turns

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import DSparkError
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime import MODES
from dspark_edge.runtime.encoding import PromptEncoder
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts, read_prompt_records
from dspark_edge.runtime.reporting.circumstances import versions_of

PACKAGES = (
    "dspark-edge",
    "onnxruntime",
    "onnxruntime-genai",
    "transformers",
    "torch",
    "llama-cpp-python",
    "numpy",
    "tokenizers",
)

Ask = Callable[[list[int]], Timing]


@dataclass(frozen=True, slots=True)
class Prompt:
    domain: str
    token_ids: list[int]


def limited(records: Sequence[PromptRecord], limit: int | None) -> list[PromptRecord]:
    """The first `limit` records of each domain, in the file's order."""
    seen: Counter[str] = Counter()
    kept = []
    for record in records:
        seen[record.domain] += 1
        if limit is None or seen[record.domain] <= limit:
            kept.append(record)
    return kept


def compete(
    contenders: Mapping[str, Ask], prompts: Sequence[Prompt], repeats: int, progress: Callable[[str], object]
) -> tuple[list[Run], dict[str, str]]:
    """Let all answer all prompts in turns. Returns the runs, and name → why it had to give up.

    Everybody's first answer, to the first prompt, warms up and does not count.
    """
    runs: list[Run] = []
    failures: dict[str, str] = {}

    def ask(name: str, prompt: Prompt) -> Timing | None:
        if name in failures:
            return None
        try:
            return contenders[name](prompt.token_ids)
        except ContenderError as error:
            failures[name] = str(error)
            progress(f"{name}: {error}")
            return None

    for name in contenders:
        ask(name, prompts[0])
    for repeat, index, order in turns(tuple(contenders), len(prompts), repeats):
        for name in order:
            timing = ask(name, prompts[index])
            if timing is not None:
                runs.append(Run(name, repeat, index, prompts[index].domain, timing))
        progress(f"repeat {repeat + 1} of {repeats}, prompt {index + 1} of {len(prompts)}")
    return runs, failures


def named(text: str, default: Callable[[Path], str]) -> tuple[str, Path]:
    """`NAME=PATH`, or a path with a name made of it."""
    name, separator, path = text.rpartition("=")
    return (name, Path(path)) if separator else (default(Path(text)), Path(text))


def planned(arguments: argparse.Namespace, common: Mapping[str, Any]) -> tuple[dict[str, Setup], dict[str, str]]:
    """Name → setup of every contender, and name → the one whose answers it is compared with.

    Ours are compared with plain decoding of the same bundle; a peer with that of the bundle of its own name (int4 and
    int4), or else of the first.
    """
    setups: dict[str, Setup] = {}
    references: dict[str, str] = {}

    def add(name: str, kind: str, path: Path, reference: str, **more: Any) -> None:
        if name in setups:
            raise ValueError(f"two contenders are called {name!r}; name them: NAME=PATH")
        setups[name] = Setup(kind=kind, path=str(path), **common, **more)
        references[name] = reference

    for text in arguments.bundle:
        label, path = named(text, lambda path: Bundle.open(path).manifest.precision)
        for mode in arguments.modes:
            add(f"ours {label} {mode}", "ours", path, f"ours {label} plain", mode=mode)
    first = next(iter(references.values()))
    lookups = (0, *arguments.lookup)
    for lookup in lookups if arguments.transformers else ():
        suffix = f" lookup {lookup}" if lookup else ""
        add(f"transformers fp32{suffix}", "transformers", arguments.transformers, first, lookup=lookup)
    for text in arguments.genai:
        label, path = named(text, lambda path: path.name)
        same = f"ours {label} plain"
        add(f"onnxruntime-genai {label}", "genai", path, same if same in setups else first)
    for lookup in lookups if arguments.llama else ():
        label, path = named(arguments.llama, lambda path: path.stem.rpartition(".")[2])
        add(f"llama.cpp {label}" + (f" lookup {lookup}" if lookup else ""), "llama", path, first, lookup=lookup)
    return setups, references


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison; progress goes to stderr."""

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    _, path = named(arguments.bundle[0], lambda path: path.name)
    encoder = PromptEncoder.of(Bundle.open(path))
    records = limited(read_prompt_records(arguments.prompts), arguments.limit)
    prompts = [Prompt(record.domain, encoder.encode(record.opening)) for record in records]
    common = {
        "threads": arguments.threads,
        "context": max(len(prompt.token_ids) for prompt in prompts) + arguments.tokens,
        "tokens": arguments.tokens,
        "eos_ids": tuple(sorted(encoder.eos_ids)),
    }
    setups, references = planned(arguments, common)
    failures: dict[str, str] = {}
    ready: dict[str, Ask] = {}
    with ExitStack() as stack:
        for name, setup in setups.items():
            progress(f"starting {name}")
            try:
                ready[name] = stack.enter_context(Contender(setup, arguments.patience)).answer
            except ContenderError as error:
                failures[name] = str(error)
                progress(f"{name}: {error}")
        runs, gave_up = compete(ready, prompts, arguments.repeats, progress)
    result = summarise(
        references, runs, failures | gave_up, [name for name, setup in setups.items() if setup.kind == "ours"]
    )
    for name, entry in result["contenders"].items():
        setup = setups[name]
        entry |= {"kind": setup.kind, "path": Path(setup.path).name, "mode": setup.mode, "lookup": setup.lookup}
        if encoder.tokenizer is not None:  # of each domain one answer to look at
            its = [run for run in runs if run.contender == name and run.repeat == 0]
            answers = {run.domain: run.timing.token_ids for run in reversed(its)}
            entry["answers"] = {domain: encoder.tokenizer.decode(ids) for domain, ids in answers.items()}
    return {
        "date": date.today().isoformat(),
        "device": asdict(probe_device("cpu", arguments.threads)),
        "versions": versions_of(PACKAGES),
        "settings": {
            "prompts": arguments.prompts.name,
            "prompts_sha256": hash_prompts(records),
            "domains": dict(Counter(record.domain for record in records)),
            "tokens": arguments.tokens,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
        },
        **result,
    }


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSON Lines; of a conversation only the opening is asked")
    parser.add_argument("--bundle", action="append", required=True, metavar="[NAME=]DIR", help="ours; repeatable")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of each bundle; default: all")
    parser.add_argument("--transformers", type=Path, metavar="TARGET", help="a checkpoint or GGUF, run in fp32")
    parser.add_argument(
        "--genai", action="append", default=[], metavar="[NAME=]DIR", help="onnxruntime-genai; repeatable"
    )
    parser.add_argument("--llama", metavar="[NAME=]FILE", help="a GGUF, run by llama-cpp-python")
    parser.add_argument(
        "--lookup",
        type=positive,
        nargs="+",
        default=[],
        help="transformers and llama.cpp with prompt lookup of so many",
    )
    parser.add_argument("--limit", type=positive, help="prompts of each domain; default: all")
    parser.add_argument("--tokens", type=positive, default=128, help="most of an answer")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=probe_device("cpu").threads, help="default: usable cores")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for a start or an answer")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--chart", type=Path, help="draw the result here, as a PNG")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    # Set before the contenders' processes start: OpenMP reads it when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        result = measure(arguments)
    except (DSparkError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(table(result))
    if arguments.chart:
        draw(result, arguments.chart)
    return 1 if any(entry["status"] == "failed" for entry in result["contenders"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
