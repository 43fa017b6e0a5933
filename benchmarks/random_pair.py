"""A target and a drafter with random weights, in the shape of a real pair: to measure sizes that nobody has trained.

    python benchmarks/random_pair.py FOLDER [--shape qwen3-4b] [--layers 5] [--device cuda]

writes FOLDER/target and FOLDER/drafter in bf16, for `dspark-edge export … --tokenizer` with any tokenizer. What the
target says means nothing, and the drafter is accepted by chance alone; what calls cost is what it is. Needs
transformers, and for qwen3-4b 9 GB of memory (of the device's, where one is named) and as much disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dspark_edge.exporter.configuration import read_decoder_config
from dspark_edge.trainer.training.checkpoints import drafter_config_json, save_drafter
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.settings import DrafterSettings

_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "max_position_embeddings": 40960}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-4b": {
        **_COMMON,
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        **_COMMON,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
    },
}
"""Published configurations (Qwen3-4B: its config.json), and one for tests."""

_DEVIATION = 0.02


def write_target(folder: Path, shape: Mapping[str, Any], device: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")


def write_drafter(folder: Path, target: Path, settings: DrafterSettings) -> None:
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    decoder = read_decoder_config(config, str(target))
    drafter = TrainableDrafter(settings.shape(decoder, decoder.vocab_size - 1), 1)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if name.endswith("norm.weight") or name == "feature_scale":
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _DEVIATION)
    folder.mkdir(parents=True, exist_ok=True)
    save_drafter(folder, drafter, drafter_config_json(drafter, config, 1), torch.bfloat16, None)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--layers", type=int, default=5, help="of the drafter; DeepSpec's have 5")
    parser.add_argument("--block-size", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    arguments = parser.parse_args(given)
    torch.manual_seed(0)
    write_target(arguments.folder / "target", SHAPES[arguments.shape], arguments.device)
    settings = DrafterSettings(layers=arguments.layers, block_size=arguments.block_size)
    write_drafter(arguments.folder / "drafter", arguments.folder / "target", settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
