"""Conditions of a simulated fleet: what its network takes, and failures with their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from aioengine.checks import nearest
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
        kind, _, rest = item.partition(":")
        index, _, time = rest.partition("@")
        try:
            fault = Fault(float(time), kind, int(index))  # type: ignore[arg-type] # checked below
        except ValueError:
            raise ConfigError(
                f"faults={text!r}: {item!r} is not of the form KIND:REPLICA@SECONDS, as in kill:2@60"
            ) from None
        if kind not in get_args(FaultKind):
            known = ", ".join(get_args(FaultKind))
            near = nearest(kind, get_args(FaultKind))
            raise ConfigError(f"faults={text!r}: there is no {kind!r}{near}; there are {known}")
        if not 0 <= fault.replica < replicas:
            raise ConfigError(f"faults={text!r}: replica {index} is not in 0..{replicas - 1}")
        if not 0 <= fault.time < float("inf"):
            raise ConfigError(f"faults={text!r}: the time of {item!r} must be 0 or more")
        faults.append(fault)
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
