"""Listeners of events, and streams for callers that prefer an async iterator to a callback."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet, ref

from aioengine.checks import Count, check_value
from aioengine.errors import ConfigError
from aioengine.events import Event, EventsLost

logger = logging.getLogger("aioengine")
E = TypeVar("E", bound=Event)

BUFFER = 10_000
"""Number of events kept for a reader that is behind."""

Listener = Callable[[Event], None]


class ForeignCode:
    """Takes what code of the engine's users, its listeners and resolvers, raises. That may be anything, a
    CancelledError too, and must not stop the engine. Every failure is counted, and the first of its kind is
    logged."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """By what has failed: "listener" or "resolver"."""
        self._logged: set[tuple[object, ...]] = set()

    def failed(self, what: str, code: object, error: BaseException, on: str) -> None:
        """Note that ``code``, a listener or resolver, has failed on something. Raises KeyboardInterrupt
        again."""
        if isinstance(error, KeyboardInterrupt):
            raise error
        self.failures[what] += 1
        name = getattr(code, "__qualname__", type(code).__qualname__)
        if (kind := (what, name, type(error))) not in self._logged:
            self._logged.add(kind)
            logger.error(
                "the %s %s failed on %s (logged once, counted each time)", what, name, on, exc_info=error
            )


class Listeners:
    """Callbacks for events, each for all of them or for some types, called in the order of their coming. The
    same one may be added several times."""

    def __init__(self) -> None:
        self.foreign = ForeignCode()
        self._all: dict[object, tuple[Listener, tuple[type[Event], ...]]] = {}
        """Each with the types that it was added for."""
        self._of: dict[type[Event], tuple[Listener, ...]] = {}
        self._streams: WeakSet[EventStream[Any]] = WeakSet()
        self._ended = False

    def add(self, listener: Listener, *types: type[Event]) -> Callable[[], None]:
        """Call ``listener`` for every event, or for those of these types; returns a function that ends it.
        Raises ConfigError for what is no type of events."""
        for kind in types:
            if not (isinstance(kind, type) and issubclass(kind, Event)):
                raise ConfigError(f"{kind!r}: must be a class of aioengine.events")
        key = object()
        self._all[key] = listener, types or (Event,)
        self._of.clear()

        def remove() -> None:
            self._all.pop(key, None)
            self._of.clear()

        return remove

    def of(self, kind: type[Event]) -> tuple[Listener, ...]:
        """Return the listeners that want events of this type."""
        found = self._of.get(kind)
        if found is None:
            wanting = [listener for listener, types in self._all.values() if issubclass(kind, types)]
            found = self._of[kind] = tuple(wanting)
        return found

    def __call__(self, event: Event) -> None:
        for listener in self.of(type(event)):
            try:
                listener(event)
            except BaseException as error:
                self.foreign.failed("listener", listener, error, type(event).__name__)

    def stream(self, types: tuple[type[E], ...], buffer: int) -> EventStream[E]:
        """Open a stream of these event types; of all, if none are given. Raises ConfigError for other
        types."""
        check_value("buffer", buffer, Count)
        stream: EventStream[E] = EventStream(buffer, types, self)
        self._streams.add(stream)
        if self._ended:
            stream.end()
        return stream

    def end_streams(self) -> None:
        """End all streams; streams opened later end at once."""
        self._ended = True
        for stream in self._streams:
            stream.end()


class EventStream(Generic[E]):
    """An async iterator over the events from the moment it was made; ``AsyncEngine.events`` makes it.

    The engine never waits for a reader. A reader that falls behind by more than the buffer loses the oldest
    events, and reads an :class:`~aioengine.events.EventsLost` in their place. The stream ends when the engine
    has stopped, after the last event. Leave it with ``aclose()``, ``async with``, or by dropping it.
    Cancelling the task that waits for an event loses none.
    """

    def __init__(self, buffer: int, types: tuple[type[E], ...], listeners: Listeners) -> None:
        def deliver(event: Event) -> None:
            stream = itself()
            if stream is None:  # its reader has dropped it
                leave()
            else:
                stream._offer(event)  # type: ignore[arg-type] # the listener is for these types

        itself = ref(self)
        leave = self._leave = listeners.add(deliver, *types)
        self._events: deque[E] = deque()
        self._buffer = buffer
        self._lost = 0
        self._lost_until = 0.0
        self._ready = asyncio.Event()
        self._open = True

    def _offer(self, event: E) -> None:
        if not self._open:
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
        while not (self._lost or self._events):
            if not self._open:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        if self._lost:
            count, self._lost = self._lost, 0
            return EventsLost(time=self._lost_until, count=count)
        return self._events.popleft()

    async def aclose(self) -> None:
        """Stop the stream, and drop unread events."""
        self._events.clear()
        self._lost = 0
        self.end()
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
