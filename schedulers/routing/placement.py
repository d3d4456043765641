"""The built-in placement policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
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


def check_demand(share: float, idle: float) -> None:
    """Raise ValueError for an option that is out of range."""
    if not 0 < share < float("inf"):
        raise ValueError(f"share={share}: must be more than 0")
    if not 0 <= idle < float("inf"):
        raise ValueError(f"idle={idle}: must be at least 0")


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
    worst_case = (
        "moves the least possible when replicas join or leave; hot adapters may meet on one replica, because "
        "hashing does not look at demand beyond the number of copies"
    )

    def __init__(self, share: float = 0.5, idle: float = 0.1) -> None:
        check_demand(share, idle)
        self._share = share
        self._idle = idle
        self._order = RendezvousOrder()

    def plan(self, view: FleetView) -> Sequence[Move]:
        up = {replica.replica_id for replica in view.accepting}
        moves: list[Move] = []
        for name in view.changed if up else ():
            demand, mean = view.adapters[name].demand, view.demand / len(up)
            copies = 0
            if demand >= self._idle:
                copies = max(ceil(demand / (self._share * mean)), 1) if mean > 0 else 1
            wanted = set([i for i in self._order.of(name, view) if i in up][:copies])
            moves += _changes(view, name, wanted, up)
        return moves


def _changes(view: FleetView, name: str, wanted: Set[str], up: Set[str]) -> Iterator[Move]:
    """Yield the moves by which an adapter comes to the ``wanted`` replicas, and to no others of ``up``."""
    targets = view.adapters[name].target_holders
    yield from (Move("load", name, replica) for replica in sorted(wanted - targets))
    yield from (Move("unload", name, replica) for replica in sorted((targets & up) - wanted))


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
        check_demand(share, idle)
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
        moves: list[Move] = []
        for name in changed:
            if wanted[name] < self._idle:
                moves += _changes(view, name, set(), index.keys())
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
            moves += _changes(view, name, kept, index.keys())
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
