"""Conditions of a simulated fleet: how old a door's knowledge is, and what fails when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

FaultKind = Literal["kill", "start", "cut", "heal", "drain"]


class Fault(NamedTuple):
    """Something that happens to a replica: it is killed, started again with empty caches, cut off from the
    door or reachable again, or drained."""

    time: float
    """Seconds from the start of the run."""
    kind: FaultKind
    replica: int
    """Index, from 0."""


class Conditions(NamedTuple):
    """The defaults are those of replicas on one network that are well."""

    report_seconds: float = 0.05
    """Between two reports of a replica."""
    delay: float = 0.001
    """Seconds that a message takes, each way."""
    report_delay: float = 0.0
    """Seconds that reports take beyond ``delay``: knowledge that is old when it comes."""
    detect_seconds: float = 0.05
    """From a replica's death until the door knows of it."""
    silent_after: float = 3.0
    """Seconds without a report after which the door gives a replica up."""
    skew: Mapping[int, float] = {}
    """Seconds by which a replica's clock differs from the door's, by index."""
    migration_limit: int = 3
    """How often a request is sent to another replica, at most."""
    plan_seconds: float = 10.0
    """Between two plans of the placement policy."""
    scale_seconds: float = 1.0
    """Between two questions to the scaling policy."""
    start_seconds: float = 30.0
    """From the decision to add a replica until it takes requests: its model has to be read first."""
    faults: Sequence[Fault] = ()
