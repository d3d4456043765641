"""SharedUsage: each door's usage within each limit, exchanged between the doors of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aioengine.runtime.client import Usage

DOOR_SECONDS = 30.0
"""Seconds without a call after which a door, with its open requests, counts as gone."""


class SharedUsage:
    """Passes each door's usage on to the others. Runs in the registry's actor.

    Args:
        clock: Returns seconds, from any starting point.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._mail: dict[str, dict[str, Usage]] = {}
        """Usage of the other doors since a door's last call, by door."""
        self._active: dict[str, dict[str, int]] = {}
        """Requests that each door answers now, for each limit."""
        self._told: dict[str, dict[str, int]] = {}
        """Open requests of the other doors, as last reported to each door."""

    def join(self, door: str) -> None:
        self._heard[door] = self._clock()
        self._mail.setdefault(door, {})
        self._active.setdefault(door, {})
        self._told.setdefault(door, {})

    def leave(self, door: str) -> int:
        """Forget a door; returns the number of doors left."""
        for known in (self._heard, self._mail, self._active, self._told):
            known.pop(door, None)
        self._forget_silent()
        return len(self._heard)

    def exchange(self, door: str, usage: Mapping[str, Usage]) -> dict[str, Usage] | None:
        """Take a door's usage since its last call, and return that of the others: by limit the requests and
        tokens since then, and their open requests. None: the door is not known, and its usage was not
        counted."""
        if door not in self._heard:
            return None
        self._heard[door] = self._clock()
        self._forget_silent()
        for other, mail in self._mail.items():
            if other != door:
                for name, new in usage.items():
                    before = mail.get(name, Usage())
                    mail[name] = Usage(before.requests + new.requests, before.tokens + new.tokens)
        mine = self._active[door]
        for name, new in usage.items():
            mine[name] = new.active
            if not new.active:
                del mine[name]
        found, self._mail[door] = self._mail[door], {}
        return self._with_active(door, found)

    def _with_active(self, door: str, found: dict[str, Usage]) -> dict[str, Usage]:
        now: dict[str, int] = {}
        for other, active in self._active.items():
            if other != door:
                for name, count in active.items():
                    now[name] = now.get(name, 0) + count
        told = self._told[door]
        for name in {*now, *told, *found}:
            count = now.get(name, 0)
            if name in found or told.get(name, 0) != count:
                found[name] = found.get(name, Usage())._replace(active=count)
        self._told[door] = {name: count for name, count in now.items() if count}
        return found

    def _forget_silent(self) -> None:
        due = self._clock() - DOOR_SECONDS
        for door in [door for door, heard in self._heard.items() if heard < due]:
            for known in (self._heard, self._mail, self._active, self._told):
                known.pop(door, None)
