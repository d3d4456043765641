"""Whatever happens to a fleet, the gateway's knowledge stays sound, and every router names replicas that
accept.

A model keeps the truth beside the state: which replicas live, what each has received, and what is on its way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aioengine.schedulers.registry import available
from aioengine.schedulers.routing import (
    FleetState,
    FleetView,
    Location,
    Move,
    PlacementGuard,
    PlacementPolicy,
    ReplicaLimits,
    Report,
    Route,
    RouteRequest,
    RouterGuard,
    RouterPolicy,
    Tiers,
    available_routers,
    load_placement,
    load_router,
)
from aioengine.schedulers.routing.guard import MAX_REASONS

ADAPTERS = [None, "a", "b", "c", "d"]
SIZES = {"a": 100, "b": 200, "c": 300, "d": 400}
"""Bytes of each adapter."""
LIMITS = ReplicaLimits(slots=2, max_running=4, kv_tokens=1000)
SILENT = 3.0


class TrueReplica:
    """What is really so on a replica, and the requests of this gateway there."""

    def __init__(self, skew: float) -> None:
        self.skew = skew
        self.received: list[RouteRequest] = []
        self.ended = 0
        self.held: list[str] = []
        self.on_the_way: list[RouteRequest] = []
        self.draining = False
        self.heard = 0.0


class FleetMachine(RuleBasedStateMachine):
    """Replicas join, die, fall silent, drain and report late; requests are routed, end and fail."""

    router = "affinity"

    def __init__(self) -> None:
        super().__init__()
        self.now = 10.0
        self.state = FleetState(lambda: self.now, silent_after=SILENT, prefix_blocks=16)
        self.guard = RouterGuard(load_router(self.router))
        self.truth: dict[str, TrueReplica] = {}
        self.joined = self.sent = 0
        self.in_flight: dict[str, str] = {}
        self.requests: dict[str, RouteRequest] = {}
        self.late: list[tuple[str, Report]] = []
        self.registered: set[str] = set()

    @rule(skew=st.sampled_from([0.0, 1e6, -1e6]), again=st.booleans())
    @precondition(lambda self: len(self.truth) < 5)
    def join(self, skew: float, again: bool) -> None:
        name = f"r{self.joined - 1 if again and self.joined else self.joined}"
        self._forget(name)
        self.joined += 1
        self.state.join(name, LIMITS)
        self.truth[name] = TrueReplica(skew)
        self.truth[name].heard = self.now

    @rule(data=st.data())
    @precondition(lambda self: self.truth)
    def die(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.truth)))
        lost = {request.request_id for request in self.state.leave(name)}
        assert lost == {one for one, where in self.in_flight.items() if where == name}
        self._forget(name)
        assert self.state.leave(name) == []

    @rule(data=st.data(), draining=st.booleans())
    @precondition(lambda self: self.truth)
    def drain(self, data: st.DataObject, draining: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.truth)))
        self.truth[name].draining = draining
        self.state.drain(name, draining)

    @rule(
        adapter=st.sampled_from(ADAPTERS),
        tenant=st.sampled_from([None, "x", "y"]),
        prefixes=st.lists(st.integers(0, 5), max_size=4, unique=True),
    )
    def route(self, adapter: str | None, tenant: str | None, prefixes: list[int]) -> None:
        self.sent += 1
        request = RouteRequest(f"q{self.sent}", adapter, 100, 10, tenant=tenant, prefixes=tuple(prefixes))
        self._route(request)

    @rule(data=st.data())
    @precondition(lambda self: self.in_flight)
    def fail_and_retry(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.in_flight)))
        request, where = self.requests[name], self.in_flight.pop(name)
        self.state.ended(name)
        self.truth[where].ended += request in self.truth[where].received
        if request in self.truth[where].on_the_way:
            self.truth[where].on_the_way.remove(request)
        self._route(request._replace(tried=(*request.tried, where)))

    @rule(data=st.data())
    @precondition(lambda self: self.in_flight)
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.in_flight)))
        where = self.truth[self.in_flight.pop(name)]
        self.state.ended(name)
        where.ended += 1
        self.state.ended(name)  # a second end changes nothing

    @rule(data=st.data(), late=st.booleans(), held=st.lists(st.sampled_from("abcd"), max_size=3, unique=True))
    @precondition(lambda self: self.truth)
    def report(self, data: st.DataObject, late: bool, held: list[str]) -> None:
        name = data.draw(st.sampled_from(sorted(self.truth)))
        truth = self.truth[name]
        arrived = data.draw(st.integers(0, len(truth.on_the_way)))
        truth.received += truth.on_the_way[:arrived]
        del truth.on_the_way[:arrived]
        truth.held = held
        running = max(len(truth.received) - truth.ended, 0)
        report = Report(
            sent_at=self.now + truth.skew,
            received=len(truth.received),
            ended=truth.ended,
            waiting=0,
            running=running,
            waiting_tokens=0,
            free_kv_tokens=LIMITS.kv_tokens,
            waiting_for={},
            seconds_per_token=1e-4,
            tiers=Tiers(held[:1], held[1:2], held[2:], {name: SIZES[name] for name in held[:2]}),
        )
        if late:
            self.late.append((name, report))
        else:
            self._take(name, report)

    @rule()
    @precondition(lambda self: self.late)
    def late_report(self) -> None:
        """Of a replica that may have left meanwhile; it may come after a newer one."""
        self._take(*self.late.pop(0))

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        before = {replica.replica_id for replica in self.state.view.accepting}
        silent = self.state.check()
        accepting = {replica.replica_id for replica in self.state.view.accepting}
        assert set(silent) == before - accepting

    @rule(name=st.sampled_from(sorted(available("placement"))), fails=st.booleans())
    def plan(self, name: str, fails: bool) -> None:
        snapshot = self.state.snapshot()
        moves = PlacementGuard(load_placement(name)).plan(snapshot)
        assert moves is not None
        if fails:
            assert set(snapshot.changed) <= set(self.state.view.changed)
        else:
            self.state.planned(snapshot, moves)
            assert not set(self.state.view.changed) - {None}

    @rule(name=st.sampled_from("abcd"), known=st.booleans())
    def register(self, name: str, known: bool) -> None:
        (self.state.add_adapter if known else self.state.remove_adapter)(name)
        (self.registered.add if known else self.registered.discard)(name)

    @invariant()
    def only_what_is_used_is_remembered(self) -> None:
        """Clients make up names of adapters."""
        used = {self.requests[one].adapter for one in self.in_flight} | self.registered
        for name, adapter in self.state.view.adapters.items():
            if adapter.holders or adapter.target_holders:
                used.add(name)
        assert used - {None} == self.state.view.adapters.keys()

    @invariant()
    def sound(self) -> None:
        view = self.state.view
        assert list(view.replicas) == sorted(view.replicas, key=list(self.truth).index)
        assert self.state.in_flight == len(self.in_flight)
        for replica in view.accepting:
            assert replica.accepting and not self.truth[replica.replica_id].draining
        for name, replica in view.replicas.items():
            assert replica.waiting >= 0 and replica.running >= 0
            assert replica.age >= 0 and replica.queue_seconds >= 0
            for adapter in "abcd":
                holds = adapter in view.adapters and name in view.adapters[adapter].holders
                assert holds == (replica.location(adapter) is not Location.DISK)
        for adapter in view.adapters.values():
            assert set(adapter.holders) <= view.replicas.keys()
            assert set(adapter.target_holders) <= view.replicas.keys()
            assert adapter.demand >= 0
            assert adapter.nbytes in (0, SIZES.get(adapter.name))
            mine = sum(self.requests[one].adapter == adapter.name for one in self.in_flight)
            assert adapter.in_flight == mine
        assert len(self.state.view._prefixes) <= 16 * len(self.truth)
        assert not self.guard.failures, self.guard.failures

    def _route(self, request: RouteRequest) -> None:
        able = {r.replica_id for r in self.state.view.accepting} - set(request.tried)
        route = self.guard.route(request, self.state.view)
        assert set(route.replicas) <= able and bool(route.replicas) == (route.reject is None)
        if not route.replicas:
            assert not able or self.router == "shuffle"
            return
        chosen = route.replicas[0]
        self.state.sent(request, chosen)
        self.truth[chosen].on_the_way.append(request)
        self.in_flight[request.request_id], self.requests[request.request_id] = chosen, request

    def _take(self, name: str, report: Report) -> None:
        self.state.report(name, report)
        if name in self.truth:
            self.truth[name].heard = self.now

    def _forget(self, name: str) -> None:
        self.truth.pop(name, None)
        self.late = [(who, report) for who, report in self.late if who != name]
        self.in_flight = {one: where for one, where in self.in_flight.items() if where != name}


MACHINES = {
    name: type(f"Machine_{name}", (FleetMachine,), {"router": name}) for name in sorted(available_routers())
}


@pytest.mark.parametrize("name", MACHINES)
def test_machine(name: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    examples = 20 if name == "affinity" else 4
    run_state_machine_as_test(
        MACHINES[name], settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )


# The guard


class Broken(RouterPolicy):
    """Answers whatever it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def fleet_of(count: int = 3) -> FleetState:
    state = FleetState(lambda: 0.0)
    for index in range(count):
        state.join(f"r{index}", LIMITS)
    return state


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (RuntimeError("no"), "raised"),
        (StopIteration(), "raised"),
        (None, "nonsense"),
        ("r0", "nonsense"),
        (("r0",), "nonsense"),
        (Route(["r9"]), "nonsense"),
        (Route("r0"), "nonsense"),
        (Route([0]), "nonsense"),  # type: ignore[list-item]
        (Route(iter(["r0"])), "nonsense"),  # type: ignore[arg-type]
        (Route(["r0"], reason=3), "nonsense"),  # type: ignore[arg-type]
        (Route([], reject=3), "nonsense"),  # type: ignore[arg-type]
        (Route([]), "nonsense"),
        (Route(["r2"]), "nonsense"),  # it drains
    ],
)
def test_a_broken_router_harms_nobody(answer: object, kind: str) -> None:
    state, said = fleet_of(), []
    state.drain("r2")
    guard = RouterGuard(Broken(answer), failed=lambda *what: said.append(what))
    route = guard.route(RouteRequest("q", "a", 10, 10), state.view)
    assert set(route.replicas) == {"r0", "r1"} and route.reject is None
    assert dict(guard.failures) == {kind: 1} and said[0][0] == kind and said[0][1].startswith("Broken")


def test_a_slow_router_is_asked_no_more() -> None:
    clock = iter(range(10_000))
    state = fleet_of()
    guard = RouterGuard(Broken(Route(["r1"])), timer=lambda: next(clock), budget=0.5, max_overruns=3)
    for _ in range(3):
        assert guard.route(RouteRequest("q", None, 10, 10), state.view).replicas == ["r1"]
    assert guard.failures == {"slow": 3, "replaced": 1}
    assert len(guard.route(RouteRequest("q", None, 10, 10), state.view).replicas) == 3


class BrokenPlacement(PlacementPolicy):
    """Answers whatever it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def plan(self, view: FleetView) -> Sequence[Move]:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (ZeroDivisionError(), "raised"),
        (None, "nonsense"),
        ([Move("steal", "a", "r0")], "nonsense"),  # type: ignore[arg-type]
        ([Move("load", "a", "r9")], "nonsense"),
        ([Move("load", "z", "r0")], "nonsense"),
    ],
)
def test_a_broken_placement_policy_moves_nothing(answer: object, kind: str) -> None:
    state = fleet_of()
    state.add_adapter("a")
    guard = PlacementGuard(BrokenPlacement(answer))
    assert guard.plan(state.snapshot()) is None
    assert dict(guard.failures) == {kind: 1}


def test_reasons_that_a_router_makes_up_are_counted_together() -> None:
    router = Broken(Route(["r0"]))
    guard, view = RouterGuard(router), fleet_of().view
    for number in range(1000):
        router.answer = Route(["r0"], reason=f"made up {number}")
        guard.route(RouteRequest("q", "a", 10, 10), view)
    assert len(guard.reasons) == MAX_REASONS + 1
    assert guard.reasons["other"] == 1000 - MAX_REASONS


def test_the_view_is_read_only_and_live_and_a_snapshot_is_not() -> None:
    state = fleet_of(1)
    view, snapshot = state.view, state.snapshot()
    with pytest.raises(TypeError):
        view.replicas["x"] = view.replicas["r0"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        view.replicas["r0"].waiting = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        view.now = 3.0  # type: ignore[misc]
    state.sent(RouteRequest("q", "a", 10, 10), "r0")
    assert view.replicas["r0"].waiting == 1 and "a" in view.adapters
    assert snapshot.replicas["r0"].waiting == 0 and "a" not in snapshot.adapters
    assert copy.copy(snapshot).changed == frozenset()
