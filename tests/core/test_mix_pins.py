"""Mixes beside pinned adapters, their new versions, and reads that hang."""

from __future__ import annotations

import random

import pytest
from support.mix_world import core_with

from aioengine.core.state import Status
from aioengine.errors import EngineOverloaded
from aioengine.schedulers.policy import Location
from aioengine.testing import LIMITS


def test_pinned_adapters_that_leave_too_few_slots() -> None:
    sim = core_with("a", "b", "c")
    sim.core.residency.want(sim.core.residency.current["a"], sim.now, pin=True)
    for _ in range(3):
        sim.settle()
    lost, kept = sim.add(sim.mix("b", "c")), sim.add(sim.mix("a", "b"))
    sim.run()
    assert sim.ended == {lost.id: "error", kept.id: "length"}
    assert isinstance(sim.errors[lost.id], EngineOverloaded)
    assert "needs 2 slots at a time, and there are 1" in str(sim.errors[lost.id])


@pytest.mark.parametrize("seed", range(20))
def test_no_mix_fails_because_a_pinned_part_is_replaced(seed: int) -> None:
    """Mixes of what is current wait for slots that are busy, and pinned parts get new versions."""
    rng = random.Random(seed)
    slots = rng.randint(2, 4)
    limits = LIMITS._replace(num_slots=slots, cpu_capacity=slots + rng.randint(0, 2), num_blocks=64)
    sim = core_with(*"abcdef", limits=limits._replace(slot_memory=rng.choice([None, 1024 * slots])))
    residency = sim.core.residency
    pinned = list("abc"[: rng.randint(1, slots - 1)])
    for name in pinned:
        residency.want(residency.current[name], sim.now, pin=True)
        for _ in range(3):
            sim.settle()
    requests = [sim.add(rng.choice("abcdef"), max_tokens=rng.randint(10, 40)) for _ in range(slots)]
    for _ in range(rng.randint(0, 4)):
        sim.settle()
    for _ in range(rng.randint(1, 3)):
        parts = rng.sample(pinned, rng.randint(1, len(pinned)))
        room = slots - len(pinned)
        parts += rng.sample("def", rng.randint(1, room))
        requests.append(sim.add(sim.mix(*parts)))
    for name in pinned:
        for _ in range(rng.randint(0, 2)):
            residency.want(residency.declare(name, f"/adapters/{name}"), sim.now)
            sim.settle(step_seconds=rng.choice([0.01, 0.5]))
    sim.run(step_seconds=0.1)
    assert [sim.ended[request.id] for request in requests] == ["length"] * len(requests)
    for _ in range(8):
        sim.settle(step_seconds=0.1)
    assert all(residency.current[name].location is Location.SLOT for name in pinned)


def test_a_read_that_hangs_keeps_no_new_version_of_a_pinned_adapter_out() -> None:
    """A mix of the version before waits for the read."""
    sim = core_with("a", "b")
    residency = sim.core.residency
    residency.want(residency.current["a"], sim.now, pin=True)
    for _ in range(3):
        sim.settle()
    mix = sim.add(sim.mix("a", "b"))
    sim.schedule()
    hanging = sim.loads.pop()
    sim.core.adapter_load_stalled(hanging)
    residency.want(residency.declare("a", "/adapters/a"), sim.now)
    for _ in range(10):
        sim.settle(step_seconds=0.5)
    new = residency.current["a"]
    assert (new.version, new.location, mix.status) == (2, Location.SLOT, Status.WAITING)
    sim.loads.append(hanging)
    sim.run(step_seconds=0.1)
    assert sim.ended == {mix.id: "length"}
    for _ in range(3):
        sim.settle()
    assert new.location is Location.SLOT


def test_replaced_parts_leave_their_slots_while_the_read_of_another_hangs() -> None:
    sim = core_with("a", "b", "c", "d", limits=LIMITS._replace(cpu_capacity=6))
    residency = sim.core.residency
    for name in ("a", "b"):
        sim.add(name)
    sim.run()
    mixes = [sim.add(sim.mix(name, "c")) for name in ("a", "b")]
    sim.schedule()
    hanging = sim.loads.pop()
    sim.core.adapter_load_stalled(hanging)
    for name in ("a", "b"):
        residency.want(residency.declare(name, f"/adapters/{name}"), sim.now)
    sim.settle()
    others = [sim.add("d"), sim.add("a")]
    for _ in range(40):
        sim.settle(step_seconds=0.1)
    assert [other.status for other in others] == [Status.ENDED] * 2
    assert [mix.status for mix in mixes] == [Status.WAITING] * 2
    sim.loads.append(hanging)
    sim.run(step_seconds=0.1)
    assert set(sim.ended.values()) == {"length"}


def test_a_slow_read_of_a_part_is_in_nobody_s_way() -> None:
    sim = core_with("a", "b", "c", "d")
    sim.add(sim.mix("a", "b"))
    other = sim.add(sim.mix("c", "d"))
    plain = sim.add("b")
    sim.schedule()
    for _ in range(20):
        slow = [index for index, entry in enumerate(sim.loads) if entry.label != "a"]
        if slow:
            sim.finish_load(slow[0])
        elif len(sim.loads) == 1 and not sim.loads[0].stalled:
            sim.core.adapter_load_stalled(sim.loads[0])
        while sim.copies:
            sim.finish_copy()
        if sim.batch is not None:
            sim.finish_step()
        sim.now += 0.1
        sim.schedule()
        sim.core.check()
    assert sim.ended == {plain.id: "length", other.id: "length"}
