"""Pinned adapters: how many there may be, and which callers hold a pin.

The core places a pinned adapter in a slot as soon as one is idle, and never takes it out.
"""

from __future__ import annotations

from collections.abc import Callable

from aioengine import events
from aioengine.core.adapters.name import NameTable
from aioengine.core.state import AdapterEntry
from aioengine.errors import ConfigError


class Pins:
    """Pins belong to names: the next version of an adapter takes over its predecessor's."""

    def __init__(self, num_slots: int, names: NameTable, emit: Callable[[events.Event], None]) -> None:
        self._num_slots = num_slots
        self._names = names
        self._emit = emit
        self.count = 0
        """Number of pinned adapters."""

    def claim(self, name: str, *, force: bool) -> None:
        """Count ``name`` as pinned while it is on its way to a slot, until :meth:`release`.

        Raises ConfigError if that would leave no slot for other adapters; with ``force``, only if this one
        has no slot either.
        """
        others = {other.label for other in self._names.in_use.values() if other.claims or other.pinned}
        others.discard(name)
        if len(others) >= (self._num_slots if force else self._num_slots - 1):
            todo = "unpin one or raise LoRAConfig.max_loras"
            if not force:
                todo = f"one must stay free for other adapters: {todo}, or use force if no others are served"
            raise ConfigError(
                f"adapter {name!r} cannot be pinned: {len(others)} of max_loras={self._num_slots} slots are "
                f"pinned already ({', '.join(sorted(others)) or 'none'}); {todo}"
            )
        known = self._names.of(name)
        if not known.claims:
            known.pin_settled = known.pinned
        known.claims += 1

    def release(self, name: str, now: float, *, failed: bool) -> None:
        """End a claim. If it has failed, ``name`` is unpinned, unless it was pinned before or other callers
        have pinned it too."""
        known = self._names.of(name)
        if not failed:
            known.pin_settled = known.pinned
        elif known.current is not None and not known.pin_settled and known.claims == 1:
            self._set(known.current, False, now)
        known.claims -= 1
        self._names.tidy(known)

    def pin(self, entry: AdapterEntry, now: float) -> None:
        self._set(entry, True, now)

    def unpin(self, entry: AdapterEntry, now: float) -> None:
        """Remove the pin, whoever holds it."""
        if (known := self._names.find(entry.label)) is not None:
            known.pin_settled = False
        self._set(entry, False, now)

    def hand_over(self, old: AdapterEntry, new: AdapterEntry, now: float) -> None:
        """Transfer the pin of ``old`` to ``new``, which replaces it."""
        if old.pinned:
            self._set(old, False, now)
            self._set(new, True, now)

    def _set(self, entry: AdapterEntry, pinned: bool, now: float) -> None:
        if entry.pinned != pinned:
            entry.pinned = pinned
            self.count += 1 if pinned else -1
            event = events.AdapterPinned(time=now, adapter=entry.label, version=entry.version, pinned=pinned)
            self._emit(event)
