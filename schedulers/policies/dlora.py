"""Merging of an adapter that is alone for long."""

from __future__ import annotations

from math import inf

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.compose import EARLY
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import AdapterView, Decision, PolicyEvent, SchedulerView

LOOK_AGAIN = 1.0
"""Seconds after which an adapter is looked at again that would save nothing: measured costs may change."""


class DLoRA(FCFS):
    """First come, first served; an adapter that runs alone for long is merged with the base model's weights.

    While all running requests are one adapter's, each step counts what it would have saved, merged:
    ``view.costs.step`` with the adapter's rank less that without. Once these savings are ``payback`` times
    the seconds of a merge, the adapter is merged. With 1 that is the rule of ski rental: merges and lost
    savings together are at most twice what they would be if the arrivals were known (Karlin et al.,
    "Competitive snoopy caching", 1988). While no merge has been timed yet, ``alone`` decides.

    In the paper's system a merged adapter has the batch for itself, and credits end that before others wait
    too long. Here the base model's weights stay beside the merged ones, so that others run at once, and
    nothing has to be balanced.

    Args:
        alone: Seconds that an adapter has been alone at least, in one piece, before it is merged.
        payback: Seconds saved so far, in merges.
        max_wait, fair: As for ``fcfs``.
    """

    source = "Wu et al. 2024, dLoRA (OSDI'24): merged and unmerged inference"

    def __init__(
        self, alone: float = 1.0, payback: float = 1.0, max_wait: float = 1.0, fair: bool = True
    ) -> None:
        at_least(0, "seconds", alone=alone)
        at_least(0, payback=payback)
        super().__init__(max_wait=max_wait, fair=fair)
        self.alone, self.payback = alone, payback
        self._saved: dict[str, float] = {}
        """Seconds that steps of each adapter would have saved since its last merge, until ``_from``."""
        self._name: str | None = None
        """The adapter that was alone in the last decision."""
        self._since, self._from = 0.0, 0
        """Time since when it has been alone, and the step since when each saves ``_saving``."""
        self._saving: float | None = None
        """Seconds that a step would save; None if that is not known yet."""

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        gone = event.was if event.kind == "adapter_retired" else event.adapter
        if event.kind in ("adapter_retired", "adapter_dropped") and gone is not None:
            self._saved.pop(gone, None)
            if gone == self._name:
                self._name = None

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        if not view.merging.possible:
            return decision
        name = self._who_is_alone(view)
        if name is None or name in (view.merging.adapter, view.merging.under_way):
            self._count(view.step)
            self._name = None
            return decision
        saving = _saving(view, view.adapters[name])
        if (name, saving) != (self._name, self._saving):
            self._count(view.step)
            if name != self._name:
                self._since = view.now
            self._name, self._saving, self._from = name, saving, view.step
        if view.merging.under_way is not None or view.now < self._since + self.alone:
            return decision
        seconds = view.costs.merge(name)
        if seconds is not None and self._saved_until(view.step, name) < self.payback * seconds:
            return decision
        self._saved.pop(name, None)
        self._from = view.step
        return decision._replace(merge=[name])

    def quiet_until(self, view: SchedulerView) -> float:
        until = super().quiet_until(view)
        if self._name is None or view.merging.under_way is not None:
            return until
        return min(until, self._pays_at(view, self._name))

    def _pays_at(self, view: SchedulerView, name: str) -> float:
        """Return a time before which it does not pay to merge the adapter that is alone."""
        alone = self._since + self.alone - EARLY
        seconds, saving = view.costs.merge(name), self._saving
        if seconds is None:
            return alone
        missing = self.payback * seconds - self._saved_until(view.step, name)
        if missing <= 0:
            return alone
        adapter = view.adapters[name]
        step = view.costs.step(adapter.running, [adapter.rank])
        if saving is None or step is None:
            return -inf
        if saving <= 0:
            return view.now + LOOK_AGAIN
        # Half of the time that the steps take which are missing: they may take less than is estimated.
        return max(alone, view.now + missing / saving * step / 2)

    def _who_is_alone(self, view: SchedulerView) -> str | None:
        """The adapter of all running requests, if it can be merged."""
        names = {slot.adapter for slot in view.slots if slot.running}
        if len(names) != 1:
            return None
        [name] = names
        if name is None or not (adapter := view.adapters[name]).mergeable:
            return None
        return name if adapter.running == len(view.running) else None

    def _saved_until(self, step: int, name: str) -> float:
        """Return what the adapter that is alone would have saved by now. It does not depend on how often this
        is asked."""
        return self._saved.get(name, 0.0) + (step - self._from) * max(self._saving or 0.0, 0.0)

    def _count(self, step: int) -> None:
        """Enter what the adapter that was alone would have saved by now."""
        if self._name is not None:
            self._saved[self._name] = self._saved_until(step, self._name)
            self._from = step


def _saving(view: SchedulerView, adapter: AdapterView) -> float | None:
    """Return the seconds that a step of this adapter alone would save if it were merged."""
    with_it, without = (view.costs.step(adapter.running, ranks) for ranks in ([adapter.rank], []))
    return None if with_it is None or without is None else with_it - without
