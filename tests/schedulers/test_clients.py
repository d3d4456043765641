"""Who waits and runs, by client: what events kept is what reading everything anew would find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.schedulers.parts.clients import Client, Clients, Waiting, rank
from aioengine.schedulers.policy import PolicyEvent

NAMES = [None, "x", "y", "z"]


@dataclass
class Asked:
    request_id: str
    tenant: str
    adapter: str | None
    arrival: float


@dataclass
class View:
    waiting: list[Any]
    running: list[Any]


def shown(clients: Clients) -> dict[str, Any]:
    def of(client: Any) -> Any:
        return client.name, len(client.running), client.held, client.open, client.in_slots

    return {
        "clients": {of(client) for client in clients.by_name.values()},
        "ready": {client.name for client in clients.ready},
        "cold": [client.name for client in clients.cold],
        "idle": set(clients.idle),
        "using": clients.using_adapters,
        "running": clients.running_counts,
        "holding": {held: {client.name for client in group} for held, group in clients.holding.items()},
        "users": {name: {client.name for client in clients.users(name)} for name in clients.in_slots},
    }


OPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "admit", "preempt", "finish", "slots", "open", "retire"]),
        st.integers(0, 30),
        st.integers(0, 7),
    ),
    max_size=60,
)


@given(OPS)
@settings(max_examples=300, deadline=None)
def test_what_events_kept_is_what_reading_anew_finds(ops: list[tuple[str, int, int]]) -> None:
    clients = Clients(lambda request: request.tenant)
    view = View([], [])
    slots: list[str | None] = []
    can_run: set[str | None] = set()

    def tell(kind: Any, **fields: Any) -> None:
        clients.on_event(PolicyEvent(kind, 0.0, **fields))

    for number, (kind, i, bits) in enumerate(ops):
        if kind == "add":
            request = Asked(f"r{number}", "abc"[i % 3], NAMES[bits % 4], float(number))
            view.waiting.append(request)
            tell("request_added", request=request)
        elif kind == "admit" and view.waiting:
            request = view.waiting.pop(i % len(view.waiting))
            view.running.append(request)
            tell("request_admitted", request=request)
        elif kind == "preempt" and view.running:
            request = view.running.pop(i % len(view.running))
            view.waiting = sorted([*view.waiting, request], key=lambda r: r.arrival)
            tell("request_preempted", request=request)
        elif kind == "finish" and (view.waiting or view.running):
            group = view.running if view.running and (bits % 2 or not view.waiting) else view.waiting
            tell("request_finished", request=group.pop(i % len(group)))
        elif kind == "slots":
            slots = [name for bit, name in enumerate(["x", "y", "z"]) if bits >> bit & 1]
        elif kind == "open":
            can_run = {name for bit, name in enumerate([None, "x", "y"]) if bits >> bit & 1}
        elif kind == "retire":
            was, name = NAMES[1 + i % 3], f"{NAMES[1 + i % 3]}@{number}"
            for request in (*view.waiting, *view.running):
                if request.adapter == was:
                    request.adapter = name
            slots = [name if slot == was else slot for slot in slots]
            can_run = {name if other == was else other for other in can_run}
            tell("adapter_retired", was=was, adapter=name)
        clients.sync(view)  # type: ignore[arg-type]
        clients.set_slots(slots)
        clients.set_open(can_run)
        anew = Clients(lambda request: request.tenant)
        unheard_of = Asked("?", "?", None, 0.0)
        anew.on_event(PolicyEvent("request_finished", 0.0, request=unheard_of))  # type: ignore[arg-type]
        anew.sync(view)  # type: ignore[arg-type]
        anew.set_slots(slots)
        anew.set_open(can_run)
        found, expected = shown(clients), shown(anew)
        for of_first_waiter in ("clients", "cold", "holding", "users"):
            if any(name not in {r.adapter for r in view.running} for name in slots):
                del found[of_first_waiter], expected[of_first_waiter]  # who began to wait first is not known
        assert found == expected
        ready = [rank(client) for client in clients.ready]
        assert ready == sorted(ready)
        assert sum(clients.running_counts.values()) == len(clients.by_name)


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 9)), max_size=60), st.sets(st.integers(0, 16)))
def test_requests_for_some_adapters_come_in_order_of_arrival(
    added: list[tuple[int, int]], names: set[int]
) -> None:
    client = Client("a")
    entries = [
        Waiting(float(time), number, Asked(f"r{number}", "a", f"x{adapter}", time))  # type: ignore[arg-type]
        for number, (adapter, time) in enumerate(added)
    ]
    for entry in entries:
        client.add(entry.request.adapter, entry)
    wanted = {f"x{name}" for name in names}
    found = list(client.waiting_for(wanted))
    assert found == sorted((e for e in entries if e.request.adapter in wanted), key=lambda e: e[:2])


def test_idle_adapters_are_in_the_order_of_their_slots() -> None:
    """Whatever the hashes of their names: a simulation is the same in every process."""
    clients, names = Clients(lambda request: request.tenant), [f"adapter-{i}" for i in range(30)]
    clients.set_slots(names[:20])
    assert [*clients.idle] == names[:20]
    clients.set_slots([*names[20:], *names[10:20]])
    assert [*clients.idle] == [*names[10:20], *names[20:]]
