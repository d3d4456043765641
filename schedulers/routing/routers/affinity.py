"""The default router: the replica that costs the request least, in seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil
from operator import attrgetter

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import (
    AdapterView,
    FleetView,
    ReplicaView,
    Route,
    RouteRequest,
    RouterPolicy,
)
from aioengine.schedulers.routing.routers.common import (
    MAX_NAMED,
    RendezvousOrder,
    cached_tokens,
    candidates,
)

_DEFAULTS = {"seconds_per_token": 1e-4, "load_seconds": 0.25, "slot_seconds": 0.02, "service_seconds": 0.0}
"""Speeds while no replica has measured one."""
CROWDING = 0.05
"""Share of additional time that a request takes in a full batch."""
MAX_HOLDERS = 4
"""Maximum number of holders whose costs are all computed; of more, only those of the two with the shortest
queues."""
FRESH_SECONDS = 1.0
"""Reports up to this age count as new; each second beyond counts as a second of waiting."""
SLACK_SECONDS = 0.02
SLACK_SHARE = 0.25
"""Costs that differ by less than either count as equal, because measured speeds of equal machines differ a
little."""

_QUEUE = attrgetter("queue_seconds")
_REQUESTS = attrgetter("waiting", "running", "max_running")


class Affinity(RouterPolicy):
    """Sends a request where it costs least: seconds of queueing, of loading its adapter, and of computing
    the part of its prompt that is not cached there, all as measured.

    Every adapter has homes, in an order by hash, and as many of them as its demand needs. A replica that
    holds the adapter or is one of its homes is preferred to other replicas, until another one is cheaper by
    ``margin`` times the cost of a load: a new copy evicts another adapter, whose next request then waits for
    a load.

    Args:
        margin: Factor on the cost of a load where a new copy would be made; at least 1.
        homes: Share of a replica's time, or of its maximum running requests, that one adapter may need before
            it gets another home.
    """

    source = "own; after Thaler and Ravishankar, 1998, Preble (2024) and NVIDIA Dynamo's adapter allocation"
    worst_case = "a request waits at most margin loads longer than on the best replica, as far as is known"

    def __init__(self, margin: float = 4.0, homes: float = 0.5) -> None:
        at_least(1, margin=margin)
        if not 0 < homes <= 1:
            raise ValueError(f"homes={homes}: must be above 0 and at most 1")
        self._margin = margin
        self._home_share = homes
        self._order = RendezvousOrder()
        self._found: Sequence[ReplicaView] = ()
        self._index: dict[str, ReplicaView] = {}
        """The replicas of this decision, by id."""

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if found is not self._found:  # a view has another sequence whenever it has other replicas
            self._found, self._index = found, {replica.replica_id: replica for replica in found}
        index, name = self._index, request.adapter
        cached = cached_tokens(request, view)
        near = {*_two_shortest(found), *cached}
        homes: Collection[str] = ()
        holding: Collection[str] = ()
        if name is None:
            shares = [(waiting + running + 1) / most for waiting, running, most in map(_REQUESTS, found)]
            near.add(found[shares.index(min(shares))].replica_id)
        else:
            adapter = view.adapters.get(name)
            if adapter is not None:
                holding = [replica for replica in adapter.holders if replica in index]
            homes = self._homes(name, adapter, holding, view)
            near.update(homes)
            if len(holding) > MAX_HOLDERS:
                near.update(_two_shortest([index[replica] for replica in holding]))
            else:
                near.update(holding)
        costs, loads = self._costs(request, near & index.keys(), cached, homes)
        named = _by_cost(costs, loads, index, cached)
        reason = "base" if name is None else "holder" if named[0] in holding else "spill"
        return Route(named, reason="home" if reason == "spill" and named[0] in homes else reason)

    def _costs(
        self,
        request: RouteRequest,
        replicas: Collection[str],
        cached: Mapping[str, int],
        homes: Collection[str],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return for each replica the seconds before the request's first token there, and how many of these
        are for its adapter. They are the work before it, its own prompt, and the wait until other requests
        end if the batch is full."""
        costs, loads = {}, {}
        for replica_id in replicas:
            replica = self._index[replica_id]
            service = replica.service_seconds or self._fastest("service_seconds")
            share = _share(replica)
            # With more running requests each is slower; if the batch is full, some must end first.
            seconds = service * (CROWDING * share if share <= 1.0 else CROWDING + share - 1.0)
            seconds += max(replica.age - FRESH_SECONDS, 0.0)
            tokens = request.prompt_tokens
            if cached:
                tokens = max(tokens - cached.get(replica_id, 0), 1)
            seconds += replica.queue_seconds + tokens * (
                replica.seconds_per_token or self._fastest("seconds_per_token")
            )
            load = 0.0
            if request.adapter is not None:
                load = self._load(replica, request.adapter, service, at_home=replica_id in homes)
            costs[replica_id], loads[replica_id] = seconds + load, load
        return costs, loads

    def _fastest(self, speed: str) -> float:
        """Return the shortest time that a replica has measured. It is assumed for those that have not, which
        would otherwise be dearer only because they have done nothing yet."""
        return min(filter(None, map(attrgetter(speed), self._found)), default=_DEFAULTS[speed])

    def _load(self, replica: ReplicaView, adapter: str, service: float, *, at_home: bool) -> float:
        where = replica.location(adapter)
        if where is Location.SLOT:
            return 0.0
        slot = replica.slot_seconds or self._fastest("slot_seconds")
        # Adapters that already wait for a slot come first, and each waits until one is free.
        slot += replica.adapters_waiting * (slot + service / max(replica.slots, 1))
        if where is Location.CPU:
            return slot
        disk = replica.load_seconds or self._fastest("load_seconds")
        if where is Location.LOADING:
            return slot + disk / 2
        return slot + disk * (1.0 if at_home else self._margin)

    def _homes(
        self, name: str, adapter: AdapterView | None, holding: Collection[str], view: FleetView
    ) -> Collection[str]:
        """Return the replicas that should hold the adapter: those of the plan, or as many as it needs, in
        order of hash, first holders and then others."""
        index, count = self._index, 1
        if adapter is not None:
            planned = [replica for replica in adapter.target_holders if replica in index]
            if planned:
                return planned
            # By the time of its tokens, or by its concurrent requests; all replicas count as the first one.
            first = view.accepting[0]
            share = adapter.demand * (first.seconds_per_token or self._fastest("seconds_per_token"))
            count = max(ceil(max(share, adapter.in_flight / first.max_running) / self._home_share), 1)
        if count == 1 and 0 < len(holding) <= MAX_HOLDERS:  # usual: no order of all replicas is needed
            return [self._order.first(name, view, holding)]
        order = [replica for replica in self._order.of(name, view) if replica in index]
        return sorted(order, key=lambda replica: replica not in holding)[:count]


def _share(replica: ReplicaView) -> float:
    """Return the replica's requests plus one, as a share of its maximum running requests."""
    return (replica.waiting + replica.running + 1) / replica.max_running


def _two_shortest(replicas: Sequence[ReplicaView]) -> list[str]:
    """Return the ids of the two replicas with the shortest queues."""
    queues = list(map(_QUEUE, replicas))
    chosen = []
    for _ in queues[:2]:
        place = queues.index(min(queues))
        chosen.append(replicas[place].replica_id)
        queues[place] = float("inf")
    return chosen


def _by_cost(
    costs: dict[str, float],
    loads: dict[str, float],
    index: Mapping[str, ReplicaView],
    cached: Mapping[str, int],
) -> list[str]:
    """Return the replicas by cost. Of those at about the same cost that need no longer load, the ones with
    the most of the prompt cached take turns: the one with the fewest requests is first."""
    # Equal replicas by name, so that the same knowledge gives the same route.
    ranked = sorted(zip(costs.values(), costs, strict=True))
    least, best = ranked[0]
    most = least + max(SLACK_SECONDS, SLACK_SHARE * (least - loads[best]))
    equals = [replica for cost, replica in ranked if cost <= most and loads[replica] <= loads[best]]
    if len(equals) > 1:
        longest = max(cached.get(replica, 0) for replica in equals)
        equals = [replica for replica in equals if cached.get(replica, 0) == longest]
        best = min(equals, key=lambda replica: _share(index[replica]))
    others = [replica for _, replica in ranked if replica != best]
    return [best, *others][:MAX_NAMED]
