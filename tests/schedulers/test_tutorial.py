"""What docs/policies.md shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aioengine import events
from aioengine.schedulers import Composed, SchedulerPolicy, compose
from aioengine.testing import LIMITS, Sim

DOC = Path(__file__).parents[2] / "docs" / "policies.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def tutorial() -> type[SchedulerPolicy]:
    (source,) = (block for block in blocks() if "class TakeTurns" in block)
    scope: dict[str, object] = {}
    exec(compile(source, str(DOC), "exec"), scope)
    policy = scope["TakeTurns"]
    assert isinstance(policy, type)
    assert issubclass(policy, SchedulerPolicy)
    return policy


def test_adapters_take_turns() -> None:
    sim = Sim(LIMITS._replace(num_slots=2, max_num_seqs=3), tutorial()())
    for name in "ab":
        sim.register(name)
    for name in ("a", "a", "a", "a", "b", "b", None, None):
        sim.add(name)
    sim.run()
    order = [e.adapter for e in sim.of(events.RequestAdmitted)]  # type: ignore[attr-defined]
    adapters = [adapter for adapter in order if adapter is not None]
    assert adapters.index("b") <= 1, "four requests of a came first, and b did not wait for them"
    assert len(sim.ended) == 8
    assert not sim.of(events.PolicyRefused)
    assert not sim.of(events.PolicyFailed)


def test_the_other_blocks_run() -> None:
    scope: dict[str, object] = {}
    (composed,) = (b for b in blocks() if "compose(" in b)
    exec(composed, scope)
    assert isinstance(scope["policy"], Composed)
    (part,) = (b for b in blocks() if "class FewestTokens" in b)
    exec(part, scope)
    sim = Sim(LIMITS._replace(max_num_seqs=1), compose(order=scope["FewestTokens"]()))  # type: ignore
    sim.add(prompt=[5] * 9)
    sim.add(prompt=[5] * 3)
    sim.run()
    assert list(sim.ended) == ["r2", "r1"]


def test_every_refusal_of_the_core_is_documented() -> None:
    files = (DOC.parents[1] / "aioengine" / "core").rglob("*.py")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    reasons = set(re.findall(r'"((?:admit|place|prefetch|preempt|evict|discard)_[a-z_]+)"', source))
    assert len(reasons) >= 12
    whys = re.findall(r'return "(loading|busy|pinned|admitted)"|"(admitted)" if', source)
    reasons |= {f"{item}_{why or last}" for item in ("place_slot", "evict", "discard") for why, last in whys}
    assert len(reasons) >= 24
    for reason in reasons:
        assert f"`{reason}`" in DOC.read_text(encoding="utf-8"), reason


@pytest.mark.parametrize("name", ["docs/policies.md", "README.md"])
def test_links_lead_somewhere(name: str) -> None:
    path = DOC.parents[1] / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
