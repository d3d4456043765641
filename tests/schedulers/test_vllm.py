"""The peer's order: arrival order, skip what needs a further adapter, never age."""

from __future__ import annotations

from aioengine.core import CoreLimits
from aioengine.schedulers import compose
from aioengine.schedulers.policies.by_arrival import VLLMOrder
from aioengine.testing import LIMITS, Sim


def sim_with(limits: CoreLimits, names: str) -> Sim:
    sim = Sim(limits, compose(order=VLLMOrder()))
    for name in names:
        sim.register(name)
    return sim


def test_an_idle_slot_goes_to_the_first_in_the_queue_at_once() -> None:
    """Although a later request waits for the adapter that is in it, and is served when it comes back."""
    sim = sim_with(LIMITS._replace(num_slots=1), "ab")
    for name in "ba":  # both on the CPU, a in the slot
        sim.add(name)
        sim.run()
    cold = sim.add("b")
    sim.now += 0.001
    warm = sim.add("a")
    sim.run()
    assert cold.admitted is not None and warm.admitted is not None
    assert cold.admitted < warm.admitted


def test_nothing_is_read_ahead() -> None:
    sim = sim_with(LIMITS._replace(num_slots=1, cpu_capacity=3), "ab")
    sim.add("a", max_tokens=8)
    for _ in range(3):
        sim.settle()
    sim.add("b")
    sim.settle()
    assert not sim.loads, "b would have to wait for the slot anyway"
