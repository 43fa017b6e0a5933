"""Parts of a buffer, and the caches of all slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeBuffer, OnnxRuntimeEngine
from dspark_edge.runtime import model
from dspark_edge.runtime.batching.slots import SlotCaches
from dspark_edge.runtime.batching.windows import InputRows, exchange_rows, row_window
from dspark_edge.runtime.profile_probe import EngineView


@pytest.fixture
def engine(bundle_dir: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as opened:
        yield opened


def test_a_window_is_the_same_memory(engine: OnnxRuntimeEngine) -> None:
    whole = engine.allocate("float32", (4, 3, 2))
    part = row_window(engine, whole, 1, 2)
    part.write(np.arange(12).reshape(2, 3, 2))
    assert whole.read()[0].sum() == whole.read()[3].sum() == 0
    assert whole.read()[1:3].ravel().tolist() == list(range(12))
    assert engine.window(part, (2, 2), start=4).read().tolist() == [[4, 5], [6, 7]]
    assert isinstance(part, OnnxRuntimeBuffer) and part.value.numpy().tolist() == part.read().tolist()


def test_a_window_stays_inside(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match=r"a window of \[2, 2\] from element 3 passes the end of a buffer of \[6\]"):
        engine.window(engine.allocate("int64", (6,)), (2, 2), start=3)


def test_memory_of_another_device_has_no_windows(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match="run the bundle with the provider 'cpu'"):
        engine.window(OnnxRuntimeBuffer(None, "float32", (2,), None), (1,))


def test_rows_that_no_window_begins_at_are_copied(engine: OnnxRuntimeEngine) -> None:
    class Aligned(EngineView):
        alignment = 16  # type: ignore[assignment]

    whole = engine.allocate("int64", (4, 3))
    whole.write(np.arange(12).reshape(4, 3))
    copied, viewed = InputRows(Aligned(engine), whole, 1, (2, 3)), InputRows(Aligned(engine), whole, 2, (2, 3))
    copied.refresh()
    viewed.refresh()
    assert copied.buffer.read().ravel().tolist() == [*range(3, 9)]
    assert viewed.buffer.read().ravel().tolist() == [*range(6, 12)]
    whole.write(7)
    assert viewed.buffer.read().min() == 7 and copied.buffer.read().max() == 8
    copied.refresh()
    assert copied.buffer.read().min() == 7


def test_rows_are_exchanged_as_far_as_they_are_valid(engine: OnnxRuntimeEngine) -> None:
    caches = engine.allocate("float32", (3, 2, 5, 1))
    for row in range(3):
        caches.read()[row] = 10 * row + np.arange(5)[:, None]
    spare = engine.allocate("float32", (5, 1))
    exchange_rows(engine, caches, spare, 0, 2, (2, 4))
    assert caches.read()[0, 1, :4, 0].tolist() == [20, 21, 22, 23]
    assert caches.read()[2, 1, :2, 0].tolist() == [0, 1]
    assert caches.read()[1, 0, :, 0].tolist() == [10, 11, 12, 13, 14]
    exchange_rows(engine, caches, spare, 1, 0, (0, 3))  # into a free row
    assert caches.read()[1, 0, :3, 0].tolist() == [20, 21, 22]


def test_slots_grow_together_and_keep_what_they_hold(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_FIRST_CAPACITY", 16)
    caches, graph = SlotCaches(engine, 3), engine.bundle.manifest.graphs["target"]
    name = "past_key_values.0.key"
    if "capacity" not in next(spec for spec in graph.inputs if spec.name == name).shape:
        pytest.skip("only the ort lowering has caches that grow")
    before = caches.rows(graph, 2, 1)[name]
    assert caches.rows(graph, 2, 1)[name] is before
    before.write(7.0)
    caches.ensure(16)
    assert (caches.capacity, caches.version) == (16, 0)
    caches.ensure(33)
    assert (caches.capacity, caches.version) == (64, 1)
    after = caches.rows(graph, 2, 1)[name].read()
    assert (after[..., :16, :] == 7).all() and not after[..., 16:, :].any()
    assert not caches.rows(graph, 0, 2)[name].read().any()
