"""A gateway's knowledge of one replica: its last report, corrected by messages sent and received since."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Collection, Mapping, Set
from math import exp, inf
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple, Self

from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import RouteRequest

GUESSED_SECONDS_PER_TOKEN = 1e-4
"""Seconds for each token until it is measured."""
TOKENS_REMEMBERED = 16384
"""A token that was measured this many tokens ago counts 1/e as much as a new one."""
TOKENS_NEEDED = 256
"""Fewer tokens are not used, because the first steps are slow for other reasons. A router that used them
would send no more requests, and so could not learn the true speed."""


class TokenSpeed:
    """Mean seconds for a prompt token in a replica's normal steps. The mean is over tokens and not over
    steps, because a short step is mostly overhead."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        """Count a step of ``tokens`` tokens that took ``seconds``."""
        kept = exp(-tokens / TOKENS_REMEMBERED)
        self._seconds = kept * self._seconds + seconds
        self._tokens = kept * self._tokens + tokens

    @property
    def seconds_per_token(self) -> float | None:
        """None until enough has been measured."""
        return self._seconds / self._tokens if self._tokens >= TOKENS_NEEDED else None


class ReplicaLimits(NamedTuple):
    """The limits of a replica, which do not change while it lives."""

    slots: int
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
    """Report of a replica to a gateway, at least as often as its heartbeat."""

    sent_at: float
    """The replica's own clock."""
    received: int
    """Number of requests from this gateway that had arrived; later ones are still on their way."""
    ended: int
    """Requests from this gateway that had ended."""
    waiting: int
    running: int
    waiting_tokens: int
    """Prompt tokens still to be computed."""
    free_kv_tokens: int
    waiting_for: Mapping[str | None, int]
    """Queued requests by adapter; adapters without any are left out."""
    load_seconds: float | None = None
    slot_seconds: float | None = None
    seconds_per_token: float | None = None
    service_seconds: float | None = None
    tiers: Tiers | None = None
    """None: as in the previous report."""


class Clock:
    """Time in a view, and the measured speed of one replica, which is assumed for replicas that are not
    measured yet."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.token_seconds = GUESSED_SECONDS_PER_TOKEN


class Replica:
    """A :class:`~aioengine.schedulers.routing.interface.ReplicaView`. Only
    :class:`~aioengine.schedulers.routing.fleet.FleetState` calls the methods with an underscore."""

    def __init__(self, replica_id: str, limits: ReplicaLimits, clock: Clock) -> None:
        self.replica_id = replica_id
        self.draining = False
        self._clock = clock
        self._limits = limits
        self._accepting = True
        self._heard = clock.now
        self._report = Report(-inf, 0, 0, 0, 0, 0, limits.kv_tokens, {})
        self._tiers: dict[str, Location] = {}
        self._sent = self._ended = 0
        self._on_the_way: deque[RouteRequest] = deque()
        """The last requests that were sent; the earlier ones have arrived."""
        self._transit = Counter[str | None]()
        """The same by adapter. The replica is expected to load those that it does not hold."""
        self._waiting_there = 0
        """Adapters with queued requests there that are in no slot."""
        self._free_slots = limits.slots
        self._count()

    # ReplicaView: routers read these of every replica, and a getter in C costs half of one in Python.

    accepting = property(attrgetter("_accepting"))
    waiting = property(attrgetter("_waiting"))
    running = property(attrgetter("_running"))
    adapters_waiting = property(attrgetter("_adapters_waiting"))
    free_slots = property(attrgetter("_free_slots"))
    queue_seconds = property(attrgetter("_queue_seconds"))
    service_seconds = property(attrgetter("_report.service_seconds"))
    seconds_per_token = property(attrgetter("_report.seconds_per_token"))
    slot_seconds = property(attrgetter("_report.slot_seconds"))
    load_seconds = property(attrgetter("_report.load_seconds"))
    slots = property(attrgetter("_limits.slots"))
    free_kv_tokens = property(attrgetter("_report.free_kv_tokens"))
    kv_tokens = property(attrgetter("_limits.kv_tokens"))
    max_running = property(attrgetter("_limits.max_running"))

    @property
    def age(self) -> float:
        return max(self._clock.now - self._heard, 0.0)

    def location(self, adapter: str) -> Location:
        return self._tiers.get(adapter) or (Location.LOADING if adapter in self._transit else Location.DISK)

    # What FleetState does

    def _held(self) -> Set[str]:
        """Return the adapters that the replica holds or is expected to load."""
        return {name: None for name in (*self._tiers, *self._transit) if name is not None}.keys()

    def _send(self, request: RouteRequest) -> None:
        """Note that a request is on its way."""
        self._sent += 1
        self._on_the_way.append(request)
        self._transit[request.adapter] += 1
        self._count()

    def _take(self, report: Report) -> None:
        """Take in a report that has come now."""
        self._heard = self._clock.now
        self._report = report
        if report.seconds_per_token is not None:
            self._clock.token_seconds = report.seconds_per_token
        while self._on_the_way and self._sent - len(self._on_the_way) < report.received:
            self._transit[self._on_the_way.popleft().adapter] -= 1
        self._transit = +self._transit
        if report.tiers is not None:
            self._tiers = {
                **dict.fromkeys(report.tiers.loading, Location.LOADING),
                **dict.fromkeys(report.tiers.cpu, Location.CPU),
                **dict.fromkeys(report.tiers.slot, Location.SLOT),
            }
            self._free_slots = max(self._limits.slots - len(report.tiers.slot), 0)
        self._waiting_there = sum(
            name is not None and self._tiers.get(name) is not Location.SLOT for name in report.waiting_for
        )
        self._count()

    def _end(self) -> None:
        """Note that one of this gateway's requests has ended on the replica."""
        self._ended += 1
        self._count()

    def _count(self) -> None:
        """Correct the report by the requests that are on their way, and by those that have ended since."""
        report = self._report
        self._running = max(report.running - max(self._ended - report.ended, 0), 0)
        self._waiting = report.waiting + len(self._on_the_way)
        tokens = report.waiting_tokens + sum([request.prompt_tokens for request in self._on_the_way])
        seconds = report.seconds_per_token or self._clock.token_seconds
        self._queue_seconds = (tokens + self._running) * seconds
        expected = sum(name is not None and name not in self._tiers for name in self._transit)
        self._adapters_waiting = self._waiting_there + expected

    def _copy(self, clock: Clock) -> Self:
        found = copy.copy(self)
        found._clock, found._transit = clock, self._transit.copy()
        return found
