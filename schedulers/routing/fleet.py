"""FleetState: a door's knowledge of its fleet, and the view of it for policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from aioengine.schedulers.routing.adapter import Adapter, Demand
from aioengine.schedulers.routing.interface import (
    AdapterView,
    Move,
    PinnedPrefix,
    ReplicaView,
    RouteEvent,
    RouteEventKind,
    RouteRequest,
)
from aioengine.schedulers.routing.prefixes import PinIndex, PrefixIndex
from aioengine.schedulers.routing.replica import Replica, ReplicaLimits, Report, _Clock

MAX_PINS = 16384
"""Pinned prefixes that a door remembers."""
MAX_UNUSED = 1024
"""Names that a door remembers only for the demand that there was for them. Clients can make up any number of
mixes and of adapters that do not exist."""


class View:
    """A :class:`~aioengine.schedulers.routing.interface.FleetView`: live, or a fixed copy."""

    __slots__ = (
        "_accepting", "_adapters", "_changed", "_clock", "_demand", "_pins", "_prefixes", "_replicas",
    )  # fmt: skip

    def __init__(
        self,
        clock: _Clock,
        replicas: Mapping[str, Replica],
        adapters: Mapping[str, Adapter],
        demand: Demand,
        prefixes: PrefixIndex | None,
        pins: PinIndex | None,
        changed: Collection[str] | None = None,
    ) -> None:
        self._clock = clock
        self._replicas: Mapping[str, ReplicaView] = MappingProxyType(replicas)
        self._adapters: Mapping[str, AdapterView] = MappingProxyType(adapters)
        self._accepting = tuple(replica for replica in replicas.values() if replica.accepting)
        self._demand = demand
        self._prefixes = prefixes
        self._pins = pins
        self._changed = changed

    @property
    def now(self) -> float:
        return self._clock.now

    @property
    def replicas(self) -> Mapping[str, ReplicaView]:
        return self._replicas

    @property
    def accepting(self) -> Sequence[ReplicaView]:
        return self._accepting

    @property
    def adapters(self) -> Mapping[str, AdapterView]:
        return self._adapters

    @property
    def demand(self) -> float:
        return self._demand.at(self._clock.now)

    @property
    def changed(self) -> Collection[str]:
        if self._changed is not None:
            return self._changed
        return [name for name, found in self._adapters.items() if found._changed()]  # type: ignore[attr-defined] # a live view's are Adapters

    def cached_blocks(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        return {} if self._prefixes is None or not prefixes else self._prefixes.lookup(prefixes)

    def pinned_tokens(self, pins: Sequence[PinnedPrefix]) -> Mapping[str, int]:
        return {} if self._pins is None or not pins else self._pins.lookup(pins, self._clock.now)


class FleetState:
    """The knowledge of one door, from the replicas' reports and from the door's own actions.

    Nothing here waits: ``clock`` is read at every call, and the owner of the state calls :meth:`check` at
    intervals. All calls must come from one thread; :meth:`snapshot` makes a copy for another thread.

    Args:
        clock: Returns seconds from any starting point; it must not go back.
        silent_after: A replica that has not reported for this many seconds gets no requests.
        prefix_blocks: Number of prefix blocks that are remembered for each replica.
    """

    def __init__(
        self, clock: Callable[[], float], *, silent_after: float = 3.0, prefix_blocks: int = 8192
    ) -> None:
        if not silent_after > 0:
            raise ValueError(f"silent_after={silent_after!r}: must be more than 0 seconds")
        self.listeners: list[Callable[[RouteEvent], None]] = []
        """Listeners, called for every event; they must not raise."""
        self._time = clock
        self._silent_after = silent_after
        self._clock = _Clock(clock())
        self._replicas: dict[str, Replica] = {}
        self._adapters: dict[str, Adapter] = {}
        self._unused: dict[str, None] = {}
        """Adapters that may be of no more use; the first is the one that came first."""
        self._demand = Demand()
        self._prefixes = PrefixIndex(prefix_blocks)
        self._pins = PinIndex(MAX_PINS)
        self._in_flight: dict[str, tuple[RouteRequest, str]] = {}
        self._view = View(
            self._clock, self._replicas, self._adapters, self._demand, self._prefixes, self._pins
        )

    @property
    def view(self) -> View:
        """Live; its ``now`` is when it was asked for."""
        self._tick()
        return self._view

    # Replicas

    def join(self, replica_id: str, limits: ReplicaLimits) -> None:
        """Add a replica, which holds nothing until it reports. One that was known by this id is forgotten
        first. Raises ValueError for an empty id."""
        if not replica_id:
            raise ValueError("replica_id='': must not be empty")
        if replica_id in self._replicas:
            self.leave(replica_id)
        now = self._tick()
        self._replicas[replica_id] = Replica(replica_id, limits, self._clock)
        self._prefixes.join(replica_id)
        self._accepting_changed()
        self._tell("replica_joined", now, None, replica_id)

    def leave(self, replica_id: str) -> list[RouteRequest]:
        """Remove a replica. Returns its requests, which the door sends to other replicas or fails;
        :meth:`ended` must not be called for them. Does nothing for an unknown replica."""
        now = self._tick()
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return []
        self._prefixes.leave(replica_id)
        self._pins.leave(replica_id)
        for adapter in list(self._adapters.values()):
            if replica_id in adapter._holders or replica_id in adapter._targets:
                adapter._targets.pop(replica_id, None)
                self._release(adapter, replica_id)
        self._accepting_changed()
        self._tell("replica_left", now, None, replica_id)
        lost = [request for request, where in self._in_flight.values() if where == replica_id]
        for request in lost:
            self._forget(request)
            self._tell("failed", now, request, replica_id)
        return lost

    def drain(self, replica_id: str, draining: bool = True) -> None:
        """Send the replica no more requests (or send requests again). Raises KeyError for an unknown
        replica."""
        now = self._tick()
        self._replicas[replica_id].draining = draining
        if self._decide(self._replicas[replica_id]) and draining:
            self._tell("replica_draining", now, None, replica_id)

    def report(self, replica_id: str, report: Report) -> None:
        """Take in a replica's report. The report of an unknown replica is dropped, because it may have left
        meanwhile; so is one that is older than the last."""
        now = self._tick()
        replica = self._replicas.get(replica_id)
        if replica is None or (report.sent_at < replica._report.sent_at and replica._offset is not None):
            return
        gained, lost = replica._take(report, now)
        for name in gained:
            self._adapter(name)._hold(replica_id)
        for name in lost:
            self._release(self._adapter(name), replica_id)
        if report.tiers is not None:
            for name, nbytes in report.tiers.nbytes.items():
                self._adapter(name).nbytes = nbytes
        self._decide(replica)

    def check(self) -> list[str]:
        """Find the replicas that have been silent for too long, and return the new ones. Call it about as
        often as replicas report."""
        self._tick()
        before = {replica_id for replica_id, replica in self._replicas.items() if replica.accepting}
        return [i for i, replica in self._replicas.items() if self._decide(replica) and i in before]

    # Adapters

    def add_adapter(self, name: str, nbytes: int = 0) -> None:
        """Register an adapter with the fleet."""
        adapter = self._adapter(name)
        adapter.registered, adapter.nbytes = True, nbytes or adapter.nbytes

    def remove_adapter(self, name: str) -> None:
        """Unregister an adapter: it is forgotten as soon as no replica holds it."""
        if name in self._adapters:
            self._adapters[name].registered = False
            self._may_forget(self._adapters[name])

    # Requests

    def sent(self, request: RouteRequest, replica_id: str) -> None:
        """Note that the door sends a request to a replica. Raises KeyError for an unknown replica, ValueError
        for a request that is in flight already."""
        now = self._tick()
        replica = self._replicas[replica_id]
        if request.request_id in self._in_flight:
            raise ValueError(f"request {request.request_id!r} is in flight already")
        expected = request.expected_tokens if request.expected_tokens is not None else request.max_tokens
        tokens = request.prompt_tokens + expected
        if not request.tried:
            self._demand.add(tokens, now)
        if request.adapter is not None:
            adapter = self._adapter(request.adapter)
            if not request.tried:  # do not count the same tokens twice
                adapter._demand.add(tokens, now)
            adapter.in_flight += 1
            if replica._send(request):
                adapter._hold(replica_id)
        else:
            replica._send(request)
        if request.prefixes:
            self._prefixes.add(replica_id, request.prefixes)
        if request.pins:
            self._pins.add(replica_id, request.pins, now)
        self._in_flight[request.request_id] = request, replica_id
        self._tell("routed", now, request, replica_id)

    def started(self, request_id: str, pinned_tokens: int = 0) -> None:
        """Note that a request's first token came. ``pinned_tokens``: so many of its prompt's tokens are
        pinned on its replica now."""
        found = self._in_flight.get(request_id)
        if found is not None and found[0].pins:
            self._pins.correct(found[1], found[0].pins, pinned_tokens)
        self._about("started", request_id)

    def ended(self, request_id: str) -> None:
        """Note that a request has ended, for any reason. Does nothing if it is not in flight."""
        self._finish("ended", request_id)

    def failed(self, request_id: str) -> None:
        """Note that a request's replica refused it or broke off; the replica itself may be alive."""
        self._finish("failed", request_id)

    @property
    def in_flight(self) -> int:
        """Requests that have been sent and have not ended."""
        return len(self._in_flight)

    # Plans

    def snapshot(self) -> View:
        """Return a copy of the fleet's state, for a placement policy in another thread. Its ``changed`` has
        the changes since the last snapshot; pass it to :meth:`not_planned` if it leads to no plan."""
        now = self._tick()
        clock = _Clock(now)
        changed = set()
        for name, adapter in list(self._adapters.items()):
            if adapter._changed():
                changed.add(name)
                adapter._planned, adapter._holders_changed = adapter.demand, False
            elif not adapter._needed():
                del self._adapters[name]
        demand = Demand()
        demand._rate, demand._as_of = self._demand._rate, self._demand._as_of
        return View(
            clock,
            {name: replica._copy(clock) for name, replica in self._replicas.items()},
            {name: adapter._copy(clock) for name, adapter in self._adapters.items()},
            demand,
            None,
            None,
            frozenset(changed),
        )

    def not_planned(self, snapshot: View) -> None:
        """Note that a snapshot led to no plan: its changes count for the next one."""
        for name in snapshot.changed:
            if name in self._adapters:
                self._adapters[name]._holders_changed = True

    def planned(self, moves: Iterable[Move]) -> None:
        """Remember which replicas should hold which adapters, because this plan is carried out."""
        for move in moves:
            if move.replica not in self._replicas:
                continue
            targets = self._adapter(move.adapter)._targets
            if move.kind in ("load", "pin"):
                targets[move.replica] = None
            elif move.kind == "unload":
                targets.pop(move.replica, None)
            self._may_forget(self._adapter(move.adapter))

    # Inside

    def _tick(self) -> float:
        now = self._clock.now = max(self._time(), self._clock.now)
        return now

    def _adapter(self, name: str) -> Adapter:
        found = self._adapters.get(name)
        if found is None:
            found = self._adapters[name] = Adapter(name, self._clock)
        return found

    def _release(self, adapter: Adapter, replica_id: str) -> None:
        adapter._release(replica_id)
        self._may_forget(adapter)

    def _may_forget(self, adapter: Adapter) -> None:
        """Note that an adapter may be of no more use. The first of more than ``MAX_UNUSED`` are forgotten."""
        if adapter._used():
            return
        self._unused.pop(adapter.name, None)
        self._unused[adapter.name] = None
        while len(self._unused) > MAX_UNUSED:
            name = next(iter(self._unused))
            del self._unused[name]
            if name in self._adapters and not self._adapters[name]._used():
                del self._adapters[name]

    def _decide(self, replica: Replica) -> bool:
        """Decide whether the replica may get requests. Returns whether that has changed."""
        accepting = not replica.draining and self._clock.now - replica._heard <= self._silent_after
        if accepting == replica._accepting:
            return False
        replica._accepting = accepting
        self._accepting_changed()
        return True

    def _accepting_changed(self) -> None:
        self._view._accepting = tuple(r for r in self._replicas.values() if r._accepting)

    def _finish(self, kind: RouteEventKind, request_id: str) -> None:
        found = self._in_flight.get(request_id)
        if found is not None:
            request, replica_id = found
            self._forget(request)
            if replica_id in self._replicas:
                self._replicas[replica_id]._end()
            self._tell(kind, self._tick(), request, replica_id)

    def _forget(self, request: RouteRequest) -> None:
        """Remove a request from those in flight."""
        del self._in_flight[request.request_id]
        if request.adapter is not None:
            adapter = self._adapters[request.adapter]
            adapter.in_flight -= 1
            self._may_forget(adapter)

    def _about(self, kind: RouteEventKind, request_id: str) -> None:
        found = self._in_flight.get(request_id)
        if found is not None:
            self._tell(kind, self._tick(), *found)

    def _tell(
        self, kind: RouteEventKind, now: float, request: RouteRequest | None, replica: str | None
    ) -> None:
        if self.listeners:
            event = RouteEvent(kind, now, request, replica)
            for listener in self.listeners:
                listener(event)
