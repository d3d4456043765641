"""Conditions of a simulated fleet: the age of a door's knowledge, and failures with their times."""

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
    """Conditions; the defaults are those of healthy replicas on one network."""

    report_seconds: float = 0.05
    """Seconds between two reports of a replica."""
    delay: float = 0.001
    """Seconds that a message takes, each way."""
    report_delay: float = 0.0
    """Additional seconds that reports take, so that knowledge is old when it arrives."""
    detect_seconds: float = 0.05
    """Seconds from a replica's death until the door knows of it."""
    silent_after: float = 3.0
    """Seconds without a report after which the door gives a replica up."""
    skew: Mapping[int, float] = {}
    """Seconds by which each replica's clock differs from the door's, by index."""
    migration_limit: int = 3
    """Maximum number of times that a request is sent to another replica."""
    plan_seconds: float = 10.0
    """Seconds between two plans of the placement policy."""
    scale_seconds: float = 1.0
    """Seconds between two decisions of the scaling policy."""
    start_seconds: float = 30.0
    """Seconds from the decision to add a replica until it takes requests, because its model must be read
    first."""
    faults: Sequence[Fault] = ()
