"""A door's knowledge of one replica: its last report, corrected by messages sent and received since."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple, Self

from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import RouteRequest

GUESSED_SECONDS_PER_TOKEN = 1e-4
"""Seconds for each token until it is measured."""
OFFSET_DRIFT = 1e-4
"""Seconds a second by which the shortest known delay grows, because clocks drift and routes change."""


class ReplicaLimits(NamedTuple):
    """The limits of a replica, which do not change while it lives."""

    slots: int
    cpu_loras: int
    max_running: int
    kv_tokens: int


class Tiers(NamedTuple):
    """The adapters that a replica holds, and where. Each name is in only one of the fields."""

    slot: Collection[str] = ()
    cpu: Collection[str] = ()
    """Adapters in the CPU cache and in no slot."""
    loading: Collection[str] = ()
    """Adapters on their way from disk."""
    nbytes: Mapping[str, int] = MappingProxyType({})
    """Sizes in the CPU cache, of those of them that have been read."""


class Report(NamedTuple):
    """Report of a replica to a door, at least as often as its heartbeat."""

    sent_at: float
    """The replica's own clock."""
    received: int
    """Number of requests from this door that had arrived; later ones are still on their way."""
    ended: int
    """Requests from this door that had ended."""
    waiting: int
    running: int
    waiting_tokens: int
    """Prompt tokens still to be computed."""
    running_tokens: int
    free_kv_tokens: int
    waiting_for: Mapping[str | None, int]
    """Queued requests by adapter; adapters without any are left out."""
    load_seconds: float | None = None
    slot_seconds: float | None = None
    seconds_per_token: float | None = None
    service_seconds: float | None = None
    tiers: Tiers | None = None
    """None: as in the previous report."""


class _OnItsWay(NamedTuple):
    number: int
    adapter: str | None
    tokens: int


class Replica:
    """A :class:`~aioengine.schedulers.routing.interface.ReplicaView`. Only
    :class:`~aioengine.schedulers.routing.fleet.FleetState` calls the methods with an underscore."""

    __slots__ = (
        "_accepting", "_adapters_waiting", "_age_at", "_clock", "_ended", "_expected", "_free_slots",
        "_heard", "_limits", "_offset", "_on_the_way", "_queue_seconds", "_report", "_running", "_sent",
        "_tiers", "_transit", "_transit_tokens", "_waiting", "_waiting_tokens", "draining", "replica_id",
    )  # fmt: skip

    def __init__(self, replica_id: str, limits: ReplicaLimits, clock: _Clock) -> None:
        now = clock.now
        self.replica_id = replica_id
        self.draining = False
        self._clock = clock
        self._limits = limits
        self._accepting = True
        self._heard = self._age_at = now
        self._offset: float | None = None
        self._report = Report(now, 0, 0, 0, 0, 0, 0, limits.kv_tokens, {})
        self._tiers: dict[str, Location] = {}
        self._sent = self._ended = 0
        self._on_the_way: deque[_OnItsWay] = deque()
        self._transit: dict[str | None, int] = {}
        """Requests on the way by adapter."""
        self._transit_tokens = 0
        self._expected: dict[str, int] = {}
        """Adapter that a request was sent for while it was not there -> that request's number."""
        self._running = self._waiting = self._waiting_tokens = self._adapters_waiting = 0
        self._free_slots = limits.slots
        self._queue_seconds = 0.0

    # ReplicaView: routers read these of every replica, and a getter in C costs half of one in Python.

    accepting = property(attrgetter("_accepting"))
    waiting = property(attrgetter("_waiting"))
    running = property(attrgetter("_running"))
    waiting_tokens = property(attrgetter("_waiting_tokens"))
    free_slots = property(attrgetter("_free_slots"))
    queue_seconds = property(attrgetter("_queue_seconds"))
    service_seconds = property(attrgetter("_report.service_seconds"))
    seconds_per_token = property(attrgetter("_report.seconds_per_token"))
    slot_seconds = property(attrgetter("_report.slot_seconds"))
    load_seconds = property(attrgetter("_report.load_seconds"))
    cpu_loras = property(attrgetter("_limits.cpu_loras"))
    slots = property(attrgetter("_limits.slots"))
    free_kv_tokens = property(attrgetter("_report.free_kv_tokens"))
    kv_tokens = property(attrgetter("_limits.kv_tokens"))
    running_tokens = property(attrgetter("_report.running_tokens"))
    max_running = property(attrgetter("_limits.max_running"))

    @property
    def age(self) -> float:
        return max(self._clock.now - self._age_at, 0.0)

    @property
    def adapters_waiting(self) -> int:
        return self._adapters_waiting + len(self._expected)

    def location(self, adapter: str) -> Location:
        found = self._tiers.get(adapter)
        if found is None:
            return Location.LOADING if adapter in self._expected else Location.DISK
        return found

    def held(self, tier: Location) -> Collection[str]:
        found = [name for name, where in self._tiers.items() if where is tier]
        if tier is Location.LOADING:
            found += [name for name in self._expected if name not in self._tiers]
        return found

    def waiting_for(self, adapter: str | None) -> int:
        return self._report.waiting_for.get(adapter, 0) + self._transit.get(adapter, 0)

    # What FleetState does

    def _send(self, request: RouteRequest) -> bool:
        """Note that a request is on its way. Returns True if the replica is now expected to load its
        adapter."""
        self._sent += 1
        adapter = request.adapter
        self._on_the_way.append(_OnItsWay(self._sent, adapter, request.prompt_tokens))
        self._transit[adapter] = self._transit.get(adapter, 0) + 1
        self._transit_tokens += request.prompt_tokens
        self._count()
        if adapter is None or adapter in self._tiers:
            return False
        new = adapter not in self._expected
        self._expected[adapter] = self._sent
        return new

    def _take(self, report: Report, now: float) -> tuple[set[str], set[str]]:
        """Take in a report. Returns the adapters that the replica holds newly, and those that it no longer
        holds."""
        self._heard = now
        offset = now - report.sent_at
        best = offset if self._offset is None else self._offset + (now - self._age_at) * OFFSET_DRIFT
        self._offset = min(best, offset)
        self._age_at = report.sent_at + self._offset
        self._report = report
        if report.seconds_per_token is not None:
            self._clock.token_seconds = report.seconds_per_token
        while self._on_the_way and self._on_the_way[0].number <= report.received:
            arrived = self._on_the_way.popleft()
            self._transit_tokens -= arrived.tokens
            left = self._transit[arrived.adapter] - 1
            if left:
                self._transit[arrived.adapter] = left
            else:
                del self._transit[arrived.adapter]
        before = self._tiers.keys() | self._expected.keys()
        if report.tiers is not None:
            self._tiers = {
                **dict.fromkeys(report.tiers.loading, Location.LOADING),
                **dict.fromkeys(report.tiers.cpu, Location.CPU),
                **dict.fromkeys(report.tiers.slot, Location.SLOT),
            }
            self._free_slots = max(self._limits.slots - len(report.tiers.slot), 0)
        self._expected = {
            name: number
            for name, number in self._expected.items()
            if number > report.received and name not in self._tiers
        }
        tiers = self._tiers
        self._adapters_waiting = sum(
            name is not None and tiers.get(name) is not Location.SLOT for name in report.waiting_for
        )
        self._count()
        after = self._tiers.keys() | self._expected.keys()
        return after - before, before - after

    def _end(self) -> None:
        """Note that one of this door's requests has ended on the replica."""
        self._ended += 1
        self._count()

    def _count(self) -> None:
        """Correct the report by the requests that are on their way, and by those that have ended since."""
        report = self._report
        self._running = max(report.running - max(self._ended - report.ended, 0), 0)
        self._waiting = report.waiting + len(self._on_the_way)
        self._waiting_tokens = report.waiting_tokens + self._transit_tokens
        seconds = report.seconds_per_token or self._clock.token_seconds
        self._queue_seconds = (self._waiting_tokens + self._running) * seconds

    def _copy(self, clock: _Clock) -> Self:
        found = object.__new__(type(self))
        for name in Replica.__slots__:
            setattr(found, name, getattr(self, name))
        found._clock = clock
        # Dicts that a report replaces may be shared; these are changed in place.
        found._on_the_way = self._on_the_way.copy()
        found._transit, found._expected = self._transit.copy(), self._expected.copy()
        return found


class _Clock:
    """Time in a view, and the measured speed of one replica, which is assumed for replicas that are not
    measured yet."""

    __slots__ = ("now", "token_seconds")

    def __init__(self, now: float) -> None:
        self.now = now
        self.token_seconds = GUESSED_SECONDS_PER_TOKEN
