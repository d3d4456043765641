"""Runs blocking reads in threads that can be abandoned.

A read from a network mount whose server is gone may never return, and nothing can interrupt it. The threads
of ``concurrent.futures``, asyncio's included, are joined when the interpreter exits, and anyio's threads are
no daemons either: one such read would keep the process from ending. So each read has a daemon thread of its
own. (Starting one takes a tenth of a millisecond, a read takes several.) The thread can be abandoned: nobody
waits for it any more, its result is dropped, and it ends when the read returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Progress:
    """Progress of a read of the folder ``path``. Its thread enters the context around each file operation
    that may hang; other threads watch it."""

    calls = 0
    """Number of operations that have returned."""
    waiting = True
    """Whether the read is inside an operation. False while it computes; True before the first operation."""
    running = False
    """Whether an attempt is under way."""
    stuck = False
    """Whether it was found to make no progress."""
    over = False
    """Whether nobody waits for it any more; one that still runs was abandoned."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def __enter__(self) -> None:
        self.waiting = True

    def __exit__(self, *_: object) -> None:
        self.waiting = False
        self.moved()

    def moved(self) -> None:
        """Record that an operation has returned."""
        self.calls += 1


def start_read(name: str, read: Callable[[], T]) -> asyncio.Future[T]:
    """Start ``read()`` in a thread of this name and return a future of its result. Cancelling the future
    abandons the thread."""
    found: Future[T] = Future()
    found.set_running_or_notify_cancel()  # from now on it is not cancelled together with the other
    Thread(target=_run, args=(read, found), name=name, daemon=True).start()
    return asyncio.wrap_future(found)


def _run(read: Callable[[], T], found: Future[T]) -> None:
    """Run ``read()`` for its future."""
    try:
        found.set_result(read())
    except BaseException as error:
        found.set_exception(for_the_loop(error, "the read"))
        del read, found  # the error's frames refer to them: leave no cycle


def for_the_loop(error: BaseException, what: str) -> Exception:
    """Convert exceptions that a future cannot carry (StopIteration) or that would end the loop. ``what``: who
    raised it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(f"{what} raised {error!r}")
    wrapped.__cause__ = error
    return wrapped


class SharedRead(Generic[T]):
    """A read whose result is kept, in one thread however many ask for it while a disk hangs. After one that
    has failed the next caller reads again. Calls are on one event loop."""

    def __init__(self, name: str, read: Callable[[], T]) -> None:
        self._name, self._read = name, read
        self._reading: asyncio.Future[T] | None = None

    async def result(self) -> T:
        reading = self._reading
        if reading is None or (reading.done() and reading.exception()):
            reading = self._reading = start_read(self._name, self._read)
        return await asyncio.shield(reading)
