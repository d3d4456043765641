"""The ids of the replicas, from the routers that Serve makes in this process."""

from __future__ import annotations

from collections.abc import Callable

Watcher = Callable[[set[str]], None]

_watchers: dict[str, list[Watcher]] = {}
"""Watchers by application. Serve makes the router in the process that has the handle, and the router can
reach the gateway only through this table, which is not in the module of the router: Serve copies that one."""
_latest: dict[str, set[str]] = {}


def watch_replicas(application: str, watcher: Watcher) -> Callable[[], None]:
    """Call ``watcher`` with the ids of an application's replicas, now if they are known, and at each change.
    Returns a function that ends this. The calls come from the thread of Serve's router in this process."""
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
    """Tell the watchers the ids of the replicas; the router calls this."""
    _latest[application] = replicas
    for watcher in list(_watchers.get(application, ())):
        watcher(replicas)
