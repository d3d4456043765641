"""Streams of events, for callers that prefer an async iterator to a callback."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet

from aioengine.checks import check_integer
from aioengine.errors import ConfigError
from aioengine.events import Event, EventsLost

E = TypeVar("E", bound=Event)

BUFFER = 10_000
"""Number of events kept for a reader that is behind."""


class EventStream(Generic[E]):
    """An async iterator over the events from the moment it was made; ``AsyncEngine.events`` makes it.

    The engine never waits for a reader. A reader that falls behind by more than the buffer loses the oldest
    events, and reads an :class:`~aioengine.events.EventsLost` in their place. The stream ends when the engine
    has stopped, after the last event. Leave it with ``aclose()``, ``async with``, or by dropping it.
    Cancelling the task that waits for an event loses none.
    """

    def __init__(self, types: tuple[type[E], ...], buffer: int, closed: Callable[[Any], None]) -> None:
        self._types = types
        self._closed = closed
        self._events: deque[E] = deque()
        self._buffer = buffer
        self._lost = 0
        self._lost_until = 0.0
        self._ready = asyncio.Event()
        self._open = True

    def offer(self, event: Event) -> None:
        """Add the event if its type is wanted."""
        if not self._open or not isinstance(event, self._types):
            return
        if len(self._events) >= self._buffer:
            self._lost += 1
            self._lost_until = self._events.popleft().time
        self._events.append(event)
        self._ready.set()

    def end(self) -> None:
        """Mark the end of the stream."""
        self._open = False
        self._ready.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E | EventsLost:
        while True:
            if self._lost:
                count, self._lost = self._lost, 0
                return EventsLost(time=self._lost_until, count=count)
            if self._events:
                return self._events.popleft()
            if not self._open:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()

    async def aclose(self) -> None:
        """Stop the stream, and drop unread events."""
        self._events.clear()
        self._lost = 0
        self.end()
        self._closed(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class EventStreams:
    """The open streams of an engine; an event listener."""

    def __init__(self) -> None:
        # Weak references, so that a stream that its reader has dropped is freed, closed or not.
        self._streams: WeakSet[EventStream[Any]] = WeakSet()
        self._ended = self._was_used = False

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, types: tuple[type[E], ...], buffer: int) -> EventStream[E]:
        """Open a stream of these event types; of all, if none are given. Raises ConfigError for other
        types."""
        check_integer("buffer", buffer, low=1)
        for kind in types:
            if not (isinstance(kind, type) and issubclass(kind, Event)):
                raise ConfigError(f"events({kind!r}): must be a class of aioengine.events")
        wanted: tuple[Any, ...] = types or (Event,)
        stream: EventStream[E] = EventStream(wanted, buffer, self._streams.discard)
        self._streams.add(stream)
        self._was_used = True
        if self._ended:
            stream.end()
        return stream

    def __call__(self, event: Event) -> None:
        if not self._was_used:  # iterating over an empty WeakSet takes longer than this check
            return
        for stream in self._streams:
            stream.offer(event)

    def end(self) -> None:
        """End all streams; streams opened later end at once."""
        self._ended = True
        for stream in self._streams:
            stream.end()
