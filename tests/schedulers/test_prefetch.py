"""The popular prefetch: what is waited for first, then guesses, for which nothing is evicted."""

from __future__ import annotations

from aioengine import events
from aioengine.schedulers import Composed, compose
from aioengine.schedulers.parts.prefetch import Popular
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import SchedulerPolicy
from aioengine.testing import LIMITS, Sim


def with_popular(**options: float) -> Composed:
    return compose(prefetch=Popular(**options))  # type: ignore[arg-type]


def asked_for(policy: SchedulerPolicy, counts: dict[str, int], *, cpu: int, loads: int = 2) -> Sim:
    """Adapters that were asked for so often, by requests that were given up before anything was read."""
    sim = Sim(LIMITS._replace(cpu_capacity=cpu, max_loads=loads, num_slots=1), policy)
    for name, count in counts.items():
        sim.register(name)
        for _ in range(count):
            sim.core.end(sim.add(name), "abort", sim.now)
    sim.take_events()
    return sim


def reading(sim: Sim) -> list[str]:
    return [entry.label for entry in sim.loads]


def test_the_most_requested_are_read_when_nobody_waits() -> None:
    counts = {"rare": 1, "often": 3, "never": 0, "some": 2}
    sim = asked_for(with_popular(), counts, cpu=4)
    sim.schedule()
    assert reading(sim) == ["often", "some"]
    plain = asked_for(FCFS(), counts, cpu=4)
    plain.schedule()
    assert reading(plain) == []


def test_what_was_requested_lately_counts_more() -> None:
    for half_life, first in ((10.0, "new"), (0.0, "old")):
        sim = asked_for(with_popular(half_life=half_life), {"old": 3}, cpu=4, loads=1)
        sim.now += 30.0
        sim.register("new")
        sim.core.end(sim.add("new"), "abort", sim.now)
        sim.schedule()
        assert reading(sim) == [first]


def test_what_is_waited_for_goes_first() -> None:
    sim = asked_for(with_popular(), {"often": 9, "wanted": 0, "wanted2": 0}, cpu=4)
    sim.add("wanted")
    sim.schedule()
    assert reading(sim) == ["wanted", "often"]
    busy = asked_for(with_popular(), {"often": 9, "wanted": 0, "wanted2": 0}, cpu=4)
    busy.add("wanted")
    busy.add("wanted2")
    busy.schedule()
    assert reading(busy) == ["wanted", "wanted2"]


def test_nothing_is_evicted_for_a_guess() -> None:
    """Three adapters take turns on a CPU cache for two; two more were popular once."""
    sim = asked_for(with_popular(), {"p": 60, "q": 50, "a": 0, "b": 0, "c": 0}, cpu=2)
    for _ in range(3):
        for name in "abc":
            sim.add(name)
            sim.run()
    evicted = [e for e in sim.of(events.AdapterEvicted) if e.level == "cpu"]  # type: ignore[attr-defined]
    read = [e.adapter for e in sim.of(events.AdapterLoading)]  # type: ignore[attr-defined]
    guesses = [name for name in read if name in "pq"]
    # The cache takes one guess beside the first adapter. All other evictions are for one that waits.
    assert guesses == ["p"]
    assert len(evicted) == len(read) - 2
