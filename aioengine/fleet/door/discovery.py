"""Which replicas there are, by what Serve tells the routers that it makes in this process."""

from __future__ import annotations

from collections.abc import Callable

Watcher = Callable[[set[str]], None]

_watchers: dict[str, list[Watcher]] = {}
"""By application. Serve makes the router in whatever process has a handle, and there is no other way from it
to the door in that process."""
_latest: dict[str, set[str]] = {}


def watch_replicas(application: str, watcher: Watcher) -> Callable[[], None]:
    """Have ``watcher`` told the ids of an application's replicas, now if they are known, and whenever they
    change; returns what ends it. It is told in whatever thread Serve's router has in this process."""
    watchers = _watchers.setdefault(application, [])
    watchers.append(watcher)
    if application in _latest:
        watcher(_latest[application])

    def end() -> None:
        watchers.remove(watcher)
        if not watchers:
            _latest.pop(application, None)

    return end


def replicas_changed(application: str, replicas: set[str]) -> None:
    """What a router calls."""
    _latest[application] = replicas
    for watcher in list(_watchers.get(application, ())):
        watcher(replicas)
