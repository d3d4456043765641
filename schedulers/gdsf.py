"""GreedyDual-Size-Frequency: keep what is used often, dear to load and small."""

from __future__ import annotations

from typing import NamedTuple

from aioengine.schedulers.parts import Replacement
from aioengine.schedulers.policy import AdapterView, PolicyEvent, SchedulerView, SlotView

MEBIBYTE = 2**20


class _Stay(NamedTuple):
    """An adapter's time in a slot."""

    uses: int
    base: float
    """L at its last use."""


class GDSF(Replacement):
    """Frequency times load cost over size, plus an inflation that makes what is no longer used go.

    H = L + frequency * cost / size, with L as of the adapter's last use. The lowest H goes, and L rises
    to it, so that those used since then are ahead of those that were not.

    - frequency: requests admitted since the adapter came into its slot, at least 1.
    - cost: measured seconds of its last copy into a slot; plus those of its last read from disk while
      the CPU cache is full, since there it would be among the first to be dropped.
    - size: MiB in the CPU cache, else its rank.

    L rises only when the evicted adapter was scored since its last use: one that was turned out for
    another reason (a slot closed for somebody who has waited too long) says nothing about worth.

    Args:
        cost: "seconds", as above, or "one": every load costs the same, which aims at few loads rather
            than at little time spent loading.
    """

    source = "Cherkasova 1998, Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching"

    def __init__(self, cost: str = "seconds") -> None:
        if cost not in ("seconds", "one"):
            raise ValueError(f'cost={cost!r}: must be "seconds" or "one"')
        self.cost = cost
        self.inflation = 0.0
        self._stays: dict[str, _Stay] = {}
        self._scored: dict[str, float] = {}

    def on_event(self, event: PolicyEvent) -> None:
        name = event.adapter
        if name is None:
            return
        if event.kind == "request_admitted":
            uses = self._stays[name].uses if name in self._stays else 0
            self._stays[name] = _Stay(uses + 1, self.inflation)
            self._scored.pop(name, None)
        elif event.kind == "adapter_placed":
            self._stays[name] = _Stay(0, self.inflation)
        elif event.kind == "adapter_evicted":
            self._stays.pop(name, None)
            self.inflation = max(self.inflation, self._scored.pop(name, 0.0))

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        if len(self._stays) > 2 * len(view.slots):  # some were renamed or unloaded while in a slot
            self._forget_absent(view)
        uses, base = self._stays.get(adapter.name, _Stay(0, self.inflation))
        size = adapter.bytes / MEBIBYTE or adapter.rank or 1
        value = base + max(1, uses) * self._cost(view, adapter) / size
        self._scored[adapter.name] = value
        return value

    def _cost(self, view: SchedulerView, adapter: AdapterView) -> float:
        if self.cost == "one":
            return 1.0
        read_again = view.cpu_room <= 0
        return (adapter.slot_seconds or 0.0) + ((adapter.disk_seconds or 0.0) if read_again else 0.0)

    def _forget_absent(self, view: SchedulerView) -> None:
        held = {slot.adapter for slot in view.slots}
        self._stays = {name: stay for name, stay in self._stays.items() if name in held}
        self._scored = {name: value for name, value in self._scored.items() if name in held}
