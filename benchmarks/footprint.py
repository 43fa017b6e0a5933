"""What an export and an import cost, each in a fresh process: seconds, and memory above torch's own.

    python benchmarks/footprint.py TARGET [--drafter ngram] [--json FILE]

Prints the export's wall time and its peak resident memory over that of a process that only imports torch, beside the
size of the weights written; and the time that `import dspark_edge.runtime` takes over a bare interpreter's start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
EXPORT = "import sys; from dspark_edge.exporter.export import export_bundle; export_bundle(*sys.argv[1:4])"


def run(program: str, *arguments: str) -> tuple[float, str]:
    """Seconds and output of a Python program in a process of its own."""
    started = perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return perf_counter() - started, done.stdout


def seconds(program: str, repeats: int = 7) -> float:
    return median(run(program)[0] for _ in range(repeats))


def measure(target: str, drafter: str) -> dict[str, Any]:
    torch_peak = int(run(f"import torch; {PEAK}")[1])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        elapsed, peak = run(f"{EXPORT}; {PEAK}", target, drafter, str(output))
        weights = sum(file.stat().st_size for file in output.glob("*.data"))
    return {
        "export_s": elapsed,
        "export_peak_over_torch_bytes": int(peak) - torch_peak,
        "weights_bytes": weights,
        "import_runtime_s": seconds("import dspark_edge.runtime") - seconds("pass"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    result = measure(arguments.target, arguments.drafter)
    over, weights = result["export_peak_over_torch_bytes"], result["weights_bytes"]
    print(f"export  {result['export_s']:.1f} s")
    print(f"peak    {over / 1e6:.0f} MB over torch's own, {over / weights:.2f}x the {weights / 1e6:.0f} MB of weights")
    print(f"import dspark_edge.runtime  {result['import_runtime_s']:.3f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
