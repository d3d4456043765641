"""The parts that do nothing: no prefetch, no preemption, no cache of adapters in the slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

from aioengine.schedulers.parts.base import Preemption, Prefetch, Replacement
from aioengine.schedulers.policy import AdapterView, SchedulerView, SlotState, SlotView


class NoPrefetch(Prefetch):
    """Reads an adapter only when a slot is available."""

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        return ()

    def ask_again(self, view: SchedulerView) -> float | None:
        return inf


class NoPreemption(Preemption):
    """Lets every running request finish."""

    def choose(self, view: SchedulerView) -> Sequence[str]:
        return ()

    def ask_again(self, view: SchedulerView) -> float | None:
        return inf


class Discard(Replacement):
    """Keeps no adapter in a slot that no request uses or waits for: the slots are no cache.

    This is how S-LoRA treats adapters, and what Chameleon's cache is compared with. It is a baseline: the
    adapter is copied again for its next request. It stays in the CPU cache.
    """

    source = (
        "Sheng et al. 2023, S-LoRA (2311.03285); the baseline of Iliakopoulou et al. 2024, "
        "Chameleon (2411.17741)"
    )

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return slot.last_used

    def discard(self, view: SchedulerView) -> Sequence[str]:
        idle = [s for s in view.slots if s.state is SlotState.READY and s.running == 0 and not s.pinned]
        names = [slot.adapter for slot in idle if slot.adapter is not None]
        return [name for name in names if not view.adapters[name].waiting]
