"""The number of replicas, as Ray Serve asks for it: a scaling policy that runs in Serve's controller."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

from aioengine.schedulers.routing import load_autoscaler

POLICY_PATH = f"{__name__}:ServeAutoscaler"
METRICS_SECONDS = 0.5
"""Seconds between two reports of a replica to Serve's controller."""


class Load(NamedTuple):
    """What a scaling policy reads of a :class:`~aioengine.schedulers.routing.ReplicaView`, from reports."""

    waiting: float = 0
    running: float = 0
    max_running: float = 1
    queue_seconds: float = 0
    adapters_waiting: float = 0
    load_seconds: float = 0
    slot_seconds: float = 0
    service_seconds: float = 0


class Fleet(NamedTuple):
    now: float
    accepting: list[Any]


class ServeAutoscaler:
    """Asks the scaling policy that ``spec`` names, and gives it the replicas' reports as means over two
    reports.

    Serve makes it, and calls it about ten times a second with its ``AutoscalingContext``, whose time is not
    used: a system's clock may be set.
    """

    def __init__(self, spec: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = load_autoscaler(spec)
        self._clock = clock

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas, and the reason that Serve shows."""
        loads: dict[Any, dict[str, float]] = {}
        for name, by_replica in (context.aggregated_metrics or {}).items():
            for replica, value in by_replica.items():
                loads.setdefault(replica, {})[name] = value
        view: Any = Fleet(
            self._clock(),
            [Load(**{k: v for k, v in load.items() if k in Load._fields}) for load in loads.values()],
        )
        # Calls that wait at the gateways for a replica: one is enough to start a replica when there is none.
        waiting = 0 if loads else ceil(context.total_queued_requests or 0)
        found = self._policy.replicas(view, context.target_num_replicas, waiting=waiting)
        return found.replicas, {"reason": found.reason}
