"""The built-in placement policies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.routing.interface import AdapterView, FleetView, Move, PlacementPolicy
from aioengine.schedulers.routing.routers.common import RendezvousOrder

CHOICES = 4
"""Replicas beside its holders that an adapter may be moved to: its first by hash."""


class NoPlacement(PlacementPolicy):
    """Moves nothing: adapters go where requests for them are routed, and leave by each replica's cache."""

    source = "what a fleet does without a placement policy"
    worst_case = "the first request after a router has chosen a new replica waits for the load"

    def plan(self, view: FleetView) -> Sequence[Move]:
        return ()


class RendezvousPlacement(PlacementPolicy):
    """Each adapter is on the first replicas of its order by hash: on one, and on one more for each ``share``
    of a replica's mean demand that it has.

    Args:
        share: Maximum demand for one copy, as a share of one replica's mean demand.
        idle: Demand in tokens a second below which no copy is kept ready.
    """

    source = "Thaler and Ravishankar, 1998"
    worst_case = "hot adapters may meet on one replica, because hashing does not look at demand"

    def __init__(self, share: float = 0.5, idle: float = 0.1) -> None:
        if not 0 < share < float("inf"):
            raise ValueError(f"share={share}: must be more than 0")
        at_least(0, idle=idle)
        self._share, self._idle = share, idle
        self._order = RendezvousOrder()

    def plan(self, view: FleetView) -> Sequence[Move]:
        up = {replica.replica_id for replica in view.accepting}
        moves: list[Move] = []
        most = self._share * view.demand / max(len(up), 1)
        changed = map(view.adapters.__getitem__, view.changed if up else ())
        for adapter in sorted(changed, key=lambda adapter: (-adapter.demand, adapter.name)):
            wanted: set[str] = set()
            if adapter.demand >= self._idle:
                copies = max(ceil(adapter.demand / most), 1) if most > 0 else 1
                order = [replica for replica in self._order.of(adapter.name, view) if replica in up]
                wanted.update(self.choose(adapter, min(copies, len(up)), order))
            targets = adapter.target_holders
            moves += [Move("load", adapter.name, replica) for replica in sorted(wanted - targets)]
            moves += [Move("unload", adapter.name, replica) for replica in sorted((targets & up) - wanted)]
        return moves

    def choose(self, adapter: AdapterView, copies: int, order: Sequence[str]) -> Collection[str]:
        """Return the replicas for the copies of an adapter. ``order``: all that accept requests, by hash."""
        return order[:copies]


class DemandPlacement(RendezvousPlacement):
    """Every adapter with demand gets as many copies as its share of the demand needs, at the lowest cost: an
    existing copy costs nothing, a new one costs a load, and the cost of a replica's load rises with the load.

    The adapters that have changed since the last plan are placed one after the other, that with the most
    demand first. The others stay where they are, and count as load.

    Args:
        share: Maximum demand for one copy, as a share of one replica's mean demand.
        idle: Demand in tokens a second below which no copy is kept ready.
    """

    source = "greedy for a convex cost of load; copies by demand as in NVIDIA Dynamo's adapter allocation"
    worst_case = "demand that moves faster than plans are made is placed late"

    def plan(self, view: FleetView) -> Sequence[Move]:
        self._load = dict.fromkeys((replica.replica_id for replica in view.accepting), 0.0)
        self._mean = view.demand / max(len(self._load), 1) or 1.0
        changed = set(view.changed)
        for name, adapter in view.adapters.items():
            places = (adapter.target_holders or adapter.holders) & self._load.keys()
            for place in places if name not in changed else ():
                self._load[place] += adapter.demand / len(places)
        return super().plan(view)

    def choose(self, adapter: AdapterView, copies: int, order: Sequence[str]) -> Collection[str]:
        there = adapter.holders | adapter.target_holders
        others = [replica for replica in order if replica not in there][: max(CHOICES, copies)]
        demand = adapter.demand / copies

        def cost(replica: str) -> float:
            """In loads of an adapter. At the mean load, each further unit costs four."""
            before = self._load[replica] / self._mean
            return (before + demand / self._mean) ** 4 - before**4 + (replica not in there)

        found = sorted([*(replica for replica in order if replica in there), *others], key=cost)[:copies]
        for replica in found:
            self._load[replica] += demand
        return found
