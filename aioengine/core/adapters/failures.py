"""Recent failures of adapters, and when each may be tried again."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

from aioengine.errors import AdapterError

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
MAX_NAMES = 1024
"""Maximum number of remembered names. The oldest failures are forgotten first; those adapters are tried again
at once."""


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


class _Failure(NamedTuple):
    times: int
    error: AdapterError
    at: float
    until: float


class Failures:
    """Failures by name, so that they are remembered even if the folder is looked up again. After one failure
    a retry may follow at once; from the second in a row on there is a pause, which doubles each time."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Failure] = {}

    def add(self, name: str, error: AdapterError, now: float) -> None:
        """Count a failure. ``error`` is kept, so it must be :func:`frameless`. Those that waited for the same
        read say the same error at about the same time, which counts once."""
        last = self._by_name.get(name)
        if last is not None and last.error is error and now < last.at + FIRST_SECONDS:
            return
        self._by_name.pop(name, None)
        count = 1 if last is None else last.times + 1
        pause = 0.0 if count == 1 else min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(count - 2, 10))
        while len(self._by_name) >= MAX_NAMES:
            del self._by_name[next(iter(self._by_name))]
        self._by_name[name] = _Failure(count, error, now, now + pause)

    def times(self, name: str) -> int:
        """Return the number of failures in a row."""
        failure = self._by_name.get(name)
        return 0 if failure is None else failure.times

    def forget(self, name: str) -> None:
        """Forget the failures of an adapter that has been read."""
        self._by_name.pop(name, None)

    def check(self, name: str, now: float) -> None:
        """Raise its last error again if its pause is not over."""
        failure = self._by_name.get(name)
        if failure is None or now >= failure.until:
            return
        error, seconds = failure.error, failure.until - now
        raise type(error)(
            f"{error.reason} (failed {failure.times} times; requests try it again in {seconds:.1f} s)",
            name=name,
            path=error.path,
            transient=error.transient,
        )
