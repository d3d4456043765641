"""The work of a decision while mixes wait."""

from __future__ import annotations

import random

import pytest
from support.mix_world import core_with

from aioengine.core.adapters.arena import Arena
from aioengine.core.adapters.assembly import MIX_PATIENCE_SECONDS
from aioengine.core.state import AdapterEntry, Status
from aioengine.testing import LIMITS


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
        sim = core_with(*names, limits=LIMITS._replace(num_slots=4, cpu_capacity=12, num_blocks=400))
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
    sim = core_with(*names, "b", "c", limits=limits)
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
