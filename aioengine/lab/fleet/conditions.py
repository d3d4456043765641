"""Conditions of a simulated fleet: what its network takes, failures with their times, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from aioengine.config import EngineConfig
from aioengine.fleet.config import FleetConfig


class Fault(NamedTuple):
    """Something that happens to a replica: it is killed, started again with empty caches, cut off from the
    gateway or reachable again, or drained."""

    time: float
    """Seconds from the start of the run."""
    kind: Literal["kill", "start", "cut", "heal", "drain"]
    replica: int
    """Index, from 0."""


class Conditions(NamedTuple):
    """Conditions; the defaults are those of healthy replicas on one network."""

    delay: float = 0.001
    """Seconds that a message takes, each way."""
    report_delay: float = 0.0
    """Additional seconds that reports take, so that knowledge is old when it arrives."""
    detect_seconds: float = 0.05
    """Seconds from a replica's death until the gateway knows of it."""
    skew: Mapping[int, float] = {}
    """Seconds by which each replica's clock differs from the gateway's, by index."""
    scale_seconds: float = 1.0
    """Seconds between two decisions of the scaling policy."""
    start_seconds: float = 30.0
    """Seconds from the decision to add a replica until it takes requests, because its model must be read
    first."""
    faults: Sequence[Fault] = ()


def fleet_config(engine: EngineConfig, *, start_seconds: float = 30.0, **fields: Any) -> FleetConfig:
    """Return the settings of a fleet of simulated engines; ``fields`` are those of FleetConfig. None of its
    steps counts as hung, and a request waits as long as a replica may take to start. Tokens that were
    delivered before a replica was lost are not decoded again."""
    own = {"replay": False, "step_seconds": 1e9, "replica_wait_seconds": 30.0 + start_seconds}
    return FleetConfig(**{"engine": engine, **own, **fields})
