"""The device is lost: what ran fails, what waits is served when there is one again."""

from __future__ import annotations

from aioengine import events
from aioengine.schedulers import Location
from aioengine.testing import LIMITS, Sim


def test_running_requests_fail_and_waiting_ones_are_served() -> None:
    sim = Sim(LIMITS._replace(max_num_seqs=2))
    sim.register("a")
    running = [sim.add("a", max_tokens=20), sim.add(None, max_tokens=20)]
    for _ in range(4):
        sim.settle()
    waiting = sim.add("a")
    sim.schedule()  # lost with a step in flight
    sim.lose_device()
    assert [sim.ended.get(r.id) for r in running] == ["error", "error"]
    sim.core.check()
    sim.run()
    assert sim.ended[waiting.id] == "length"
    kinds = [type(e).__name__ for e in sim.events if isinstance(e, events.AdapterEvent)]
    once = ["AdapterLoading", "AdapterLoaded", "AdapterPlacing", "AdapterPlaced"]
    assert kinds == ["AdapterRegistered", *once, "AdapterEvicted", "AdapterEvicted", *once]


def test_pinned_and_wanted_adapters_are_read_again_and_others_are_not() -> None:
    sim = Sim()
    residency = sim.core.residency
    pinned, wanted, other = (sim.register(name) for name in ("pinned", "wanted", "other"))
    for entry in (pinned, other):
        residency.names.of(entry.label).load(sim.now, entry)
    sim.core.residency.names.of(pinned.label).pin(sim.now)
    sim.settle()
    sim.settle()
    residency.names.of(wanted.label).load(sim.now, wanted)
    sim.schedule()
    assert [e.location for e in (pinned, wanted, other)] == [
        Location.CPU,  # its copy is under way
        Location.LOADING,
        Location.CPU,
    ]
    sim.lose_device()
    assert {e.location for e in (pinned, wanted, other)} == {Location.DISK}
    for _ in range(4):
        sim.settle()
    assert [e.location for e in (pinned, wanted, other)] == [Location.SLOT, Location.CPU, Location.DISK]
