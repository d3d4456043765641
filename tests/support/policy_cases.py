"""Helpers for tests of scheduling policies, in virtual time."""

from __future__ import annotations

from collections.abc import Callable

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import SchedulerPolicy
from aioengine.testing import LIMITS, Sim


def order_of(sim: Sim) -> list[str]:
    """Requests in the order of admission."""
    return [e.request_id for e in sim.of(events.RequestAdmitted)]  # type: ignore[attr-defined]


def preempted(sim: Sim) -> list[str]:
    return [e.request_id for e in sim.of(events.RequestPreempted)]  # type: ignore[attr-defined]


def adapters_in_order(sim: Sim, requests: list[Request]) -> str:
    """Adapters of these requests in the order of admission, "-" for the base model."""
    name = {r.id: "-" if r.adapter is None else r.adapter.name for r in requests}
    return "".join(name[request_id] for request_id in order_of(sim) if request_id in name)


def warm(policy: SchedulerPolicy, names: str, limits: CoreLimits = LIMITS) -> Sim:
    """All adapters are in slots, and nothing is running."""
    sim = Sim(limits._replace(num_slots=len(names), cpu_capacity=2 * len(names)), policy)
    for name in names:
        sim.register(name)
        sim.add(name, max_tokens=1)
        sim.run()
    return sim


class TimedSim(Sim):
    """Reads, copies and steps take time, beside each other."""

    load_seconds, copy_seconds, step_seconds, token_seconds = 0.1, 0.01, 0.02, 0.0002

    def __init__(self, limits: CoreLimits, policy: SchedulerPolicy) -> None:
        super().__init__(limits, policy)
        self._due: dict[int, float] = {}

    def go(self, until: Callable[[], bool], seconds: float) -> None:
        """Steps until something is so; fails after ``seconds``."""
        end = self.now + seconds
        while not until():
            assert self.now < end, "it takes too long"
            self._finish_moves()
            batch = self.schedule()
            for entry in self.loads:
                self._due.setdefault(entry.uid, self.now + self.load_seconds)
            for entry in [move.entry for move in self.copies]:
                self._due.setdefault(entry.uid, self.now + self.copy_seconds)
            if batch is not None:
                tokens = sum(len(work.tokens) for work in batch.sequences)
                self.now += self.step_seconds + self.token_seconds * tokens
                self.finish_step()
            else:
                self.now = min([*self._due.values(), self.now + self.step_seconds])
        self.core.check()

    def _finish_moves(self) -> None:
        for entry in [entry for entry in self.loads if self._due[entry.uid] <= self.now]:
            del self._due[entry.uid]
            self.finish_load(self.loads.index(entry))
        for entry in [move.entry for move in self.copies if self._due[move.entry.uid] <= self.now]:
            del self._due[entry.uid]
            self.finish_copy([move.entry for move in self.copies].index(entry))
