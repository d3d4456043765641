"""Runs tokenization and detokenization: short texts on the loop, long ones in separate threads."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from aioengine.errors import EngineStopped

T = TypeVar("T")
Owner = str | None

SHORT = 1024
"""Size (characters, tokens or bytes) up to which work is done on the loop, in about a millisecond."""

MOST = 2**17
"""Values of JSON that are measured; it may contain itself."""

LONG = 2**16
"""Size above which texts leave one thread free for shorter ones."""

RATE = 2**20
"""Expected speed in characters a second."""

EACH = 16
"""Size of an empty text: what each call of the tokenizer takes besides."""


def size_of_all(texts: Collection[Sized]) -> int:
    """Return the size of the work on several texts."""
    return sum(map(len, texts)) + EACH * len(texts)


def size_of_json(value: object) -> int:
    """Return the size of JSON that a chat template may write: its texts, names included, and all values (at
    most ``MOST`` of them)."""
    size, left = 0, [value]
    for _ in range(MOST):
        if not left:
            break
        item = left.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
    return size


class _Waiter(NamedTuple):
    ends: float
    """Virtual time at which the text would end if it ran alone."""
    arrival: int
    size: int
    turn: asyncio.Future[None]
    """Set when a thread is free for the text."""


class _Lane:
    """Queue of texts that wait for threads, by owner: start-time fair queueing (Goyal, Vin and Cheng, 1996).

    An owner's next text starts, in virtual time, where its last one ended, or now if that is later; the one
    that starts first is next. Virtual time is the start of the text that was begun last.
    """

    def __init__(self) -> None:
        self.running = 0
        self._now = 0.0
        self._starts: dict[Owner, float] = {}
        """Start tag of the next text of each owner with texts here."""
        self._waiting: dict[Owner, list[_Waiter]] = {}
        """Waiting texts by owner, as heaps; none is empty."""
        self._here: Counter[Owner] = Counter()
        """Number of texts that run or wait."""

    def begin(self, owner: Owner, size: int) -> None:
        """Note that a text has a thread."""
        self.running += 1
        self._here[owner] += 1
        self._charge(owner, size)

    def end(self, owner: Owner) -> None:
        self.running -= 1
        self._left(owner)

    def put(self, owner: Owner, waiter: _Waiter) -> None:
        self._here[owner] += 1
        heapq.heappush(self._waiting.setdefault(owner, []), waiter)

    def take(self) -> bool:
        """Start the next waiting text. Returns False if there is none."""
        while self._waiting:
            owner = min(self._waiting, key=lambda owner: (self._start(owner), self._waiting[owner][0][:2]))
            waiter = heapq.heappop(self._waiting[owner])
            if not self._waiting[owner]:
                del self._waiting[owner]
            if waiter.turn.done():  # cancelled
                self._left(owner)
                continue
            self.running += 1
            self._charge(owner, waiter.size)
            waiter.turn.set_result(None)
            return True
        return False

    def fail(self, error: Exception) -> None:
        for waiters in self._waiting.values():
            for waiter in waiters:
                if not waiter.turn.done():
                    waiter.turn.set_exception(error)
        self._waiting.clear()

    def _start(self, owner: Owner) -> float:
        return max(self._now, self._starts.get(owner, 0.0))

    def _charge(self, owner: Owner, size: int) -> None:
        self._now = self._start(owner)
        self._starts[owner] = self._now + size

    def _left(self, owner: Owner) -> None:
        self._here[owner] -= 1
        if not self._here[owner]:
            del self._here[owner]
            self._starts.pop(owner, None)


class TextWork:
    """Runs functions whose time grows with a text's length.

    Short ones run at once, on the loop. Longer ones run in ``threads`` threads that nothing else uses.
    Owners have equal shares of these: an owner's text waits at most for those that already run and for one of
    each other owner, even if others send many or long texts. An owner's own texts are done in the order in
    which each would end if it ran alone at ``RATE``, so a long one does not delay the shorter ones behind it,
    and a flood of short ones does not delay a long one for ever. Texts over ``LONG`` have all threads but
    one.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="aioengine-text")
        self._count = threads
        self._jobs: set[Future[Any]] = set()
        self._short, self._long = _Lane(), _Lane()
        self._arrivals = 0
        self._closed = False

    async def run(self, size: int, work: Callable[[], T], owner: Owner = None) -> T:
        """Run ``work()`` and return its result; ``size`` is the length of its text.

        If the call is cancelled while ``work`` runs in a thread, it goes on there and its result is dropped.
        Raises EngineStopped after :meth:`close`.
        """
        if size <= SHORT:
            return work()
        lane = self._long if size > LONG and self._count > 1 else self._short
        await self._turn(lane, owner, size)
        job = self._threads.submit(work)
        loop = asyncio.get_running_loop()
        self._jobs.add(job)

        def ended(job: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._ended, job, lane, owner)

        job.add_done_callback(ended)
        return await asyncio.wrap_future(job)

    async def close(self) -> None:
        """Wait for running work; waiting work fails with EngineStopped."""
        self._closed = True
        for lane in (self._short, self._long):
            lane.fail(EngineStopped("the engine was stopped while the text was to be tokenized"))
        await asyncio.gather(*map(asyncio.wrap_future, self._jobs), return_exceptions=True)
        self._threads.shutdown(wait=True)

    async def _turn(self, lane: _Lane, owner: Owner, size: int) -> None:
        if self._closed:
            raise EngineStopped("the engine has been stopped")
        if self._has_room(lane):
            lane.begin(owner, size)
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._arrivals += 1
        lane.put(owner, _Waiter(loop.time() + size / RATE, self._arrivals, size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                lane.end(owner)
                self._pass_on()
            raise

    def _has_room(self, lane: _Lane) -> bool:
        """Whether a thread is free. Nothing waits while it could run, so a text that finds room is the
        first."""
        if lane is self._long and self._long.running == self._count - 1:
            return False
        return self._short.running + self._long.running < self._count

    def _ended(self, job: Future[Any], lane: _Lane, owner: Owner) -> None:
        self._jobs.discard(job)
        lane.end(owner)
        self._pass_on()

    def _pass_on(self) -> None:
        """Start the next text. A long one comes first if none runs: short ones may use every thread but that
        one."""
        lanes = (self._short, self._long) if self._long.running else (self._long, self._short)
        for lane in lanes:
            while self._has_room(lane) and lane.take():
                pass
