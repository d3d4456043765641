"""The default router: the replica that costs the request least, in seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from itertools import islice
from math import ceil
from operator import attrgetter

from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import (
    AdapterView,
    FleetView,
    ReplicaView,
    Route,
    RouteEvent,
    RouteRequest,
    RouterPolicy,
)
from aioengine.schedulers.routing.routers.common import MAX_NAMED, RendezvousOrder, candidates

DEFAULT_TOKEN_SECONDS = 1e-4
DEFAULT_LOAD_SECONDS = 0.25
DEFAULT_SLOT_SECONDS = 0.02
"""Taken while nothing has been measured."""
CROWDING = 0.05
"""Of the time that a request runs, how much longer that is in a full batch than alone."""
MAX_HOLDERS = 4
"""Holders whose cost is reckoned in full: those with the shortest queues."""
FRESH_SECONDS = 1.0
"""Knowledge of this age is as good as new; each second beyond counts as a second of waiting."""
SHRINK = 0.7
"""The number of homes falls when this share of fewer homes' capacity would do."""
SERVICE_MEMORY = 0.02
"""Weight of the newest request in the moving average of how long requests run."""


_ID, _QUEUE = attrgetter("replica_id"), attrgetter("queue_seconds")


class Affinity(RouterPolicy):
    """Sends a request where it costs least: seconds of queueing, of loading its adapter, and of computing
    the part of its prompt that is not cached there, all as measured.

    Every adapter has homes, in an order by hash, and as many of them as its demand needs. A replica that
    holds it or is a home of it is taken before a stranger, until the stranger is cheaper by ``margin``
    times what the load costs: a new copy pushes another adapter out, whose next request pays for that.

    Args:
        margin: How many times a load is counted where a new copy would be made; 1: only once.
        homes: Share of a replica's time, or of the requests that it runs at once, that one adapter may ask
            for before it gets another home.
    """

    source = (
        "own; homes after rendezvous hashing (Thaler and Ravishankar, 1998), costs of prefixes after Preble "
        "(Srivatsa et al., 2024), homes by demand after NVIDIA Dynamo's adapter allocation"
    )
    worst_case = (
        "by the door's knowledge, a request waits at most margin x the seconds of one load longer than on "
        "the best replica"
    )

    def __init__(self, margin: float = 4.0, homes: float = 0.5) -> None:
        if not 1 <= margin < float("inf"):
            raise ValueError(f"margin={margin}: must be at least 1")
        if not 0 < homes <= 1:
            raise ValueError(f"homes={homes}: must be above 0 and at most 1")
        self._margin = margin
        self._home_share = homes
        self._order = RendezvousOrder()
        self._homes: dict[str, int] = {}
        """Adapters with more than one home."""
        self._started: dict[str, float] = {}
        self._service = 0.0
        """Seconds from a request's first token to its end: a moving average."""

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        queues: dict[str, float] = dict(zip(map(_ID, found), map(_QUEUE, found), strict=True))
        by_queue = sorted(queues, key=queues.__getitem__)
        cached = view.cached_blocks(request.prefixes)
        near = [*by_queue[:2], *(i for i in cached if i in queues)]
        name = request.adapter
        if name is None:
            return _answer({i: self._cost(request, view.replicas[i], cached) for i in near}, "base")
        adapter = view.adapters.get(name)
        holding: Set[str] = frozenset() if adapter is None else adapter.holders
        homes = self._homes_of(name, adapter, view, queues)
        if len(holding) <= MAX_HOLDERS:
            near += [i for i in holding if i in queues]
        else:
            near += islice((i for i in by_queue if i in holding), MAX_HOLDERS)
        costs = {}
        for replica_id in {*homes, *near}:
            replica = view.replicas[replica_id]
            cost = self._cost(request, replica, cached)
            costs[replica_id] = cost + self._load(replica, name, at_home=replica_id in homes)
        route = _answer(costs, "spill")
        best = route.replicas[0]
        if best in holding:
            return route._replace(reason="holder")
        return route._replace(reason="home") if best in homes else route

    def on_event(self, event: RouteEvent) -> None:
        if event.request is None:
            return
        if event.kind == "started":
            self._started[event.request.request_id] = event.now
        elif event.kind in ("ended", "failed"):
            start = self._started.pop(event.request.request_id, None)
            if start is not None and event.kind == "ended":
                self._service += SERVICE_MEMORY * (event.now - start - self._service)

    def _cost(self, request: RouteRequest, replica: ReplicaView, cached: Mapping[str, int]) -> float:
        """Seconds before its first token, less the load of its adapter: what is computed first, its own
        prompt, and those that must end first because as many run as may."""
        seconds = replica.queue_seconds
        share = (replica.waiting + replica.running + 1) / replica.max_running
        # The more run at once, the slower each; and beyond as many as may, some must end first.
        seconds += self._service * (CROWDING * share if share <= 1.0 else CROWDING + share - 1.0)
        stale = replica.age - FRESH_SECONDS
        if stale > 0:
            seconds += stale
        blocks = cached.get(replica.replica_id, 0)
        tokens = max(request.prompt_tokens - blocks * request.prefix_block, 1)
        return seconds + tokens * (replica.seconds_per_token or DEFAULT_TOKEN_SECONDS)

    def _load(self, replica: ReplicaView, adapter: str, *, at_home: bool) -> float:
        where = replica.location(adapter)
        if where is Location.SLOT:
            return 0.0
        slot = replica.slot_seconds or DEFAULT_SLOT_SECONDS
        # Those that wait for a slot already are first, and each waits until one is free.
        slot += replica.adapters_waiting * (slot + self._service / max(replica.slots, 1))
        if where is Location.CPU:
            return slot
        disk = replica.load_seconds or DEFAULT_LOAD_SECONDS
        if where is Location.LOADING:
            return slot + disk / 2
        return slot + disk * (1.0 if at_home else self._margin)

    def _homes_of(
        self, name: str, adapter: AdapterView | None, view: FleetView, queues: Mapping[str, float]
    ) -> Collection[str]:
        """Replicas that should hold it: those of the plan, or as many as it needs, the first by hash of
        those that hold it, then of the others."""
        order = self._order.of(name, view)
        if adapter is None:
            return list(islice((i for i in order if i in queues), 1))
        if adapter.target_holders:
            planned = [i for i in adapter.target_holders if i in queues]
            if planned:
                return planned
        count, holding = self._count(name, adapter, view), adapter.holders
        homes = list(islice((i for i in order if i in holding and i in queues), count)) if holding else []
        if len(homes) < count:  # else a copy more would be one too many
            homes += islice((i for i in order if i in queues and i not in holding), count - len(homes))
        return homes

    def _count(self, name: str, adapter: AdapterView, view: FleetView) -> int:
        """How many homes it needs, by the time that its tokens take or by its requests that run at once; all
        replicas are taken to be as fast, and as large, as the first."""
        first = view.accepting[0]
        share = adapter.demand * (first.seconds_per_token or DEFAULT_TOKEN_SECONDS)
        share = max(share, adapter.in_flight / first.max_running) / self._home_share
        if share <= SHRINK:
            self._homes.pop(name, None)
            return 1
        count, before = max(ceil(share), 1), self._homes.get(name, 1)
        if count < before and share > SHRINK * (before - 1):
            count = before
        if count > 1:
            self._homes[name] = count
        return count


def _answer(costs: dict[str, float], reason: str) -> Route:
    # Equal ones by name, so that the same knowledge gives the same route.
    return Route(sorted(costs, key=lambda i: (costs[i], i))[:MAX_NAMED], reason=reason)
