"""SharedUsage: each gateway's usage within each limit, exchanged between the gateways of a fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aioengine.runtime.client import Usage

GATEWAY_SECONDS = 30.0
"""Seconds without a call after which a gateway, with its open requests, counts as gone."""


@dataclass(slots=True)
class _Gateway:
    heard: float
    mail: dict[str, Usage] = field(default_factory=dict)
    """Usage of the other gateways since its last call."""
    active: Counter[str] = field(default_factory=Counter)
    """Requests that it answers now, for each limit."""


class SharedUsage:
    """Passes each gateway's usage on to the others. Runs in the registry's actor.

    Args:
        clock: Returns seconds, from any starting point.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gateways: dict[str, _Gateway] = {}

    def join(self, gateway: str) -> None:
        self._gateways.setdefault(gateway, _Gateway(0.0)).heard = self._clock()

    def leave(self, gateway: str) -> int:
        """Forget a gateway; returns the number of gateways left."""
        self._gateways.pop(gateway, None)
        self._forget_silent()
        return len(self._gateways)

    def exchange(self, gateway: str, usage: Mapping[str, Usage]) -> dict[str, Usage] | None:
        """Take a gateway's usage since its last call, and return that of the others: by limit the requests
        and tokens since then, and their open requests, unless there are none of either. None: the gateway is
        not known, and its usage was not counted."""
        own = self._gateways.get(gateway)
        if own is None:
            return None
        own.heard = self._clock()
        self._forget_silent()
        others = [other for other in self._gateways.values() if other is not own]
        for other in others:
            for name, new in usage.items():
                other.mail[name] = other.mail.get(name, Usage()).then(new)
        own.active = Counter({**own.active, **{name: new.active for name, new in usage.items()}})
        own.active = +own.active  # without those that have none
        found, own.mail = own.mail, {}
        now = sum((other.active for other in others), Counter[str]())
        return {name: found.get(name, Usage())._replace(active=now[name]) for name in {*now, *found}}

    def _forget_silent(self) -> None:
        due = self._clock() - GATEWAY_SECONDS
        self._gateways = {name: each for name, each in self._gateways.items() if each.heard >= due}
