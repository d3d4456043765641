"""Nothing on the device is read or written out of order, whatever is stepped, swapped, aborted, replaced."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.core_on_cuda import SLOTS, CudaSim, run
from support.fake_cuda import Event, FakeCuda

from aioengine.events import AdapterPlaced
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.copy import StreamCopier

SEEDS = 40 if os.environ.get("AIOENGINE_FUZZ_RUNS") else 1


@pytest.mark.parametrize("played", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("slots", SLOTS)
def test_no_access_races_with_another(model: Path, slots: str, played: bool) -> None:
    steps = placed = preempted = 0
    for seed in range(SEEDS):
        sim = run(model, slots, seed, played=played, actions=200)
        steps, placed = steps + sim.core.step, placed + len(sim.of(AdapterPlaced))
        preempted += sim.core.batcher.preemptions
        assert sim.world.races == []
    assert steps > 5 * SEEDS / 2 and placed and preempted


@pytest.mark.slow
def test_a_step_that_nobody_waits_for_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without samples came back while the device still computed. If its request was then aborted,
    another adapter was written into the slot that the step read."""
    assert not _races_after_an_abort(model)
    monkeypatch.setattr(ModelRunner, "_wait", lambda self: None)
    monkeypatch.setattr(StreamCopier, "after_step", lambda self: None)
    races = _races_after_an_abort(model)
    assert any("slots: written by stream" in race for race in races)


def _races_after_an_abort(model: Path) -> list[str]:
    with FakeCuda() as world:
        sim = CudaSim(world, model, "fixed", random.Random(0), played=False)
        request = sim.add("a", prompt=list(range(3, 43)))
        while sim.core.step < 1:
            _place_all(sim)
        assert not sim.done[0][0].sequences[0].sample
        sim.take_in()
        sim.core.end(request, "abort", sim.now)
        for name in ("b", "c"):  # there are two slots
            sim.add(name, prompt=[3, 4])
        sim.now += 1.0
        while len(sim.of(AdapterPlaced)) < 3:
            _place_all(sim)
            sim.done.clear()
        sim.close()
        return world.races


def _place_all(sim: CudaSim) -> None:
    """Carry out what the core wants now, copies before steps."""
    if sim.batch is None:
        sim.form()
    while sim.loads:
        sim.read(0)
    while sim.told:
        sim.copy(next(iter(sim.told)))
    sim.hear_of_copies()
    if sim.queued:
        sim.compute()
    sim.now += 0.01


@pytest.mark.slow
def test_a_write_that_returns_too_early_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    monkeypatch.setattr(StreamCopier, "before_step", lambda self: None)
    sims = (run(model, "fixed", seed, played=False) for seed in range(5))
    assert any(race.startswith(("slots", "page-locked memory")) for sim in sims for race in sim.world.races)
