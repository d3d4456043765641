"""Slots that share one memory: who comes, and who goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from aioengine import events
from aioengine.core.adapters.arena import GRANULE
from aioengine.schedulers import Decision, Location, Place, SchedulerPolicy, SchedulerView, load_policy
from aioengine.testing import LIMITS, Sim

MEMORY = 8 * GRANULE
ELASTIC = LIMITS._replace(
    num_slots=6, cpu_capacity=12, slot_memory=MEMORY, slot_bytes=4 * GRANULE, max_loads=4
)


class Scripted(SchedulerPolicy):
    """Does what the test says, once."""

    def __init__(self) -> None:
        self.next = Decision()
        self.admits = True
        self.view: SchedulerView | None = None

    def schedule(self, view: SchedulerView) -> Decision:
        self.view = view
        decision, self.next = self.next, Decision()
        admit = [request.request_id for request in view.waiting] if self.admits else []
        return decision._replace(admit=admit)


class MemorySim(Sim):
    def __init__(self, limits: object = ELASTIC) -> None:
        self.policy = Scripted()
        super().__init__(limits, self.policy)  # type: ignore[arg-type]

    def read(self, **granules: int) -> None:
        """Adapters of these sizes, on the CPU."""
        for name, size in granules.items():
            self.sizes[name] = size * GRANULE
            entry = self.register(name)
            self.core.residency.names.of(entry.label).load(self.now, entry)
        while any(e.location is not Location.CPU for e in self.core.residency.current.values() if not e.slot):
            if self.schedule() is not None:
                self.finish_step()
            if not self.loads:
                break
            while self.loads:
                self.finish_load()

    def decide(self, place: Sequence[str | Place], evict: Sequence[str] = ()) -> list[str]:
        """Place, and finish all copies; returns what was refused."""
        self.now += 1
        before = len(self.events)
        places = [Place(item) if isinstance(item, str) else item for item in place]
        self.policy.next = Decision(place=places, evict=evict)
        if self.schedule() is not None:
            self.finish_step()
        self.core.check()
        while self.copies:
            self.finish_copy()
            self.core.check()
        refused = [e for e in self.events[before:] if isinstance(e, events.PolicyRefused)]
        return [event.reason for event in refused]

    @property
    def layout(self) -> str:
        """The memory, granule by granule: each adapter's letter, and dots."""
        cells = ["."] * (MEMORY // GRANULE)
        for slot in self.core.slots.slots:
            if slot.entry is not None and slot.offset is not None:
                first = slot.offset // GRANULE
                size = -(-slot.entry.slot_nbytes // GRANULE)
                cells[first : first + size] = slot.entry.name * size
        return "".join(cells)


def test_an_adapter_takes_what_it_needs() -> None:
    sim = MemorySim()
    sim.read(a=1, b=2, c=4, d=1)
    assert sim.decide(["a", "b", "c", "d"]) == []
    assert sim.layout == "abbccccd"
    memory = sim.policy.view.memory if sim.policy.view else None
    assert memory is not None and memory.elastic
    assert (memory.total, memory.free, memory.largest_hole) == (MEMORY, 0, 0)
    assert memory.evictable == MEMORY
    assert [memory.bytes_of(name) for name in "abcd"] == [n * GRANULE for n in (1, 2, 4, 1)]


def test_victims_go_in_the_policys_order_and_only_as_many_as_it_takes() -> None:
    sim = MemorySim()
    sim.read(a=2, b=2, c=2, d=2, x=4)
    sim.decide(["a", "b", "c", "d"])
    assert sim.decide(["x"], evict=["c", "d", "a"]) == []
    assert sim.layout == "aabbxxxx"
    sim.read(y=2)
    assert sim.decide(["y"], evict=["b", "a"]) == []
    assert sim.layout == "aayyxxxx"


@pytest.mark.parametrize("evict", [["a"], []])
def test_who_gives_its_slot_to_one_on_disk_leaves_the_cpu_cache_too(evict: list[str]) -> None:
    sim = MemorySim(ELASTIC._replace(cpu_max_bytes=6 * GRANULE))
    sim.read(b=4)
    sim.read(a=4)
    sim.decide(["a"])
    assert sim.core.residency.current["b"].location is Location.DISK, "there is no room for both"
    sim.policy.admits = False
    sim.add("a")
    sim.now += 1
    sim.add("b")
    sim.decide(["b"], evict=evict)
    assert [entry.name for entry in sim.loads] == (["b"] if evict else []), "else the first keeps it"
    while sim.loads:
        sim.finish_load()
    sim.core.check()


def test_what_is_busy_or_pinned_never_leaves() -> None:
    sim = MemorySim()
    sim.read(a=2, b=2, c=4, x=3)
    sim.decide(["a", "b", "c"])
    sim.core.residency.names.of("b").pin(sim.now)
    sim.add("c", max_tokens=40)
    sim.decide([])
    assert sim.decide(["x"], evict=["c", "b", "ghost"]) == [
        "evict_unknown_adapter", "evict_busy", "evict_pinned", "place_no_room",
    ]  # fmt: skip
    assert sim.layout == "aabbcccc", "and nobody leaves for nothing"
    sim.sizes["z"] = 2 * GRANULE
    sim.read(z=2)
    assert sim.decide(["z"], evict=["c", "b"]) == ["evict_busy", "evict_pinned"]
    assert sim.layout == "zzbbcccc", "the core's own choice where the policy's is no good"


def test_idle_neighbours_leave_where_only_the_holes_are_too_small() -> None:
    sim = MemorySim()
    sim.read(a=1, b=2, c=1, d=2, e=2, x=3)
    sim.decide(["a", "b", "c", "d", "e"])
    for name in "bd":
        sim.core.residency.names.of(name).unload(sim.now)
    sim.decide([])
    assert sim.layout == "a..c..ee"
    assert sim.decide(["x"]) == []
    assert sim.layout == "xxxc..ee"
    assert sim.core.residency.current["a"].location is Location.CPU, "it is copied again when it is needed"
    sim.add("a")
    sim.decide(["a"])
    sim.run()
    sim.core.check()


def cold(sim: Sim, name: str, size: int) -> None:
    sim.sizes[name] = size * GRANULE
    sim.register(name)


def test_size_aware_replacement_keeps_many_small_adapters_rather_than_one_large() -> None:
    """What gdsf evicts frees its own bytes, so its worth by size counts on the device."""
    left: dict[str, list[str]] = {}
    for policy in ("fcfs+gdsf", "fcfs+lru"):
        sim = Sim(ELASTIC, load_policy(policy))
        for name, size in (("big", 4), ("a", 1), ("b", 1), ("c", 1), ("d", 1), ("new", 2)):
            cold(sim, name, size)
        for name in ("a", "b", "c", "d", "big"):
            sim.add(name, max_tokens=1)
            sim.run()
            sim.now += 1
        sim.add("new", max_tokens=1)
        sim.run()
        evicted = [e for e in sim.events if isinstance(e, events.AdapterEvicted) and e.level == "slot"]
        left[policy] = [event.adapter for event in evicted]
    assert left == {"fcfs+gdsf": ["big"], "fcfs+lru": ["a", "b"]}
