"""What a round drafts and verifies, decided from numbers.

costs.py, correction.py     what a call costs on this device, and what it costs by now
ladder.py, pricing.py       a round's candidates in order, at the price that the engine charges
schedulers.py               how much of each draft to verify, and why that is lossless
history.py                  what earlier rounds say of acceptance
parking.py                  whether to draft at all
whole_blocks.py             whether to draft more than a short block
plan.py                     a round's decision, and what came of it
controller.py               all of these together, as a round uses them
"""

from dspark_edge.runtime.scheduling.controller import Controller, SequenceState
from dspark_edge.runtime.scheduling.correction import CorrectedCosts
from dspark_edge.runtime.scheduling.costs import Costs
from dspark_edge.runtime.scheduling.ladder import Ladder, Proposal
from dspark_edge.runtime.scheduling.parking import Evidence, Parking, ParkingOptions
from dspark_edge.runtime.scheduling.plan import Offer, Plan
from dspark_edge.runtime.scheduling.pricing import Dense, FixedWidth, Packed, Pricing, Serial
from dspark_edge.runtime.scheduling.schedulers import (
    EarlyStop,
    Lagged,
    LookAhead,
    Plain,
    Scheduler,
    Static,
    Threshold,
)

__all__ = [
    "Controller",
    "CorrectedCosts",
    "Costs",
    "Dense",
    "EarlyStop",
    "Evidence",
    "FixedWidth",
    "Ladder",
    "Lagged",
    "LookAhead",
    "Offer",
    "Packed",
    "Parking",
    "ParkingOptions",
    "Plain",
    "Plan",
    "Pricing",
    "Proposal",
    "Scheduler",
    "SequenceState",
    "Serial",
    "Static",
    "Threshold",
]
