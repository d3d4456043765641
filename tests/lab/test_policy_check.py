"""The check of policies finds what breaks the contract, and nothing in those that keep it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aioengine.cli.main import main
from aioengine.lab.policy_check.check import Checked, check_policy_contract
from aioengine.lab.policy_check.world import SCENARIOS, NeverEnds, serve_one_by_one
from aioengine.lab.runs.study import TEMPLATES
from aioengine.schedulers import (
    Decision,
    Ordering,
    PolicyEvent,
    RequestView,
    SchedulerPolicy,
    SchedulerView,
    compose,
    load_policy,
)
from aioengine.schedulers.policies.fcfs import FCFS

FEW = [scenario for scenario in SCENARIOS if scenario.name in ("one slot", "adapters that come and go")]


def checked(make: type[SchedulerPolicy]) -> Checked:
    return check_policy_contract(make, runs=1, turns=40, scenarios=FEW)


def documented() -> Iterator[object]:
    """The policies that the docs show, and the one with which a study begins."""
    root = Path(__file__).resolve().parents[2]
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/policies.md").read_text("utf-8"), re.DOTALL)
    sources = {
        "ShortestFirst": (root / "examples/my_policy.py").read_text("utf-8"),
        "TakeTurns": next(block for block in blocks if "class TakeTurns" in block),
        "MyPolicy": (TEMPLATES / "policy.py.txt").read_text("utf-8"),
    }
    for name, source in sources.items():
        scope: dict[str, Any] = {}
        exec(compile(source, name, "exec"), scope)
        yield pytest.param(scope[name], id=name)


@pytest.mark.parametrize("policy", list(documented()))
def test_policies_to_copy_from_keep_the_contract(policy: type[SchedulerPolicy]) -> None:
    assert check_policy_contract(policy, runs=4, turns=60, scenarios=FEW).broken == ()


@pytest.mark.parametrize(("policy", "keeps"), [("lpm", True), ("lpm:age=100000", False), ("sjf", True)])
def test_a_bound_that_is_stated_is_kept(policy: str, keeps: bool) -> None:
    """sjf states none for requests whose adapter has a slot."""
    found = check_policy_contract(lambda: load_policy(policy), runs=1, turns=20, scenarios=FEW).broken
    assert [finding.what for finding in found] == [] if keeps else "states a bound" in found[0].what


class Raises(FCFS):
    """Forgets that adapters go."""

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        if event.kind == "adapter_evicted":
            raise KeyError(event.adapter)


class AdmitsNobody(SchedulerPolicy):
    def schedule(self, view: SchedulerView) -> Decision:
        return Decision()


class ThrowsDice(FCFS):
    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        return decision if random.random() < 0.5 else decision._replace(admit=decision.admit[:1])


class AnswersNothing(SchedulerPolicy):
    def schedule(self, view: SchedulerView) -> Decision:
        return None  # type: ignore[return-value]


class PlacesAnything(FCFS):
    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        return decision._replace(prefetch=[*decision.prefetch, "ghost"])


class HoldsBack(FCFS):
    """Lets each cold adapter wait for a second, on purpose."""

    def schedule(self, view: SchedulerView) -> Decision:
        ready = [
            a
            for a in view.waiting_adapters
            if a is None or (view.adapters[a].oldest_arrival or 0) + 1 <= view.now
        ]
        decision = super().schedule(view)
        return decision._replace(place=[place for place in decision.place if place.adapter in ready])


def test_an_engine_that_is_idle_asks_again() -> None:
    assert checked(HoldsBack).sound
    with pytest.raises(NeverEnds, match="adapter-0, alone on the engine"):
        serve_one_by_one(AdmitsNobody())


class ColdAreHeldBack(Ordering):
    """Shows an adapter only when its first request has waited for a while."""

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def cold(self, view: SchedulerView) -> Iterator[str]:
        oldest = {name: view.adapters[name].oldest_arrival or 0.0 for name in super().cold(view)}
        return iter([name for name, arrival in oldest.items() if arrival + 0.5 <= view.now])


@pytest.mark.parametrize("ages", [True, False])
def test_an_ordering_that_holds_adapters_back_is_asked_again(ages: bool) -> None:
    order = ColdAreHeldBack()
    order.ages = ages
    serve_one_by_one(compose(order=order))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Raises, "on_event('adapter_evicted') raised KeyError: 'adapter-"),
        (AdmitsNobody, "requests wait for ever although nothing is in their way"),
        (ThrowsDice, "the same events, and other decisions"),
        (AnswersNothing, "schedule returned NoneType, not Decision"),
    ],
)
def test_what_is_broken_is_named(policy: type[SchedulerPolicy], says: str) -> None:
    found = checked(policy)
    assert not found.sound
    assert any(finding.what.startswith(says) for finding in found.broken), found.broken


def test_a_traceback_shows_where_it_was_raised() -> None:
    [finding, *_] = checked(Raises).broken
    assert "raise KeyError(event.adapter)" in finding.details


def test_items_that_the_core_refuses_are_no_fault() -> None:
    assert checked(PlacesAnything).sound


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from aioengine.schedulers import Decision, SchedulerPolicy\n"
        "class Mine(SchedulerPolicy):\n"
        "    def schedule(self, view):\n"
        "        raise ValueError('not today')\n"
    )
    assert main(["policies", "check", f"{file}:Mine", "--runs", "1"]) == 3
    said = capsys.readouterr().out
    assert "broken: schedule raised ValueError: not today" in said
    assert main(["policies", "check", "no_such_policy"]) == 2
    assert main(["policies", "check", "fcfs", "--runs", "1"]) == 0
    assert "nothing is broken" in capsys.readouterr().out
