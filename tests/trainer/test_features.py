"""Features from the target, and from the cache that keeps them."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="features need the [train] extra")

import torch

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training import features as module
from dspark_edge.trainer.training.dataset import Example
from dspark_edge.trainer.training.features import Features, FeatureStore, features_of, log_normalizers

pytestmark = pytest.mark.needs_export

TAPS = (0, 2, 4)
LENGTHS = (12, 30, 7, 25, 18, 40, 3, 22)
WIDTH = 4 * 96  # three taps and the final state
TOKEN_BYTES = 2 * WIDTH + 4


@pytest.fixture(scope="module")
def target(reference_dir: Path) -> TargetModel:
    return TargetModel.load(reference_dir / "qwen3_target", 64)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(97, 123, size=length).astype(np.int32), 2, "a", str(index), False)
        for index, length in enumerate(LENGTHS)
    ]


MakeStore = Callable[..., FeatureStore]


@pytest.fixture
def make_store(
    target: TargetModel, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeStore:
    """`make_store(taps=TAPS, budget=1e9, examples=…)`: a store in one folder; small batches, many records."""
    monkeypatch.setattr(module, "_CPU_TOKENS", 64)
    monkeypatch.setattr(module, "_SYNC_TOKENS", 40)

    def make(taps: tuple[int, ...] = TAPS, budget: int = 10**9, chosen: list[Example] | None = None) -> FeatureStore:
        return FeatureStore(target, examples if chosen is None else chosen, taps, tmp_path / "cache", budget)

    return make


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all sequences that the target runs over."""
    lengths: list[int] = []

    def record(target: TargetModel, examples: Any, taps: Any) -> list[Features]:
        lengths.extend(len(example) for example in examples)
        return features_of(target, examples, taps)

    monkeypatch.setattr(module, "features_of", record)
    return lengths


class Stop(Exception):
    """What interrupts a test's filling."""


def stop_after(tokens: int) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if done >= tokens:
            raise Stop

    return report


def expect_features(store: FeatureStore, target: TargetModel, examples: list[Example]) -> None:
    for index, example in enumerate(examples):
        (expected,) = features_of(target, [example], TAPS)
        found = store.load(index)
        assert found.taps.dtype == found.hidden.dtype == torch.float16
        for name in ("taps", "hidden"):
            part = getattr(found, name).float()
            torch.testing.assert_close(part, getattr(expected, name).clone(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.log_normalizers, expected.log_normalizers.clone(), rtol=1e-4, atol=1e-4)


def test_a_sequence_that_comes_twice_is_kept_once(
    target: TargetModel, examples: list[Example], make_store: MakeStore, computed: list[int]
) -> None:
    again = [*examples[:3], examples[1], *examples[3:], examples[0]]
    store = make_store(chosen=again)
    assert store.tokens == sum(LENGTHS) and store.cached == len(LENGTHS)
    store.fill()
    assert sorted(computed) == sorted(LENGTHS)
    expect_features(store, target, again)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}


def test_features_are_the_targets(
    target: TargetModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = features_of(target, examples[:2], (4, 0))
    for example, own in zip(examples, found, strict=False):
        taps, hidden = target.features(torch.from_numpy(example.token_ids.astype(np.int64))[None], (4, 0))
        torch.testing.assert_close(own.taps, taps[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.hidden, hidden[0], rtol=1e-4, atol=1e-4)
        logits = target.logits(hidden[0])
        torch.testing.assert_close(logits.exp().sum(dim=-1).log(), own.log_normalizers, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "_HEAD_ELEMENTS", 5 * 260)  # in pieces of five rows
    # Products of other sizes may take other kernels, which sum in another order.
    in_pieces = log_normalizers(target, found[0].hidden)
    torch.testing.assert_close(in_pieces, found[0].log_normalizers, rtol=1e-6, atol=1e-6)


def test_stored_features_are_cut_to_what_fp16_holds() -> None:
    stored = Features(torch.tensor([[1e5, -1e6, 0.5]]), torch.tensor([[7e4]]), torch.tensor([1e6])).stored()
    assert stored.taps.tolist() == [[65504.0, -65504.0, 0.5]] and stored.hidden.tolist() == [[65504.0]]
    assert stored.log_normalizers.tolist() == [1e6] and stored.log_normalizers.dtype == torch.float32


def test_the_cache_holds_what_the_target_says(
    make_store: MakeStore, target: TargetModel, examples: list[Example], tmp_path: Path, computed: list[int]
) -> None:
    store = make_store()
    assert store.cached == 8 and store.tokens == sum(LENGTHS) and store.size == sum(LENGTHS) * TOKEN_BYTES
    assert store.describe() == f"features: 157 tokens in a cache of 121.2 kB at {tmp_path / 'cache'}"
    with pytest.raises(RuntimeError):
        store.load(0)
    heard: list[tuple[int, int]] = []
    store.fill(lambda done, total: heard.append((done, total)))
    assert computed == list(LENGTHS) and heard[-1] == (157, 157) and len(heard) > 3
    assert sum(len(content) for name, content in files(tmp_path).items() if name != "index.json") == store.size
    computed.clear()
    expect_features(store, target, examples)
    assert computed == []
    # On disk, not in memory: what is read is copied out of the mapping.
    assert isinstance(store._states, np.memmap) and isinstance(store._normalizers, np.memmap)
    store.load(0).taps.fill_(0)
    expect_features(store, target, examples)
    store.close()
    with pytest.raises(RuntimeError):
        store.load(0)


def test_a_full_cache_is_not_computed_again(make_store: MakeStore, computed: list[int]) -> None:
    make_store().fill()
    computed.clear()
    again = make_store()
    again.fill()
    assert computed == [] and again.load(3).hidden.shape == (25, 96)


@pytest.mark.parametrize("tokens", [1, 40, 90, 110])
def test_an_interrupted_filling_goes_on(
    make_store: MakeStore, tmp_path: Path, computed: list[int], tokens: int
) -> None:
    make_store().fill()
    whole = files(tmp_path)
    for name in whole:
        (tmp_path / "cache" / name).unlink()
    computed.clear()
    with pytest.raises(Stop):
        make_store().fill(stop_after(tokens))
    first = sum(computed)
    assert tokens <= first < 157
    make_store().fill()
    assert files(tmp_path) == whole
    # What came since the last record is computed twice, and nothing else.
    assert sum(computed) - 157 <= min(first, 40 + 64)


@pytest.mark.parametrize("change", ["taps", "examples", "budget", "order"])
def test_another_run_computes_anew(
    make_store: MakeStore, examples: list[Example], computed: list[int], change: str
) -> None:
    make_store().fill()
    computed.clear()
    store = {
        "taps": lambda: make_store((0, 2, 3)),
        "examples": lambda: make_store(chosen=[*examples[:-1], Example(examples[-1].token_ids + 1, 2, "a", "7", True)]),
        "budget": lambda: make_store(budget=100 * TOKEN_BYTES),
        "order": lambda: make_store(chosen=examples[::-1]),
    }[change]()
    store.fill()
    assert len(computed) == store.cached


def test_a_cache_that_another_run_began_to_overwrite_is_no_cache(
    make_store: MakeStore, target: TargetModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store().fill()
    monkeypatch.setattr(module, "_SYNC_TOKENS", 10**6)  # killed before its first record
    with pytest.raises(Stop):
        make_store((1, 3, 5)).fill(stop_after(1))  # of the same size
    store = make_store()
    store.fill()
    expect_features(store, target, examples)


@pytest.mark.parametrize("name", ["states.fp16", "normalizers.fp32"])
@pytest.mark.parametrize("damage", ["cut", "missing", "longer"])
def test_a_damaged_file_is_computed_again(
    make_store: MakeStore,
    target: TargetModel,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
) -> None:
    make_store().fill()
    path = tmp_path / "cache" / name
    if damage == "missing":
        path.unlink()
    else:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size + (4 if damage == "longer" else -4))
    monkeypatch.setattr(module, "_SYNC_TOKENS", 10**6)
    with pytest.raises(Stop):  # killed while it computes again, the sizes are right and the content is not
        make_store().fill(stop_after(1))
    store = make_store()
    store.fill()
    expect_features(store, target, examples)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"digest": 1, "sequences": 8}', "\xff"])
def test_an_index_that_says_nothing_is_no_index(
    make_store: MakeStore, tmp_path: Path, computed: list[int], index: str
) -> None:
    make_store().fill()
    computed.clear()
    (tmp_path / "cache" / "index.json").write_text(index, encoding="latin-1")
    make_store().fill()
    assert len(computed) == 8


def test_an_index_is_believed_as_far_as_there_is_something(make_store: MakeStore, tmp_path: Path) -> None:
    make_store().fill()
    index = tmp_path / "cache" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sequences": 99}))
    store = make_store()
    store.fill()
    assert store.load(7).taps.shape == (22, 288)


def test_without_a_budget_everything_is_computed(
    make_store: MakeStore, target: TargetModel, examples: list[Example], tmp_path: Path, computed: list[int]
) -> None:
    for budget in (0, -5, 12 * TOKEN_BYTES - 1):
        store = make_store(budget=budget)
        assert (store.cached, store.tokens, store.size) == (0, 0, 0)
        assert store.describe() == "features: 157 tokens, computed on the fly"
        store.fill()
    assert computed == [] and not (tmp_path / "cache").exists()
    expect_features(store, target, examples)
    assert computed == list(LENGTHS)


def test_a_part_of_the_sequences_fits_the_budget(
    make_store: MakeStore, target: TargetModel, examples: list[Example], tmp_path: Path, computed: list[int]
) -> None:
    store = make_store(budget=49 * TOKEN_BYTES)  # 12 + 30 + 7
    assert (store.cached, store.tokens) == (3, 49) and store.size == 49 * TOKEN_BYTES
    assert store.describe() == (
        f"features: 49 tokens in a cache of 37.8 kB at {tmp_path / 'cache'}; 108 more computed on the fly"
    )
    assert make_store(budget=49 * TOKEN_BYTES - 1).cached == 2
    store.fill()
    assert computed == [12, 30, 7]
    expect_features(store, target, examples)
    assert computed == list(LENGTHS)


def test_no_sequences_at_all(make_store: MakeStore) -> None:
    store = make_store(chosen=[])
    store.fill()
    assert store.describe() == "features: 0 tokens, computed on the fly"


def test_a_disk_without_room_is_refused_before_the_work(
    make_store: MakeStore, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(f_bavail=10, f_frsize=4096)
    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda folder: free)
        with pytest.raises(InvalidInputError) as caught:
            make_store().fill()
    # The files are there already, and their ends take a block each.
    problem, needed = str(caught.value), re.search(r"needs (\d+)\.\d kB more in ", str(caught.value))
    assert needed is not None and 100 < int(needed[1]) <= 121
    assert problem.endswith(
        f"{tmp_path / 'cache'}, 41.0 kB are free; lower it with --cache-gb, or give another --cache"
    )
    assert computed == []
    # What an interrupted filling has taken already is not needed again.
    with pytest.raises(Stop):
        make_store().fill(stop_after(40))
    monkeypatch.setattr(os, "statvfs", lambda folder: free)
    make_store().fill()


def test_a_disk_that_fills_up_is_one_line(
    make_store: MakeStore,
    target: TargetModel,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(InvalidInputError, match=r"cannot write the feature cache in .*: No space left on device"):
            make_store().fill()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=r"cannot write the feature cache in file/cache: .*--cache-gb"):
        FeatureStore(target, examples, TAPS, Path("file/cache"), 10**9).fill()


def test_a_batch_comes_from_the_cache_and_from_the_target(
    target: TargetModel, examples: list[Example], make_store: MakeStore, computed: list[int]
) -> None:
    store = make_store(budget=TOKEN_BYTES * sum(LENGTHS[:4]))
    store.fill()
    assert store.cached == 4
    computed.clear()
    chosen = [6, 1, 5, 0, 7, 4]
    found = store.load_all(chosen)
    assert computed == [3, 40, 22, 18]  # 64 tokens at once, padding included: one pass, then one, then two
    for index, features in zip(chosen, found, strict=True):
        single = store.load(index)
        assert features.taps.dtype == features.hidden.dtype == torch.float16
        torch.testing.assert_close(features.taps, single.taps, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(features.hidden, single.hidden, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(features.log_normalizers, single.log_normalizers, rtol=1e-4, atol=1e-4)
        # A loss may keep them for its gradient, which it may not of what inference mode made.
        assert not features.taps.is_inference() and not features.hidden.is_inference()


def test_the_fused_normalizers_of_a_gpu_are_the_same() -> None:
    logits = 8.0 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module._fused_log_normalizers(logits), torch.logsumexp(logits, dim=-1))
