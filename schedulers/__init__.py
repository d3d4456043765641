"""Scheduler policies: the interface, the built-in ones, and how to find one by name."""

from aioengine.schedulers.policy import (
    API_VERSION,
    AdapterView,
    Decision,
    Location,
    Place,
    PolicyEvent,
    RequestView,
    SchedulerPolicy,
    SchedulerView,
    SlotState,
    SlotView,
    WaitingAdaptersView,
    WaitingView,
)
from aioengine.schedulers.registry import available_policies, load_policy

__all__ = [
    "API_VERSION",
    "AdapterView",
    "Decision",
    "Location",
    "Place",
    "PolicyEvent",
    "RequestView",
    "SchedulerPolicy",
    "SchedulerView",
    "SlotState",
    "SlotView",
    "WaitingAdaptersView",
    "WaitingView",
    "available_policies",
    "load_policy",
]
