"""The number of replicas, as Ray Serve asks for it: a scaling policy that runs in Serve's controller."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil
from types import SimpleNamespace
from typing import Any

from aioengine.schedulers.routing import load_autoscaler

POLICY_PATH = f"{__name__}:ServeAutoscaler"
METRICS_SECONDS = 0.5
"""Seconds between two reports of a replica to Serve's controller."""


_NOTHING = dict.fromkeys(("waiting", "running", "queue_seconds", "adapters_waiting"), 0.0)
_NOTHING |= dict.fromkeys(("load_seconds", "slot_seconds", "service_seconds"), 0.0) | {"max_running": 1.0}
"""What a scaling policy reads of a ``ReplicaView``, of a replica that has not reported yet."""


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
        accepting = [SimpleNamespace(**{**_NOTHING, **load}) for load in loads.values()]
        view: Any = SimpleNamespace(now=self._clock(), accepting=accepting)
        # Calls that wait at the gateways for a replica: one is enough to start a replica when there is none.
        waiting = 0 if loads else ceil(context.total_queued_requests or 0)
        found = self._policy.replicas(view, context.target_num_replicas, waiting=waiting)
        return found.replicas, {"reason": found.reason}
