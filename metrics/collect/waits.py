"""Measures from events how long each request waited for its adapter."""

from __future__ import annotations

from aioengine import events
from aioengine.metrics.collect.residency import ResidencyTracker, Version


class _Live:
    __slots__ = ("absent_before", "version", "waiting")

    def __init__(self, version: Version, absent_before: float) -> None:
        self.version = version
        self.absent_before = absent_before
        self.waiting = True


class AdapterWaits:
    """Follows requests for adapters from arrival to end, in O(1) for each event.

    A request's wait is the time that its adapter was in no slot between its arrival and its first
    admission; :class:`Version` has the total time that a version was in no slot.
    """

    def __init__(self, residency: ResidencyTracker) -> None:
        self._residency = residency
        self._live: dict[str, _Live] = {}

    def added(self, event: events.RequestAdded) -> None:
        if event.adapter is not None:
            version = self._residency.current(event.adapter, event.time)
            self._live[event.request_id] = _Live(version, version.absent(event.time))
            version.wait_begins(event.time)

    def admitted(self, event: events.RequestAdmitted) -> float | None:
        """Return the wait in seconds; None without an adapter, or if the request was admitted before."""
        live = self._live.get(event.request_id)
        if live is None:
            return None
        live.waiting = False
        live.version.wait_ends()
        return None if event.resumed else live.version.absent(event.time) - live.absent_before

    def preempted(self, event: events.RequestPreempted) -> None:
        live = self._live.get(event.request_id)
        if live is not None:
            live.waiting = True
            live.version.wait_begins(event.time)

    def ended(self, event: events.RequestEnded) -> None:
        live = self._live.pop(event.request_id, None)
        if live is not None and live.waiting:
            live.version.wait_ends()
