"""Mixes in the core: requests that need several slots at once."""

from __future__ import annotations

from support.mix_world import core_with

from aioengine import events
from aioengine.core.adapters.assembly import MIX_PATIENCE_SECONDS
from aioengine.errors import AdapterChanged, AdapterLoadError, AdapterTooLarge
from aioengine.schedulers import PolicyEvent
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim


def moved(sim: Sim) -> list[str]:
    """The adapters that were read or copied, in order."""
    kinds = (events.AdapterLoading, events.AdapterPlacing)
    return [event.adapter for event in sim.events if isinstance(event, kinds)]


def test_parts_in_slots_need_no_load() -> None:
    sim = core_with("a", "b")
    for name in ("a", "b"):
        sim.add(name)
    sim.run()
    sim.events.clear()
    request = sim.add(sim.mix("a", "b", weight=0.3), max_tokens=2)
    batch = sim.settle()
    assert batch is not None and not moved(sim)
    slots = [sim.core.residency.current[name].slot for name in ("a", "b")]
    assert [work.parts for work in batch.sequences] == [((slots[0], 0.3), (slots[1], 0.3))]
    assert batch.contents().adapters == 2
    sim.run()
    assert sim.ended[request.id] == "length" and not moved(sim)
    assert sim.core.residency.current["a"].running == 0


def test_all_or_none() -> None:
    """One slot becomes idle long before the other: it is not taken alone."""
    sim = core_with("a", "b", "c", "d")
    sim.add("a", max_tokens=3)
    sim.add("b", max_tokens=40)
    sim.settle()
    sim.add(sim.mix("c", "d"))
    placed: list[str] = []
    while sim.core.requests:
        sim.schedule()
        placed = [event.adapter for event in sim.events if isinstance(event, events.AdapterPlacing)]
        assert placed[2:] in ([], ["c", "d"]), "both in one decision"
        if sim.batch is not None:
            sim.finish_step()
        while sim.loads:
            sim.finish_load()
        while sim.copies:
            sim.finish_copy()
        sim.core.check()
        sim.now += 0.01
    assert len(placed) == 4


def test_a_part_is_freed_with_the_last_request_of_its_mixes() -> None:
    sim = core_with("a", "b")
    request = sim.add(sim.mix("a", "b"), max_tokens=6)
    for _ in range(3):
        sim.settle()
    residency = sim.core.residency
    part = residency.current["a"]
    residency.retire(part, sim.now)
    sim.settle()
    assert request.status.name == "RUNNING" and part.uid in residency.entries
    sim.run()
    sim.settle()
    assert part.uid not in residency.entries and sorted(residency.current) == ["b"]


def test_a_part_that_fails_fails_its_mixes_alone() -> None:
    sim = core_with("a", "b", "c")
    failed = [sim.add(sim.mix("a", "b")), sim.add("a"), sim.add(sim.mix("a"))]
    fine = sim.add(sim.mix("b", "c"))
    sim.schedule()
    sim.finish_load([entry.label for entry in sim.loads].index("a"), fail=True)
    assert [sim.ended[request.id] for request in failed] == ["error"] * 3
    assert all(isinstance(error, AdapterLoadError) and error.name == "a" for error in sim.errors.values())
    sim.run()
    assert sim.ended[fine.id] == "length"


def test_what_becomes_another_kind_of_adapter_fails() -> None:
    """The files of a part change while it is on disk, to what a step cannot add up."""
    sim = core_with("a", "b")
    lost = [sim.add(sim.mix("a", "b")), sim.add(sim.mix("a"))]
    kept = sim.add("a")
    sim.unsummable = {"a"}
    sim.run()
    assert sim.ended == {lost[0].id: "error", lost[1].id: "error", kept.id: "length"}
    assert all(isinstance(error, AdapterChanged) for error in sim.errors.values())
    sim.settle()
    assert sorted(sim.core.residency.current) == ["a", "b"]


def test_content_that_is_refused_changes_nothing() -> None:
    sim = core_with("a", "b")
    sim.add(sim.mix("a", "b"))
    sim.run()
    entry = sim.core.residency.current["a"]
    sim.lose_device()
    sim.core.residency.expect("a", entry.digest)
    request = sim.add(sim.mix("a", "b"))
    sim.unsummable, sim.contents = {"a"}, {"a": 1}
    sim.run()
    assert "its files have changed since it was loaded" in str(sim.errors[request.id])
    sim.unsummable, sim.contents = set(), {}
    again = sim.add(sim.mix("a", "b"))
    assert entry.summable and again.adapter is request.adapter
    sim.run()
    assert sim.ended[again.id] == "length"


def test_parts_that_can_never_be_in_slots_together() -> None:
    sim = core_with("a", "b", limits=LIMITS._replace(slot_memory=2048))
    sim.sizes = {"a": 1500, "b": 1000}
    request = sim.add(sim.mix("a", "b"))
    alone = sim.add("a")
    sim.run()
    assert sim.ended == {request.id: "error", alone.id: "length"}
    error = sim.errors[request.id]
    assert isinstance(error, AdapterTooLarge) and "2,560 bytes" in str(error)


def test_equal_prefixes_are_shared_by_the_same_mix_only() -> None:
    sim = core_with("a", "b")
    prompt = list(range(2, 14))
    names = [sim.mix("a", "b"), sim.mix("a", "b", weight=0.25), sim.mix("a"), "a"]
    for name in names:
        request = sim.add(name, prompt=prompt)
        sim.run()
        assert request.cached_tokens == 0
        request = sim.add(name, prompt=prompt)
        sim.run()
        assert request.cached_tokens == 8


def test_policies_see_a_mix_while_it_waits_beside_the_queues_and_while_it_runs_as_a_request() -> None:
    seen: list[str] = []

    class Watching(FCFS):
        def on_event(self, event: PolicyEvent) -> None:
            if event.request is not None:
                seen.append(f"{event.kind.removeprefix('request_')} {event.adapter}")
            super().on_event(event)

    sim = Sim(LIMITS, Watching())
    for name in "ab":
        sim.register(name)
    sim.add(sim.mix("a", "b", weight=0.25))
    view = sim.core._view
    sim.core.schedule(0.0)
    (mix,) = view.mixes
    assert (mix.weights, mix.missing, mix.waiting) == ({"a": 0.25, "b": 0.25}, ["a", "b"], 1)
    assert not list(view.waiting) and not list(view.waiting_adapters) and not seen
    assert sorted(view.adapters) == ["a", "b"]


def test_a_mix_that_nobody_waits_for_any_more_keeps_no_place_in_the_cpu_cache() -> None:
    """It leaves while one of its parts is read."""
    sim = core_with("a", "b", "c", limits=LIMITS._replace(cpu_capacity=2))
    running = sim.add("a", max_tokens=40)
    while not running.tokens[running.prompt_len :]:
        sim.settle()
    mix = sim.add(sim.mix("a", "b"))
    for _ in range(3):
        sim.schedule()
        sim.finish_step()
        sim.now += MIX_PATIENCE_SECONDS
    assert [entry.label for entry in sim.loads] == ["b"]
    sim.core.end(mix, "abort", sim.now)
    sim.core.end(running, "abort", sim.now)
    sim.finish_load()
    alone = sim.add("c")
    sim.run(steps=20)
    assert sim.ended[alone.id] == "length"
