"""Runs a policy through random scenarios, and reports its faults."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

from aioengine.lab.policy_check.world import (
    SCENARIOS,
    NeverEnds,
    Scenario,
    World,
    serve_beside_others,
    serve_one_by_one,
)
from aioengine.schedulers import Decision, PolicyEvent, SchedulerPolicy, SchedulerView

TURNS = 150
NOT_KEPT = "it states a bound on waiting, and does not keep it"
WAIT_FOR_EVER = "requests wait for ever although nothing is in their way"


class Where(NamedTuple):
    """Arguments that repeat a run."""

    scenario: str
    seed: int
    step: int

    def __str__(self) -> str:
        return f"{self.scenario}, seed {self.seed}, step {self.step}"


class Finding(NamedTuple):
    """A fault of the policy, and where it first occurred."""

    what: str
    first: Where
    details: str = ""
    """A traceback, or the state."""
    times: int = 1


class Checked(NamedTuple):
    """Result of a check."""

    runs: int
    decisions: int
    slowest: float
    """Seconds of the slowest decision."""
    broken: tuple[Finding, ...]
    """Faults that no policy should have."""

    @property
    def sound(self) -> bool:
        return not self.broken


def check_policy_contract(
    make: Callable[[], SchedulerPolicy],
    *,
    runs: int = 5,
    turns: int = TURNS,
    scenarios: Sequence[Scenario] = SCENARIOS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Checked:
    """Run a policy through every scenario, ``runs`` times each, and the first of them twice over; at the end
    also in the engine's own loop, on an engine that is idle, and, if it states a bound on waiting, beside
    requests that never stop to come.

    Time is simulated, so a run takes only the time of its decisions. A policy gets the same events on every
    machine.

    Args:
        make: Makes a policy for each run, because policies have state.
        turns: Number of turns in which events happen in a run; afterwards everything must end.
        progress: Called with the number of runs done, and their total.
    """
    broken = _Findings()
    total = len(scenarios) * runs
    decisions, slowest = 0, 0.0
    for index, (scenario, seed) in enumerate((s, n) for s in scenarios for n in range(runs)):
        progress(index, total)
        where, play = Where(scenario.name, seed, 0), partial(_play, scenario, seed, turns)
        watched = _watch(make(), where, broken, play)
        decisions += len(watched.decisions)
        slowest = max(slowest, watched.slowest)
        if seed == 0 and not broken:
            again = _watch(make(), where, _Findings(), play)
            _compare(watched.decisions, again.decisions, where, broken)
    if not broken:
        _watch(make(), Where("an engine that is idle", 0, 0), broken, serve_one_by_one)
    bound = make().starvation_bound
    for cold, states in ((True, not bound.startswith("none")), (False, "none" not in bound)):
        if states and not broken:
            where = Where("a request beside others that never stop", int(not cold), 0)
            _watch(make(), where, broken, partial(serve_beside_others, cold=cold), NOT_KEPT)
    return Checked(total, decisions, slowest, tuple(broken.values()))


class _Findings(dict[str, Finding]):
    """Findings by what is wrong; more of one kind are counted."""

    def add(self, what: str, where: Where, details: str) -> None:
        before = self.get(what)
        times = 1 if before is None else before.times + 1
        self[what] = (before or Finding(what, where, details))._replace(times=times)


def _play(scenario: Scenario, seed: int, turns: int, policy: SchedulerPolicy) -> None:
    World(scenario, policy, seed).play(turns)


def _watch(
    policy: SchedulerPolicy,
    where: Where,
    broken: _Findings,
    play: Callable[[SchedulerPolicy], None],
    late: str = WAIT_FOR_EVER,
) -> _Watched:
    """Play with a policy that is watched. What ends this too early is a finding; ``late``: requests did not
    end."""
    watched = _Watched(policy, where, broken)
    try:
        play(watched)
    except NeverEnds as error:
        watched.report(late, str(error))
    except AssertionError:
        text = "an invariant of the core is broken; that is a fault of the engine, please report it"
        watched.report(text, traceback.format_exc())
    return watched


def _compare(first: Sequence[Any], second: Sequence[Any], where: Where, broken: _Findings) -> None:
    """Add a finding for the first decisions that differ between two runs alike."""
    for step, (one, other) in enumerate(zip_longest(first, second)):
        if [*map(str, one or ())] != [*map(str, other or ())]:
            text = "the same events, and other decisions: it depends on something else than what it was told"
            broken.add(text, where._replace(step=step), f"first  {one}\nsecond {other}")
            return


class _Watched(SchedulerPolicy):
    """Policy that passes everything on to another one, and records its answers and its faults."""

    def __init__(self, inner: SchedulerPolicy, where: Where, broken: _Findings) -> None:
        self.decisions: list[Any] = []
        self.slowest = 0.0
        self._inner = inner
        self._where = where
        self._broken = broken

    def report(self, what: str, details: str) -> None:
        """Add a finding, in the step of the last question."""
        self._broken.add(what, self._where, details)

    def schedule(self, view: SchedulerView) -> Decision:
        self._where = self._where._replace(step=view.step)
        began = time.perf_counter()
        with self._watching("schedule"):
            decision: Any = self._inner.schedule(view)
        self.slowest = max(self.slowest, time.perf_counter() - began)
        if not isinstance(decision, Decision):
            self.report(f"schedule returned {type(decision).__name__}, not Decision", repr(decision)[:500])
        self.decisions.append(decision)
        answer: Decision = decision
        return answer

    def on_event(self, event: PolicyEvent) -> None:
        with self._watching(f"on_event({event.kind!r})"):
            self._inner.on_event(event)

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        with self._watching("cpu_victims"):
            return self._inner.cpu_victims(view, candidates)

    @contextmanager
    def _watching(self, call: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.report(f"{call} raised {type(error).__name__}: {error}", traceback.format_exc())
            raise
