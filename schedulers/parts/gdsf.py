"""GreedyDual-Size-Frequency: keeps adapters that are used often, costly to load, and small."""

from __future__ import annotations

from typing import NamedTuple

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.policy import AdapterView, PolicyEvent, SchedulerView, SlotView

MEBIBYTE = 2**20


class _Stay(NamedTuple):
    """An adapter's time in a slot, or in the CPU cache."""

    uses: int
    base: float
    """L at its last use."""


class GreedyDual:
    """Values of the adapters in one place: H = L + max(1, uses since it came) * worth, with L as of its last
    use.

    L rises to the H of an evicted adapter, if it was scored since its last use. An adapter that was evicted
    for another reason (its slot was closed for a request that has waited too long) does not change L.
    """

    def __init__(self) -> None:
        self.inflation = 0.0
        self._stays: dict[str, _Stay] = {}
        self._scored: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._stays)

    def came(self, name: str) -> None:
        self._stays[name] = _Stay(0, self.inflation)

    def used(self, name: str) -> None:
        uses = self._stays[name].uses if name in self._stays else 0
        self._stays[name] = _Stay(uses + 1, self.inflation)
        self._scored.pop(name, None)

    def left(self, name: str) -> None:
        self._stays.pop(name, None)
        self.inflation = max(self.inflation, self._scored.pop(name, 0.0))

    def renamed(self, was: str, name: str) -> None:
        if was in self._stays:
            self._stays[name] = self._stays.pop(was)
        if was in self._scored:
            self._scored[name] = self._scored.pop(was)

    def value(self, name: str, worth: float) -> float:
        uses, base = self._stays.get(name, _Stay(0, self.inflation))
        value = base + max(1, uses) * worth
        self._scored[name] = value
        return value


class GDSF(Replacement):
    """Frequency times load cost over size, plus an inflation term that lets unused adapters go.

    H = L + frequency * cost / size, with L as of the adapter's last use. The adapter with the lowest H is
    evicted, and L rises to this H. So adapters that are used later have a higher H than unused ones. Slots
    and CPU cache each have their own L and their own frequencies.

    - frequency: requests admitted since the adapter came to this place, at least 1.
    - cost: measured seconds of its last copy into a slot; plus those of its last read from disk while
      the CPU cache is full, since there it would be among the first to be dropped. In the CPU cache: the
      seconds of its last read.
    - size: MiB in the CPU cache, else its rank.

    Args:
        cost: "seconds", as above, or "one": every load costs the same, which minimizes the number of loads
            instead of their time.
    """

    source = "Cherkasova 1998, Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching"

    def __init__(self, cost: str = "seconds") -> None:
        if cost not in ("seconds", "one"):
            raise ValueError(f'cost={cost!r}: must be "seconds" or "one"')
        self.cost = cost
        self.slots = GreedyDual()
        self.cpu = GreedyDual()

    def on_event(self, event: PolicyEvent) -> None:
        name = event.adapter
        if name is None:
            return
        match event.kind:
            case "request_admitted":
                self.slots.used(name)
                self.cpu.used(name)
            case "adapter_loaded":
                self.cpu.came(name)
            case "adapter_placed":
                self.slots.came(name)
            case "adapter_evicted":
                self.slots.left(name)
            case "adapter_dropped":
                self.cpu.left(name)
            case "adapter_retired" if event.was is not None:
                self.slots.renamed(event.was, name)
                self.cpu.renamed(event.was, name)

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        read_again = view.cpu_room <= 0
        seconds = (adapter.slot_seconds or 0.0) + ((adapter.disk_seconds or 0.0) if read_again else 0.0)
        return self.slots.value(adapter.name, self._worth(adapter, seconds))

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self.cpu.value(adapter.name, self._worth(adapter, adapter.disk_seconds or 0.0))

    def _worth(self, adapter: AdapterView, seconds: float) -> float:
        size = adapter.bytes / MEBIBYTE or adapter.rank or 1
        return (1.0 if self.cost == "one" else seconds) / size
