"""Policies that break their contract in every way that can be thought of, by seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf, nan

from aioengine.schedulers import Decision, Place, PolicyEvent, SchedulerPolicy, SchedulerView


class Hostile(SchedulerPolicy):
    """Anything goes: known and unknown names, any order, duplicates, nonsense types."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def schedule(self, view: SchedulerView) -> Decision:
        rng = self.rng
        kind = rng.random()
        if kind < 0.05:
            raise RuntimeError("hostile")
        if kind < 0.1:
            return rng.choice([None, 3, "x", Decision(admit=3)])  # type: ignore
        ids = [r.request_id for r in view.waiting] + [r.request_id for r in view.running] + ["ghost"]
        names = [*view.adapters, "ghost"]
        self.meddle(view)
        return Decision(
            admit=rng.choices(ids, k=rng.randint(0, 8)),
            place=[Place(rng.choice(names), rng.choice([None, 0, 1, 5])) for _ in range(rng.randint(0, 4))],
            prefetch=rng.choices(names, k=rng.randint(0, 3)),
            preempt=rng.choices(ids, k=rng.choice([0, 0, 0, 1, 2])),
            reject=[(rng.choice(ids), "hostile") for _ in range(rng.choice([0, 0, 0, 0, 1]))],
            evict=rng.choices(names, k=rng.choice([0, 0, 1, 5])),
            discard=rng.choices(names, k=rng.choice([0, 0, 0, 1, 2])),
            ask_again=rng.choice([None, None, -inf, view.now, view.now + 0.5, inf, inf, nan]),
        )

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        self.meddle(view)
        return self.rng.choice([[], ["ghost"], candidates, [*candidates][::-1], 3, None])  # type: ignore

    def meddle(self, view: SchedulerView) -> None:
        """Try to change what it was given."""
        attempts: list[Callable[[], object]] = [
            lambda: setattr(view, "now", 0.0),
            lambda: setattr(view.slots[0], "running", 0),
            lambda: setattr(view, "slots", ()),
            lambda: view.running.clear(),  # type: ignore[attr-defined]
            lambda: setattr(next(iter(view.adapters.values())), "pinned", True),
            lambda: view.adapters.clear(),  # type: ignore[attr-defined]
            lambda: setattr(next(iter(view.waiting)), "arrival", -1.0),
        ]
        with suppress(AttributeError, TypeError, StopIteration):
            self.rng.choice(attempts)()


class Failing(SchedulerPolicy):
    """Decides as ``inner`` does, but now and then raises, whatever it is asked."""

    ERRORS = (RuntimeError("planned"), asyncio.CancelledError(), RecursionError("planned"), StopIteration())

    def __init__(self, inner: SchedulerPolicy, seed: int, rate: float = 0.1) -> None:
        self.inner = inner
        self.rng = random.Random(seed)
        self.rate = rate

    def schedule(self, view: SchedulerView) -> Decision:
        self.fail()
        return self.inner.schedule(view)

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        self.fail()
        return self.inner.cpu_victims(view, candidates)

    def on_event(self, event: PolicyEvent) -> None:
        self.inner.on_event(event)
        self.fail()

    def fail(self) -> None:
        if self.rng.random() < self.rate:
            planned = self.rng.choice(self.ERRORS)
            raise type(planned)(*planned.args)  # a new one: tracebacks gather in one that is raised again


class Slow(SchedulerPolicy):
    """Decides as ``inner`` does, after ``delay()``, which moves the clock on."""

    def __init__(self, inner: SchedulerPolicy, delay: Callable[[], None]) -> None:
        self.inner = inner
        self.delay = delay
        self.on_event = inner.on_event  # type: ignore[method-assign]
        self.cpu_victims = inner.cpu_victims  # type: ignore[method-assign]

    def schedule(self, view: SchedulerView) -> Decision:
        self.delay()
        return self.inner.schedule(view)
