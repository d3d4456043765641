"""Routes by scores of the adapter's place, of the queue, and of the KV cache."""

from __future__ import annotations

from collections.abc import Set

from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing.interface import FleetView, ReplicaView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import MAX_NAMED, candidates


class Tiers(RouterPolicy):
    """A weighted sum of three scores between 0 and 1: 1 where the adapter is in a slot, 0.8 where a slot is
    free, 0.6 where it is on its way or in the CPU cache, else 0; the queue, against the shortest and the
    longest; and the free share of the KV cache.

    Args:
        lora: Weight of the adapter's place.
        queue: Weight of the queue.
        kv: Weight of the KV cache.
    """

    source = "llm-d and the Gateway API inference extension: LoRA affinity, queue and KV cache scorers"
    worst_case = (
        "scores do not know what a load or a queue costs in seconds: with a weight of 1 each, a holder is "
        "left for a queue that is shorter by one request where all queues are short"
    )

    def __init__(self, lora: float = 1.0, queue: float = 1.0, kv: float = 1.0) -> None:
        for name, weight in (("lora", lora), ("queue", queue), ("kv", kv)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}={weight}: must be at least 0")
        self._weights = lora, queue, kv

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        lora, queue, kv = self._weights
        adapter = request.adapter
        known = None if adapter is None else view.adapters.get(adapter)
        holders: Set[str] = frozenset() if known is None else known.holders
        waiting = [replica.waiting for replica in found]
        longest = max(waiting)
        spread = longest - min(waiting)
        scored = []
        for replica, here in zip(found, waiting, strict=True):
            score = lora * (1.0 if adapter is None else _place(replica, adapter, holders))
            score += queue * ((longest - here) / spread if spread else 1.0)
            score += kv * replica.free_kv_tokens / max(replica.kv_tokens, 1)
            scored.append((score, replica.replica_id))
        scored.sort(key=lambda item: item[0], reverse=True)
        return Route([replica_id for _, replica_id in scored[:MAX_NAMED]], reason="score")


def _place(replica: ReplicaView, adapter: str, holders: Set[str]) -> float:
    here = replica.replica_id in holders
    if here and replica.location(adapter) is Location.SLOT:
        return 1.0
    if replica.free_slots:
        return 0.8
    return 0.6 if here else 0.0
