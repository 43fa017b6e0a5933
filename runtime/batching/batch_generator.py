"""Many requests at once: continuous batching.

with BatchGenerator.open("bundle/", slots=8) as generator:
    tickets = [generator.submit(prompt, SamplingParams(max_new_tokens=64)) for prompt in prompts]
    for event in generator.run():
        print(event.request_id, event.text)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from types import TracebackType

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import ClosedError, InvalidInputError, QueueFullError
from dspark_edge.runtime.answer import Answer, Generation
from dspark_edge.runtime.batching.executor import Executor
from dspark_edge.runtime.batching.group_round import decode_group
from dspark_edge.runtime.batching.lane import Lane
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.policy import FixedLengths, GroupPolicy
from dspark_edge.runtime.batching.prefill_pace import PrefillPace
from dspark_edge.runtime.batching.slot_table import SlotTable
from dspark_edge.runtime.batching.ticket import Event, Ticket
from dspark_edge.runtime.encoding import PromptEncoder
from dspark_edge.runtime.generator import Prompt
from dspark_edge.runtime.round import Request
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.scheduling import Costs
from dspark_edge.runtime.sequence import Sequence as TokenSequence
from dspark_edge.runtime.statistics import EngineStatistics, EngineTally, Tally

__all__ = ["BatchGenerator"]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request in the queue."""

    ticket: Ticket
    token_ids: list[int]
    params: SamplingParams


class BatchGenerator:
    """Answers many requests at once; they join and leave between rounds. A context manager.

    `submit` and a ticket's methods may be called from any thread; `step` and what is built on it (`run`, `generate`)
    from one at a time.

    Args:
        executor: runs target and drafter; closed with the generator.
        encoder: of the bundle's prompts.
        options: see `BatchOptions`; bit_exact needs an executor of a `SingleGrouping`.
        policy: decides what is verified; None: `options.verify_length` draft tokens, or none in mode plain.

    Raises:
        InvalidInputError: an option does not fit the bundle, or the mode is 'scheduled' without a policy.
    """

    def __init__(
        self,
        executor: Executor,
        encoder: PromptEncoder,
        options: BatchOptions | None = None,
        policy: GroupPolicy | None = None,
    ) -> None:
        self.options = options or BatchOptions()
        self._executor, self._encoder = executor, encoder
        self._policy = policy or self._fixed_policy()
        self._table = SlotTable(self.options.slots, executor.exchange)
        self._prefilling: deque[Lane] = deque()  # whose chunk is next, then the others in turn
        self._queue: deque[_Waiting] = deque()
        self._ids = count()
        self._lock = threading.Lock()  # of the queue, and of whether it is open
        self._stepping = threading.Lock()
        self._closed = False
        self._totals = EngineTally()
        self._pace = PrefillPace(self.options.chunk) if self.options.paced else PrefillPace(self.options.chunk, None)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        mode: str | None = None,
        verify_length: int | None = None,
        slots: int = 8,
        queue: int = 64,
        prefill_chunk: int | None = None,
        execution: str = "auto",
        bit_exact: bool = False,
        costs: Costs | Mapping[str, Costs] | None = None,
        engine: str = "onnxruntime",
        provider: str | None = None,
        threads: int | None = None,
    ) -> BatchGenerator:
        """Open a bundle and run it.

        Args:
            path: the bundle's folder.
            mode: plain, static or scheduled; None: scheduled where costs are given or the device has been profiled,
                static elsewhere.
            verify_length, slots, queue, prefill_chunk, execution, bit_exact: see `BatchOptions`.
            costs: what calls cost on this device, of all kinds of sampling or by sampler role; None: as profiled.
            engine, provider, threads: see `EngineChoice`; an ONNX Runtime provider has to share the CPU's memory.

        Raises:
            BundleError, EngineError, InvalidInputError: see there; InvalidInputError also where mode is "scheduled"
                and there are no costs.
        """
        from dspark_edge.engines.opening import EngineChoice
        from dspark_edge.runtime.batching.opening import assemble, device_costs

        # checked before a graph is read
        wanted = BatchOptions("static", None, slots, queue, prefill_chunk, execution, bit_exact)
        choice = EngineChoice(engine, provider, threads)
        opened = choice.open(Bundle.open(path))
        try:
            if costs is None:
                costs = device_costs(opened.bundle, choice.device(), mode, verify_length)
            parts = assemble(opened, wanted, mode, verify_length, costs)
            return cls(parts.executor, PromptEncoder.of(opened.bundle), parts.options, parts.policy)
        except BaseException:
            opened.close()
            raise

    @property
    def capacity(self) -> int:
        """Most tokens of a prompt and its answer together; in bit-exact mode γ fewer than the bundle's."""
        return self._executor.capacity

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self._table.lanes)

    @property
    def statistics(self) -> EngineStatistics:
        """Of all requests so far together, as of the last whole step."""
        return self._totals.result()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._queue and not self._table.lanes

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> Ticket:
        """Queue a request; from any thread.

        Args:
            prompt: text, messages or token ids.
            params: how it is sampled, and where it ends.
            raw: feed a text as it is, without the chat template.

        Raises:
            InvalidInputError: the prompt is empty or does not fit the bundle (CapacityError: the capacity).
            QueueFullError: as many requests wait as may.
            ClosedError: the generator is closed.
        """
        params = params or SamplingParams()
        token_ids = self._encoder.checked(prompt, params, self.capacity, raw=raw)
        with self._lock:
            self._check_open()
            if len(self._queue) >= self.options.queue:
                raise QueueFullError(
                    f"{len(self._queue)} requests wait already, as many as the queue holds; send it again later, or "
                    "open the generator with a larger queue"
                )
            ticket = Ticket(next(self._ids), len(token_ids))
            self._queue.append(_Waiting(ticket, token_ids, params))
        return ticket

    def step(self) -> list[Event]:
        """Admit, prefill at most one chunk, decode one round of all who decode.

        Returns:
            What was added to answers, one event a request at most twice: for its first token and for its round.

        Raises:
            EngineError: the backend failed. Every request that had no answer ends with that error, and the generator
                is closed.
            ClosedError: it was closed before.
            InvalidInputError: another thread is in a step.
        """
        if not self._stepping.acquire(blocking=False):
            raise InvalidInputError("another thread is in a step of this generator; step it from one thread at a time")
        try:
            self._check_open()
            events: list[Event] = []
            self._step(events)
            return events
        except ClosedError:
            raise
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._stepping.release()

    def run(self) -> Iterator[Event]:
        """Step until there is nothing to do, and yield the events. More may be submitted meanwhile.

        Raises:
            See `step`.
        """
        while not self.idle:
            yield from self.step()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, *, raw: bool = False
    ) -> list[Generation]:
        """The answers to prompts, in their order; as many as may wait are queued at a time.

        Raises:
            See `submit` and `step`.
        """
        tickets: list[Ticket] = []
        try:
            while len(tickets) < len(prompts) or not all(ticket.done for ticket in tickets):
                while len(tickets) < len(prompts) and len(self._queue) < self.options.queue:
                    tickets.append(self.submit(prompts[len(tickets)], params, raw=raw))
                self.step()
        except BaseException:
            for ticket in tickets:  # nobody would read their answers
                ticket.cancel()
            raise
        return [ticket.result() for ticket in tickets]

    def close(self) -> None:
        """End all requests with a `ClosedError` and release the engine. May be called twice; waits for a step's end."""
        with self._stepping:
            self._end(ClosedError("the generator was closed before the request had its answer"))

    def __enter__(self) -> BatchGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, events: list[Event]) -> None:
        started = perf_counter()
        self._drop_cancelled(events)
        self._admit()
        before = self._table.decoding
        self._prefill_chunk(events)
        decoding = self._table.decoding
        if not decoding:
            return
        begun = perf_counter()
        members = [lane.member(self.capacity) for lane in decoding]
        records = decode_group([lane.request for lane in decoding], members, self._executor, self._policy)
        found = []
        for lane, record in zip(decoding, records, strict=True):
            lane.tally.add(record)
            # A round's time is that of all its requests; those that decoded before have waited for the chunk, too.
            lane.tally.decode_s += perf_counter() - (started if lane in before else begun)
            found.append(lane.take_in())
        decode_s = perf_counter() - begun
        self._pace.observe_round(decode_s)
        self._totals.add_step(records, decode_s)
        for lane, event in zip(decoding, found, strict=True):
            self._publish(lane, event, events)

    def _drop_cancelled(self, events: list[Event]) -> None:
        for lane in self._table.lanes:
            if lane.ticket.cancelled:
                self._publish(lane, lane.cancel(), events)
        with self._lock:
            dropped = [waiting for waiting in self._queue if waiting.ticket.cancelled]
            for waiting in dropped:
                self._queue.remove(waiting)
        for waiting in dropped:
            lane = self._lane(waiting)
            event = lane.cancel()
            self._settle(lane, event)
            events.append(event)

    def _admit(self) -> None:
        """First come, first served."""
        while self._table.free:
            with self._lock:
                if not self._queue:
                    return
                lane = self._lane(self._queue.popleft())
                self._table.admit(lane)  # under the lock: whoever closes finds it here or in the queue
            self._prefilling.append(lane)

    def _prefill_chunk(self, events: list[Event]) -> None:
        """One chunk of one prompt; then it is the next one's turn, so that a long prompt does not hold up a short."""
        if not self._prefilling:
            return
        lane = self._prefilling[0]
        chunk = min(lane.unread, self._pace.chunk(decoding=bool(self._table.decoding)))
        started = perf_counter()
        verdict = self._executor.prefill(self._table.slot_of(lane), lane.request, chunk)
        prefill_s = perf_counter() - started
        self._pace.observe_chunk(chunk, prefill_s)
        self._totals.add_prefill(prefill_s)
        if verdict is None:
            self._prefilling.rotate(-1)
            return
        lane.request.sequence.commit((verdict.next_id,), verdict.log_probs)
        lane.tally.time_to_first_token_s = perf_counter() - lane.ticket.submitted_at
        event = lane.take_in()
        if event.generation is None:
            self._prefilling.popleft()
            group = len(self._table.decoding) + 1 + len(self._prefilling)  # those will follow soon
            lane.state = self._policy.join(lane.request.params, group)
            self._table.promote(lane)
        self._publish(lane, event, events)

    def _publish(self, lane: Lane, event: Event, events: list[Event]) -> None:
        """Append the event; if it is the request's last, its slot is free from now on."""
        if event.generation is not None:
            if lane in self._prefilling:
                self._prefilling.remove(lane)
            self._table.remove(lane)
            self._settle(lane, event)
        events.append(event)

    def _settle(self, lane: Lane, event: Event) -> None:
        if event.generation is not None:
            self._totals.end_request(lane.ticket.prompt_tokens, len(event.generation.token_ids))
            lane.ticket.finish(event.generation)

    def _lane(self, waiting: _Waiting) -> Lane:
        token_ids = waiting.token_ids
        sequence = TokenSequence(list(token_ids), len(token_ids))
        encoder = self._encoder
        return Lane(
            waiting.ticket,
            Request(sequence, waiting.params, RandomStream(waiting.params.seed)),
            Answer(sequence, waiting.params, encoder.eos_ids, self.capacity, encoder.tokenizer),
            Tally(len(token_ids), 0),
        )

    def _fixed_policy(self) -> GroupPolicy:
        mode, block_size = self.options.mode, self._executor.block_size
        if mode == "scheduled":
            raise InvalidInputError("mode 'scheduled' needs a policy; BatchGenerator.open makes one of the profile")
        if mode == "plain":
            return FixedLengths(0)
        length = self.options.verify_length or block_size
        if length > block_size:
            raise InvalidInputError(f"verify_length is {length}, the drafter's block has {block_size} tokens")
        return FixedLengths(length)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the generator is closed; open another one")

    def _end(self, error: BaseException) -> None:
        """Close, with an error for every request that has no answer."""
        with self._lock:
            self._closed = True
            tickets = [lane.ticket for lane in self._table.lanes] + [waiting.ticket for waiting in self._queue]
            self._queue.clear()
        for ticket in tickets:
            if not ticket.done:
                ticket.fail(error)
        self._table = SlotTable(self.options.slots, self._executor.exchange)
        self._prefilling.clear()
        self._executor.close()
