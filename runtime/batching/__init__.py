"""Continuous batching: many requests at once, which join and leave between rounds.

batch_generator.py, options.py, opening.py   the interface, and what it is opened with
ticket.py                                    a request as its sender sees it
lane.py, slot_table.py                       a request as it is decoded, and whose slot is whose
group_round.py, policy.py, pricing.py        the round of a group, what it verifies, and what that costs
executor.py, grouping.py                     target, drafter and acceptance for slots, and which calls that takes
target.py, drafting.py, acceptance.py        the graphs, bound to ranges of slots
prefill_pace.py                              how much of a prompt is read between two rounds
slots.py, windows.py                         one allocation for all slots, and parts of it
probe.py                                     what rounds of a batch take, for a profile
"""

from dspark_edge.engines.errors import ClosedError, QueueFullError
from dspark_edge.runtime.batching.batch_generator import BatchGenerator
from dspark_edge.runtime.batching.executor import Executor
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.policy import GroupScheduling
from dspark_edge.runtime.batching.ticket import Event, Ticket

__all__ = [
    "BatchGenerator",
    "BatchOptions",
    "ClosedError",
    "Event",
    "Executor",
    "GroupScheduling",
    "QueueFullError",
    "Ticket",
]
