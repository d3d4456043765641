"""AdapterTracker: derives from events where each adapter version is, and how long requests wait for it."""

from __future__ import annotations

from dataclasses import dataclass

from aioengine import events
from aioengine.metrics.families.storage import Store


@dataclass(slots=True)
class _Version:
    """One version of an adapter. Times are seconds on the events' clock."""

    absent_since: float | None
    """Time since when it has been in no slot; ``absent_seconds`` has the earlier periods."""
    absent_seconds: float = 0.0
    rank: int = 0
    on_cpu: bool = False
    copying: bool = False
    """Whether it is being copied into a slot."""
    waiting: int = 0
    """Number of waiting requests for it."""
    early: bool = False
    """Whether its read was started while no request waited for it, and it has not been used or dropped
    yet."""
    blocked_since: float | None = None
    """Time since when it has been on the CPU, in no slot, with requests waiting for it."""

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
        idle = self.on_cpu and not self.copying and self.absent_since is not None
        if idle and self.waiting and self.blocked_since is None:
            self.blocked_since = now


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    version: _Version
    absent_before: float
    waiting: bool = True


class AdapterTracker:
    """Follows the events of adapters and of requests for them, in O(1) for each, and counts look-ups, swaps
    and prefetches in ``store``. State is kept for versions that have not been unloaded.

    A request's wait is the time that its adapter was in no slot between its arrival and its first admission.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._current: dict[str, int] = {}
        self._versions: dict[tuple[str, int], _Version] = {}
        self._live: dict[str, _Live] = {}

    def rank(self, adapter: str, version: int) -> int:
        """Rank of the adapter; 0 if it has not been read."""
        found = self._versions.get((adapter, version))
        return 0 if found is None else found.rank

    # Requests

    def added(self, adapter: str, event: events.RequestAdded) -> None:
        """Count the look-up of its adapter; the CPU level is checked only if no slot has it."""
        version = self._at((adapter, self._current.get(adapter, 0)), event.time)
        in_slot = version.absent_since is None
        self._store.inc("lora_cache_requests", ("slot", "hit" if in_slot else "miss"))
        if not in_slot:
            self._store.inc("lora_cache_requests", ("cpu", "hit" if version.on_cpu else "miss"))
        self._live[event.request_id] = _Live(version, version.absent(event.time))
        version.wait_begins(event.time)

    def admitted(self, event: events.RequestAdmitted) -> float | None:
        """Return the wait in seconds; None without an adapter, or if the request was admitted before."""
        live = self._live.get(event.request_id)
        if live is None:
            return None
        live.waiting = False
        live.version.wait_ends()
        return None if event.resumed else live.version.absent(event.time) - live.absent_before

    def preempted(self, event: events.RequestPreempted) -> None:
        live = self._live.get(event.request_id)
        if live is not None:
            live.waiting = True
            live.version.wait_begins(event.time)

    def ended(self, event: events.RequestEnded) -> None:
        live = self._live.pop(event.request_id, None)
        if live is not None and live.waiting:
            live.version.wait_ends()

    # Adapters

    def registered(self, event: events.AdapterRegistered) -> None:
        self._current[event.adapter] = event.version
        if event.replaces is not None:
            self._store.inc("lora_swaps", ("replace",))

    def loading(self, event: events.AdapterLoading) -> None:
        version = self._of(event)
        version.early = version.waiting == 0
        if not version.early:
            self._store.inc("lora_prefetch", ("late",))

    def loaded(self, event: events.AdapterLoaded) -> None:
        version = self._of(event)
        version.on_cpu = True
        version.rank = event.rank
        version.check_blocked(event.time)
        self._store.observe("lora_swap_seconds", event.seconds, ("disk",))
        self._store.inc("lora_swap_bytes", ("disk",), event.nbytes)

    def placing(self, event: events.AdapterPlacing) -> None:
        version = self._of(event)
        version.copying = True
        if version.blocked_since is not None:
            self._store.observe("lora_swap_seconds", event.time - version.blocked_since, ("cpu",))
            version.blocked_since = None

    def placed(self, event: events.AdapterPlaced) -> None:
        version = self._of(event)
        version.rank = event.rank
        version.copying = False
        version.absent_seconds = version.absent(event.time)
        version.absent_since = None
        self._prefetched(version, "used")
        self._store.inc("lora_swaps", ("load",))
        self._store.observe("lora_swap_seconds", event.seconds, ("slot",))
        self._store.inc("lora_swap_bytes", ("slot",), event.nbytes)

    def evicted(self, event: events.AdapterEvicted) -> None:
        version = self._of(event)
        if event.level == "slot":
            version.absent_since = event.time
            version.check_blocked(event.time)
            self._store.inc("lora_swaps", ("evict",))
        else:
            version.on_cpu = version.copying = False  # a copy that was under way is lost with the device
            version.blocked_since = None
            self._prefetched(version, "wasted")

    def failed(self, event: events.AdapterFailed) -> None:
        version = self._of(event)
        if version.copying:  # the event is about the copy: the adapter is still on the CPU
            version.copying = False
            version.check_blocked(event.time)
        else:
            version.early = False
        self._store.inc("lora_load_failures", (event.reason,))

    def unloaded(self, event: events.AdapterUnloaded) -> bool:
        """Return whether the name no longer stands for an adapter."""
        self._versions.pop((event.adapter, event.version), None)
        if self._current.get(event.adapter) == event.version:
            del self._current[event.adapter]
        return event.adapter not in self._current

    def _prefetched(self, version: _Version, result: str) -> None:
        if version.early:
            version.early = False
            self._store.inc("lora_prefetch", (result,))

    def _of(self, event: events.AdapterEvent) -> _Version:
        return self._at((event.adapter, event.version), event.time)

    def _at(self, key: tuple[str, int], now: float) -> _Version:
        found = self._versions.get(key)
        if found is None:
            found = self._versions[key] = _Version(now)
        return found
