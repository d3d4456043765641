"""Pinned adapters: how many there may be, and which callers hold a pin.

The core places a pinned adapter in a slot as soon as one is idle, and never takes it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aioengine import events
from aioengine.core.state import AdapterEntry
from aioengine.errors import ConfigError


@dataclass
class _Claim:
    """State shared by all callers that are pinning the same name at the moment."""

    settled: bool
    """Whether the name was pinned before, or one caller has succeeded: then it stays pinned if the others
    fail."""
    count: int = 0


class Pins:
    """Pins belong to names: the next version of an adapter takes over its predecessor's.

    ``current`` holds the published versions by name.
    """

    def __init__(
        self, num_slots: int, current: Mapping[str, AdapterEntry], emit: Callable[[events.Event], None]
    ) -> None:
        self._num_slots = num_slots
        self._current = current
        self._emit = emit
        self._claims: dict[str, _Claim] = {}
        self.count = 0
        """Number of pinned adapters."""

    def claim(self, name: str, *, force: bool) -> None:
        """Count ``name`` as pinned while it is on its way to a slot, until :meth:`release`.

        Raises ConfigError if that would leave no slot for other adapters; with ``force``, only if this one
        has no slot either.
        """
        others = {label for label, entry in self._current.items() if entry.pinned} | self._claims.keys()
        others.discard(name)
        if len(others) >= (self._num_slots if force else self._num_slots - 1):
            todo = "unpin one or raise LoRAConfig.max_loras"
            if not force:
                todo = f"one must stay free for other adapters: {todo}, or use force if no others are served"
            raise ConfigError(
                f"adapter {name!r} cannot be pinned: {len(others)} of max_loras={self._num_slots} slots are "
                f"pinned already ({', '.join(sorted(others)) or 'none'}); {todo}"
            )
        entry = self._current.get(name)
        claim = self._claims.setdefault(name, _Claim(settled=entry is not None and entry.pinned))
        claim.count += 1

    def release(self, name: str, now: float, *, failed: bool) -> None:
        """End a claim. If it has failed, ``name`` is unpinned, unless it was pinned before or other callers
        have pinned it too."""
        entry, claim = self._current.get(name), self._claims[name]
        if not failed:
            claim.settled = entry is not None and entry.pinned
        elif entry is not None and not claim.settled and claim.count == 1:
            self._set(entry, False, now)
        claim.count -= 1
        if not claim.count:
            del self._claims[name]

    def pin(self, entry: AdapterEntry, now: float) -> None:
        self._set(entry, True, now)

    def unpin(self, entry: AdapterEntry, now: float) -> None:
        """Remove the pin, whoever holds it."""
        if entry.label in self._claims:
            self._claims[entry.label].settled = False
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
            kind = events.AdapterPinned if pinned else events.AdapterUnpinned
            self._emit(kind(time=now, adapter=entry.label, version=entry.version))
