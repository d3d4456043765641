"""Mixes in the core: requests that need several slots at once."""

from __future__ import annotations

import random

import pytest
from support.core_sim import LIMITS, CoreSim

from aioengine import events
from aioengine.core.limits import CoreLimits
from aioengine.errors import AdapterLoadError, AdapterTooLarge, EngineOverloaded
from aioengine.schedulers import Location, available_policies
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.registry import load_policy

POLICIES = sorted(available_policies().keys() - {"oracle", "belady"})


def make(*names: str, limits: CoreLimits = LIMITS) -> CoreSim:
    sim = CoreSim(limits, FCFS())
    for name in names:
        sim.register(name)
    return sim


def moved(sim: CoreSim) -> list[str]:
    """The adapters that were read or copied, in order."""
    kinds = (events.AdapterLoading, events.AdapterPlacing)
    return [event.adapter for event in sim.events if isinstance(event, kinds)]


def test_parts_in_slots_need_no_load() -> None:
    sim = make("a", "b")
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
    sim = make("a", "b", "c", "d")
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


@pytest.mark.parametrize("name", POLICIES)
def test_steady_traffic_does_not_keep_a_mix_out(name: str) -> None:
    """Both slots have requests all the time, and each policy thinks of one slot at a time."""
    sim = CoreSim(LIMITS._replace(max_num_seqs=8, num_blocks=64), load_policy(name))
    for adapter in "abcd":
        sim.register(adapter)
    mix = None
    for step in range(1000):
        if step % 2 == 0:
            sim.add("ab"[step // 2 % 2], max_tokens=5, tenant="t" if step % 4 else None)
        if step == 50:
            mix = sim.add(sim.mix("c", "d"), tenant="m")
        sim.settle(step_seconds=0.05)
        if mix is not None and mix.id in sim.ended:
            break
    assert mix is not None and sim.ended[mix.id] == "length"
    assert sim.now - mix.arrival < 10


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", ["fixed", "bytes", "shared"])
def test_every_policy_serves_them(name: str, shape: str) -> None:
    """Overlapping mixes, scales and single adapters, with room for few: all end, and nothing is left."""
    rng = random.Random(name)
    limits = LIMITS._replace(cpu_capacity=3)
    if shape == "bytes":
        limits = limits._replace(slot_memory=3328, num_slots=3)
    elif shape == "shared":
        limits = limits._replace(num_blocks=28, shared_block_bytes=256 * 4, num_slots=3, cpu_capacity=4)
    sim = CoreSim(limits, load_policy(name))
    sim.unsummable = {"d"}
    for adapter in "abcd":
        sim.register(adapter)
        sim.sizes[adapter] = rng.choice([400, 900, 1300])
    for _ in range(60):
        kind = rng.choice([None, "a", "b", "ab", "bc", "ca", "c", "cd"])
        mixed = kind is not None and (len(kind) > 1 or rng.random() < 0.3)
        sim.add(
            sim.mix(*kind) if kind and mixed else kind, max_tokens=rng.randint(1, 9), tenant=rng.choice("xy")
        )
        if rng.random() < 0.05:
            sim.register(rng.choice("ab"))
        if rng.random() < 0.7:
            sim.settle(step_seconds=rng.choice([0.01, 0.3]))
    sim.run(steps=600, step_seconds=0.1)
    assert set(sim.ended.values()) == {"length"}
    assert all(entry.running == 0 for entry in sim.core.residency.entries.values())


def test_a_part_is_freed_with_the_last_request_of_its_mixes() -> None:
    sim = make("a", "b")
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
    assert part.uid not in residency.entries and not residency.mixes.by_uid
    assert sorted(residency.current) == ["b"]


def test_a_part_that_fails_fails_its_mixes_alone() -> None:
    sim = make("a", "b", "c")
    failed = [sim.add(sim.mix("a", "b")), sim.add("a"), sim.add(sim.mix("a"))]
    fine = sim.add(sim.mix("b", "c"))
    errors = {}
    for request in failed:
        request.sink = Keep(errors, request.id)  # type: ignore[assignment]
    sim.schedule()
    sim.finish_load([entry.label for entry in sim.loads].index("a"), fail=True)
    assert [sim.ended[request.id] for request in failed] == ["error"] * 3
    assert all(isinstance(error, AdapterLoadError) and error.name == "a" for error in errors.values())
    sim.run()
    assert sim.ended[fine.id] == "length"


class Keep:
    """Keeps the error that a request ends with."""

    takes_many = False

    def __init__(self, errors: dict[str, Exception | None], request_id: str) -> None:
        self._errors, self._id = errors, request_id

    def end(self, reason: str, error: Exception | None) -> None:
        self._errors[self._id] = error


@pytest.mark.parametrize("names", [("a", "x"), ("x",), ("a", "b", "c")])
def test_what_cannot_be_added_up_is_one_adapter(names: tuple[str, ...]) -> None:
    """A part with more than A and B, and more parts than slots."""
    sim = make("a", "b", "c", "x")
    sim.unsummable = {"x"}
    name = sim.mix(*names)
    request = sim.add(name)
    sim.run()
    assert sim.ended[request.id] == "length"
    mix = sim.core.residency.current[name]
    assert [part.label for part in mix.members] == [name + "="] and mix.location is Location.SLOT
    sim.events.clear()
    sim.add(name)
    sim.run()
    assert not moved(sim)


def test_pinned_adapters_that_leave_too_few_slots() -> None:
    sim = make("a", "b", "c")
    sim.core.residency.want(sim.core.residency.current["a"], sim.now, pin=True)
    for _ in range(3):
        sim.settle()
    errors: dict[str, Exception | None] = {}
    lost, kept = sim.add(sim.mix("b", "c")), sim.add(sim.mix("a", "b"))
    lost.sink = Keep(errors, lost.id)  # type: ignore[assignment]
    sim.run()
    assert sim.ended == {lost.id: "error", kept.id: "length"}
    assert isinstance(errors[lost.id], EngineOverloaded)
    assert "needs 2 slots at a time, and there are 1" in str(errors[lost.id])


def test_parts_that_can_never_be_in_slots_together() -> None:
    sim = make("a", "b", limits=LIMITS._replace(slot_memory=2048))
    sim.sizes = {"a": 1500, "b": 1000}
    errors: dict[str, Exception | None] = {}
    request = sim.add(sim.mix("a", "b"))
    request.sink = Keep(errors, request.id)  # type: ignore[assignment]
    alone = sim.add("a")
    sim.run()
    assert sim.ended == {request.id: "error", alone.id: "length"}
    assert isinstance(errors[request.id], AdapterTooLarge) and "2,560 bytes" in str(errors[request.id])


def test_equal_prefixes_are_shared_by_the_same_mix_only() -> None:
    sim = make("a", "b")
    prompt = list(range(2, 14))
    names = [sim.mix("a", "b"), sim.mix("a", "b", weight=0.25), sim.mix("a"), "a"]
    for name in names:
        request = sim.add(name, prompt=prompt)
        sim.run()
        assert request.cached_tokens == 0
        request = sim.add(name, prompt=prompt)
        sim.run()
        assert request.cached_tokens == 8


def test_time_alone_makes_a_mix_urgent() -> None:
    """Nothing happens but that tokens come; the core says when it must be asked again."""
    sim = make("a", "b", "c", "d", limits=LIMITS._replace(max_num_seqs=3))
    for name in ("a", "b"):
        sim.add(name, max_tokens=30)
    for _ in range(4):
        sim.settle()
    mix = sim.add(sim.mix("c", "d"))
    for _ in range(4):
        sim.settle()
    assert sim.core.next_due() == mix.arrival + 1.0
    late = sim.add("a", max_tokens=30)
    sim.now = mix.arrival + 1.0
    sim.settle()
    assert sim.core.placing.is_closed(sim.core.residency.current["a"])
    sim.run()
    assert sim.ended[mix.id] == sim.ended[late.id] == "length"
