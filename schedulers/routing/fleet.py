"""FleetState: a gateway's knowledge of its fleet, and the view of it for policies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from math import exp
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from aioengine.schedulers.routing.interface import (
    AdapterView,
    Move,
    ReplicaView,
    RouteRequest,
)
from aioengine.schedulers.routing.prefixes import PrefixIndex
from aioengine.schedulers.routing.replica import Clock, Replica, ReplicaLimits, Report

DEMAND_SECONDS = 60.0
"""Time constant of the moving average of demand."""
CHANGED_SHARE = 0.25
"""A demand has changed when it differs by more than this share from that of the last plan."""


class Demand(NamedTuple):
    """Tokens a second as an exponential moving average over events at any times: each adds its tokens over
    the time constant, and all decay with it."""

    rate: float = 0.0
    as_of: float = 0.0

    def plus(self, tokens: float, now: float) -> Demand:
        return Demand(self.at(now) + tokens / DEMAND_SECONDS, now)

    def at(self, now: float) -> float:
        return self.rate * exp(min(self.as_of - now, 0.0) / DEMAND_SECONDS) if self.rate else 0.0


class Adapter:
    """An :class:`~aioengine.schedulers.routing.interface.AdapterView`."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.nbytes = 0
        self.in_flight = 0
        self.registered = False
        self._clock = clock
        self._demand = Demand()
        self._holders: dict[str, None] = {}
        self._targets: dict[str, None] = {}
        self._holders_changed = False
        """Whether the holders have changed since the last plan."""
        self._planned = 0.0
        """Demand when the last plan was made."""

    @property
    def demand(self) -> float:
        return self._demand.at(self._clock.now)

    @property
    def holders(self) -> Set[str]:
        return self._holders.keys()

    @property
    def target_holders(self) -> Set[str]:
        return self._targets.keys()

    def _changed(self) -> bool:
        difference = abs(self.demand - self._planned)
        return self._holders_changed or difference > max(CHANGED_SHARE * self._planned, 1e-3)

    def _copy(self, clock: Clock) -> Adapter:
        found = copy.copy(self)
        found._clock, found._holders, found._targets = clock, self._holders.copy(), self._targets.copy()
        return found


class View:
    """A :class:`~aioengine.schedulers.routing.interface.FleetView`: live, or (with ``changed``) a copy, which
    knows of no prefixes."""

    def __init__(
        self,
        clock: Clock,
        replicas: Mapping[str, Replica],
        adapters: Mapping[str, Adapter],
        *,
        prefix_blocks: int = 0,
        changed: Collection[str] | None = None,
    ) -> None:
        self._clock = clock
        self._replicas: Mapping[str, ReplicaView] = MappingProxyType(replicas)
        self._adapters: Mapping[str, AdapterView] = MappingProxyType(adapters)
        self._known = adapters
        self._accepting: Sequence[ReplicaView] = tuple(one for one in replicas.values() if one.accepting)
        self._demand = Demand()
        self._prefixes = PrefixIndex(prefix_blocks)
        self._changed = changed

    now = property(attrgetter("_clock.now"))
    replicas = property(attrgetter("_replicas"))
    accepting = property(attrgetter("_accepting"))
    adapters = property(attrgetter("_adapters"))

    @property
    def demand(self) -> float:
        return self._demand.at(self._clock.now)

    @property
    def changed(self) -> Collection[str]:
        if self._changed is not None:
            return self._changed
        return [name for name, found in self._known.items() if found._changed()]

    def cached_blocks(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        return self._prefixes.lookup(prefixes)


class FleetState:
    """The knowledge of one gateway, from the replicas' reports and from the gateway's own actions.

    Nothing here waits: ``clock`` is read at every call, and the owner of the state calls :meth:`check` at
    intervals. All calls must come from one thread; :meth:`snapshot` makes a copy for another thread. An
    adapter is known as long as it is registered, requests for it run, or a replica has it or should have it.

    Args:
        clock: Returns seconds from any starting point; it must not go back.
        silent_after: A replica that has not reported for this many seconds gets no requests.
        prefix_blocks: Number of prefix blocks that are remembered for each replica.
    """

    def __init__(
        self, clock: Callable[[], float], *, silent_after: float = 3.0, prefix_blocks: int = 8192
    ) -> None:
        self._time = clock
        self._silent_after = silent_after
        self._clock = Clock(clock())
        self._replicas: dict[str, Replica] = {}
        self._adapters: dict[str, Adapter] = {}
        self._in_flight: dict[str, tuple[RouteRequest, str]] = {}
        self._view = View(self._clock, self._replicas, self._adapters, prefix_blocks=prefix_blocks)

    @property
    def view(self) -> View:
        """Live; its ``now`` is when it was asked for."""
        self._tick()
        return self._view

    # Replicas

    def join(self, replica_id: str, limits: ReplicaLimits) -> None:
        """Add a replica, which holds nothing until it reports. One that was known by this id is forgotten
        first."""
        self.leave(replica_id)
        self._tick()
        self._replicas[replica_id] = Replica(replica_id, limits, self._clock)
        self._accepting_changed()

    def leave(self, replica_id: str) -> list[RouteRequest]:
        """Remove a replica. Returns its requests, which the gateway sends to other replicas or fails;
        :meth:`ended` must not be called for them. Does nothing for an unknown replica."""
        self._tick()
        if self._replicas.pop(replica_id, None) is None:
            return []
        self._view._prefixes.leave(replica_id)
        for adapter in list(self._adapters.values()):
            adapter._targets.pop(replica_id, None)
            self._hold(adapter, replica_id, False)
        self._accepting_changed()
        lost = [request for request, where in self._in_flight.values() if where == replica_id]
        for request in lost:
            self._forget(request)
        return lost

    def drain(self, replica_id: str, draining: bool = True) -> None:
        """Send the replica no more requests (or send requests again). Raises KeyError for an unknown
        replica."""
        self._tick()
        self._replicas[replica_id].draining = draining
        self._decide(self._replicas[replica_id])

    def report(self, replica_id: str, report: Report) -> None:
        """Take in a replica's report. The report of an unknown replica is dropped, because it may have left
        meanwhile; so is one that is older than the last."""
        self._tick()
        replica = self._replicas.get(replica_id)
        if replica is None or report.sent_at < replica._report.sent_at:
            return
        before = replica._held()
        replica._take(report)
        after = replica._held()
        for name in before ^ after:
            self._hold(self._adapter(name), replica_id, name in after)
        if report.tiers is not None:
            for name in after & report.tiers.nbytes.keys():
                self._adapters[name].nbytes = report.tiers.nbytes[name]
        self._decide(replica)

    def check(self) -> list[str]:
        """Find the replicas that have been silent for too long, and return the new ones. Call it about as
        often as replicas report."""
        self._tick()
        before = [replica for replica in self._replicas.values() if replica.accepting]
        for replica in self._replicas.values():
            self._decide(replica)
        return [replica.replica_id for replica in before if not replica.accepting]

    # Adapters

    def add_adapter(self, name: str, nbytes: int = 0) -> None:
        """Register an adapter with the fleet."""
        adapter = self._adapter(name)
        adapter.registered, adapter.nbytes = True, nbytes or adapter.nbytes

    def remove_adapter(self, name: str) -> None:
        """Unregister an adapter: it is forgotten as soon as no replica holds it."""
        if name in self._adapters:
            self._adapters[name].registered = False
            self._forget_unused(self._adapters[name])

    # Requests

    def sent(self, request: RouteRequest, replica_id: str) -> None:
        """Note that the gateway sends a request to a replica. Raises KeyError for an unknown replica,
        ValueError for a request that is in flight already."""
        now = self._tick()
        replica = self._replicas[replica_id]
        if request.request_id in self._in_flight:
            raise ValueError(f"request {request.request_id!r} is in flight already")
        expected = request.expected_tokens if request.expected_tokens is not None else request.max_tokens
        tokens = 0 if request.tried else request.prompt_tokens + expected  # the same are not counted twice
        view = self._view
        view._demand = view._demand.plus(tokens, now)
        replica._send(request)
        if request.adapter is not None:
            adapter = self._adapter(request.adapter)
            adapter._demand = adapter._demand.plus(tokens, now)
            adapter.in_flight += 1
            self._hold(adapter, replica_id, True)
        view._prefixes.add(replica_id, request.prefixes)
        self._in_flight[request.request_id] = request, replica_id

    def ended(self, request_id: str) -> None:
        """Note that a request has ended, or that its replica, which may be alive, refused it or broke off.
        Does nothing if it is not in flight."""
        self._tick()
        if request_id in self._in_flight:
            request, replica_id = self._in_flight[request_id]
            self._forget(request)
            self._replicas[replica_id]._end()

    @property
    def in_flight(self) -> int:
        """Requests that have been sent and have not ended."""
        return len(self._in_flight)

    # Plans

    def snapshot(self) -> View:
        """Return a copy of the fleet's state, for a placement policy in another thread."""
        clock = Clock(self._tick())
        replicas = {name: replica._copy(clock) for name, replica in self._replicas.items()}
        adapters = {name: adapter._copy(clock) for name, adapter in self._adapters.items()}
        view = View(clock, replicas, adapters, changed=frozenset(self._view.changed))
        view._demand = self._view._demand
        return view

    def planned(self, snapshot: View, moves: Iterable[Move]) -> None:
        """Remember which replicas should hold which adapters, because this plan is carried out. What had
        changed in the snapshot that it was made from is in no later ``changed``, unless it changes again."""
        for name in self._adapters.keys() & snapshot.changed:
            adapter, was = self._adapters[name], snapshot._known[name]
            adapter._planned, adapter._holders_changed = was.demand, adapter._holders != was._holders
        for move in moves:
            if move.replica in self._replicas:
                adapter = self._adapter(move.adapter)
                if move.kind in ("load", "pin"):
                    adapter._targets[move.replica] = None
                elif move.kind == "unload":
                    adapter._targets.pop(move.replica, None)
                self._forget_unused(adapter)

    # Inside

    def _tick(self) -> float:
        now = self._clock.now = max(self._time(), self._clock.now)
        return now

    def _adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            self._adapters[name] = Adapter(name, self._clock)
        return self._adapters[name]

    def _hold(self, adapter: Adapter, replica_id: str, holds: bool) -> None:
        """Note that a replica holds an adapter now, or no longer."""
        if holds != (replica_id in adapter._holders):
            adapter._holders_changed = True
            if holds:
                adapter._holders[replica_id] = None
            else:
                del adapter._holders[replica_id]
        self._forget_unused(adapter)

    def _forget_unused(self, adapter: Adapter) -> None:
        """Forget an adapter that neither the fleet nor a request has. Clients can make up any number of mixes
        and of adapters that do not exist."""
        if not (adapter.registered or adapter.in_flight or adapter._holders or adapter._targets):
            del self._adapters[adapter.name]

    def _decide(self, replica: Replica) -> None:
        """Decide whether the replica may get requests."""
        accepting = not replica.draining and self._clock.now - replica._heard <= self._silent_after
        if accepting != replica._accepting:
            replica._accepting = accepting
            self._accepting_changed()

    def _accepting_changed(self) -> None:
        self._view._accepting = tuple(one for one in self._replicas.values() if one._accepting)

    def _forget(self, request: RouteRequest) -> None:
        """Remove a request from those in flight."""
        del self._in_flight[request.request_id]
        if request.adapter is not None:
            adapter = self._adapters[request.adapter]
            adapter.in_flight -= 1
            self._forget_unused(adapter)
