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
    assert [event.error.waiting for event in ended.values()] == [7, 6, 5], "what it still has"  # type: ignore[union-attr]
    with pytest.raises(EngineOverloaded, match="max_waiting=8") as caught:
        sim.add(tenant="hog")
    assert (caught.value.bound, caught.value.waiting) == ("server", 8)
    sim.run()
    assert all(sim.ended[request.id] == "length" for request in (*hog[:5], *others))


def test_bounds_of_tenants_and_adapters_concern_nobody_else() -> None:
    sim = Sim(LIMITS._replace(max_waiting_per_tenant=4, max_waiting_per_adapter=2))
    for name in "xyz":
        sim.register(name)
    sim.core.room.max_of_tenant = {"b": 1}
    for adapter in "xxyy":
        sim.add(adapter, tenant="a")
    with pytest.raises(EngineOverloaded, match=r"'a'.*max_waiting_per_tenant") as caught:
        sim.add(tenant="a")
    assert (caught.value.bound, caught.value.waiting) == ("tenant", 4)
    sim.add(tenant="b")
    with pytest.raises(EngineOverloaded, match="may have 1"):
        sim.add(tenant="b")
    sim.core.room.max_of_tenant = {}
    sim.add(tenant="b")
    shared = sim.add("x", tenant="c")
    assert [r.options.tenant for r in sim.core.queues.all if r.adapter and r.adapter.label == "x"] == [
        "a",
        "c",
    ]
    with pytest.raises(EngineOverloaded, match=r"max_waiting_per_adapter=2 .*'x'") as caught:
        sim.add("x", tenant="d")
    assert (caught.value.bound, caught.value.waiting) == ("adapter", 2)
    sim.core.end(shared, "abort", sim.now)
    sim.add("x", tenant="d")
    sim.take_events()
    refused = [event.bound for event in sim.of(events.RequestRefused)]  # type: ignore[attr-defined]
    assert refused == ["tenant", "tenant", "adapter"]


def test_a_mix_counts_for_each_of_its_adapters() -> None:
    sim = Sim(LIMITS._replace(max_waiting_per_adapter=2, max_num_seqs=1))
    for name in "xyz":
        sim.register(name)
    running = sim.add(max_tokens=20)
    sim.settle()
    first = [sim.add(sim.mix("x", "y"), tenant="a"), sim.add("y", tenant="a")]
    for wanted in (sim.mix("x", "y"), sim.mix("z", "y"), "y", sim.mix("y")):
        with pytest.raises(EngineOverloaded, match=r"max_waiting_per_adapter=2 .*'y'") as caught:
            sim.add(wanted, tenant="a")
        assert (caught.value.bound, caught.value.waiting, caught.value.adapter) == ("adapter", 2, "y")
    sim.take_events()
    refused = [(event.bound, event.adapter) for event in sim.of(events.RequestRefused)]  # type: ignore[attr-defined]
    assert refused == [("adapter", "y")] * 4
    first += [sim.add("x", tenant="a"), sim.add(sim.mix("z"), tenant="a"), sim.add("z", tenant="a")]
    with pytest.raises(EngineOverloaded, match="'x'"):
        sim.add("x", tenant="a")
    sim.core.check()
    sim.core.end(first[0], "abort", sim.now)
    first += [sim.add("x", tenant="a"), sim.add("y", tenant="a")]
    sim.core.check()
    sim.run()
    assert all(sim.ended[request.id] == "length" for request in (running, *first[1:]))
    assert not sim.core.room._of_adapter


def test_a_mix_takes_a_place_of_each_of_its_adapters_or_none() -> None:
    sim = Sim(LIMITS._replace(max_waiting_per_adapter=2, max_num_seqs=1))
    for name in "vwxyz":
        sim.register(name)
    sim.add(max_tokens=20)
    sim.settle()
    hog = [sim.add(wanted, tenant="hog") for wanted in (*"vvwwzz", sim.mix("x", "y"), sim.mix("x", "y"))]
    sim.add(sim.mix("v", "w"), tenant="b")
    assert list(endings(sim)) == [hog[1].id, hog[3].id]
    sim.add(sim.mix("x", "y"), tenant="b")
    assert list(endings(sim))[2:] == [hog[7].id], "it had places of both"
    with pytest.raises(EngineOverloaded, match="'x'"):
        sim.add(sim.mix("z", "x"), tenant="c")
    assert len(endings(sim)) == 3, "nobody makes way in vain"
    sim.core.check()


def prompt(tokens: int) -> list[int]:
    return [10] * tokens


def test_long_prompts_are_bounded_by_their_tokens() -> None:
    sim = Sim(LIMITS._replace(max_waiting_tokens=100, max_waiting_tokens_per_tenant=80))
    accepted = [sim.add(tenant="hog", prompt=prompt(30)) for _ in range(2)]
    with pytest.raises(EngineOverloaded, match=r"'hog'.*max_waiting_tokens_per_tenant=80") as caught:
        sim.add(tenant="hog", prompt=prompt(30))
    assert caught.value.bound == "tenant"
    accepted.append(sim.add(tenant="hog", prompt=prompt(20)))
    accepted += [sim.add(tenant="b", prompt=prompt(5)) for _ in range(4)]
    assert sim.core.room.tokens == 100 and not endings(sim), "the bound is kept, and nobody was displaced"
    sim.run()
    assert all(sim.ended[request.id] == "length" for request in accepted)
    assert sim.core.room.tokens == 0


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
    first, second = room.enter("a", (), 0.0), room.enter("a", (), 0.0)
    room.weigh(first, 8, 0.0)
    with pytest.raises(EngineOverloaded, match="8 tokens of tenant 'a'"):
        room.weigh(second, 3, 0.0)
    first.leave()
    room.weigh(first, 8, 0.0)  # it has no place any more
    room.weigh(second, 3, 0.0)
    room.check()
    assert room.tokens == 3
