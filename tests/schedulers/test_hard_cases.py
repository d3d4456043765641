"""The cases that break simple schedulers, each in virtual time and with its bound stated."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from core_sim import LIMITS, CoreSim

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import SchedulerPolicy
from aioengine.schedulers.compose import Composed
from aioengine.schedulers.drr import DRR
from aioengine.schedulers.edf import EDF
from aioengine.schedulers.fcfs import FCFS, Arrival
from aioengine.schedulers.lookahead import Lookahead
from aioengine.schedulers.lru import LRU
from aioengine.schedulers.none import NoPreemption, NoPrefetch
from aioengine.schedulers.parts import Ordering
from aioengine.schedulers.priority import PreemptLower, Priority
from aioengine.schedulers.sjf import SJF
from aioengine.schedulers.vllm import VLLMOrder
from aioengine.schedulers.vtc import VTC

STEP = 0.05


def composed(order: Ordering, max_wait: float = 1.0) -> Composed:
    return Composed(order, LRU(), Lookahead(), NoPreemption(), max_wait=max_wait)


def vllm() -> Composed:
    return Composed(VLLMOrder(), LRU(), NoPrefetch(), NoPreemption())


BUILT_IN: dict[str, Callable[[], SchedulerPolicy]] = {
    "fcfs": FCFS,
    "vllm": vllm,
    "sjf": lambda: composed(SJF()),
    "edf": lambda: composed(EDF()),
    "vtc": lambda: composed(VTC()),
    "drr": lambda: composed(DRR()),
    "priority": lambda: Composed(Priority(), LRU(), Lookahead(), PreemptLower()),
}


class TimedSim(CoreSim):
    """Reads, copies and steps take time, and run beside each other."""

    def __init__(
        self,
        limits: CoreLimits,
        policy: SchedulerPolicy,
        *,
        load_seconds: float = 0.2,
        copy_seconds: float = 0.02,
        step_seconds: float = 0.02,
        token_seconds: float = 0.0005,
    ) -> None:
        super().__init__(limits, policy)
        self.load_seconds, self.copy_seconds = load_seconds, copy_seconds
        self.step_seconds, self.token_seconds = step_seconds, token_seconds

    def drive(self, arrivals: Iterable[tuple[float, str | None, list[int], int]]) -> None:
        """Add each (time, adapter, prompt, max_tokens) at its time, and go on until all have ended."""
        due: list[tuple[float, int, str, object]] = []
        number = 0

        def at(time: float, what: str, value: object) -> None:
            nonlocal number
            number += 1
            due.append((time, number, what, value))

        for time, *rest in arrivals:
            at(time, "arrival", rest)
        while due:
            due.sort(key=lambda item: item[:2])
            self.now = due[0][0]
            while due and due[0][0] <= self.now:
                _time, _number, what, value = due.pop(0)
                if what == "arrival":
                    adapter, prompt, max_tokens = value  # type: ignore[misc]
                    self.add(adapter, prompt=prompt, max_tokens=max_tokens)
                elif what == "load":
                    self.finish_load(self.loads.index(value))  # type: ignore[arg-type]
                elif what == "copy":
                    self.finish_copy([entry for entry, _slot in self.copies].index(value))  # type: ignore[arg-type]
                else:
                    self.finish_step()
            if self.batch is None:
                loads, copies = len(self.loads), len(self.copies)
                batch = self.schedule()
                for entry in self.loads[loads:]:
                    at(self.now + self.load_seconds, "load", entry)
                for entry, _slot in self.copies[copies:]:
                    at(self.now + self.copy_seconds, "copy", entry)
                if batch is not None:
                    tokens = sum(len(work.tokens) for work in batch.sequences)
                    at(self.now + self.step_seconds + self.token_seconds * tokens, "step", None)
        assert not self.core.requests, "requests were left waiting with nothing under way"
        self.core.check()


def admissions(sim: CoreSim) -> dict[str, float]:
    return {e.request_id: e.time for e in sim.of(events.RequestAdmitted)}  # type: ignore[attr-defined]


# (a) One slot, a hot adapter that never pauses, and one request for another


def flood_one_slot(policy: SchedulerPolicy, seconds: float, tokens: int = 8) -> tuple[Request, float]:
    """A, B, A, A, A, ...: B's request, and when it came."""
    sim = CoreSim(LIMITS._replace(num_slots=1), policy)
    sim.register("A")
    sim.register("B")
    sim.add("A", max_tokens=tokens)
    sim.settle(step_seconds=STEP)
    b, arrival = sim.add("B", max_tokens=tokens), sim.now
    while sim.now < arrival + seconds and b.first_token is None:
        sim.add("A", max_tokens=tokens)
        sim.settle(step_seconds=STEP)
    return b, arrival


@pytest.mark.parametrize("name", ["fcfs", "sjf", "edf", "vtc", "drr", "priority"])
def test_a_cold_request_is_served_within_the_ageing_bound(name: str) -> None:
    max_wait, tokens = 1.0, 8
    b, arrival = flood_one_slot(BUILT_IN[name](), seconds=60.0, tokens=tokens)
    assert b.first_token is not None, "starved"
    # max_wait, the longest generation that was running, and steps to read, to copy and to run it.
    assert b.first_token - arrival <= max_wait + (tokens + 5) * STEP


def test_vllm_starves_it() -> None:
    bound = 1.0 + 13 * STEP
    b, _arrival = flood_one_slot(vllm(), seconds=100 * bound)
    assert b.admitted is None, "a busy slot was given up: this is not what vLLM does"


# (b) The base model needs no slot


@pytest.mark.parametrize("name", BUILT_IN)
def test_base_requests_are_as_fast_as_without_adapters(name: str) -> None:
    def base_admissions(with_adapters: bool) -> tuple[list[float], CoreSim]:
        limits = LIMITS._replace(num_slots=2, max_num_seqs=64, num_blocks=400, max_num_batched_tokens=200)
        sim = CoreSim(limits, BUILT_IN[name]())
        times: list[float] = []
        base: list[Request] = []
        for adapter in "abcd":
            sim.register(adapter)
        for step in range(100):
            if with_adapters and step % 2 == 0:
                sim.add("abcd"[step // 2 % 4], max_tokens=20)
            base.append(sim.add(max_tokens=3))
            sim.settle(step_seconds=STEP)
        for request in base:
            assert request.admitted is not None
            times.append(request.admitted)
        return times, sim

    alone, _ = base_admissions(with_adapters=False)
    beside, sim = base_admissions(with_adapters=True)
    assert beside == alone
    assert sum(slot.entry is not None for slot in sim.core.slots.slots) == 2, "the adapters fill the slots"


# (c) Many adapters over few slots

SWAP_LIMITS = CoreLimits(
    num_slots=8,
    cpu_capacity=64,
    max_loads=4,
    num_blocks=4096,
    block_size=16,
    max_num_seqs=32,
    max_num_batched_tokens=1024,
    max_model_len=2048,
    eos_token_ids=(1,),
)


def swaps_and_p99(policy: SchedulerPolicy, rate: float, seed: int, requests: int = 600) -> tuple[float, float]:
    """Slot loads per finished request, and the p99 time to first token."""
    rng = random.Random(seed)
    sim = TimedSim(SWAP_LIMITS, policy)
    for i in range(64):
        sim.register(f"a{i}")
    now, arrivals = 0.0, []
    for _ in range(requests):
        now += rng.expovariate(rate)
        prompt = [rng.randrange(2, 200) for _ in range(rng.randrange(8, 64))]
        arrivals.append((now, f"a{rng.randrange(64)}", prompt, rng.randrange(8, 32)))
    sim.drive(arrivals)
    assert set(sim.ended.values()) == {"length"}
    ttft = sorted(e.seconds for e in sim.of(events.FirstToken))  # type: ignore[attr-defined]
    return len(sim.of(events.AdapterPlaced)) / requests, ttft[int(0.99 * len(ttft))]
