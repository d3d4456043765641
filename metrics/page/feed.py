"""Feed of the live page: the engine's state, which is followed only while a client watches.

All watchers share one copy of the state, in which every part has the tick of its last change. A watcher is
one number, the last tick that it has seen. So a slow watcher takes no memory: nothing is queued for it, and
its next call returns everything that is newer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import msgspec

from aioengine import events
from aioengine.info import AdapterInfo, AdapterLocation, EngineStats, SlotInfo

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from aioengine.config import EngineConfig

LOG_LENGTH = 1000
"""Number of adapter movements that are kept, for new and for slow watchers."""
ADAPTERS_PER_SECOND = 20_000
"""Adapters that are looked at in a second, or else thousands of them would take a good part of the loop's
time."""
TOMBSTONES = 1000
"""Number of unloaded adapters that are kept; a watcher that is further behind gets the whole state again."""
QUIET_SECONDS = 1.0
"""Interval at which the state is read without an event; for example, declaring an adapter on the Hub causes
none."""
HEARTBEAT_SECONDS = 5.0
"""After this time without changes a watcher gets a message with the time, which shows that the connection
works."""

Kind = Literal[
    "loading", "loaded", "placing", "placed", "draining", "evicted", "dropped", "failed", "unloaded"
]
_MOVEMENTS: dict[type[events.Event], Kind] = {
    events.AdapterLoading: "loading",
    events.AdapterLoaded: "loaded",
    events.AdapterPlacing: "placing",
    events.AdapterPlaced: "placed",
    events.AdapterFailed: "failed",
    events.AdapterUnloaded: "unloaded",
}
_DETAILS = ("slot", "seconds", "nbytes", "reason")


class ScrapedMetrics(Protocol):
    @property
    def registry(self) -> CollectorRegistry: ...
    def expose(self, accept: str) -> tuple[bytes, str]: ...


class WatchedEngine(Protocol):
    """Interface that the feed needs of an :class:`~aioengine.engine.AsyncEngine`, or of a fleet."""

    config: EngineConfig

    @property
    def metrics(self) -> ScrapedMetrics: ...
    def stats(self) -> EngineStats: ...
    def adapters(self) -> list[AdapterInfo]: ...
    def add_listener(self, listener: Callable[[events.Event], None]) -> Callable[[], None]: ...


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One movement of an adapter; "evicted" is from a slot, "dropped" from the CPU cache."""

    time: float
    kind: Kind
    adapter: str
    version: int
    slot: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    reason: str | None = None


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One adapter, without its path, which a web page must not show."""

    name: str
    version: int
    rank: int
    bytes: int
    location: AdapterLocation
    slot: int | None
    pinned: bool
    running: int
    waiting: int


class Update(msgspec.Struct, omit_defaults=True):
    """Content of one message. Times are seconds on the engine's clock."""

    time: float
    full: bool = False
    """Whether this message replaces the ones before."""
    model: str | None = None
    since: float | None = None
    """When the log began."""
    numbers: dict[str, int] | None = None
    slots: tuple[SlotInfo, ...] | None = None
    adapters: list[Row] = []
    gone: list[str] = []
    log: list[Entry] = []


class Changes(NamedTuple):
    """A message that is not written yet. It may have thousands of adapters."""

    update: Update
    adapters: list[AdapterInfo]

    def written(self) -> bytes:
        """Return it as JSON."""
        self.update.adapters = [
            Row(*(getattr(info, name) for name in Row.__struct_fields__)) for info in self.adapters
        ]
        return msgspec.json.encode(self.update)


class Feed:
    """The shared copy of one engine's state.

    ``watch`` and ``Watcher.close`` attach it to the engine's events and detach it again. ``interval``
    is the shortest time, in seconds, between two messages to one watcher.
    """

    def __init__(self, engine: WatchedEngine, interval: float) -> None:
        self.interval = interval
        self.watchers: set[Watcher] = set()
        self._engine = engine
        self._remove: Callable[[], None] | None = None
        self._clear(0.0)

    def watch(self, now: float) -> Watcher:
        if not self.watchers:
            self._clear(now)
            self._remove = self._engine.add_listener(self._listen)
        watcher = Watcher(self)
        self.watchers.add(watcher)
        return watcher

    def forget(self, watcher: Watcher) -> None:
        self.watchers.discard(watcher)
        if not self.watchers and self._remove is not None:
            self._remove()
            self._remove = None
            self._clear(0.0)

    def _clear(self, now: float) -> None:
        self._tick = 0
        self._since = self._collected = now
        self._changed = True
        self._floor = 0
        self._stats: EngineStats | None = None
        self._stats_tick = 0
        self._tokens = {"prefill": 0, "decode": 0}
        self._log: deque[tuple[int, Entry]] = deque(maxlen=LOG_LENGTH)
        self._rows: OrderedDict[str, tuple[int, AdapterInfo | None]] = OrderedDict()
        """Adapters in the order in which they changed; None: unloaded."""
        self._gone = 0

    # From the engine

    def _listen(self, event: events.Event) -> None:
        self._changed = True
        if isinstance(event, events.StepFinished):
            self._tokens["prefill"] += event.steps * event.prefill_tokens
            self._tokens["decode"] += event.steps * event.decode_tokens
        elif isinstance(event, events.AdapterEvent):
            entry = _entry(event)
            if entry is not None:
                self._log.append((self._tick + 1, entry))

    def collect(self, now: float) -> None:
        """Update the copy, unless that was done a moment ago."""
        age = now - self._collected
        least = max(self.interval / 2, len(self._rows) / ADAPTERS_PER_SECOND)
        if self._tick and age < (least if self._changed else max(QUIET_SECONDS, least)):
            return
        self._tick += 1
        self._collected = now
        self._changed = False
        stats = self._engine.stats()
        before = () if self._stats is None else self._stats.slots
        for old, slot in zip(before, stats.slots, strict=False):
            if slot.replica is not None:  # in a fleet, movements are seen in the table alone
                continue
            if slot.state == "DRAINING" != old.state and slot.adapter is not None:
                entry = Entry(now, "draining", slot.adapter, slot.version or 0, slot.index)
                self._log.append((self._tick, entry))
        if stats != self._stats:
            self._stats = stats
            self._stats_tick = self._tick
        self._collect_adapters()

    def _collect_adapters(self) -> None:
        rows = self._rows
        infos = self._engine.adapters()
        for info in infos:
            known = rows.get(info.name)
            if known is None or (known[1] is not info and known[1] != info):
                if known is not None and known[1] is None:
                    self._gone -= 1
                rows[info.name] = (self._tick, info)
                rows.move_to_end(info.name)
        if len(rows) - self._gone == len(infos):
            return
        names = {info.name for info in infos}
        for name in [n for n, (_, info) in rows.items() if info is not None and n not in names]:
            rows[name] = (self._tick, None)
            rows.move_to_end(name)
            self._gone += 1
        if self._gone > TOMBSTONES:
            for name in [n for n, (_, info) in rows.items() if info is None]:
                del rows[name]
            self._gone = 0
            self._floor = self._tick

    # To the watchers

    def newer_than(self, seen: int, now: float) -> tuple[int, Changes | None]:
        """Return the present tick, and the changes after the tick ``seen`` (None: no changes)."""
        self.collect(now)
        full = seen == 0 or seen < self._floor
        if full:
            seen = 0
        update, adapters = Update(time=now, full=full), list[AdapterInfo]()
        for name, (tick, info) in reversed(self._rows.items()):
            if tick <= seen:
                break
            if info is not None:
                adapters.append(info)
            elif not full:
                update.gone.append(name)
        for tick, entry in reversed(self._log):
            if tick <= seen:
                break
            if tick <= self._tick:
                update.log.append(entry)
        update.log.reverse()
        if self._stats is not None and self._stats_tick > seen:
            update.slots = self._stats.slots
            update.numbers = self._numbers(self._stats)
        if full:
            update.since = self._since
            update.model = Path(self._engine.config.model).name
        elif not (adapters or update.gone or update.log or update.numbers):
            return self._tick, None
        return self._tick, Changes(update, adapters)

    def _numbers(self, stats: EngineStats) -> dict[str, int]:
        values = msgspec.structs.asdict(stats)
        return {name: value for name, value in values.items() if isinstance(value, int)} | self._tokens


class Watcher:
    """One client's place in the feed."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._seen = 0
        self._spoken = 0.0

    def next(self, now: float) -> Changes | None:
        """Return the changes since the last call; None if there are none."""
        self._seen, changes = self._feed.newer_than(self._seen, now)
        if changes is None and now - self._spoken >= HEARTBEAT_SECONDS:
            changes = Changes(Update(time=now), [])
        if changes is not None:
            self._spoken = now
        return changes

    def close(self) -> None:
        self._feed.forget(self)


def _entry(event: events.AdapterEvent) -> Entry | None:
    kind = _MOVEMENTS.get(type(event))
    if isinstance(event, events.AdapterEvicted):
        kind = "evicted" if event.level == "slot" else "dropped"
    if kind is None:
        return None
    slot, seconds, nbytes, reason = (getattr(event, name, None) for name in _DETAILS)
    return Entry(event.time, kind, event.adapter, event.version, slot, seconds, nbytes, reason)
