"""A core with random events around it: requests, reads, copies and failures, which take no time."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import NamedTuple

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.core import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.errors import EngineOverloaded
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.request import SamplingParams
from aioengine.schedulers import SchedulerPolicy
from aioengine.testing import LIMITS, Sim

STEP_SECONDS = 0.05
MOST_TURNS_TO_END = 4000
"""Number of turns after the last arrival in which everything must end; most runs need a few dozen."""

PRESET = "smollm2-135m-cpu"
MOST_SECONDS_ALONE = 600.0
"""Simulated seconds in which a request that is alone on an engine must end."""
MOST_SECONDS_BESIDE = 300.0
"""Simulated seconds in which a request must end beside others that never stop, under a policy that states a
bound on waiting."""
CHECK_EVERY = 8
"""Number of turns between two checks of all invariants, because a check takes longer than a turn."""

SMALL = LIMITS._replace(num_blocks=40, max_waiting=40)


class Scenario(NamedTuple):
    """Probabilities of events in a turn."""

    name: str
    limits: CoreLimits = SMALL
    adapters: int = 5
    base: float = 0.2
    """Share of requests for the base model."""
    arrive: float = 0.5
    abort: float = 0.02
    fail: float = 0.0
    """Share of reads and copies that fail."""
    replace: float = 0.0
    """An adapter gets a new version, is unloaded, or comes back."""
    pin: float = 0.0
    lose: float = 0.0
    """The device is lost with its contents."""
    tenants: int = 0
    priorities: int = 1
    deadlines: float = 0.0
    """Share of requests with a deadline."""
    prefixes: int = 6
    """Number of prefixes that prompts share."""


SCENARIOS = (
    Scenario("the base model alone", adapters=0, base=1.0, limits=SMALL._replace(num_slots=0)),
    Scenario("more adapters than slots"),
    Scenario("one slot", adapters=4, limits=SMALL._replace(num_slots=1, cpu_capacity=1, max_loads=1)),
    Scenario("a small KV cache", limits=SMALL._replace(num_blocks=17), arrive=0.8),
    Scenario("a CPU cache bounded in bytes", limits=SMALL._replace(cpu_max_bytes=2500)),
    Scenario(
        "slots that share a memory by bytes",
        limits=SMALL._replace(num_slots=4, cpu_capacity=6, slot_memory=4096),
        replace=0.02,
    ),
    Scenario("tenants, priorities and deadlines", tenants=4, priorities=3, deadlines=0.5),
    Scenario("adapters that come and go", replace=0.1, pin=0.1),
    Scenario("reads and copies that fail", fail=0.3, replace=0.02),
    Scenario("a device that is lost", lose=0.02, fail=0.1, tenants=2),
)


class NeverEnds(Exception):
    """Error for requests that wait although nothing prevents them from running."""


class World(Sim):
    """Drives a core through a scenario by a seed; a policy gets the same events in every run."""

    def __init__(self, scenario: Scenario, policy: SchedulerPolicy, seed: int) -> None:
        self._rng = random.Random(f"{scenario.name} {seed}")
        super().__init__(scenario.limits, policy, self._random_token, strict=False)
        self._is = scenario
        self._turns = 0
        self._names = [f"adapter-{index}" for index in range(scenario.adapters)]
        for name in self._names:
            self.register(name)

    def play(self, turns: int) -> None:
        """Play the scenario. Raises NeverEnds, and AssertionError if an invariant of the core does not
        hold."""
        for _ in range(turns):
            self._disturb()
            self._turn(calm=False)
        for _ in range(MOST_TURNS_TO_END):
            if not self.core.requests:
                self.core.check()
                return
            self._turn(calm=True)
        raise NeverEnds(self._state())

    def _turn(self, *, calm: bool) -> None:
        """Take one step, and finish some of the moves under way; all of them, without failures, if
        ``calm``."""
        for moves, finish in ((self.loads, self.finish_load), (self.copies, self.finish_copy)):
            for index in reversed(range(len(moves))):
                if calm or self._rng.random() < 0.5:
                    finish(index, fail=not calm and self._rng.random() < self._is.fail)
        if self.batch is None:
            self.schedule()
        self.now += STEP_SECONDS
        if self.batch is not None and (calm or self._rng.random() < 0.9):
            self.finish_step(STEP_SECONDS)
        self._turns += 1
        if self._turns % CHECK_EVERY == 0:
            self.core.check()

    def _random_token(self, history: list[int]) -> int:
        return 1 if self._rng.random() < 0.05 else self._rng.randint(2, 4)

    def register(self, name: str) -> AdapterEntry:
        entry = super().register(name)
        self.sizes[name] = 400 + entry.uid * 400 % 2000
        return entry

    # What happens

    def _disturb(self) -> None:
        scenario, rng, core = self._is, self._rng, self.core
        while rng.random() < scenario.arrive:
            self._add()
        if core.requests and rng.random() < scenario.abort:
            core.end(rng.choice(list(core.requests.values())), "abort", self.now)
        if self._names and rng.random() < scenario.replace:
            self._change(rng.choice(self._names))
        if self._names and rng.random() < scenario.pin:
            self._pin(rng.choice(self._names))
        if rng.random() < scenario.lose:
            self.lose_device()
        self.take_events()

    def _add(self) -> None:
        scenario, rng = self._is, self._rng
        name = None if rng.random() < scenario.base else rng.choice(self._names or [""])
        if name is not None and name not in self.core.residency.current:
            return  # unloaded just now
        prefix = rng.randrange(scenario.prefixes)
        due = self.now + rng.choice((0.1, 1.0, 5.0)) if rng.random() < scenario.deadlines else None
        with suppress(EngineOverloaded):
            self.add(
                name,
                prompt=[2 + prefix % 3] * rng.choice((1, 4, 9, 16)) + [5 + prefix] * rng.randint(1, 16),
                max_tokens=rng.randint(1, 20),
                deadline=due,
                tenant=f"tenant-{rng.randrange(scenario.tenants)}" if scenario.tenants else None,
                priority=rng.randrange(scenario.priorities),
                expected_tokens=rng.choice((None, 3)),
            )

    def _change(self, name: str) -> None:
        known = self.core.residency.names.of(name)
        if known.current is None or self._rng.random() < 0.5:
            self.register(name)
        else:
            known.unload(self.now)

    def _pin(self, name: str) -> None:
        residency = self.core.residency
        known = residency.names.of(name)
        pinned = [e for e in residency.entries.values() if e.pinned]
        if known.pinned:
            known.unpin(self.now)
        elif known.current is not None and len(pinned) + 1 < self._is.limits.num_slots:
            known.pin(self.now)

    def _state(self) -> str:
        core = self.core
        first = next(iter(core.queues.all), None)
        slots = ", ".join(f"{slot.entry.name if slot.entry else 'empty'}" for slot in core.slots.slots)
        return (
            f"{MOST_TURNS_TO_END} steps after the last arrival {len(core.queues)} requests wait "
            f"(first {first and first.id}) and {len(core.running)} run; slots: {slots or 'none'}"
        )


def serve_beside_others(policy: SchedulerPolicy, *, cold: bool) -> None:
    """Serve a long request of low priority, without a deadline, while short ones with everything in their
    favour never stop to come for another adapter. Its own adapter is ``cold``, and the only slot is taken; or
    it is in a slot already. Raises NeverEnds if it is not served in ``MOST_SECONDS_BESIDE``."""
    sim = Sim(SMALL._replace(num_slots=1 if cold else 2, cpu_capacity=2), policy, strict=False)
    for name in ("hot", "other"):
        sim.register(name)
    if not cold:
        sim.add("other", max_tokens=1)
        sim.run()
    kept, waits = SMALL.max_num_seqs * 2, None
    while sim.now < MOST_SECONDS_BESIDE:
        while len(sim.core.queues) < kept:
            sim.add("hot", prompt=[3] * 8, max_tokens=2, priority=9, tenant="others", deadline=sim.now + 60)
            if waits is None and sim.now > 1:
                waits = sim.add("other", prompt=[4] * 16, max_tokens=20, tenant="one")
        for moves, finish in ((sim.loads, sim.finish_load), (sim.copies, sim.finish_copy)):
            while moves:
                finish(0)
        sim.schedule()
        sim.now += STEP_SECONDS
        if sim.batch is not None:
            sim.finish_step(STEP_SECONDS)
        sim.take_events()
        if waits is not None and waits.id in sim.ended:
            return
    raise NeverEnds(
        f"a long request of low priority {'for a cold adapter ' * cold}was not served in "
        f"{MOST_SECONDS_BESIDE:g} s while short ones of high priority kept coming for another adapter; say "
        "'none' if that may be"
    )


def serve_one_by_one(policy: SchedulerPolicy) -> None:
    """Serve requests that come one by one, each for a cold adapter, on a simulated engine that is idle
    otherwise, in the engine's own loop: is the policy asked again when nothing wakes it? Raises NeverEnds if
    one of them is not served."""
    run_in_virtual_time(_serve(policy))


async def _serve(policy: SchedulerPolicy) -> None:
    lora = LoRAConfig(max_loras=1, max_cpu_loras=2)
    config = EngineConfig(model=PRESET, max_model_len=256, kv_cache_memory="64MiB", lora=lora)
    shapes = [AdapterShape(f"adapter-{index}", 8) for index in range(3)]
    async with SimulatedEngine(config, load_costs(PRESET), policy, metrics=False) as engine:
        engine.add_adapters(shapes)
        for shape in (*shapes, *shapes):
            try:
                async with asyncio.timeout(MOST_SECONDS_ALONE):
                    await engine.complete([0] * 8, SamplingParams(max_tokens=4), adapter=shape.name)
            except TimeoutError:
                raise NeverEnds(
                    f"a request for {shape.name}, alone on the engine, was not served in "
                    f"{MOST_SECONDS_ALONE:g} s"
                ) from None
