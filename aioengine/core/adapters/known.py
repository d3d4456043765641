"""The adapters that the policy knows, and how it sees them."""

from __future__ import annotations

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

    oldest_arrival = property(attrgetter("_e.waiting.oldest"))


class KnownAdapters(dict[str, AdapterEntry]):
    """Versions that requests may wait for or run on, by the name that the policy has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, CoreAdapterView] = {}
        """Their views, by the same names."""

    def __setitem__(self, name: str, entry: AdapterEntry) -> None:
        super().__setitem__(name, entry)
        self.views[name] = CoreAdapterView(entry)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.views[name]
