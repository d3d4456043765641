"""Merging of an adapter that is alone for long."""

from __future__ import annotations

from math import inf

from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import AdapterView, Decision, PolicyEvent, SchedulerView


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
        if not alone >= 0:
            raise ValueError(f"alone={alone}: must be >= 0 seconds")
        if not payback >= 0:
            raise ValueError(f"payback={payback}: must be >= 0")
        super().__init__(max_wait=max_wait, fair=fair)
        self.alone, self.payback = alone, payback
        self._saved: dict[str, float] = {}
        """Seconds that steps of each adapter would have saved since its last merge."""
        self._name: str | None = None
        """The adapter that was alone in the last decision."""
        self._since, self._step = 0.0, 0
        """Time since when it has been alone, and the step of the last decision."""

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        if event.kind == "adapter_retired" and event.was is not None:
            self._saved.pop(event.was, None)
            self._name = None
        elif event.kind == "adapter_dropped" and event.adapter is not None:
            self._saved.pop(event.adapter, None)

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        if not view.merging.possible:
            return decision
        name = self._who_is_alone(view)
        if name is None or name in (view.merging.adapter, view.merging.under_way):
            self._name = None
            return decision
        if name != self._name:
            self._name, self._since = name, view.now
        else:
            self._count(view, view.adapters[name], view.step - self._step)
        self._step = view.step
        if view.merging.under_way is not None or view.now - self._since < self.alone:
            return decision
        seconds = view.costs.merge(name)
        if seconds is not None and self._saved.get(name, 0.0) < self.payback * seconds:
            return decision
        self._saved.pop(name, None)
        return decision._replace(merge=[name])

    def quiet_until(self, view: SchedulerView) -> float:
        return super().quiet_until(view) if self._name is None else -inf

    def _who_is_alone(self, view: SchedulerView) -> str | None:
        """The adapter of all running requests, if it can be merged."""
        names = {slot.adapter for slot in view.slots if slot.running}
        if len(names) != 1:
            return None
        [name] = names
        if name is None or not (adapter := view.adapters[name]).mergeable:
            return None
        return name if adapter.running == len(view.running) else None

    def _count(self, view: SchedulerView, adapter: AdapterView, steps: int) -> None:
        with_it, without = (view.costs.step(adapter.running, ranks) for ranks in ([adapter.rank], []))
        if with_it is not None and without is not None and with_it > without:
            self._saved[adapter.name] = self._saved.get(adapter.name, 0.0) + steps * (with_it - without)
