"""Mixes in the core: requests that need several slots at once."""

from __future__ import annotations

import os
import random

import pytest
from support.core_sim import LIMITS, CoreSim
from support.mix_world import World

from aioengine import events
from aioengine.core.adapters.arena import Arena
from aioengine.core.adapters.assembly import MIX_LIMIT_SECONDS, MIX_PATIENCE_SECONDS
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry, Request, Status
from aioengine.errors import AdapterChanged, AdapterLoadError, AdapterTooLarge, EngineOverloaded
from aioengine.schedulers import Decision, PolicyEvent, SchedulerPolicy, SchedulerView, available_policies
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import Location
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
    assert part.uid not in residency.entries and sorted(residency.current) == ["b"]


def test_a_part_that_fails_fails_its_mixes_alone() -> None:
    sim = make("a", "b", "c")
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
    sim = make("a", "b")
    lost = [sim.add(sim.mix("a", "b")), sim.add(sim.mix("a"))]
    kept = sim.add("a")
    sim.unsummable = {"a"}
    sim.run()
    assert sim.ended == {lost[0].id: "error", lost[1].id: "error", kept.id: "length"}
    assert all(isinstance(error, AdapterChanged) for error in sim.errors.values())
    sim.settle()
    assert sorted(sim.core.residency.current) == ["a", "b"]


def test_content_that_is_refused_changes_nothing() -> None:
    sim = make("a", "b")
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


def test_pinned_adapters_that_leave_too_few_slots() -> None:
    sim = make("a", "b", "c")
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
    sim = make(*"abcdef", limits=limits._replace(slot_memory=rng.choice([None, 1024 * slots])))
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
    sim = make("a", "b")
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
    sim = make("a", "b", "c", "d", limits=LIMITS._replace(cpu_capacity=6))
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


def test_sequences_do_not_keep_a_pinned_adapter_and_mixes_behind_it_out() -> None:
    """It takes more than half of the memory that adapters share with the KV cache, which is always full."""
    limits = LIMITS._replace(num_slots=4, cpu_capacity=6, num_blocks=44, shared_block_bytes=1024)
    sim = make("a", "b", "c", limits=limits._replace(max_num_seqs=16, max_num_batched_tokens=64))
    sim.sizes = {"c": 26_000}
    began = None
    for step in range(1000):
        while len(sim.core.queues.base) < 3:
            sim.add(prompt=[2 + step % 200, *range(8)], max_tokens=28 + step % 3 * 2)
        if step == 40:
            sim.core.residency.want(sim.core.residency.current["c"], sim.now, pin=True)
        if step == 60:
            began = sim.add(sim.mix("a", "b"))
        sim.settle(step_seconds=0.1)
        if began is not None and began.admitted is not None:
            break
    assert began is not None and began.admitted is not None
    assert began.admitted - began.arrival < 10
    assert sim.core.residency.current["c"].location is Location.SLOT


def test_parts_that_can_never_be_in_slots_together() -> None:
    sim = make("a", "b", limits=LIMITS._replace(slot_memory=2048))
    sim.sizes = {"a": 1500, "b": 1000}
    request = sim.add(sim.mix("a", "b"))
    alone = sim.add("a")
    sim.run()
    assert sim.ended == {request.id: "error", alone.id: "length"}
    error = sim.errors[request.id]
    assert isinstance(error, AdapterTooLarge) and "2,560 bytes" in str(error)


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
    sim = make("a", "b", "c", "d", limits=LIMITS._replace(max_num_seqs=4))
    for name in ("a", "b"):
        sim.add(name, max_tokens=30)
    for _ in range(4):
        sim.settle()
    mix = sim.add(sim.mix("c", "d"))
    for _ in range(4):
        sim.settle()
    assert sim.core.next_due() == mix.arrival + MIX_PATIENCE_SECONDS
    sim.now = mix.arrival + MIX_PATIENCE_SECONDS
    late = sim.add("a", max_tokens=30)
    sim.settle()
    assert late.status is Status.WAITING, "its slot is closed"
    sim.run()
    assert sim.ended[mix.id] == sim.ended[late.id] == "length"


def test_policies_see_a_mix_while_it_waits_beside_the_queues_and_while_it_runs_as_a_request() -> None:
    seen: list[str] = []

    class Watching(FCFS):
        def on_event(self, event: PolicyEvent) -> None:
            if event.request is not None:
                seen.append(f"{event.kind.removeprefix('request_')} {event.adapter}")
            super().on_event(event)

    sim = CoreSim(LIMITS, Watching())
    for name in "ab":
        sim.register(name)
    sim.add(sim.mix("a", "b", weight=0.25))
    view = sim.core._view
    sim.core.schedule(0.0)
    (mix,) = view.mixes
    assert (mix.weights, mix.missing, mix.waiting) == ({"a": 0.25, "b": 0.25}, ["a", "b"], 1)
    assert not list(view.waiting) and not list(view.waiting_adapters) and not seen
    assert sorted(view.adapters) == ["a", "b"]


@pytest.mark.parametrize("name", POLICIES)
def test_steady_requests_for_a_part_keep_no_adapter_out(name: str) -> None:
    """Two slots; requests for a, scaled ones, mixes of a and b; c comes in as it does without the mixes."""
    took = [_steps_until_served(name, mixed=mixed) for mixed in (False, True)]
    assert took[1] <= took[0] + 150


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [15, 70])
def test_what_was_brought_in_for_an_earlier_request_is_not_taken_before_it_begins(
    name: str, length: int
) -> None:
    """Two mixes take turns in both slots, each after 1.5 or 7 s; a request for an adapter comes."""
    limits = LIMITS._replace(cpu_capacity=8, num_blocks=64, max_model_len=128)
    sim = CoreSim(limits, load_policy(name))
    for adapter in "abcde":
        sim.register(adapter)
    mixes: list[Request | None] = [None, None]
    alone = None
    for step in range(800):
        for index, parts in enumerate(["ab", "cd"]):
            before = mixes[index]
            if before is None or before.status is Status.ENDED:
                mixes[index] = sim.add(sim.mix(*parts), max_tokens=length)
        if step == 100:
            alone = sim.add("e")
        sim.settle(step_seconds=0.1)
        if alone is not None and alone.admitted is not None:
            break
    assert alone is not None and alone.admitted is not None
    assert alone.admitted - alone.arrival < 0.1 * 3 * length + 2


def _steps_until_served(name: str, *, mixed: bool) -> int:
    sim = CoreSim(LIMITS._replace(num_blocks=64), load_policy(name))
    for adapter in "abc":
        sim.register(adapter)
    wanted = None
    for step in range(1000):
        if step % 2 == 0:
            sim.add("ab"[step // 2 % 2], max_tokens=3)
        if mixed and step % 3 == 0:
            sim.add(sim.mix("a"), max_tokens=3)
        if mixed and step % 3 == 1:
            sim.add(sim.mix("a", "b"), max_tokens=3)
        if step == 20:
            wanted = sim.add("c")
        sim.settle(step_seconds=0.1)
        if wanted is not None and wanted.admitted is not None:
            return step
    return 1000


def test_a_decision_looks_at_no_more_of_the_cache_s_adapters_while_more_mixes_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU cache is full; what may leave depends on who waits for it."""
    asked = 0
    waits = AdapterEntry.waits_for_other

    def counted(entry: AdapterEntry, part: AdapterEntry) -> bool:
        nonlocal asked
        asked += 1
        return waits(entry, part)

    monkeypatch.setattr(AdapterEntry, "waits_for_other", counted)

    def count(mixes: int) -> int:
        rng = random.Random(0)
        names = [f"a{i}" for i in range(24)]
        sim = make(*names, limits=LIMITS._replace(num_slots=4, cpu_capacity=12, num_blocks=400))
        sim.add("a0", max_tokens=50)
        sim.settle()
        for _ in range(mixes):
            sim.add(sim.mix(*rng.sample(names, 4)), max_tokens=50)
        for _ in range(20):
            sim.settle(step_seconds=0.2)
        before = asked
        for _ in range(10):
            sim.settle()
        return asked - before

    assert count(200) <= 2 * count(20)


def test_a_large_mix_finds_room_without_trying_each_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of 64 small adapters, in which requests run."""
    tries = 0
    copy = Arena.copy

    def counted(arena: Arena) -> Arena:
        nonlocal tries
        tries += 1
        return copy(arena)

    names = [f"a{i}" for i in range(128)]
    limits = LIMITS._replace(num_slots=128, cpu_capacity=130, num_blocks=4000, max_num_seqs=128, max_loads=64)
    limits = limits._replace(slot_memory=128 * 256, max_num_batched_tokens=4096)
    sim = make(*names, "b", "c", limits=limits)
    sim.sizes = {**dict.fromkeys(names, 200), "b": 32 * 256, "c": 32 * 256}
    for name in ("b", "c"):
        sim.core.residency.want(sim.core.residency.current[name], sim.now)
    for name in names:
        sim.add(name, max_tokens=50)
    for _ in range(8):
        sim.settle()
    assert len(sim.core.running) == 128
    mix = sim.add(sim.mix("b", "c"))
    sim.now += MIX_PATIENCE_SECONDS
    monkeypatch.setattr(Arena, "copy", counted)
    sim.settle()
    assert mix.status is Status.WAITING and sim.core.assembly.closes and 0 < tries <= 30
    monkeypatch.undo()
    sim.run()
    assert sim.ended[mix.id] == "length"


def test_a_slow_read_of_a_part_is_in_nobody_s_way() -> None:
    sim = make("a", "b", "c", "d")
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


def test_a_mix_that_nobody_waits_for_any_more_keeps_no_place_in_the_cpu_cache() -> None:
    """It leaves while one of its parts is read."""
    sim = make("a", "b", "c", limits=LIMITS._replace(cpu_capacity=2))
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


class Nothing(SchedulerPolicy):
    """Decides nothing, ever."""

    def schedule(self, view: SchedulerView) -> Decision:
        return Decision()


def test_a_policy_that_starves_adapters_starves_no_mix_behind_them() -> None:
    sim = CoreSim(LIMITS, Nothing())
    for name in "abc":
        sim.register(name)
    alone = sim.add("c")
    for _ in range(100):
        sim.settle(step_seconds=0.2)
    assert alone.admitted is None, "the policy's own fault"
    mix = sim.add(sim.mix("a", "b"))
    for _ in range(50):
        sim.settle(step_seconds=0.2)
    assert sim.ended == {alone.id: "length", mix.id: "length"}


def test_an_adapter_whose_read_has_just_begun_gets_no_turn() -> None:
    """It is waited for alone, and is a part of a mix, for which it is read first."""
    sim = CoreSim(LIMITS._replace(max_loads=1), Nothing())
    for name in "abcde":
        sim.register(name)
    sim.core.residency.want(sim.core.residency.current["e"], sim.now)
    requests = [sim.add(wanted) for wanted in (sim.mix("d", "a"), "d", sim.mix("b", "c"))]
    sim.schedule()
    sim.now += MIX_LIMIT_SECONDS
    sim.finish_load()
    sim.schedule()
    sim.core.check()
    sim.run(steps=200, step_seconds=0.2)
    assert [sim.ended[request.id] for request in requests] == ["length"] * 3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", ["fixed", "bytes", "shared"])
def test_everybody_s_turn_comes(name: str, shape: str) -> None:
    """Clients that ask again and again, for adapters, scaled ones and mixes of two to four, in one to four
    slots, beside pinned adapters, which are replaced, and reads that never end: every request begins soon, or
    fails for a reason, and every pinned adapter gets a slot. Policies that let requests wait for ever by
    themselves do it with mixes, too."""
    bound = load_policy(name).starvation_bound
    for seed in range(int(os.environ.get("AIOENGINE_MIX_SEEDS", "1"))):
        world = World(name, shape, random.Random(f"{name} {shape} {seed}"))
        for _ in range(200):
            world.step()
        world.finish()
        assert world.longest["mix"] <= 150, (seed, world.longest)
        assert bound.startswith("none") or world.longest["plain"] <= 200, (seed, world.longest)
        assert world.longest["pin"] <= 150, (seed, world.longest)
