"""All that is to be measured on a GPU, by one command, on a machine that may have no way to download anything.

    python benchmarks/gpu_session.py OUT --target TARGET [--wheels FOLDER] [--work FOLDER] [--minutes 9.5] [--only NAME]

installs what lies in FOLDER (`offline_kit.py` brings it there) and this checkout, beside the packages that the machine
has, and then, as far as the minutes reach: the GPU tests; the shipped drafter's pair in fp16, bf16 and w4a16, exported,
built, profiled, measured (`gpu.py`, `dspark-edge bench` at 1, 4, 16 and 32 sequences) and compared with torch
(`parity`); the same with embedding and head in each engine (`--no-share-weights`); ONNX Runtime's CUDA provider where
it is installed; and a pair of Qwen3-4B's shape with random weights. What has been done is kept in the work folder:
called again it goes on, and a step that failed is tried once more.

OUT gets `summary.json` (each step with its outcome and seconds) and `results.tar.gz` (logs, reports, pictures), both
written anew after every step, so that a session that is cut off has brought home what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).parents[1]
BENCHMARKS = Path(__file__).parent
_LEAST_S = 20.0  # a step that has less is not begun
BATCHES = (1, 4, 16, 32)
_COMMAND = "from dspark_edge.runtime.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Step:
    """One command. It is named PART-WHAT; a part's steps need those before them."""

    name: str
    command: tuple[str, ...]
    most_s: float  # after which it is killed

    @property
    def part(self) -> str:
        return self.name.split("-")[0]


def install(wheels: Path | None, site: Path) -> list[Step]:
    """Packages into a folder of their own, the machine's environment as it is."""
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), "--upgrade")
    steps = [Step("install-edge", (*pip, "--no-build-isolation", str(ROOT)), 120)]
    found = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    return [Step("install-wheels", (*pip, *found), 180), *steps] if found else steps


def measured(part: str, bundle: Path, results: Path, backend: str, *more: str) -> Step:
    """What calls and rounds cost, as figures and a picture; `more` arguments of gpu.py."""
    reports = ("--json", str(results / f"{part}.json"), "--picture", str(results / f"{part}.png"))
    command = (sys.executable, str(BENCHMARKS / "gpu.py"), str(bundle), "--engine", backend, *reports, *more)
    return Step(f"{part}-measure", command, 240)


def made(part: str, bundle: Path, backend: str, export: Sequence[str], batch: int) -> list[Step]:
    """From checkpoints to profiled engines.

    Args:
        part: their name.
        bundle: folder of the bundle.
        export: arguments that say what is exported, and how.
        batch: most sequences.
    """
    exported = ("export", *export, "--lowering", "onnx", "--max-batch", str(batch), "-o", str(bundle), "--overwrite")
    several = ",".join(str(count) for count in BATCHES if count <= batch)
    profiled = ("profile", str(bundle), "--engine", backend, "--budget", "40", "--batches", several)
    return [
        Step(f"{part}-export", edge(*exported), 300),
        Step(f"{part}-build", edge("build", str(bundle), "--backend", backend), 300),
        Step(f"{part}-profile", edge(*profiled), 180),
    ]


def edge(*arguments: str) -> tuple[str, ...]:
    """dspark-edge, whose script may not be on the path."""
    return (sys.executable, "-c", _COMMAND, *arguments)


def plan(arguments: argparse.Namespace) -> list[Step]:
    work, results, backend = arguments.work, arguments.work / "results", arguments.backend
    target, drafter = str(arguments.target), str(arguments.drafter)
    pair = ("--target", target, "--drafter", drafter)
    python = sys.executable
    steps = install(arguments.wheels, work / "site")
    steps.append(Step("tests-gpu", (python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"), 300))
    asked = ("--prompts", str(arguments.prompts), "--limit", "4", "--repeats", "3", "--temperatures", "0,1")
    several = ("--concurrency", ",".join(map(str, BATCHES)))
    for precision in ("fp16", "bf16", "w4a16"):
        bundle = work / f"smollm2-{precision}"
        compared = ("--torch", target) if precision == "fp16" else ()
        report = ("--html", str(results / f"{precision}-bench.html"), "--json")
        bench = ("bench", str(bundle), *asked, *several, "--engine", backend, *report)
        parity = ("parity", str(bundle), *pair, "--engine", backend, "--json")
        steps += [
            *made(precision, bundle, backend, (*pair, "--precision", precision), BATCHES[-1]),
            measured(precision, bundle, results, backend, *compared),
            Step(f"{precision}-bench", edge(*bench), 300),
            Step(f"{precision}-parity", edge(*parity), 240),
        ]
    # What an embedding and a head of its own bring each engine.
    own = work / "smollm2-unshared"
    copy = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
    steps += [
        Step("unshared-copy", (python, "-c", copy, str(work / "smollm2-fp16"), str(own)), 60),
        Step("unshared-build", edge("build", str(own), "--backend", backend, "--no-share-weights"), 300),
        measured("unshared", own, results, backend),
    ]
    cuda, provider = work / "smollm2-cuda", ("--provider", "cuda")
    steps += [
        Step("cuda-export", edge("export", *pair, "--lowering", "onnx", "--precision", "fp16", "-o", str(cuda)), 300),
        Step("cuda-profile", edge("profile", str(cuda), *provider, "--budget", "30", "--batches", "1"), 120),
        Step("cuda-bench", edge("bench", str(cuda), *provider, "--prompts", str(arguments.prompts), "--json"), 240),
    ]
    random, bundle = work / "qwen3-4b", work / "qwen3-4b-bf16"
    drawn = ("--target", str(random / "target"), "--drafter", str(random / "drafter"), "--precision", "bf16")
    draw = (python, str(BENCHMARKS / "random_pair.py"), str(random), "--device", "cuda")
    return [
        *steps,
        Step("qwen3-weights", draw, 240),
        *made("qwen3", bundle, backend, drawn, 1),
        measured("qwen3", bundle, results, backend),
    ]


def run(steps: Sequence[Step], work: Path, out: Path, minutes: float) -> bool:
    """Run what has not been done, and say after every step how far it is.

    Returns:
        Whether nothing failed.
    """
    end = monotonic() + 60 * minutes
    results, done = work / "results", work / "done"
    for folder in (results, done, out):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{work / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    outcomes: dict[str, dict[str, object]] = {}
    failed: set[str] = set()
    for step in steps:
        mark, left = done / step.name, end - monotonic()
        if mark.exists():
            outcomes[step.name] = {"outcome": "done before"}
        elif step.part in failed:
            outcomes[step.name] = {"outcome": "not tried, since an earlier step failed"}
        elif left < _LEAST_S:
            outcomes[step.name] = {"outcome": "no time left"}
        else:
            begun = monotonic()
            outcome = execute(step, results, min(left, step.most_s), environment)
            outcomes[step.name] = {"outcome": outcome, "seconds": round(monotonic() - begun, 1)}
            if outcome == "done":
                mark.touch()
            else:
                failed.add(step.part)
            print(f"{step.name:18} {outcome:20} {outcomes[step.name]['seconds']:>7} s", flush=True)
            bring_home(outcomes, results, out)
    bring_home(outcomes, results, out)
    return not failed


def execute(step: Step, results: Path, most_s: float, environment: dict[str, str]) -> str:
    """Run a command; what it prints goes to NAME.out, and what it says of it to NAME.log."""
    with open(results / f"{step.name}.out", "wb") as printed, open(results / f"{step.name}.log", "wb") as said:
        try:
            ended = subprocess.run(step.command, stdout=printed, stderr=said, timeout=most_s, env=environment, cwd=ROOT)
        except subprocess.TimeoutExpired:
            return f"killed after {most_s:.0f} s"
    return "done" if ended.returncode == 0 else f"exit code {ended.returncode}"


def bring_home(outcomes: dict[str, dict[str, object]], results: Path, out: Path) -> None:
    (out / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    partial = out / "results.tar.gz.partial"
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(results, "results")
    partial.replace(out / "results.tar.gz")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=Path, required=True, help="SmolLM2-135M-Instruct, a GGUF file or a folder")
    parser.add_argument("--drafter", type=Path, default=ROOT / "examples" / "smollm2-drafter")
    parser.add_argument("--prompts", type=Path, default=ROOT / "tests" / "data" / "prompts.jsonl")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-session"))
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts or steps; those of `install` are always run")
    arguments = parser.parse_args(given)
    steps = plan(arguments)
    if arguments.only:
        known = {name for step in steps for name in (step.name, step.part)}
        if unknown := sorted({*arguments.only} - known):
            parser.error(f"no such part or step: {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        steps = [step for step in steps if {step.name, step.part} & {"install", *arguments.only}]
    return 0 if run(steps, arguments.work, arguments.out, arguments.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
