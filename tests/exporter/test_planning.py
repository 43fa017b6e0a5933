"""What fits on a device, by hand, and of a model that is known by its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="planning needs the [export] extra")

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import CheckpointError, InvalidInputError, MismatchError
from dspark_edge.exporter.planning import DEVICES, DeviceSpec, plan_device, read_pair_shape
from dspark_edge.exporter.planning_cli import plan as plan_command

from ..conftest import ReferenceBundle

pytestmark = pytest.mark.needs_export

GIB = 1 << 30
# Qwen3-4B, as its configuration has it.
QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return tmp_path


def test_weights_are_counted_from_the_configuration(qwen: Path) -> None:
    pair = read_pair_shape(qwen, None)
    assert pair.vocabulary_weights == pair.read_vocabulary_weights == 151936 * 2560
    assert pair.target_weights + pair.vocabulary_weights == 4_022_468_096  # as its card says: 4.0 B
    assert read_pair_shape(qwen / "config.json", None) == pair


def test_what_fits_by_hand(qwen: Path) -> None:
    pair = read_pair_shape(qwen, None)
    device = DeviceSpec(16 * GIB, 200e9, True, "made up")
    found = plan_device(pair, "made up", "fp16", device)
    assert found.free == 14 * GIB
    assert found.footprint.weights == 2 * 4_022_468_096
    assert found.footprint.cache_per_token == 2 * 36 * 8 * 128 * 2
    assert found.footprint.logits_per_sequence == 4 * 151936
    room = 14 * GIB - found.footprint.weights
    assert found.longest[1] == 40960  # all that it was made for: 147 kB a token
    assert found.longest[4] == (room - 4 * 4 * 151936) // (4 * 147456)
    assert found.largest[4096] == room // (4096 * 147456 + 4 * 151936)
    assert found.footprint.total(4, found.longest[4]) <= found.free < found.footprint.total(4, found.longest[4] + 1)
    seconds = (2 * 4_022_468_096 + 2048 * 147456) / (0.7 * 200e9)
    assert found.plain_tokens_per_second == pytest.approx(1 / seconds)
    assert found.speculative_tokens_per_second is None


def test_a_model_that_is_too_large_does_not_fit(qwen: Path) -> None:
    pair = read_pair_shape(qwen, None)
    small = plan_device(pair, "orin-nano-8gb", "fp16")
    assert not small.fits
    assert set(small.largest.values()) == {0}
    assert plan_device(pair, "orin-nano-8gb", "int4").fits


def test_a_drafter_takes_room_and_is_worth_its_tau(
    reference_bundle: ReferenceBundle, reference_dir: Path, qwen: Path
) -> None:
    folders = reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla"
    pair = read_pair_shape(*folders)
    manifest = Bundle.open(reference_bundle("qwen3_target", "qwen3_vanilla")).manifest
    stored = sum(record.size for record in manifest.files if record.path.endswith(".onnx.data"))
    plain, drafting = plan_device(pair, "l4", "fp32"), plan_device(pair, "l4", "fp32", tau=3.0)
    # What both graphs share is there once, as on disk, where tables of angles are beside the weights.
    assert 0.8 < plain.footprint.weights / stored < 1.0
    both = pair.vocabulary_weights + pair.repeated_weights
    assert (pair.vocabulary_weights, both) == (260 * 96, 3 * 260 * 96)  # tied, and all tokens are drafted
    low = plan_device(pair, "l4", "int8").footprint.weights  # ONNX Runtime has a copy for each graph
    assert low == round((pair.target_weights + pair.drafter_weights + both) * (1 + 5 / 32))
    assert drafting.plain_tokens_per_second == plain.plain_tokens_per_second
    assert drafting.speculative_tokens_per_second is not None
    assert 1.5 < drafting.speculative_tokens_per_second / drafting.plain_tokens_per_second < 3.0
    with pytest.raises(MismatchError):
        read_pair_shape(qwen, folders[1])


def test_what_cannot_be_planned(qwen: Path, tmp_path: Path) -> None:
    pair = read_pair_shape(qwen, None)
    for given, message in (
        (("a toaster",), "orin-nano-8gb"),
        (("l4", "fp64"), "int4"),
        (("l4", "fp16", None, 0.5), "at least 1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            plan_device(pair, *given)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_pair_shape(_empty(tmp_path), None)
    (tmp_path / "broken.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"cannot read .*broken\.json"):
        read_pair_shape(tmp_path / "broken.json", None)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_pair_shape(tmp_path / "list.json", None)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_the_command(qwen: Path) -> None:
    def run(*options: str) -> Any:
        return CliRunner().invoke(plan_command, [str(qwen), *options])

    done = run("--json")
    plans = json.loads(done.stdout)
    assert [one["device"] for one in plans] == list(DEVICES)
    assert (done.exit_code, plans[0]["fits"], plans[-1]["fits"]) == (0, False, True)
    assert run("--device", "orin-nano-8gb").exit_code == 1
    other = run("--memory", "12", "--bandwidth", "500", "--unified", "--json")
    assert json.loads(other.stdout)[0]["device"] == "this one"
    assert "h100" in run("--device", "h100").output
    assert isinstance(run("--memory", "12").exception, InvalidInputError)
    assert isinstance(run("--tau", "2").exception, InvalidInputError)
