"""What turns prompts into a target's token ids, and its ids into text: from a bundle, or from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate
from dspark_edge.runtime.tokenizer import Tokenizer

__all__ = ["Words"]


@dataclass(frozen=True, slots=True)
class Words:
    """A target's tokenizer and chat template, and what else prompts need to know of it."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    capacity: int  # most tokens of a request and its response
    vocab_size: int
    eos_ids: tuple[int, ...]
    identity: str  # tells targets apart

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Words:
        """A bundle's.

        Raises:
            InvalidInputError: it has no tokenizer.
            BundleError: the tokenizer or the chat template is damaged.
        """
        manifest = bundle.manifest
        hashes = {record.path: record.sha256 for record in manifest.files}
        graph = manifest.graphs["target"].file
        tokenizer = Tokenizer.load(bundle.path)
        if tokenizer is None:
            raise InvalidInputError(f"{bundle.path} has no tokenizer, which prompts need")
        return cls(
            tokenizer,
            ChatTemplate.load(bundle.path),
            manifest.limits.capacity,
            manifest.target.vocab_size,
            manifest.target.eos_token_ids,
            hashes.get(f"{graph}.data") or hashes[graph],
        )

    @classmethod
    def of_checkpoint(cls, source: str) -> Words:
        """A checkpoint's, as an export of it would hold them. Needs torch.

        Raises:
            CheckpointError: it is missing, damaged or unsupported.
            InvalidInputError: it has no tokenizer.
        """
        from dspark_edge.exporter.checkpoint import open_checkpoint
        from dspark_edge.exporter.configuration import read_decoder_config, read_eos_token_ids

        with open_checkpoint(source) as checkpoint:
            config = read_decoder_config(checkpoint.config, source)
            files = checkpoint.text_files()
            digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
            # A norm stands for the weights: it is small, and no two trainings end with the same.
            digest.update(checkpoint.tensor("model.norm.weight").float().numpy().tobytes())
            generation = json.loads(files.get("generation_config.json", b"{}"))
            eos_ids = read_eos_token_ids(checkpoint.config, generation)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name, data in files.items():
                (folder / name).write_bytes(data)
            tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
        if tokenizer is None:
            raise InvalidInputError(f"{source} has no tokenizer, which prompts need; give its --bundle")
        return cls(tokenizer, template, config.max_position_embeddings, config.vocab_size, eos_ids, digest.hexdigest())
