"""Errors of adapters that can not be kept or placed, and errors that are kept."""

from __future__ import annotations

import copy
from typing import TypeVar

from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterChanged, AdapterTooLarge, EngineOverloaded

E = TypeVar("E", bound=BaseException)


def frameless(error: E) -> E:
    """Return a copy of an error that is kept, or is raised because it was kept. Tracebacks, and those of its
    causes, would keep all that their frames hold: the content of a file, the body of a request."""
    found = copy.copy(error)
    found.__cause__ = error.__cause__
    causes, seen = [error.__cause__], set[int]()
    while causes:
        cause = causes.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            cause.__traceback__ = None
            causes += [cause.__cause__, cause.__context__]
    return found


def changed(entry: AdapterEntry, why: str) -> AdapterChanged:
    """Build the error of an adapter whose files have changed."""
    return AdapterChanged(f"its files have changed {why}", name=entry.label, path=entry.path, transient=True)


def too_large(entry: AdapterEntry, why: str) -> AdapterTooLarge:
    return AdapterTooLarge(f"it takes {why}", name=entry.label, path=entry.path)


def shut_out(entry: AdapterEntry, why: str, todo: str) -> EngineOverloaded:
    """Build the error of an adapter that pinned ones leave no room for."""
    return EngineOverloaded(f"adapter {entry.label!r} ({entry.path}) {why}; {todo}", bound="pinned")
