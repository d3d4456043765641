"""Placement by rendezvous hashing."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from aioengine.schedulers.routing.interface import FleetView, Move, PlacementPolicy
from aioengine.schedulers.routing.routers.common import RendezvousOrder


class RendezvousPlacement(PlacementPolicy):
    """Each adapter is on the first replicas of its order by hash: on one, and on one more for each ``share``
    of a replica's mean demand that it has.

    Args:
        share: Maximum demand for one copy, as a share of one replica's mean demand.
        idle: Demand in tokens a second below which no copy is kept ready.
    """

    source = "Thaler and Ravishankar, 1998"
    worst_case = (
        "moves the least possible when replicas join or leave; hot adapters may meet on one replica, because "
        "hashing does not look at demand beyond the number of copies"
    )

    def __init__(self, share: float = 0.5, idle: float = 0.1) -> None:
        if not 0 < share < float("inf"):
            raise ValueError(f"share={share}: must be more than 0")
        if not 0 <= idle < float("inf"):
            raise ValueError(f"idle={idle}: must be at least 0")
        self._share = share
        self._idle = idle
        self._order = RendezvousOrder()

    def plan(self, view: FleetView) -> Sequence[Move]:
        up = {replica.replica_id for replica in view.accepting}
        if not up:
            return ()
        moves = []
        for name in view.changed:
            adapter = view.adapters[name]
            wanted = set(self._wanted(name, adapter.demand, view, up))
            moves += [Move("load", name, i) for i in sorted(wanted - adapter.target_holders)]
            moves += [Move("unload", name, i) for i in sorted((adapter.target_holders & up) - wanted)]
        return moves

    def _wanted(self, name: str, demand: float, view: FleetView, up: set[str]) -> list[str]:
        if demand < self._idle:
            return []
        copies = max(ceil(demand * len(up) / (self._share * view.demand)), 1) if view.demand > 0 else 1
        return [i for i in self._order.of(name, view) if i in up][:copies]
