"""Beliefs: what gateways believed of a replica's memory when they chose it."""

from __future__ import annotations

from aioengine import events
from aioengine.fleet.outbox import Outbox
from aioengine.fleet.wire import Delta


class Beliefs:
    """Adapters that gateways believed to be in memory when they chose this replica. If such an adapter is on
    disk when the request arrives, the gateway is told. It is a listener of the engine's events."""

    def __init__(self) -> None:
        self._believed: dict[str, tuple[Outbox, int]] = {}

    def believed(self, request_id: str, box: Outbox, key: int) -> None:
        """Note a gateway's belief about a request's adapter. ``key`` is the gateway's number for the
        request."""
        self._believed[request_id] = box, key

    def forget(self, request_id: str) -> None:
        self._believed.pop(request_id, None)

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.RequestAdded):
            told = self._believed.pop(event.request_id, None)
            if told is not None and event.location == "disk":
                box, key = told
                box.put(Delta(key, misrouted=True))
