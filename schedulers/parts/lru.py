"""Least recently used: the idle adapter that was unused for the longest time gives up its slot."""

from __future__ import annotations

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.policy import AdapterView, SchedulerView, SlotView


class LRU(Replacement):
    """Evicts the least recently used idle adapter: score = the time of its last use."""

    source = "the classic page replacement; analysed by Mattson et al. 1970"

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return slot.last_used
