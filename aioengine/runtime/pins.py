"""Pinned adapters: how many there may be, and waiting until one is in its slot.

The core places a pinned adapter in a slot as soon as one is idle, and never takes it out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aioengine import events
from aioengine.errors import AdapterNotFound, ConfigError
from aioengine.runtime.loop import Stepper
from aioengine.schedulers.policy import Location


@dataclass
class _Claim:
    """Of all those at once who have a name pinned."""

    settled: bool
    """It was pinned before them, or one of them has succeeded: then it stays pinned if the others fail."""
    count: int = 0


class Pins:
    def __init__(self, stepper: Stepper, max_loras: int) -> None:
        self._stepper = stepper
        self._current = stepper.core.residency.current
        self._max_loras = max_loras
        self._claims: dict[str, _Claim] = {}
        self._waits: list[_Wait] = []

    @contextmanager
    def claim(self, name: str, *, force: bool) -> Iterator[None]:
        """Counts ``name`` as pinned while it is on its way.

        Raises ConfigError if that would leave no slot for the others; with ``force``, if there is none
        for itself.
        """
        others = {label for label, entry in self._current.items() if entry.pinned} | self._claims.keys()
        others.discard(name)
        if len(others) >= (self._max_loras if force else self._max_loras - 1):
            todo = "unpin one or raise LoRAConfig.max_loras"
            if not force:
                todo = f"one must stay free for the others: {todo}, or force it if no others are to be served"
            raise ConfigError(
                f"adapter {name!r} cannot be pinned: {len(others)} of max_loras={self._max_loras} slots are "
                f"pinned already ({', '.join(sorted(others)) or 'none'}); {todo}"
            )
        entry = self._current.get(name)
        claim = self._claims.setdefault(name, _Claim(settled=entry is not None and entry.pinned))
        claim.count += 1
        try:
            yield
        finally:
            claim.count -= 1
            if not claim.count:
                del self._claims[name]

    async def in_slot(self, name: str) -> None:
        """Wait until ``name``, which is claimed and whose current version is pinned, is in a slot or is
        pinned no more. If that fails or is cancelled it is unpinned, unless it was pinned before or others
        have it pinned too.

        Raises AdapterNotFound if it is unloaded meanwhile, AdapterLoadError if the copy fails, and
        EngineStopped or EngineDead.
        """
        wait = _Wait(self._stepper, name)
        self._waits.append(wait)
        self._stepper.listeners.append(wait)
        self._stepper.waits.add(wait.done)
        try:
            wait()
            if not wait.done.done():
                self._stepper.check_goes_on()
            await wait.done
        except BaseException:
            entry, claim = self._current.get(name), self._claims[name]
            if entry is not None and not claim.settled and claim.count == 1:
                entry.pinned = False
                self._stepper.wake()
            raise
        else:
            entry = self._current.get(name)
            self._claims[name].settled = entry is not None and entry.pinned
        finally:
            self._waits.remove(wait)
            self._stepper.listeners.remove(wait)
            self._stepper.waits.discard(wait.done)

    def changed(self, name: str) -> None:
        """Call when an adapter was unpinned or retired, of which no event tells."""
        if name in self._claims:
            self._claims[name].settled = False
        for wait in self._waits:
            wait()


class _Wait:
    """Looks, at every event of its adapter, whether there is something left to wait for."""

    def __init__(self, stepper: Stepper, name: str) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._current = stepper.core.residency.current
        self._name = name

    def __call__(self, event: events.Event | None = None) -> None:
        if self.done.done():
            return
        if event is not None and not (isinstance(event, events.AdapterEvent) and event.adapter == self._name):
            return
        entry = self._current.get(self._name)
        if entry is None:
            self.done.set_exception(
                AdapterNotFound("it was unloaded while it waited for a slot", name=self._name)
            )
        elif isinstance(event, events.AdapterFailed) and event.version == entry.version:
            self.done.set_exception(event.error)
        elif entry.location is Location.SLOT or not entry.pinned:
            self.done.set_result(None)
