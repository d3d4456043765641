"""Which adapter gives up its slot: lru, lfu and gdsf disagree where they should."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aioengine import events
from aioengine.core.state import AdapterEntry
from aioengine.schedulers import compose, load_policy
from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.replacement import GDSF, LFU, LRU
from aioengine.step import LoadedAdapter
from aioengine.testing import LIMITS, Sim

SIZES = {"small": 100_000, "large": 10_000_000}


class SizedSim(Sim):
    """Adapters have the sizes and load times that the test gives them."""

    def __init__(self, replace: Replacement, *, slots: int = 3, cpu: int = 8) -> None:
        policy = compose(replace=replace)
        super().__init__(LIMITS._replace(num_slots=slots, cpu_capacity=cpu), policy)
        self.sizes: dict[str, int] = {}
        self.copy_seconds: dict[str, float] = {}
        self.read_seconds: dict[str, float] = {}

    def have(self, name: str, nbytes: int = 1_000_000, *, copy: float = 0.01, read: float = 0.1) -> None:
        self.register(name)
        self.sizes[name] = nbytes
        self.copy_seconds[name] = copy
        self.read_seconds[name] = read

    def finish_load(self, index: int = 0, *, fail: bool = False) -> None:
        entry = self.loads.pop(index)
        self.on_cpu.add(entry.uid)
        seconds = self.read_seconds[entry.label]
        found = LoadedAdapter(8, self.sizes[entry.label], 1, entry.label, seconds)
        self.core.adapter_loaded(entry, self.now, found)

    def finish_copy(self, index: int = 0, *, fail: bool = False) -> None:
        entry = self.copies.pop(index).entry
        self.core.slots.placed(entry, self.now, self.copy_seconds[entry.label])

    def use(self, names: str) -> None:
        """One request after the other, for each letter."""
        for name in names:
            self.add(name, max_tokens=1)
            self.run()

    def evicted(self) -> str:
        found = self.of(events.AdapterEvicted)
        return "".join(e.adapter for e in found if e.level == "slot")  # type: ignore[attr-defined]

    def entry(self, name: str) -> AdapterEntry:
        return self.core.residency.current[name]


@pytest.mark.parametrize(("replace", "victim"), [(LRU, "a"), (LFU, "b"), (GDSF, "c")])
def test_each_replacement_has_its_own_victim(replace: Callable[[], Replacement], victim: str) -> None:
    sim = SizedSim(replace())
    sim.have("a")
    sim.have("b", SIZES["small"])
    sim.have("c", SIZES["large"])
    sim.have("d")
    sim.use("aaa" + "b" + "cc")  # a: longest ago; b: least often; c: largest for its use
    assert sim.evicted() == ""
    sim.use("d")
    assert sim.evicted() == victim


def test_lfu_forgets_what_was_used_long_ago() -> None:
    fading, lasting = SizedSim(LFU(half_life=10.0), slots=2), SizedSim(LFU(half_life=0), slots=2)
    for sim in (fading, lasting):
        for name in "abc":
            sim.have(name)
        sim.use("aaaa")
        sim.now += 30.0  # three half-lives: 4 uses have come down to 1/2
        sim.use("b")
        sim.use("c")
    assert fading.evicted() == "a"
    assert lasting.evicted() == "b"


def test_gdsf_counts_what_loading_costs() -> None:
    sim = SizedSim(GDSF(), slots=2)
    sim.have("a", copy=0.01)
    sim.have("b", copy=0.05)
    sim.have("c")
    sim.use("b" + "aaa" + "c")
    assert sim.evicted() == "a", "three uses at 0.01 s are worth less than one at 0.05 s"


@pytest.mark.parametrize(("cpu", "victim"), [(8, "a"), (3, "b")])
def test_gdsf_counts_the_read_from_disk_while_the_cpu_cache_is_full(cpu: int, victim: str) -> None:
    sim = SizedSim(GDSF(), slots=2, cpu=cpu)
    sim.have("a", copy=0.01, read=1.0)
    sim.have("b", copy=0.02, read=0.1)
    sim.have("c")
    sim.use("abc")
    assert sim.evicted() == victim


def test_gdsf_inflation_lets_go_of_what_was_popular_once() -> None:
    uses_of_a, others = 5, "bcbcbcbc"
    gdsf, lfu = SizedSim(GDSF(), slots=2), SizedSim(LFU(half_life=0), slots=2)
    for sim in (gdsf, lfu):
        for name in "abc":
            sim.have(name)
        sim.use("a" * uses_of_a)
        sim.use(others)
    # Each swap raises L by 1 / size, so after 5 of them what came in last is worth more than a.
    assert "a" in gdsf.evicted()
    assert gdsf.evicted().index("a") <= uses_of_a
    assert "a" not in lfu.evicted(), "b and c were used less often, 4 times each"


def test_gdsf_forgets_adapters_that_were_unloaded_while_in_a_slot() -> None:
    gdsf = GDSF()
    sim = SizedSim(gdsf, slots=2)
    for name in "xyz":
        sim.have(name)
    for index in range(20):  # each leaves its slot under another name, "n0@1", "n1@1", ...
        sim.have(f"n{index}")
        sim.add(f"n{index}", max_tokens=1)
        sim.run()
        sim.core.residency.names.of(f"n{index}").unload(sim.now)
        sim.use("xyz")
    assert len(gdsf.slots) <= 2
    assert len(gdsf.cpu) <= 8


@pytest.mark.parametrize(("replace", "victim"), [(LRU, "a"), (LFU, "b"), (GDSF, "c")])
def test_each_replacement_has_its_own_victim_in_the_cpu_cache(
    replace: Callable[[], Replacement], victim: str
) -> None:
    sim = SizedSim(replace(), slots=1, cpu=4)
    for name in "abdx":
        sim.have(name)
    sim.have("c", SIZES["large"])
    sim.use(
        "aaa" + "b" + "cc" + "d"
    )  # a: longest ago; b: least often; c: largest for its use; d: in the slot
    sim.core.residency.names.of("x").load(sim.now)
    sim.settle()
    dropped = [e.adapter for e in sim.of(events.AdapterEvicted) if e.level == "cpu"]  # type: ignore[attr-defined]
    assert dropped == [victim]


def copies_of(policy: str, *, overlapping: bool) -> int:
    """How often an adapter is copied into a slot for ten requests, one after the other or all at once."""
    sim = Sim(LIMITS._replace(num_slots=2), load_policy(policy))
    sim.register("a")
    for _ in range(10):
        sim.add("a", max_tokens=3)
        if not overlapping:
            sim.run()
            sim.settle()  # as the engine does, the core asks the policy after the last step
    sim.run()
    assert set(sim.ended.values()) == {"length"}
    return len(sim.of(events.AdapterPlacing))


def test_discard_copies_an_adapter_again_for_each_burst_of_requests() -> None:
    assert copies_of("fcfs", overlapping=False) == 1
    assert copies_of("discard", overlapping=False) == 10
    assert copies_of("discard", overlapping=True) == 1, "requests wait for it until the last one runs"
