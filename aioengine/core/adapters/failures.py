"""Errors of adapters that are kept."""

from __future__ import annotations

import copy
from typing import TypeVar

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
