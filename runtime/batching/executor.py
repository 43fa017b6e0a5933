"""What decodes many sequences at once: an engine behind a small interface of ids and counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Protocol

from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.machine import probe_memory
from dspark_edge.runtime.batching.acceptance import Judge
from dspark_edge.runtime.batching.drafting import CallObserver, GraphDrafter, LookupDrafter, SlotDrafter
from dspark_edge.runtime.batching.grouping import DenseGrouping, Grouping, PackedGrouping, SerialGrouping
from dspark_edge.runtime.batching.slots import SlotCaches
from dspark_edge.runtime.batching.target import PackedTargetCalls, TargetCalls
from dspark_edge.runtime.bit_exact import check_rows, reserved_slots
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.round import Draft, Request, Verdict
from dspark_edge.runtime.scheduling import Costs, Pricing

__all__ = ["EXECUTIONS", "Executor", "ModelExecutor", "choose_grouping"]

EXECUTIONS = ("auto", "dense", "serial", "packed")
"""dense: one padded target call a round; serial: a call a request, plain ones together; packed: one call of exactly
the tokens there are, by graphs for a few sequences; auto: what the bundle is best decoded with here."""

_COPIES = 3  # of a bundle that have to fit into free memory, for its packed graphs to be loaded beside the others


class Executor(Protocol):
    """Runs target and drafter for sequences in slots. Not for several threads at once.

    While decoding, the requests lie in slots 0 … n − 1, and are given in that order; prompts are prefilled in slots
    behind them.
    """

    @property
    def capacity(self) -> int:
        """Cache slots of a sequence that it may fill, tokens."""

    @property
    def block_size(self) -> int:
        """γ, most tokens of a draft; 0 without a drafter."""

    def pricing(self, costs: Costs) -> Pricing:
        """What a group of requests is charged here."""

    def observe(self, observer: CallObserver | None) -> None:
        """Tell somebody what calls take, from now on."""

    def prefill(self, slot: int, request: Request, count: int) -> Verdict | None:
        """Cache `count` more tokens of a sequence; behind its last token, draw the next one."""

    def draft(self, requests: Sequence[Request], drafting: Sequence[bool]) -> list[Draft]:
        """A draft for each request that is to be drafted for, `NO_DRAFT` for the others."""

    def verify(self, requests: Sequence[Request], drafts: Sequence[Draft], lengths: Sequence[int]) -> list[Verdict]:
        """Judge the first `lengths[b]` tokens of each draft; every request has room for so many and its anchor."""

    def exchange(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        """Exchange the sequences of two slots, with so many cached tokens each (0: free)."""

    def close(self) -> None:
        """Release the engine. May be called twice."""


def choose_grouping(engine: Engine, execution: str, slots: int, drafting: bool) -> Grouping:
    """How a bundle's graphs decode several requests.

    Args:
        engine: with the bundle.
        execution: one of `EXECUTIONS`.
        slots: most requests at once.
        drafting: whether anything but plain steps is decoded, which need no packed graphs.

    Raises:
        InvalidInputError: the execution is unknown, or the bundle does not allow it.
    """
    lowering, packed = engine.bundle.manifest.lowering, engine.bundle.manifest.packed_sequences
    if execution not in EXECUTIONS:
        raise InvalidInputError(f"unknown execution {execution!r}; choose one of: {', '.join(EXECUTIONS)}")
    if execution == "auto":
        of_lowering = "serial" if lowering == "ort" else "dense"
        # Sequences that are not there cost something, too: where most never are, a call each is as good.
        packs = drafting and 1 < slots <= packed <= 2 * slots and _has_room(engine)
        execution = "packed" if packs else of_lowering
    if execution == "packed":
        if slots > packed:
            graphs = f"its packed graphs take {packed}" if packed else "it has no packed graphs"
            raise InvalidInputError(
                f"execution 'packed' was asked for {slots} slots, but of this bundle {graphs}; choose another "
                f"execution, or export with --packed-sequences {max(slots, 2)}"
            )
        return PackedGrouping()
    if execution == "serial":
        return SerialGrouping()
    if lowering == "ort":
        raise InvalidInputError(
            "execution 'dense' needs a lowering that verifies batches, the bundle's is 'ort'; choose 'serial', or "
            "export with --lowering onnx or decomposed"
        )
    return DenseGrouping()


def _has_room(engine: Engine) -> bool:
    """Whether memory is there for weights twice: packed graphs have their own copy, laid out for the processor."""
    available = probe_memory(Path("/")).available
    return available is None or available >= _COPIES * sum(file.size for file in engine.bundle.manifest.files)


class ModelExecutor:
    """A bundle's graphs on an engine.

    Args:
        engine: executes the graphs; closed with the executor.
        slots: most sequences at once.
        grouping: see `choose_grouping`; one of a fixed width takes width − 1 slots from the capacity, so that a call
            always has room.
        drafting: whether a drafter is loaded.
        prefill_chunk: width of the widest prefill calls.
        calibration: of the drafter's confidences; None: the bundle's own.

    Raises:
        BundleError: the bundle's calibration is damaged.
        EngineError: a graph cannot be loaded, memory is short, the engine has no windows, or the
            grouping's width is fixed and the backend does not give a token the same bits in each row.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        grouping: Grouping,
        drafting: bool,
        prefill_chunk: int,
        calibration: Calibration | None = None,
    ) -> None:
        manifest = engine.bundle.manifest
        self._engine, self._grouping = engine, grouping
        self._capacity = manifest.limits.capacity - reserved_slots(grouping.width)
        self._caches = SlotCaches(engine, slots)
        self._target = TargetCalls(engine, self._caches, slots, prefill_chunk)
        self._targets = {False: self._target}  # by whether a call is packed
        self._packed = grouping.packed and slots > 1
        if self._packed:
            self._targets[True] = PackedTargetCalls(engine, self._caches, slots, prefill_chunk, self._target.logits)
        if grouping.width is not None:
            check_rows(engine, grouping.width, self._caches.rows(manifest.graphs["target"], 0, 1))
        self._drafter = self._make_drafter(slots, calibration) if drafting else None
        self._block_size = manifest.drafter.block_size if drafting else 0
        candidates = self._drafter.candidates if self._drafter else None
        self._judge = Judge(engine, slots, self._target.logits, candidates)
        self._observer: CallObserver | None = None

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def caches(self) -> SlotCaches:
        """Of all slots."""
        return self._caches

    def pricing(self, costs: Costs) -> Pricing:
        return self._grouping.pricing(costs)

    def observe(self, observer: CallObserver | None) -> None:
        self._observer = observer

    def prefill(self, slot: int, request: Request, count: int) -> Verdict | None:
        sequence = request.sequence
        start = sequence.cache_length
        self._target.prefill(slot, sequence.token_ids[start : start + count], start)
        sequence.cache_length = start + count
        if sequence.cache_length < len(sequence.token_ids):
            return None
        return self._judge.accept(slot, [1], [slot], [request], [0])[0]

    def draft(self, requests: Sequence[Request], drafting: Sequence[bool]) -> list[Draft]:
        if self._drafter is None:
            raise InvalidInputError("a draft was asked for, but the executor was made without a drafter")
        return self._drafter.draft(requests, drafting, self._observer)

    def verify(self, requests: Sequence[Request], drafts: Sequence[Draft], lengths: Sequence[int]) -> list[Verdict]:
        starts = [request.sequence.cache_length for request in requests]
        verdicts: dict[int, Verdict] = {}
        for call in self._grouping.calls(lengths, [self._capacity - start - 1 for start in starts]):
            token_ids = []
            for slot, width in enumerate(call.widths, start=call.first):
                row = [requests[slot].sequence.anchor, *drafts[slot].token_ids[: min(lengths[slot], width - 1)]]
                # What is behind a narrow request's tokens, or of one that merely runs along, means nothing.
                token_ids.append(row + [0] * (width - len(row)))
            of_call = starts[call.first : call.first + len(call.widths)]
            bindings, started = self._bindings(), perf_counter()
            self._targets[call.packed].run(call.first, token_ids, of_call)
            judged = [requests[slot] for slot in call.judged]
            of_judged = [lengths[slot] for slot in call.judged]
            found = self._judge.accept(call.first, call.widths, call.judged, judged, of_judged)
            if self._observer is not None and self._bindings() == bindings:
                seconds = perf_counter() - started
                self._observer.observe_verification(*call.bucket(of_call), seconds)
            verdicts.update(zip(call.judged, found, strict=True))
        return [verdicts[slot] for slot in range(len(requests))]

    def exchange(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        self._caches.exchange(one, other, lengths)

    def close(self) -> None:
        self._engine.close()

    def _bindings(self) -> int:
        return sum(target.bindings for target in self._targets.values()) + self._judge.bindings

    def _make_drafter(self, slots: int, calibration: Calibration | None) -> SlotDrafter:
        bundle = self._engine.bundle
        if bundle.manifest.drafter.kind == "ngram":
            return LookupDrafter(self._engine, slots, bundle.manifest.drafter.block_size)
        calibration = calibration or Calibration.load(bundle)
        together = self._grouping.drafts_together
        return GraphDrafter(self._engine, self._caches, slots, together, self._packed, calibration)
