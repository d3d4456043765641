"""Listeners of events, and what else of the engine's users' code may fail without harm."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from aioengine.errors import ConfigError
from aioengine.events import Event

logger = logging.getLogger("aioengine")

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
