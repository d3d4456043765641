"""The CPU cache's two bounds, who leaves it, and what happens to what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from aioengine import events
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterTooLarge
from aioengine.schedulers import Decision, Location, PolicyEvent, SchedulerPolicy, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim

BOUNDED = LIMITS._replace(cpu_capacity=8, cpu_max_bytes=3000)


def have(sim: Sim, **sizes: int) -> None:
    sim.sizes |= sizes
    for name in sizes:
        sim.register(name)


def bring(sim: Sim, names: str) -> None:
    """To the CPU cache, one after the other."""
    for name in names:
        sim.core.residency.names.of(name).load(sim.now)
        sim.schedule()
        sim.finish_load()
        sim.now += 1.0
        sim.core.check()


def on_cpu(sim: Sim) -> str:
    return "".join(sorted(e.name for e in sim.core.cpu.entries.values()))


def entry_of(sim: Sim, name: str) -> AdapterEntry:
    return sim.core.residency.current[name]


def test_what_can_never_fit_fails_those_who_wait_for_it_and_leaves_no_memory_behind() -> None:
    sim = Sim(BOUNDED)
    have(sim, a=1000, huge=3001)
    requests = [sim.add("huge"), sim.add("huge")]
    other = sim.add("a")
    sim.run()
    assert sim.ended == {requests[0].id: "error", requests[1].id: "error", other.id: "length"}
    (failed,) = sim.of(events.AdapterFailed)
    assert failed.reason == "too_large"  # type: ignore[attr-defined]
    error = failed.error  # type: ignore[attr-defined]
    assert isinstance(error, AdapterTooLarge)
    assert all(word in str(error) for word in ("'huge'", "3,001", "max_cpu_lora_bytes=3,000"))
    sim.settle()
    assert sim.on_cpu == {entry_of(sim, "a").uid}
    again = sim.add("huge")
    sim.sizes["huge"] = 3000  # it was repaired
    sim.run()
    assert sim.ended[again.id] == "length"


def test_what_does_not_fit_beside_the_pinned_says_so() -> None:
    sim = Sim(BOUNDED)
    have(sim, p=2000, b=1800)
    bring(sim, "p")
    sim.core.residency.names.of("p").pin(sim.now)
    sim.add("b")
    sim.run()
    (failed,) = sim.of(events.AdapterFailed)
    assert "beside the 2,000 bytes of pinned adapters" in str(failed.error)  # type: ignore[attr-defined]
    assert "unpin" in str(failed.error)  # type: ignore[attr-defined]


class Chooses(FCFS):
    """Answers with ``answer`` when asked who leaves the CPU cache."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[list[str]] = []
        self.told: list[tuple[str, str | None, str | None]] = []

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        self.asked.append(list(candidates))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        if event.kind.startswith("adapter"):
            self.told.append((event.kind.removeprefix("adapter_"), event.adapter, event.was))


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        (["c", "b"], "c"),
        ({"c": 0, "b": 0}.keys(), "c"),
        ([], "a"),
        (["ghost", "b"], "b"),
        (["b", "b"], "b"),
        (3, "a"),
        ([3], "a"),
        (RuntimeError("bug"), "a"),
    ],
)
def test_the_policy_chooses_who_leaves_the_cpu_cache(answer: object, gone: str) -> None:
    policy = Chooses(answer)
    sim = Sim(LIMITS._replace(cpu_capacity=3), policy, strict=False)
    have(sim, a=1, b=1, c=1, d=1)
    bring(sim, "abcd")
    assert policy.asked == [["a", "b", "c"]]
    assert on_cpu(sim) == "".join(sorted(set("abcd") - {gone}))
    assert len(sim.of(events.PolicyFailed)) == (answer in (3, [3]) or isinstance(answer, RuntimeError))


def test_what_must_stay_is_no_candidate() -> None:
    policy = Chooses(["pinned", "running", "awaited", "idle"])
    sim = Sim(LIMITS._replace(num_slots=2, cpu_capacity=6), policy)
    have(sim, pinned=1, running=1, awaited=1, idle=1, other=1, loading=1, new=1)
    for name in ("pinned", "awaited", "idle", "other"):
        sim.core.residency.names.of(name).load(sim.now)
        sim.schedule()
        sim.finish_load()
    sim.core.residency.names.of("pinned").pin(sim.now)
    sim.add("running", max_tokens=40)
    for _ in range(4):
        sim.settle()
    assert {e.name: e.location for e in sim.core.cpu.entries.values()}["running"] is Location.SLOT
    sim.add("awaited")
    sim.core.residency.names.of("loading").load(sim.now)
    sim.core.schedule(sim.now)
    sim.core.residency.names.of("new").load(sim.now + 1.0)
    sim.core.residency.start_load(entry_of(sim, "new"), sim.now + 1.0, set())
    assert policy.asked == [["idle", "other"]]
    assert "idle" not in on_cpu(sim)


def test_a_load_asked_for_by_name_has_its_turn_although_the_policy_always_has_something_to_read() -> None:
    class Greedy(SchedulerPolicy):
        def schedule(self, view: SchedulerView) -> Decision:
            return Decision(prefetch=[n for n in "abc" if view.adapters[n].location is Location.DISK])

    sim = Sim(LIMITS._replace(max_loads=1, cpu_capacity=2), Greedy())
    for name in "abcx":
        sim.register(name)
    sim.core.residency.names.of("x").load(sim.now)
    for _ in range(20):
        sim.settle(step_seconds=0.1)
    assert entry_of(sim, "x").wanted_since is None
    reads = [e.adapter for e in sim.of(events.AdapterLoading)]  # type: ignore[attr-defined]
    assert 5 < reads.index("x") < 15
