"""Routers of a few lines each. ``LeastLoaded`` is the safe one that others fall back to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence, Set
from math import ceil, inf
from random import Random

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import FleetView, ReplicaView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import (
    MAX_NAMED,
    RendezvousOrder,
    by_load,
    cached_tokens,
    candidates,
)

Replicas = Sequence[ReplicaView]


class Simple(RouterPolicy):
    """Orders the replicas that accept requests and have not failed this one."""

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        best, reason = self.order(request, candidates(request, view), view)
        return Route([replica.replica_id for replica in best[:MAX_NAMED]], reason=reason)

    @abstractmethod
    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        """Return the replicas of ``found`` to name, the preferred one first, and the reason for that one."""


class RoundRobin(Simple):
    """Each request goes to the next replica in turn, whatever its adapter or prompt."""

    source = "the classic; the baseline of every balancer"
    worst_case = "long requests meet on one replica while others idle; each loads every adapter"

    def __init__(self) -> None:
        self._turn = 0

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        start = self._turn % len(found)
        self._turn += 1
        return (*found[start:], *found[:start]), "turn"


class LeastLoaded(RoundRobin):
    """The replica with the fewest requests, where a waiting one counts as four; equal replicas take turns.

    The safe router that others fall back to."""

    source = "vLLM's balancer between data-parallel ranks: 4 x waiting + running"
    worst_case = "a request is sent where its adapter must be loaded although a holder was as good"

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        in_turn, _ = super().order(request, found, view)
        return by_load(in_turn), "load"


class PowerOfTwoChoices(Simple):
    """The less loaded of two replicas drawn at random: several gateways with old knowledge do not all choose
    the same one."""

    source = "Mitzenmacher, 'The Power of Two Choices in Randomized Load Balancing', IEEE TPDS 2001"
    worst_case = "as least_loaded; the longest queue is about log log n above the mean"

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        return by_load(self._random.sample(found, min(len(found), 2))), "two choices"


class Holder(Simple):
    """The least loaded replica that holds the adapter; the least loaded of all if none does, or if
    ``spill`` requests or more wait on every holder.

    Args:
        spill: Requests that may wait on a holder before other replicas are used, too; 0: any number.
    """

    source = "Ray Serve's model multiplexing, and gateways that look at what is loaded"
    worst_case = "with spill=0 all users of one adapter share one replica while others idle (ray #48741)"

    def __init__(self, spill: int = 0) -> None:
        at_least(0, spill=spill)
        self._most = spill or inf

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        holders = _holders(request, view)
        having = [one for one in found if one.replica_id in holders and one.waiting < self._most]
        return by_load(having or found), "holder" if having else "load"


def _holders(request: RouteRequest, view: FleetView) -> Set[str]:
    adapter = None if request.adapter is None else view.adapters.get(request.adapter)
    return frozenset() if adapter is None else adapter.holders


class Tiers(Simple):
    """A weighted sum of three scores between 0 and 1: 1 where the adapter is in a slot, 0.8 where a slot is
    free, 0.6 where it is on its way or in the CPU cache, else 0; the queue, against the shortest and the
    longest; and the free share of the KV cache.

    Args:
        lora: Weight of the adapter's place.
        queue: Weight of the queue.
        kv: Weight of the KV cache.
    """

    source = "llm-d and the Gateway API inference extension: LoRA affinity, queue and KV cache scorers"
    worst_case = "with a weight of 1 each, a holder is left for a queue that is shorter by one request"

    def __init__(self, lora: float = 1.0, queue: float = 1.0, kv: float = 1.0) -> None:
        at_least(0, lora=lora, queue=queue, kv=kv)
        self._weights = lora, queue, kv

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        lora, queue, kv = self._weights
        adapter, holders = request.adapter, _holders(request, view)
        shortest = min(replica.waiting for replica in found)
        longest = max(replica.waiting for replica in found)

        def score(replica: ReplicaView) -> float:
            here = replica.replica_id in holders
            if adapter is None or (here and replica.location(adapter) is Location.SLOT):
                place = 1.0
            else:
                place = 0.8 if replica.free_slots else 0.6 if here else 0.0
            short = (longest - replica.waiting) / (longest - shortest) if longest > shortest else 1.0
            return lora * place + queue * short + kv * replica.free_kv_tokens / max(replica.kv_tokens, 1)

        return sorted(found, key=score, reverse=True), "score"


class Rendezvous(Simple):
    """Each adapter has an order of all replicas by hash, and a request goes to the first that has less than
    ``bound`` times the mean number of requests. Needs no knowledge of which replica holds which adapter.

    Args:
        bound: At least 1: how far above the mean a replica's load may be.
    """

    source = "Thaler and Ravishankar, 1998; Mirrokni et al., 'Consistent Hashing with Bounded Loads', 2018"
    worst_case = "a hot adapter is on so many replicas that none has more than bound x the mean of requests"

    def __init__(self, bound: float = 1.25) -> None:
        at_least(1, bound=bound)
        self._bound, self._order = bound, RendezvousOrder()

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        if request.adapter is None:
            return by_load(found), "load"
        known = {replica.replica_id: replica for replica in found}
        ranked = [known[name] for name in self._order.of(request.adapter, view) if name in known]
        most = ceil(self._bound * (sum(map(_requests, found)) + 1) / len(found))
        named = [replica for replica in ranked if _requests(replica) < most] or ranked
        return named, "home" if named[0] is ranked[0] else "bounded"


def _requests(replica: ReplicaView) -> int:
    return replica.waiting + replica.running


class ShuffleSharding(Simple):
    """Each tenant has ``shards`` replicas, chosen by hash, and uses the least loaded of them. If a tenant
    kills or floods its replicas, most other tenants still have a replica that it cannot reach. For requests
    without a tenant, the adapter takes its place.

    Args:
        shards: Replicas for each tenant.
    """

    source = "MacCarthaigh, 'Workload isolation using shuffle-sharding', Amazon Builders' Library, 2019"
    worst_case = "a hostile tenant takes its shards down; another shares all of them with 1 / C(n, shards)"

    def __init__(self, shards: int = 2) -> None:
        at_least(1, shards=shards)
        self._shards, self._order = shards, RendezvousOrder()

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        if request.tried and all(name in request.tried for name in self._own(request, view)):
            # The request itself may be the cause: it must not be tried on all replicas.
            return Route(reject="the replicas of this tenant have failed", reason="shard")
        return super().route(request, view)

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        own = self._own(request, view)
        mine = [replica for replica in found if replica.replica_id in own]
        return by_load(mine or found), "shard" if mine else "shard is down"

    def _own(self, request: RouteRequest, view: FleetView) -> Sequence[str]:
        key = request.tenant if request.tenant is not None else request.adapter or ""
        return self._order.of(key, view)[: self._shards]


class Prefix(Simple):
    """The replica that has the longest prefix of the prompt cached, if that is at least ``share`` of the
    prompt and the replica has at most ``slack`` requests more than the least loaded one, which is taken
    otherwise.

    Args:
        share: Smallest cached share of the prompt that matters, between 0 and 1.
        slack: Number of requests that it may have more than the least loaded replica.
    """

    source = "SGLang's cache-aware router; Srivatsa et al., 2024, Preble"
    worst_case = "as least_loaded, and up to slack requests more wait before one; adapters are not looked at"

    def __init__(self, share: float = 0.3, slack: int = 8) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: must be between 0 and 1")
        at_least(0, slack=slack)
        self._share, self._slack = share, slack

    def order(self, request: RouteRequest, found: Replicas, view: FleetView) -> tuple[Replicas, str]:
        cached = cached_tokens(request, view)
        enough = max(self._share * request.prompt_tokens, 1)
        most = min(map(_requests, found)) + self._slack
        having = [r for r in found if cached.get(r.replica_id, 0) >= enough and _requests(r) <= most]
        if not having:
            return by_load(found), "load"
        return sorted(having, key=lambda r: (-cached[r.replica_id], _requests(r))), "prefix"
