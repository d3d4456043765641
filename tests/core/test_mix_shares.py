"""A tenant with very many different mixes delays no other tenant, in virtual time."""

from __future__ import annotations

import math

import pytest
from support.full_sim import FullSim

from aioengine.core.state import AdapterEntry, Request
from aioengine.schedulers import load_policy
from aioengine.testing import LIMITS

OWN = ("b0", "b1", "b2", "b3")
"""The adapters of the tenant that is measured."""
SECONDS, EACH = 0.02, 0.001
"""Of a step, and of each sequence in it."""
DISK, MADE, COPY = 0.4, 0.05, 0.02
"""Seconds of a read from disk, of a mix that is made of what is in memory, and of a copy into a slot."""
AT_A_TIME = 64
"""Mixes that a tenant may have in use."""


class Timed(FullSim):
    """Reads and copies take their time beside the steps."""

    def __init__(self) -> None:
        limits = LIMITS._replace(
            num_slots=8,
            cpu_capacity=16,
            num_blocks=4000,
            max_num_seqs=32,
            max_num_batched_tokens=256,
            max_model_len=256,
        )
        super().__init__(limits, load_policy("fair"))
        self.due: dict[int, float] = {}

    def ready(self, entry: AdapterEntry, seconds: float) -> bool:
        if self.due.setdefault(entry.uid, self.now + seconds) > self.now + 1e-9:
            return False
        del self.due[entry.uid]
        return True

    def advance(self) -> None:
        """One step, and what ends in its time."""
        for index in reversed(range(len(self.loads))):
            entry = self.loads[index]
            if self.ready(entry, DISK if entry.files is None else MADE):
                self.finish_load(index)
        for index in reversed(range(len(self.copies))):
            if self.ready(self.copies[index][0], COPY):
                self.finish_copy(index)
        batch = self.schedule()
        self.now += SECONDS + EACH * (0 if batch is None else len(batch.sequences))
        if batch is not None:
            self.finish_step()


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def measure(mixes: int) -> tuple[float, float]:
    """P99 of the time to the first token and of the longest gap of a steady tenant, beside a flood of long
    answers for ``mixes`` different mixes in turn, or (0) for one adapter."""
    sim = Timed()
    for name in (*OWN, "x", "y"):
        sim.register(name)
    measured: list[Request] = []
    flood: list[Request] = []
    sent = 0
    while len(measured) < 600:
        if sim.now >= 0.25 * len(measured):
            measured.append(sim.add(OWN[len(measured) % 4], tenant="b", max_tokens=8))
        flood = [request for request in flood if request.id in sim.core.requests]
        while sim.now > 5 and sent < 1000 and len(flood) < AT_A_TIME:
            name = sim.mix("x", "y", weight=1.0 + sent % mixes, tenant="a") if mixes else "x"
            flood.append(sim.add(name, tenant="a", max_tokens=100))
            sent += 1
        sim.advance()
    sim.core.check()
    done = [request for request in measured if request.id in sim.ended][40:]
    firsts = [request.first_token - request.arrival for request in done if request.first_token is not None]
    return p99(firsts), p99([request.worst_gap for request in done if request.worst_gap is not None])


@pytest.mark.slow
def test_a_thousand_mixes_of_one_tenant_delay_no_other() -> None:
    first, gap = measure(0)
    found = measure(1000)
    assert found[0] <= 1.1 * first and found[1] <= 1.1 * gap
