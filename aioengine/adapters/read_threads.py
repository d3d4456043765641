"""Blocking reads in threads that may be left behind.

A read from a network mount whose server is gone may never return, and nothing can interrupt it. The
threads of ``concurrent.futures``, asyncio's included, are joined when the interpreter exits, and anyio's
are no daemons either: one such read would keep the process from ending. So each read has a daemon thread
of its own (starting one costs a tenth of a millisecond, a read several), which can be abandoned: nobody
waits for it any more, its result is dropped, and it ends when the read returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """How far a read has come: its thread is inside the context for each call on a file that may not return,
    and others look at it."""

    calls = 0
    """How many have returned."""
    waiting = True
    """Whether it is in one. While it computes it is not; before the first one it is taken to be."""
    running = False
    """Whether there is an attempt that has not ended."""

    def __enter__(self) -> None:
        self.waiting = True

    def __exit__(self, *_: object) -> None:
        self.waiting = False
        self.moved()

    def moved(self) -> None:
        """A call has returned."""
        self.calls += 1


class ReadThreads:
    """All methods are called on one event loop. How many reads run at once is for the caller to bound."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = itertools.count()
        self._running: dict[int, asyncio.Future[None]] = {}
        self._abandoned: dict[int, float] = {}
        """When each was given up."""

    async def run(self, read: Callable[[], T]) -> T:
        """The result of ``read()``, or what it raises. If it is cancelled, the thread is abandoned."""
        number = next(self._number)
        try:
            return await self._start(number, read)
        except asyncio.CancelledError:
            if number in self._running:
                self._abandoned[number] = asyncio.get_running_loop().time()
            raise

    def start(self, read: Callable[[], T]) -> asyncio.Future[T]:
        """Begins ``read()``, whose result anybody may wait for. Whoever cancels the future drops it."""
        return self._start(next(self._number), read)

    def _start(self, number: int, read: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        ended: asyncio.Future[None] = loop.create_future()

        def deliver(value: T | None, error: Exception | None) -> None:
            thread.join()  # it has nothing left to do; whoever sees the result finds it gone
            self._running.pop(number, None)
            self._abandoned.pop(number, None)
            ended.set_result(None)
            if result.done():  # cancelled
                return
            if error is None:
                result.set_result(value)  # type: ignore[arg-type] # a T, for there is no error
            else:
                result.set_exception(error)

        def body() -> None:
            value: T | None = None
            error: Exception | None = None
            try:
                value = read()
            except BaseException as caught:
                error = _for_the_loop(caught)
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is left to tell
                loop.call_soon_threadsafe(deliver, value, error)
            value = error = None  # an error refers to this frame: leave no cycle

        thread = threading.Thread(target=body, name=f"{self._name}-{number}", daemon=True)
        thread.start()
        self._running[number] = ended
        return result

    async def wait(self, seconds: float) -> None:
        """Until every thread has ended; but for so long at most, and for none that was given up so long
        ago."""
        now = asyncio.get_running_loop().time()
        fresh = [
            ended
            for number, ended in self._running.items()
            if number not in self._abandoned or now - self._abandoned[number] < seconds
        ]
        if fresh:
            await asyncio.wait(fresh, timeout=seconds)


def _for_the_loop(error: BaseException) -> Exception:
    """What a task may raise without ending its loop, being taken for a cancellation, or not raising."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(f"the read raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
