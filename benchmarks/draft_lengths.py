"""How long the drafts of some drafters are that greedy decoding accepts, without engines: to compare many of them.

    python benchmarks/draft_lengths.py RESPONSES.jsonl DRAFTER … --target TARGET [--json FILE]

RESPONSES are greedy answers (`dspark-edge respond --greedy-share 1`). Decoding is lossless, so what a drafter would be
accepted for is known from them: every token of an answer is an anchor once, and the rounds are walked through as
decoding with fixed blocks would go. Prints for each drafter, by domain, the mean accepted length τ (tokens of a round,
the target's own included) and the share of drafts accepted up to each position.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_edge.trainer.compute_types import autocast, pick_compute_type
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.batches import collate
from dspark_edge.trainer.training.continuation import continue_from, read_shape, read_vocabulary
from dspark_edge.trainer.training.dataset import Example, read_examples
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.features import features_of
from dspark_edge.trainer.training.objective import step_loss
from dspark_edge.trainer.training.processes import pick_device
from dspark_edge.trainer.training.trainer import shared_vocabulary


@torch.no_grad()
def survived(
    folder: Path, target: TargetModel, examples: Sequence[Example]
) -> tuple[TrainableDrafter, list[list[np.ndarray]]]:
    """The drafter, and of each answer of each example how many drafts are the tokens that came, by anchor [anchors]."""
    shape, ids = read_shape(folder), read_vocabulary(folder)
    drafter = TrainableDrafter(shape, max(len(example) for example in examples))
    continue_from(drafter, folder, ids)
    drafter.to(target.device).eval()
    vocabulary = shared_vocabulary(target, shape, ids, target.device)
    w2 = None if drafter.markov_head is None else drafter.markov_head.markov_w2.weight
    found = []
    for example in examples:
        features = [one.rounded() for one in features_of(target, [example], shape.tap_layers)]
        ranges = [np.arange(first, end - 1) for first, end in example.answers]  # of earlier turns, too
        anchors = np.concatenate(ranges)
        batch = collate([example], features, [anchors], shape.block_size, target.device)
        with autocast(target.device, target.dtype):
            measures = step_loss(drafter, vocabulary, batch, w2)
        right = (measures.correct & batch.valid)[0].int().cumprod(dim=-1).sum(dim=-1)
        found.append(np.split(right.cpu().numpy(), np.cumsum([len(one) for one in ranges])[:-1]))
    return drafter, found


def walk(lengths: np.ndarray) -> tuple[list[int], int]:
    """Rounds over an answer: what each accepts, and the tokens committed in all."""
    accepted, place = [], 0
    while place < len(lengths):
        accepted.append(int(lengths[place]))
        place += accepted[-1] + 1
    return accepted, min(place, len(lengths))


def measure(folder: Path, target: TargetModel, examples: Sequence[Example]) -> dict[str, Any]:
    drafter, lengths = survived(folder, target, examples)
    rounds: dict[str, list[int]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    for example, answers in zip(examples, lengths, strict=True):
        for one in answers:
            accepted, committed = walk(one)
            rounds[example.domain] += accepted
            tokens[example.domain] += committed
    weights, block = sum(tensor.numel() for tensor in drafter.parameters()), drafter.config.block_size
    domains = {
        domain: {
            "accepted_length": tokens[domain] / len(accepted),
            "accepted_to": [float(np.mean([count >= place for count in accepted])) for place in range(1, block + 1)],
        }
        for domain, accepted in rounds.items()
    }
    overall = sum(tokens.values()) / sum(map(len, rounds.values()))
    return {"drafter": folder.name, "parameters": weights, "accepted_length": overall, "domains": domains}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", type=Path)
    parser.add_argument("drafters", type=Path, nargs="+")
    parser.add_argument("--target", required=True)
    parser.add_argument("--device")
    parser.add_argument("--compute-type", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    device = pick_device(arguments.device)
    examples = read_examples([arguments.responses], 1 << 30)
    longest = max(len(example) for example in examples)
    target = TargetModel.load(arguments.target, longest, device, pick_compute_type(arguments.compute_type, device))
    reports = []
    for folder in arguments.drafters:
        report = measure(folder, target, examples)
        reports.append(report)
        shown = "  ".join(f"{name} {one['accepted_length']:.3f}" for name, one in sorted(report["domains"].items()))
        print(
            f"{report['drafter']:16} {report['parameters'] / 1e6:5.1f} M  all {report['accepted_length']:.3f}  {shown}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
