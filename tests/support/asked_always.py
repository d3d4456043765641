"""A policy that is asked before every step, whatever the policy in it says of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aioengine.schedulers import Decision, PolicyEvent, SchedulerPolicy, SchedulerView, load_policy


class AskedAlways(SchedulerPolicy):
    """Decides as ``policy`` does. ``says``: whether its ``ask_again`` counts."""

    questions = 0
    """Number of questions to all of them."""

    def __init__(self, policy: str, says: bool = False) -> None:
        self.inner = load_policy(policy)
        self.says = says

    def schedule(self, view: SchedulerView) -> Decision:
        AskedAlways.questions += 1
        decision = self.inner.schedule(view)
        return decision if self.says else decision._replace(ask_again=None)

    def on_event(self, event: PolicyEvent) -> None:
        self.inner.on_event(event)

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        return self.inner.cpu_victims(view, candidates)


def asked_always(policy: str, *, says: bool = False) -> dict[str, Any]:
    """Return the specification of one."""
    return {"name": f"{__name__}:AskedAlways", "policy": policy, "says": says}
