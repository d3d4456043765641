"""Conditions of a simulated fleet: what its network takes, and failures with their times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

from aioengine.checks import check_value
from aioengine.errors import ConfigError

FaultKind = Literal["kill", "start", "cut", "heal", "drain"]


class Fault(NamedTuple):
    """Something that happens to a replica: it is killed, started again with empty caches, cut off from the
    gateway or reachable again, or drained."""

    time: float
    """Seconds from the start of the run."""
    kind: FaultKind
    replica: int
    """Index, from 0."""


def parse_faults(text: str, replicas: int) -> tuple[Fault, ...]:
    """Parse "kill:2@60,start:2@90": what happens to which replica, at which second. Raises ConfigError for
    another form, or a replica that is not one of ``replicas``."""
    faults = []
    for item in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(r"(\w+):(\d+)@(\d+(?:\.\d+)?)", item)
        if found is None:
            raise ConfigError(f"faults={text!r}: {item!r} is not KIND:REPLICA@SECONDS, as in kill:2@60")
        kind, index, time = found.groups()
        check_value(f"faults={text!r}: kind", kind, FaultKind)
        if int(index) >= replicas:
            raise ConfigError(f"faults={text!r}: replica {index} is not in 0..{replicas - 1}")
        faults.append(Fault(float(time), cast("FaultKind", kind), int(index)))
    return tuple(faults)


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
