"""The bounds on waiting requests: those who fill the queue are refused, and nobody else."""

from __future__ import annotations

import pytest

from aioengine import events
from aioengine.core.waiting_room import WaitingRoom
from aioengine.errors import EngineOverloaded
from aioengine.testing import LIMITS, Sim


def endings(sim: Sim) -> dict[str, events.RequestEnded]:
    sim.take_events()
    return {event.request_id: event for event in sim.of(events.RequestEnded)}  # type: ignore[attr-defined]


def test_who_fills_the_queue_shuts_nobody_out() -> None:
    sim = Sim(LIMITS._replace(max_waiting=8))
    hog = [sim.add(tenant="hog") for _ in range(8)]
    others = [sim.add(tenant=name) for name in ("b", "c", None)]
    ended = endings(sim)
    assert list(ended) == [request.id for request in hog[:4:-1]], "the newest of the hog's make way"
    for event in ended.values():
        assert isinstance(event.error, EngineOverloaded) and event.error.bound == "tenant"
        assert "'hog'" in str(event.error) and "max_waiting=8" in str(event.error)
    with pytest.raises(EngineOverloaded, match="max_waiting=8") as caught:
        sim.add(tenant="hog")
    assert caught.value.bound == "server"
    sim.run()
    assert all(sim.ended[request.id] == "length" for request in (*hog[:5], *others))


def test_bounds_of_tenants_concern_nobody_else() -> None:
    sim = Sim(LIMITS._replace(max_waiting_per_tenant=4))
    sim.core.room.max_of_tenant = {"b": 1}
    for _ in range(4):
        sim.add(tenant="a")
    with pytest.raises(EngineOverloaded, match=r"'a'.*max_waiting_per_tenant") as caught:
        sim.add(tenant="a")
    assert caught.value.bound == "tenant"
    sim.add(tenant="b")
    with pytest.raises(EngineOverloaded, match="may have 1"):
        sim.add(tenant="b")
    sim.core.room.max_of_tenant = {}
    sim.add(tenant="b")
    sim.take_events()
    refused = [event.bound for event in sim.of(events.RequestRefused)]  # type: ignore[attr-defined]
    assert refused == ["tenant", "tenant"]


def prompt(tokens: int) -> list[int]:
    return [10] * tokens


def test_those_beside_a_flood_of_long_prompts_get_their_part() -> None:
    sim = Sim(LIMITS._replace(max_waiting_tokens=100))
    hog = [sim.add(tenant="hog", prompt=prompt(20)) for _ in range(5)]
    with pytest.raises(EngineOverloaded, match="max_waiting_tokens=100") as caught:
        sim.add(tenant="hog", prompt=prompt(20))
    assert caught.value.bound == "server"
    others = [sim.add(tenant=name, prompt=prompt(16)) for name in ("b", "b", None)]
    ended = endings(sim)
    assert list(ended) == [request.id for request in hog[:1:-1]], "the newest of the hog's make way"
    for event in ended.values():
        assert isinstance(event.error, EngineOverloaded) and event.error.bound == "tenant"
        assert "'hog'" in str(event.error) and "max_waiting_tokens=100" in str(event.error)
    for tenant in ("hog", "b"):
        with pytest.raises(EngineOverloaded, match=f"'{tenant}'") as caught:
            sim.add(tenant=tenant, prompt=prompt(16))
        assert caught.value.bound == "tenant"
    sim.run()
    assert all(sim.ended[request.id] == "length" for request in (*hog[:2], *others))


def test_tokens_that_are_known_later_are_counted_then() -> None:
    room = WaitingRoom(LIMITS._replace(max_waiting_tokens_per_tenant=10))
    first, second = room.enter("a", None, 0.0), room.enter("a", None, 0.0)
    room.weigh(first, 8, 0.0)
    with pytest.raises(EngineOverloaded, match="8 tokens of tenant 'a'"):
        room.weigh(second, 3, 0.0)
    first.leave()
    room.weigh(first, 8, 0.0)  # it has no place any more
    room.weigh(second, 3, 0.0)
    room.check()
    assert room.tokens == 3
