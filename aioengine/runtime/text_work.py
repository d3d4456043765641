"""Where text is turned into tokens and back: short texts on the loop, long ones in threads of their own."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from aioengine.errors import EngineStopped

T = TypeVar("T")

SHORT = 1024
"""Characters, tokens or bytes that are worked on at once, on the loop, which takes about a millisecond."""

RATE = 2**20
"""Characters a second that a text is expected to take."""

CHAT = 2**20
"""What a chat counts as, whose text is not known before its template has run."""


class TextWork:
    """Runs functions whose time grows with a text's length.

    Short ones run at once, on the loop. Long ones run in ``threads`` threads that nothing else uses, in the
    order in which each would end if it ran alone, at ``RATE``: so that who sends long texts delays nobody's
    shorter ones by more than those that are under way, and no flood of short ones delays a long one for ever.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="aioengine-text")
        self._free = threads
        self._jobs: set[Future[Any]] = set()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        """A heap of (when it would end alone, order of arrival, set when a thread is free)."""
        self._arrivals = 0
        self._closed = False

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """``work()``, and what it raises; ``size`` is the length of its text.

        Cancelled while it runs in a thread, it goes on there, unheard. Raises EngineStopped after
        :meth:`close`.
        """
        if size <= SHORT:
            return work()
        await self._turn(size)
        job = self._threads.submit(work)
        loop = asyncio.get_running_loop()
        self._jobs.add(job)

        def ended(job: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._ended, job)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    async def close(self) -> None:
        """Wait for what runs; what waits fails with EngineStopped."""
        self._closed = True
        for _, _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(EngineStopped("the engine was stopped while the text was to be tokenized"))
        await asyncio.gather(*map(asyncio.wrap_future, self._jobs), return_exceptions=True)
        self._threads.shutdown(wait=True)

    async def _turn(self, size: int) -> None:
        if self._closed:
            raise EngineStopped("the engine has been stopped")
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._arrivals += 1
        heapq.heappush(self._waiting, (loop.time() + size / RATE, self._arrivals, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()
            raise

    def _ended(self, job: Future[Any]) -> None:
        self._jobs.discard(job)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
