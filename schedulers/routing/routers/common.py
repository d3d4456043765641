"""Helpers that routers share: which replicas they may name, how loaded these are, and a stable order by
hash."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

from aioengine.schedulers.routing.interface import FleetView, ReplicaView, RouteRequest

MAX_NAMED = 4
"""Maximum replicas in a route: the gateway takes the next if one fails, and asks again after the last."""
_WAITING_WEIGHT = 4
_KEYS = 16384
_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: Knuth's multiplicative hashing."""


def candidates(request: RouteRequest, view: FleetView) -> Sequence[ReplicaView]:
    """Return the replicas that the request may be sent to."""
    if not request.tried:
        return view.accepting
    return [replica for replica in view.accepting if replica.replica_id not in request.tried]


def cached_tokens(request: RouteRequest, view: FleetView) -> Mapping[str, int]:
    """Return how many of the prompt's first tokens a replica probably has in its KV cache, by replica id;
    replicas with none are left out."""
    blocks = view.cached_blocks(request.prefixes) if request.prefixes else {}
    return {replica: count * request.prefix_block for replica, count in blocks.items()}


def by_load(replicas: Sequence[ReplicaView]) -> list[ReplicaView]:
    """Return the least loaded replicas first; equal ones in the given order.

    A waiting request counts as four running ones, as in vLLM's balancer between data-parallel ranks, because
    its work has not begun."""
    return sorted(replicas, key=lambda replica: _WAITING_WEIGHT * replica.waiting + replica.running)


class RendezvousOrder:
    """Order of the replicas for each key, which looks random, and in which a replica that joins or leaves
    moves no other (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM
    Transactions on Networking 1998: highest random weight). The latest orders are kept."""

    def __init__(self) -> None:
        self._seen: Sequence[ReplicaView] | None = None
        self._weights: dict[str, int] = {}
        self._kept = lru_cache(_KEYS)(self._order)

    def of(self, key: str, view: FleetView) -> tuple[str, ...]:
        """Return the ids of all known replicas, accepting or not."""
        self._see(view)
        return self._kept(key)

    def _order(self, key: str) -> tuple[str, ...]:
        seed = _digest(key)
        scores = {name: _score(seed, weight) for name, weight in self._weights.items()}
        return tuple(sorted(scores, key=scores.__getitem__, reverse=True))

    def first(self, key: str, view: FleetView, among: Collection[str]) -> str:
        """Return the one of some known replicas that comes first in the order of all."""
        self._see(view)
        seed, weights = _digest(key), self._weights
        return max(among, key=lambda name: _score(seed, weights[name]))

    def _see(self, view: FleetView) -> None:
        if view.accepting is not self._seen:  # it is another object whenever a replica joins or leaves
            self._seen = view.accepting
            if self._weights.keys() != view.replicas.keys():
                self._weights = {name: _digest(name) for name in view.replicas}
                self._kept.cache_clear()


def _score(seed: int, weight: int) -> int:
    """Return a hash: the high bits of a product, which depend on all bits of its factors."""
    return ((seed ^ weight) * _ODD) & _MASK


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
