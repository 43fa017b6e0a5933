"""What benchmarks/peers.py makes of its runs: pure functions of numbers and token ids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

OURS, PEER = "tab:blue", "tab:gray"


@dataclass(frozen=True, slots=True)
class Timing:
    """An answer, and how long it took behind what the first call of the model gave."""

    token_ids: tuple[int, ...]  # the end-of-text id that ended it included
    following: int  # of these, those that came behind the first call's
    seconds: float  # from the first call's tokens to the last ones


@dataclass(frozen=True, slots=True)
class Run:
    """One answer of one contender."""

    contender: str
    repeat: int
    prompt: int  # index
    domain: str
    timing: Timing


def turns(contenders: Sequence[str], prompts: int, repeats: int) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(repeat, prompt, contenders in the order in which they answer it).

    The order moves on by one with every prompt and every repeat: nobody always answers behind the same neighbour, or
    first, and a prompt meets another order in each repeat.
    """
    for repeat in range(repeats):
        for prompt in range(prompts):
            first = (repeat + prompt) % len(contenders)
            yield repeat, prompt, (*contenders[first:], *contenders[:first])


def speeds(runs: Sequence[Run]) -> list[float]:
    """Tokens/s of each repeat, over all its answers together; repeats without a second token are left out."""
    found = []
    for repeat in sorted({run.repeat for run in runs}):
        timings = [run.timing for run in runs if run.repeat == repeat]
        seconds = sum(timing.seconds for timing in timings)
        if seconds > 0:
            found.append(sum(timing.following for timing in timings) / seconds)
    return found


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None of no values."""
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The median over repeats of ours / theirs, each of the same repeat: what slowed both is no part of it."""
    pairs = [one / other for one, other in zip(ours, theirs, strict=False) if other > 0]
    return median(pairs) if pairs else None


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if they are the same."""
    if tuple(one) == tuple(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def agreement(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    """How far answers to the same prompts go together, by the first repeat."""
    expected = {run.prompt: run.timing.token_ids for run in reference if run.repeat == 0}
    given = {run.prompt: run.timing.token_ids for run in runs if run.repeat == 0}
    differences = [first_difference(given[prompt], expected[prompt]) for prompt in sorted(given)]
    shared = [len(expected[p]) if d is None else d for p, d in zip(sorted(given), differences, strict=True)]
    return {
        "identical_answers": sum(difference is None for difference in differences),
        "answers": len(differences),
        "agreeing_tokens": sum(shared),
        "tokens": sum(map(len, expected.values())),
        "first_difference": differences,  # by prompt; null: none
    }


def repeatable(runs: Sequence[Run]) -> bool:
    """Whether every repeat gave the same answers."""
    first = {run.prompt: run.timing.token_ids for run in runs if run.repeat == 0}
    return all(run.timing.token_ids == first[run.prompt] for run in runs)


def summarise(
    contenders: Mapping[str, str],
    runs: Sequence[Run],
    failures: Mapping[str, str],
    ours: Collection[str],
) -> dict[str, Any]:
    """The result's part that is about contenders.

    Args:
        contenders: name → the one whose answers it is compared with.
        runs: of contenders that failed half way, too; they do not count.
        failures: name → why it gave no figures.
        ours: names of those that are ours.
    """
    done = {name: [run for run in runs if run.contender == name] for name in contenders if name not in failures}
    by_repeat = {name: speeds(its) for name, its in done.items()}
    entries: dict[str, Any] = {}
    for name, reference in contenders.items():
        entries[name] = {"ours": name in ours, "status": "failed" if name in failures else "ran"}
        if name in failures:
            entries[name]["error"] = failures[name]
            continue
        its = done[name]
        domains = sorted({run.domain for run in its})
        entries[name] |= {
            "tokens_per_second": spread(by_repeat[name]),
            "by_repeat": by_repeat[name],
            "domains": {domain: spread(speeds([run for run in its if run.domain == domain])) for domain in domains},
            "answer_tokens": sum(len(run.timing.token_ids) for run in its if run.repeat == 0),
            "repeatable": repeatable(its),
            "compared_with": reference if reference in done else None,
            "agreement": agreement(its, done[reference]) if reference in done else None,
        }
    return {
        "contenders": entries,
        "ratios_of_ours": {
            one: {other: ratio(by_repeat[one], by_repeat[other]) for other in done if other != one}
            for one in done
            if one in ours
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people: a line a contender, then what ours are of the peers."""
    entries = result["contenders"]
    width = max(map(len, entries))
    lines = []
    for name, entry in entries.items():
        figures, same = entry.get("tokens_per_second"), entry.get("agreement")
        if figures is None:
            lines.append(f"{name:{width}}  {entry.get('error', 'no answer had a second token')}")
            continue
        compared = f"{same['identical_answers']} of {same['answers']} answers" if same else "unknown answers"
        lines.append(
            f"{name:{width}}  {figures['median']:7.1f} tokens/s ({figures['min']:.1f} to {figures['max']:.1f})"
            f"   {compared} as {entry['compared_with'] or 'compared with nobody'}"
        )
    for one, ratios in result["ratios_of_ours"].items():
        peers = {other: value for other, value in ratios.items() if not entries[other]["ours"] and value is not None}
        lines += [f"{one} is {value:.2f}x of {other}" for other, value in peers.items()]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A bar a contender: the median over repeats, whiskers to the least and the most, a mark a domain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = result["contenders"]
    figure = Figure(figsize=(8, 1.4 + 0.38 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    domains = sorted({domain for entry in entries.values() for domain in entry.get("domains", ())})
    marks = dict(zip(domains, "osD^vP*X<>" * (1 + len(domains) // 10), strict=False))
    for row, entry in enumerate(entries.values()):
        figures = entry.get("tokens_per_second")
        if figures is None:
            axes.text(0, row, f" not run: {entry.get('error', '')[:70]}", va="center", fontsize=7, color="tab:red")
            continue
        middle = figures["median"]
        whiskers = [[middle - figures["min"]], [figures["max"] - middle]]
        axes.barh(row, middle, xerr=whiskers, color=OURS if entry["ours"] else PEER, capsize=2)
        axes.annotate(
            f"{middle:.3g}", (0, row), (4, 0), textcoords="offset points", va="center", color="white", weight="bold"
        )
        for domain, its in entry["domains"].items():
            if its is not None:
                axes.plot(its["median"], row, marks[domain], color="black", markersize=3)
    for domain in domains:
        axes.plot([], [], marks[domain], color="black", markersize=3, label=domain)
    if domains:
        figure.legend(loc="outside lower right", ncols=len(domains), fontsize=8, frameon=False)
    axes.set_yticks(range(len(entries)), list(entries))
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set_xlabel("tokens/s behind the first token: median, least and most of the repeats")
    axes.spines[["top", "right"]].set_visible(False)
    device, settings = result["device"], result["settings"]
    axes.set_title(f"{device['processor']}, {settings['threads']} threads, {result['date']}", fontsize=10)
    figure.savefig(path, dpi=150)
