"""Which replicas there are, by what Serve tells the routers that it makes in this process."""

from __future__ import annotations

from collections.abc import Callable

Watcher = Callable[[set[str]], None]

_watchers: dict[str, list[Watcher]] = {}
"""Watchers by application. Serve makes the router in the process that has the handle, and this table is the
only way from there to the door."""
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
    """Tell the watchers which replicas there are; the router calls this."""
    _latest[application] = replicas
    for watcher in list(_watchers.get(application, ())):
        watcher(replicas)
