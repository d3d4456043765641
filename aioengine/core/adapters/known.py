"""The adapters that the policy knows, and how it sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from aioengine.core.state import AdapterEntry


class CoreAdapterView:
    """The read-only :class:`~aioengine.schedulers.policy.AdapterView` of an adapter's version."""

    __slots__ = ("_e",)

    def __init__(self, entry: AdapterEntry) -> None:
        self._e = entry

    # An attrgetter takes half as long as a function in Python, and a decision reads these very often.
    name = property(attrgetter("_e.name"))
    rank = property(attrgetter("_e.rank"))
    bytes = property(attrgetter("_e.nbytes"))
    location = property(attrgetter("_e.location"))
    slot = property(attrgetter("_e.slot"))
    """The slot that holds it, or that it is being copied to."""
    pinned = property(attrgetter("_e.pinned"))
    waiting = property(lambda self: len(self._e.waiting))
    running = property(attrgetter("_e.running"))
    last_used = property(attrgetter("_e.last_used"))
    disk_seconds = property(attrgetter("_e.disk_seconds"))
    slot_seconds = property(attrgetter("_e.slot_seconds"))
    mergeable = property(attrgetter("_e.mergeable"))

    oldest_arrival = property(attrgetter("_e.waiting.oldest"))


class PartView(CoreAdapterView):
    """The view of an adapter that is a part of mixes: whoever waits for one of these waits for it, too."""

    __slots__ = ()

    waiting = property(lambda self: sum(len(e.waiting) for e in (self._e, *self._e.mixes.values())))
    oldest_arrival = property(attrgetter("_e.oldest_arrival"))
    pinned = property(lambda self: self._e.pinned or self._e.lent)


class MixView(CoreAdapterView):
    """The view of a mix: its size, and what it takes to bring it in, are those of the parts that are in no
    slot or, if all are, of all."""

    __slots__ = ()

    rank = property(lambda self: max(part.rank for part in self._e.members))
    bytes = property(lambda self: sum(part.nbytes for part in _left(self._e)))
    slot = property(attrgetter("_e.shown_at"))
    last_used = property(lambda self: min(part.last_used for part in self._e.members))
    disk_seconds = property(lambda self: _total(part.disk_seconds for part in _left(self._e)))
    slot_seconds = property(lambda self: _total(part.slot_seconds for part in _left(self._e)))


def _left(mix: AdapterEntry) -> Sequence[AdapterEntry]:
    return [part for part in mix.members if part.slot is None] or mix.members


def _total(times: Iterable[float | None]) -> float | None:
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if known else None


class KnownAdapters(dict[str, AdapterEntry]):
    """Versions that requests may wait for or run on, by the name that the policy has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, CoreAdapterView] = {}
        """Their views, by the same names."""

    def __setitem__(self, name: str, entry: AdapterEntry) -> None:
        super().__setitem__(name, entry)
        self.views[name] = (MixView if entry.parts else PartView if entry.mixes else CoreAdapterView)(entry)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.views[name]
