"""The device is lost: what ran fails, what waits is served when there is one again."""

from __future__ import annotations

from aioengine.schedulers import Location
from aioengine.testing import Sim


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
