"""ResidencyTracker: derives from events where each adapter version is, and which requests wait for it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from aioengine import events

Level = Literal["slot", "cpu"]
PrefetchResult = Literal["used", "wasted", "late"]


class Lookup(NamedTuple):
    """Result of one look into one cache level."""

    level: Level
    hit: bool


class Version:
    """One version of an adapter. Times are seconds on the events' clock."""

    __slots__ = (
        "absent_seconds",
        "absent_since",
        "blocked_since",
        "copying",
        "early",
        "on_cpu",
        "rank",
        "waiting",
    )

    def __init__(self, now: float) -> None:
        self.rank = 0
        self.on_cpu = False
        self.copying = False
        """Whether it is being copied into a slot."""
        self.waiting = 0
        """Number of waiting requests for it."""
        self.early = False
        """Whether its read was started while no request waited for it, and it has not been used or dropped
        yet."""
        self.blocked_since: float | None = None
        """Time since when it has been on the CPU, in no slot, with requests waiting for it."""
        self.absent_seconds = 0.0
        self.absent_since: float | None = now
        """Time since when it has been in no slot; ``absent_seconds`` has the earlier periods."""

    @property
    def in_slot(self) -> bool:
        return self.absent_since is None

    def absent(self, now: float) -> float:
        """Return the total seconds for which it was in no slot. The difference between two moments is a
        wait."""
        return self.absent_seconds + (0.0 if self.absent_since is None else now - self.absent_since)

    def wait_begins(self, now: float) -> None:
        self.waiting += 1
        self.check_blocked(now)

    def wait_ends(self) -> None:
        self.waiting -= 1
        if self.waiting == 0:
            self.blocked_since = None

    def check_blocked(self, now: float) -> None:
        idle = self.on_cpu and not self.copying and not self.in_slot
        if idle and self.waiting and self.blocked_since is None:
            self.blocked_since = now


class ResidencyTracker:
    """Follows the adapter events. State is kept for versions that have not been unloaded."""

    def __init__(self) -> None:
        self._current: dict[str, int] = {}
        self._versions: dict[tuple[str, int], Version] = {}

    def current(self, adapter: str, now: float) -> Version:
        """Return the version that a request gets if it arrives now."""
        return self._at((adapter, self._current.get(adapter, 0)), now)

    def rank(self, adapter: str, version: int) -> int:
        """Rank of the adapter; 0 if it has not been read."""
        found = self._versions.get((adapter, version))
        return 0 if found is None else found.rank

    def lookup(self, adapter: str, now: float) -> tuple[Lookup, ...]:
        """Return the result of a request's look-up of ``adapter``; the CPU level is checked only if no slot
        has it."""
        version = self.current(adapter, now)
        if version.in_slot:
            return (Lookup("slot", True),)
        return (Lookup("slot", False), Lookup("cpu", version.on_cpu))

    def registered(self, event: events.AdapterRegistered) -> None:
        self._current[event.adapter] = event.version

    def loading(self, event: events.AdapterLoading) -> PrefetchResult | None:
        version = self._of(event)
        version.early = version.waiting == 0
        return None if version.early else "late"

    def loaded(self, event: events.AdapterLoaded) -> None:
        version = self._of(event)
        version.on_cpu = True
        version.rank = event.rank
        version.check_blocked(event.time)

    def placing(self, event: events.AdapterPlacing) -> float | None:
        """Return how long requests have waited for a slot for it, in seconds; None if none waits."""
        version = self._of(event)
        version.copying = True
        if event.moved:  # it leaves its slot for a moment
            version.absent_since = event.time
            return None
        since, version.blocked_since = version.blocked_since, None
        return None if since is None else event.time - since

    def placed(self, event: events.AdapterPlaced) -> PrefetchResult | None:
        version = self._of(event)
        version.rank = event.rank
        version.copying = False
        version.absent_seconds = version.absent(event.time)
        version.absent_since = None
        early, version.early = version.early, False
        return "used" if early else None

    def evicted(self, event: events.AdapterEvicted) -> PrefetchResult | None:
        version = self._of(event)
        if event.level == "slot":
            version.absent_since = event.time
            version.check_blocked(event.time)
            return None
        version.on_cpu = version.copying = False  # a copy that was under way is lost with the device
        version.blocked_since = None
        early, version.early = version.early, False
        return "wasted" if early else None

    def failed(self, event: events.AdapterFailed) -> None:
        version = self._of(event)
        if version.copying:  # the event is about the copy: the adapter is still on the CPU
            version.copying = False
            version.check_blocked(event.time)
        else:
            version.early = False

    def unloaded(self, event: events.AdapterUnloaded) -> bool:
        """Return whether the name no longer stands for an adapter."""
        self._versions.pop((event.adapter, event.version), None)
        if self._current.get(event.adapter) == event.version:
            del self._current[event.adapter]
        return event.adapter not in self._current

    def _of(self, event: events.AdapterEvent) -> Version:
        return self._at((event.adapter, event.version), event.time)

    def _at(self, key: tuple[str, int], now: float) -> Version:
        found = self._versions.get(key)
        if found is None:
            found = self._versions[key] = Version(now)
        return found
