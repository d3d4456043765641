"""Listeners of events, and streams for callers that prefer an async iterator to a callback."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Self, TypeVar
from weakref import WeakSet, ref

from aioengine.checks import Count, check_value
from aioengine.errors import ConfigError
from aioengine.events import Event, EventsLost, StepFinished, StepsFinished, TokenInterval
from aioengine.runtime.foreign import ForeignCode

E = TypeVar("E", bound=Event)

BUFFER = 10_000
"""Number of events kept for a reader that is behind."""

Listener = Callable[[Event], None]
Took = tuple[float, float, tuple[TokenInterval, ...]]
"""End of a step, its duration, and the intervals of its tokens."""
Decided = tuple[float, float]
"""Seconds that core and policy took, and those of the policy alone."""


@dataclass(frozen=True, eq=False, slots=True)
class _Registration:
    """Listener with the types that it was added for; the same listener may be added several times."""

    listener: Listener
    types: tuple[type[Event], ...]

    def wants(self, kind: type[Event]) -> bool:
        if kind is StepsFinished:
            return kind in self.types
        if kind is StepFinished and StepsFinished in self.types:
            return False
        return issubclass(kind, self.types)


class Listeners:
    """Callbacks for events, each for all of them or for some types, called in the order of their coming."""

    def __init__(self, foreign: ForeignCode) -> None:
        self._foreign = foreign
        self._all: list[_Registration] = []
        self._of: dict[type[Event], tuple[Listener, ...]] = {}
        self._streams: WeakSet[EventStream[Any]] = WeakSet()
        self._ended = False

    def add(self, listener: Listener, *types: type[Event]) -> Callable[[], None]:
        """Call ``listener`` for every event, or for those of these types; returns a function that ends it.
        Raises ConfigError for what is no type of events."""
        for kind in types:
            if not (isinstance(kind, type) and issubclass(kind, Event)):
                raise ConfigError(f"{kind!r}: must be a class of aioengine.events")
        added = _Registration(listener, types or (Event,))
        self._all.append(added)
        self._of = {}
        return partial(self._remove, added)

    def _remove(self, added: _Registration) -> None:
        self._all = [item for item in self._all if item is not added]
        self._of = {}

    def of(self, kind: type[Event]) -> tuple[Listener, ...]:
        """Return the listeners that want events of this type."""
        found = self._of.get(kind)
        if found is None:
            found = self._of[kind] = tuple([item.listener for item in self._all if item.wants(kind)])
        return found

    def __call__(self, event: Event) -> None:
        for listener in self.of(type(event)):
            try:
                listener(event)
            except BaseException as error:
                self._foreign.failed("listener", listener, error, type(event).__name__)

    def of_steps(
        self, first: int, contents: dict[str, Any], took: Sequence[Took], decided: Decided
    ) -> list[Event]:
        """Return the events about steps that ended one after the other, for the listeners that there are:
        ``first`` is the number of the first one, and ``contents`` have the fields of
        :class:`~aioengine.step.StepContents`, which are the same for all."""
        found: list[Event] = []
        if self.of(StepFinished):
            found += [
                StepFinished(
                    time=end,
                    step=step,
                    seconds=seconds,
                    schedule_seconds=decided[0],
                    policy_seconds=decided[1],
                    intervals=intervals,
                    **contents,
                )
                for step, (end, seconds, intervals) in enumerate(took, first)
            ]
        if self.of(StepsFinished):
            each = tuple([seconds for _, seconds, _ in took])
            found.append(StepsFinished(time=took[-1][0], first=first, seconds=each, **contents))
        return found

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
                stream._offer(event)

        itself = ref(self)
        leave = self._leave = listeners.add(deliver, *types)
        self._events: deque[Any] = deque()
        self._buffer = buffer
        self._lost = 0
        self._lost_until = 0.0
        self._ready = asyncio.Event()
        self._open = True

    def _offer(self, event: Event) -> None:
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
        event: E = self._events.popleft()
        return event

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
