"""Fleets of a few replicas, put together by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aioengine.schedulers.routing import FleetState, ReplicaLimits, Report, RouteRequest, Tiers

LIMITS = ReplicaLimits(slots=2, max_running=8, kv_tokens=10_000)


class Fleet:
    """A :class:`FleetState` whose clock the test sets, with replicas r0, r1, ..."""

    def __init__(self, replicas: int = 3, **options: Any) -> None:
        self.now = 100.0
        self.state = FleetState(lambda: self.now, **options)
        for index in range(replicas):
            self.state.join(f"r{index}", LIMITS)

    def report(self, replica: str, tiers: Tiers | None = None, **fields: Any) -> None:
        """Nothing waits and nothing runs there, but for ``fields``."""
        waiting_for: Mapping[str | None, int] = {}
        values: dict[str, Any] = {
            "sent_at": self.now,
            "received": 0,
            "ended": 0,
            "waiting": 0,
            "running": 0,
            "waiting_tokens": 0,
            "free_kv_tokens": LIMITS.kv_tokens,
            "waiting_for": waiting_for,
            "load_seconds": 0.5,
            "slot_seconds": 0.05,
            "seconds_per_token": 1e-4,
        }
        self.state.report(replica, Report(**{**values, **fields}, tiers=tiers))

    def report_all(self, **fields: Any) -> None:
        for replica in list(self.state.view.replicas):
            self.report(replica, Tiers(), **fields)


def request(name: str = "q", adapter: str | None = "a", **fields: Any) -> RouteRequest:
    return RouteRequest(name, adapter, **{"prompt_tokens": 100, "max_tokens": 10, **fields})
