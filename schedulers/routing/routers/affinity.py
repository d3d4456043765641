"""The default router: the replica that costs the request least, in seconds."""

from __future__ import annotations

from math import ceil

from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import (
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
MAX_HOLDERS = 8
"""Holders whose cost is reckoned in full: those with the shortest queues."""
FRESH_SECONDS = 1.0
"""Knowledge of this age is as good as new; each second beyond counts as a second of waiting."""
SHRINK = 0.7
"""The number of homes falls when this share of fewer homes' capacity would do."""
SERVICE_MEMORY = 0.02
"""Weight of the newest request in the moving average of how long requests run."""


class Affinity(RouterPolicy):
    """Sends a request where it costs least: seconds of queueing, of loading its adapter, and of computing
    the part of its prompt that is not cached there, all as measured.

    Every adapter has homes, in an order by hash, and as many of them as its demand needs. A replica that
    holds it or is a home of it is taken before a stranger, until the stranger is cheaper by ``margin``
    times what the load costs: a new copy pushes another adapter out, whose next request pays for that.

    Args:
        margin: How many times a load is counted where a new copy would be made; 1: only once.
        homes: Share of a replica's time that one adapter may ask for before it gets another home.
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
        token = {replica.replica_id: replica.seconds_per_token or DEFAULT_TOKEN_SECONDS for replica in found}
        queues = {r.replica_id: (r.waiting_tokens + r.running) * token[r.replica_id] for r in found}
        cached = view.cached_blocks(request.prefixes)
        name = request.adapter
        if name is None:
            costs = {
                r.replica_id: self._queue(r, queues[r.replica_id])
                + _prefill(request, cached.get(r.replica_id, 0)) * token[r.replica_id]
                for r in found
            }
            return _answer(costs, "base")
        adapter = view.adapters.get(name)
        holders = () if adapter is None else [i for i in adapter.holders if i in queues]
        if len(holders) > MAX_HOLDERS:
            holders = sorted(holders, key=queues.__getitem__)[:MAX_HOLDERS]
        homes = self._homes_of(name, view, queues, token)
        shortest = sorted(queues, key=queues.__getitem__)[:2]
        costs = {}
        for replica_id in dict.fromkeys((*holders, *homes, *shortest, *(i for i in cached if i in queues))):
            replica = view.replicas[replica_id]
            cost = self._queue(replica, queues[replica_id])
            cost += _prefill(request, cached.get(replica_id, 0)) * token[replica_id]
            cost += self._load(replica, name, at_home=replica_id in homes)
            costs[replica_id] = cost
        best = min(costs, key=costs.__getitem__)
        return _answer(costs, "holder" if best in holders else "home" if best in homes else "spill")

    def on_event(self, event: RouteEvent) -> None:
        if event.request is None:
            return
        if event.kind == "started":
            self._started[event.request.request_id] = event.now
        elif event.kind in ("ended", "failed"):
            start = self._started.pop(event.request.request_id, None)
            if start is not None and event.kind == "ended":
                self._service += SERVICE_MEMORY * (event.now - start - self._service)

    def _queue(self, replica: ReplicaView, seconds: float) -> float:
        """Seconds before its first step: what is to be computed first (``seconds``), and those that must end
        first because as many run as may."""
        over = replica.waiting + replica.running + 1 - replica.max_running
        if over > 0:
            seconds += over * self._service / replica.max_running
        stale = replica.age - FRESH_SECONDS
        return seconds + stale if stale > 0 else seconds

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
        self, name: str, view: FleetView, queues: dict[str, float], token: dict[str, float]
    ) -> tuple[str, ...]:
        """Replicas that should hold it: those of the plan, or as many as it needs, the first by hash of
        those that hold it, then of the others."""
        adapter = view.adapters.get(name)
        if adapter is not None and adapter.target_holders:
            planned = tuple(i for i in adapter.target_holders if i in queues)
            if planned:
                return planned
        count = 1
        if adapter is not None:
            # Of one replica's time, how much the adapter asks for; all are taken to be as fast as the first.
            share = adapter.demand * next(iter(token.values())) / self._home_share
            count = max(ceil(share), 1)
            before = self._homes.get(name, 1)
            if count < before and share > SHRINK * (before - 1):
                count = before
            if count > 1:
                self._homes[name] = count
            else:
                self._homes.pop(name, None)
        having = () if adapter is None else adapter.holders
        order = [i for i in self._order.of(name, view) if i in queues]
        held = [i for i in order if i in having]
        if len(held) < count:  # else a copy more would be one too many
            held += [i for i in order if i not in having][: count - len(held)]
        return tuple(held[:count])


def _prefill(request: RouteRequest, cached: int) -> int:
    """Tokens of the prompt that are to be computed where so many blocks are cached."""
    return max(request.prompt_tokens - cached * request.prefix_block, 1)


def _answer(costs: dict[str, float], reason: str) -> Route:
    return Route(sorted(costs, key=costs.__getitem__)[:MAX_NAMED], reason=reason)
