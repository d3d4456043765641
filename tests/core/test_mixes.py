"""Scaled adapters, adapters that were made for one tenant, and those that take several slots of one size."""

from __future__ import annotations

import pytest
from support.full_sim import FullSim

from aioengine import events
from aioengine.core.limits import CoreLimits
from aioengine.errors import AdapterChanged, AdapterTooLarge
from aioengine.schedulers import load_policy
from aioengine.schedulers.policy import Location
from aioengine.testing import LIMITS

SLOT = LIMITS._replace(num_slots=4, cpu_capacity=6, slot_bytes=1000)


def core_with(*names: str, limits: CoreLimits = LIMITS) -> FullSim:
    sim = FullSim(limits)
    for name in names:
        sim.register(name)
    return sim


def moved(sim: FullSim) -> list[str]:
    """The adapters that were read or copied, in order."""
    kinds = (events.AdapterLoading, events.AdapterPlacing)
    return [event.adapter for event in sim.events if isinstance(event, kinds)]


# Scales


def test_a_scale_is_a_number_of_each_row() -> None:
    sim = core_with("a")
    scaled, plain = sim.add("a", scale=0.5), sim.add("a")
    sim.settle()
    assert [request.view.adapter for request in sim.core.requests.values()] == ["a", "a"]
    batch = None
    while sim.core.requests:
        batch = sim.settle() or batch
    assert batch is not None
    assert {work.request_id: work.scale for work in batch.sequences} == {scaled.id: 0.5, plain.id: 1.0}
    assert moved(sim) == ["a", "a"], "a read and a copy"
    assert (scaled.adapter_name, plain.adapter_name) == ("a@1*0.5", "a")


def test_equal_prefixes_are_shared_at_the_same_scale_only() -> None:
    sim = core_with("a", "b")
    prompt = list(range(2, 14))
    for name, scale in (
        (sim.mix("a", "b"), 1.0),
        (sim.mix("a", "b", weight=0.25), 1.0),
        ("a", 0.5),
        ("a", 1.0),
    ):
        request = sim.add(name, prompt=prompt, scale=scale)
        sim.run()
        assert request.cached_tokens == 0
        request = sim.add(name, prompt=prompt, scale=scale)
        sim.run()
        assert request.cached_tokens == 8


def test_what_becomes_another_kind_of_adapter_fails_where_it_is_scaled() -> None:
    """Its files change while it is on disk, to what a step cannot scale."""
    sim = core_with("a")
    lost, kept = sim.add("a", scale=0.5), sim.add("a")
    sim.unscalable = {"a"}
    sim.run()
    assert sim.ended == {lost.id: "error", kept.id: "length"}
    assert isinstance(sim.errors[lost.id], AdapterChanged)


# Several slots of one size


def test_it_takes_adjacent_slots_and_what_is_in_the_way_is_copied_elsewhere() -> None:
    sim = core_with("a", "b", "c", "d", "large", limits=SLOT)
    sim.sizes["large"] = 1800
    for name in "abcd":
        sim.add(name)
    sim.run()
    running = sim.add("b", max_tokens=40)
    request = sim.add("large")
    while request.status.name != "RUNNING":
        sim.settle()
    entry = sim.core.residency.current["large"]
    assert entry.places == 2 and running.status.name == "RUNNING"
    assert sim.core.slots.arena.regions[sim.core.slots.slots[entry.slot or 0].offset or 0] == 2000
    view = sim.core._view.memory
    assert view is not None and view.elastic and view.bytes_of("large") == 2000 and view.total == 4000
    sim.run()
    assert set(sim.ended.values()) == {"length"}


@pytest.mark.parametrize(
    ("size", "limits", "words"),
    [
        (4001, {}, "4,001 bytes in the slots, which have 4,000 in all"),
        (
            3500,
            {"num_slots": 5, "cpu_capacity": 3},
            "4 places in the CPU cache, and max_cpu_loras=3",
        ),
    ],
)
def test_it_is_refused_where_it_never_has_room(size: int, limits: dict[str, int], words: str) -> None:
    sim = core_with("large", limits=SLOT._replace(**limits))
    sim.sizes["large"] = size
    request = sim.add("large")
    sim.run()
    assert isinstance(sim.errors[request.id], AdapterTooLarge) and words in str(sim.errors[request.id])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "fair", "lpm", "slora", "drr", "chameleon"])
def test_no_policy_keeps_it_out(policy: str, shared: bool) -> None:
    """Beside steady requests for as many adapters as have room; slots may share their memory."""
    limits = SLOT._replace(num_slots=6, cpu_capacity=12, slot_memory=4096) if shared else SLOT
    sim = FullSim(limits._replace(max_num_seqs=8), load_policy(policy))
    for name in (*"abcd", "large"):
        sim.register(name)
        sim.sizes[name] = 1900 if name == "large" else 1000
    request, step = None, 0
    while request is None or sim.core.requests.get(request.id) is request:
        for number, name in enumerate("abcd"):
            if not sim.core.residency.current[name].waiting:
                sim.add(name, max_tokens=3 + (step + number) % 5)
        if step == 30:
            request = sim.add("large")
        sim.settle(step_seconds=0.05)
        step += 1
        assert step < 400, "it waits for ever"
    assert sim.ended[request.id] == "length"


# Adapters that were made for one tenant


def test_their_share_of_the_slots_bounds_them() -> None:
    """With another tenant there, two of four slots are for those of the one; what they displace is their
    own."""
    sim = core_with("a", "b", "mine", limits=LIMITS._replace(num_slots=4, cpu_capacity=8))
    sim.add("mine", tenant="quiet")
    sim.run()
    made = []
    for step in range(8):
        sim.add(sim.mix("a", "b", weight=step + 1.0, tenant="loud"), tenant="loud")
        sim.run()
        made = [entry for entry in sim.core.cpu.entries.values() if entry.owner is not None]
        assert len(made) <= 2
    assert sim.core.residency.current["mine"].location is Location.SLOT
    assert len(made) == 2
