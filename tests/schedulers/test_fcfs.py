"""The default policy's promises, in virtual time."""

from __future__ import annotations

from support.policy_cases import order_of

from aioengine import events
from aioengine.core.adapters.arena import GRANULE
from aioengine.core.state import Request
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim


def test_order_of_arrival_among_what_can_run() -> None:
    sim = Sim(LIMITS._replace(max_num_seqs=2))
    sim.register("a")
    for adapter in (None, "a", None, "a", None):
        sim.add(adapter)
        sim.now += 0.01
    sim.run()
    order = order_of(sim)
    assert order[:2] == ["r1", "r3"], "what waits for its adapter is skipped, not waited for"
    assert order.index("r2") < order.index("r4")


def test_all_cold_adapters_get_their_turn_in_order_of_arrival() -> None:
    sim = Sim(LIMITS._replace(num_slots=2, cpu_capacity=2), FCFS(max_wait=0.5))
    names = [f"n{i}" for i in range(8)]
    firsts: list[Request] = []
    for name in names:
        sim.register(name)
        firsts.append(sim.add(name))
        sim.now += 0.001
    for _ in range(400):
        sim.add("n0")
        sim.add("n1")
        sim.settle(step_seconds=0.05)
        if all(r.admitted is not None for r in firsts):
            break
    times = [r.admitted for r in firsts]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]


def test_an_idle_slot_that_nobody_waits_for_is_reused_least_recently_used_first() -> None:
    sim = Sim(LIMITS._replace(num_slots=2, cpu_capacity=4))
    for name in "abc":
        sim.register(name)
    for name in "ab":
        sim.add(name)
        sim.run()
    sim.add("a")
    sim.run()
    sim.add("c")
    sim.run()
    evicted = [e.adapter for e in sim.of(events.AdapterEvicted)]  # type: ignore[attr-defined]
    assert evicted == ["b"]


def test_an_adapter_that_found_only_pieces_of_memory_fits_beside_a_pinned_one_later() -> None:
    limits = LIMITS._replace(num_slots=4, cpu_capacity=6, slot_memory=4 * GRANULE)
    sim = Sim(limits, FCFS())
    sim.sizes = {"pinned": GRANULE, "idle": GRANULE, "busy": GRANULE, "large": 2 * GRANULE}
    for name in sim.sizes:
        sim.register(name)
    sim.core.residency.names.of("pinned").load(sim.now)
    sim.core.residency.names.of("pinned").pin(sim.now)
    sim.settle()
    for name, tokens in (("idle", 1), ("busy", 40)):
        sim.add(name, max_tokens=tokens)
        for _ in range(4):
            sim.settle()
    large = sim.add("large", max_tokens=1)
    while len(sim.core.requests) > 1:
        sim.settle(step_seconds=0.1)
    assert large.id not in sim.ended and sim.of(events.PolicyRefused), "the free bytes are in two pieces"
    sim.run()
    assert sim.ended[large.id] == "length"
