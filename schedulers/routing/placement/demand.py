"""Placement by demand: a flow of least cost from adapters to replicas."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

from aioengine.schedulers.routing.interface import FleetView, Move, PlacementPolicy
from aioengine.schedulers.routing.routers.common import RendezvousOrder

CHOICES = 4
"""Replicas beside its holders that an adapter may be moved to: its first by hash."""
SEGMENTS = (0.7, 1.0, 1.4, 64.0)
"""Load of a replica, in mean loads, up to which each further unit costs as much as below..."""
PRICES = (0.0, 1.0, 4.0, 16.0)
"""...in loads of an adapter."""
KEEP = 1e-3
"""Minimum share of an adapter's demand that is worth a copy."""


class _Arc(NamedTuple):
    adapter: int
    replica: int
    cost: float


class DemandPlacement(PlacementPolicy):
    """Every adapter with demand gets as many copies as its share of the demand needs, at the lowest cost. An
    existing copy costs nothing, a new one costs a load, and the cost of a replica's load rises with the load.

    Demand flows from adapters over the possible copies to replicas, whose load has a convex price, and the
    flow of least cost is found as a linear program (HiGHS, through scipy: extra ``routing``). Adapters that
    have not changed since the last plan stay where they are, and count as load.

    Args:
        share: Maximum demand for one copy, as a share of one replica's mean demand.
        idle: Demand in tokens a second below which no copy is kept ready.
        most: Maximum number of adapters that one plan examines, those with the most demand.

    Raises ValueError if scipy is missing, and says how to get it.
    """

    source = (
        "min-cost flow (Ahuja, Magnanti and Orlin, 'Network Flows', 1993); copies by demand as in NVIDIA "
        "Dynamo's adapter allocation"
    )
    worst_case = (
        "demand that moves faster than plans are made is placed late; a plan moves at most one copy for each "
        "replica and changed adapter; an adapter is offered its holders and 4 others only"
    )

    def __init__(self, share: float = 0.5, idle: float = 0.1, most: int = 2000) -> None:
        if not 0 < share < float("inf"):
            raise ValueError(f"share={share}: must be more than 0")
        if not 0 <= idle < float("inf"):
            raise ValueError(f"idle={idle}: must be at least 0")
        if most < 1:
            raise ValueError(f"most={most}: must be at least 1")
        try:
            import scipy.optimize
        except ImportError as error:
            raise ValueError("it needs scipy: pip install 'aioengine[routing]'") from error
        self._linprog = scipy.optimize.linprog
        self._share = share
        self._idle = idle
        self._most = most
        self._order = RendezvousOrder()

    def plan(self, view: FleetView) -> Sequence[Move]:
        replicas = [replica.replica_id for replica in view.accepting]
        if not replicas or view.demand <= 0:
            return ()
        index = {replica_id: number for number, replica_id in enumerate(replicas)}
        changed = sorted(view.changed, key=lambda name: (-view.adapters[name].demand, name))[: self._most]
        wanted = {name: view.adapters[name].demand for name in changed}
        names = [name for name in changed if wanted[name] >= self._idle]
        load = self._standing(view, set(changed), index)
        mean = (sum(wanted[name] for name in names) + sum(load)) / len(replicas)
        moves = [
            Move("unload", name, i)
            for name in changed
            if wanted[name] < self._idle
            for i in sorted(view.adapters[name].target_holders)
            if i in index
        ]
        if not names:
            return moves
        copies = [min(max(ceil(wanted[name] / (self._share * mean)), 1), len(replicas)) for name in names]
        arcs = self._arcs(view, names, copies, index)
        flow = self._solve([wanted[name] for name in names], copies, arcs, load, mean)
        for number, name in enumerate(names):
            best = sorted(
                ((-flow[at], replicas[arc.replica]) for at, arc in enumerate(arcs) if arc.adapter == number)
            )
            kept = {i for given, i in best[: copies[number]] if -given > KEEP * wanted[name]}
            targets = view.adapters[name].target_holders
            moves += [Move("load", name, i) for i in sorted(kept - targets)]
            moves += [Move("unload", name, i) for i in sorted((targets & index.keys()) - kept)]
        return moves

    def _standing(self, view: FleetView, changed: set[str], index: dict[str, int]) -> list[float]:
        """Load of each replica by adapters that stay where they are."""
        load = [0.0] * len(index)
        for name, adapter in view.adapters.items():
            if name in changed:
                continue
            places = [index[i] for i in (adapter.target_holders or adapter.holders) if i in index]
            for place in places:
                load[place] += adapter.demand / len(places)
        return load

    def _arcs(
        self, view: FleetView, names: list[str], copies: list[int], index: dict[str, int]
    ) -> list[_Arc]:
        arcs = []
        for number, name in enumerate(names):
            adapter = view.adapters[name]
            there = (adapter.holders | adapter.target_holders) & index.keys()
            order = [i for i in self._order.of(name, view) if i in index]
            others = [i for i in order if i not in there][: max(CHOICES, copies[number])]
            arcs += [_Arc(number, index[i], 0.0) for i in order if i in there]
            arcs += [_Arc(number, index[i], 1.0 + 0.01 * rank) for rank, i in enumerate(others)]
        return arcs

    def _solve(
        self, demand: list[float], copies: list[int], arcs: list[_Arc], load: list[float], mean: float
    ) -> list[float]:
        """Flow over each arc. The last columns are the segments of each replica's load."""
        import numpy as np
        from scipy.sparse import coo_array

        replicas, segments, count = len(load), len(SEGMENTS), len(arcs)
        rows, columns, values = [], [], []
        for at, arc in enumerate(arcs):
            rows += [arc.adapter, len(demand) + arc.replica]
            columns += [at, at]
            values += [1.0, 1.0]
        for replica in range(replicas):
            for segment in range(segments):
                rows.append(len(demand) + replica)
                columns.append(count + replica * segments + segment)
                values.append(-1.0)
        right = [*demand, *(-standing for standing in load)]
        matrix = coo_array((values, (rows, columns)), shape=(len(right), count + replicas * segments)).tocsr()
        widths = np.diff([0.0, *SEGMENTS]) * mean
        # An adapter's whole demand over one new copy costs one load, whatever the demand is.
        prices = [arc.cost * mean / demand[arc.adapter] * copies[arc.adapter] for arc in arcs]
        found: Any = self._linprog(
            [*(min(price, 1e6) for price in prices), *(PRICES * replicas)],
            A_eq=matrix,
            b_eq=right,
            bounds=[
                *((0.0, 1.0001 * demand[arc.adapter] / copies[arc.adapter]) for arc in arcs),
                *((0.0, width) for width in list(widths) * replicas),
            ],
            method="highs",
        )
        if found.x is None:
            raise RuntimeError(f"no plan was found: {found.message}")
        return [float(value) for value in found.x[:count]]
