"""SharedUsage: each gateway's usage within each limit, exchanged between the gateways of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aioengine.runtime.client import Usage

GATEWAY_SECONDS = 30.0
"""Seconds without a call after which a gateway, with its open requests, counts as gone."""


class SharedUsage:
    """Passes each gateway's usage on to the others. Runs in the registry's actor.

    Args:
        clock: Returns seconds, from any starting point.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._mail: dict[str, dict[str, Usage]] = {}
        """Usage of the other gateways since a gateway's last call, by gateway."""
        self._active: dict[str, dict[str, int]] = {}
        """Requests that each gateway answers now, for each limit."""
        self._told: dict[str, dict[str, int]] = {}
        """Open requests of the other gateways, as last reported to each gateway."""

    def join(self, gateway: str) -> None:
        self._heard[gateway] = self._clock()
        self._mail.setdefault(gateway, {})
        self._active.setdefault(gateway, {})
        self._told.setdefault(gateway, {})

    def leave(self, gateway: str) -> int:
        """Forget a gateway; returns the number of gateways left."""
        for known in (self._heard, self._mail, self._active, self._told):
            known.pop(gateway, None)
        self._forget_silent()
        return len(self._heard)

    def exchange(self, gateway: str, usage: Mapping[str, Usage]) -> dict[str, Usage] | None:
        """Take a gateway's usage since its last call, and return that of the others: by limit the requests
        and tokens since then, and their open requests. None: the gateway is not known, and its usage was not
        counted."""
        if gateway not in self._heard:
            return None
        self._heard[gateway] = self._clock()
        self._forget_silent()
        for other, mail in self._mail.items():
            if other != gateway:
                for name, new in usage.items():
                    before = mail.get(name, Usage())
                    mail[name] = Usage(before.requests + new.requests, before.tokens + new.tokens)
        mine = self._active[gateway]
        for name, new in usage.items():
            mine[name] = new.active
            if not new.active:
                del mine[name]
        found, self._mail[gateway] = self._mail[gateway], {}
        return self._with_active(gateway, found)

    def _with_active(self, gateway: str, found: dict[str, Usage]) -> dict[str, Usage]:
        now: dict[str, int] = {}
        for other, active in self._active.items():
            if other != gateway:
                for name, count in active.items():
                    now[name] = now.get(name, 0) + count
        told = self._told[gateway]
        for name in {*now, *told, *found}:
            count = now.get(name, 0)
            if name in found or told.get(name, 0) != count:
                found[name] = found.get(name, Usage())._replace(active=count)
        self._told[gateway] = {name: count for name, count in now.items() if count}
        return found

    def _forget_silent(self) -> None:
        due = self._clock() - GATEWAY_SECONDS
        for gateway in [gateway for gateway, heard in self._heard.items() if heard < due]:
            for known in (self._heard, self._mail, self._active, self._told):
                known.pop(gateway, None)
