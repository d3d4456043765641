"""Scheduler policies: the interface, the built-in ones, and how to find one by name."""

from aioengine.schedulers.parts.base import Ordering, Part, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policy import (
    API_VERSION,
    AdapterView,
    CostsView,
    Decision,
    Location,
    MemoryView,
    Place,
    PolicyEvent,
    Refusal,
    RequestView,
    SchedulerPolicy,
    SchedulerView,
    SlotState,
    SlotView,
    WaitingAdaptersView,
    WaitingView,
)
from aioengine.schedulers.registry import available_parts, available_policies, compose, load_policy

__all__ = [
    "API_VERSION",
    "AdapterView",
    "Composed",
    "CostsView",
    "Decision",
    "Location",
    "MemoryView",
    "Ordering",
    "Part",
    "Place",
    "PolicyEvent",
    "Preemption",
    "Prefetch",
    "Refusal",
    "Replacement",
    "RequestView",
    "SchedulerPolicy",
    "SchedulerView",
    "SlotState",
    "SlotView",
    "WaitingAdaptersView",
    "WaitingView",
    "available_parts",
    "available_policies",
    "compose",
    "load_policy",
]
