"""Make an onnxruntime-genai model of a checkpoint, for --genai of the other benchmarks.

    python benchmarks/make_genai.py TARGET OUTPUT [--precision fp32|int4]

TARGET is what `dspark-edge export` takes; a GGUF is dequantised, so that both runtimes have the same weights. Needs
the packages of the [export] and [bench] extras.

int4 is what `export --precision int4` makes: MatMulNBits, blocks of 32 weights with a zero point each, 8 bits for the
head, products at accuracy level 4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from dspark_edge.exporter.checkpoint import open_checkpoint

BUILDER_OPTIONS = {
    "fp32": (),
    "int4": (
        "block_size=32",
        "accuracy_level=4",
        # The builder's defaults are no zero points, and 4 bits for the head.
        "is_symmetric=false",
        "matmul_mixed_precision=last_matmul:int8",
        # Release 0.18 names a shared embedding's blocks otherwise than the head's, and the model does not load. Apart
        # it is fp32; a row of it is looked up a token, which costs no time.
        "shared_embeddings=false",
    ),
}


def write_hugging_face(target: str, folder: Path) -> None:
    """The checkpoint in Hugging Face's layout, fp32."""
    with open_checkpoint(target) as checkpoint:
        tensors = {name: checkpoint.tensor(name).to(torch.float32).contiguous() for name in sorted(checkpoint.names())}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        rope = checkpoint.config.get("rope_parameters", {})
        config = {**checkpoint.config, "torch_dtype": "float32", "rope_theta": rope.get("rope_theta", 10000.0)}
        (folder / "config.json").write_text(json.dumps(config))
        for name, data in checkpoint.text_files().items():
            (folder / name).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=tuple(BUILDER_OPTIONS), default="fp32")
    arguments = parser.parse_args()
    options = BUILDER_OPTIONS[arguments.precision]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        write_hugging_face(arguments.target, Path(folder))
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-c", cache]
        builder += ["-i", folder, "-o", str(arguments.output), "-p", arguments.precision]
        subprocess.run([*builder, *(["--extra_options", *options] if options else [])], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
