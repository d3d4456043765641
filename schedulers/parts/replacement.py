"""The built-in replacements: which idle adapter gives up its slot, and which one leaves the CPU cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import inf, log2

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.policy import AdapterView, PolicyEvent, SchedulerView, SlotState, SlotView

MAX_NAMES = 16384
"""Maximum number of counted names; beyond it the less frequent half is forgotten."""
MEBIBYTE = 2**20


class LRU(Replacement):
    """Evicts the least recently used idle adapter: score = the time of its last use."""

    source = "the classic page replacement; analysed by Mattson et al. 1970"

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return slot.last_used


class Discard(LRU):
    """Keeps no adapter in a slot that no request uses or waits for: the slots are no cache.

    A baseline: the adapter, which stays in the CPU cache, is copied again for its next request.
    """

    source = "Sheng et al. 2023, S-LoRA (2311.03285); the baseline of Chameleon (2411.17741)"

    def discard(self, view: SchedulerView) -> Sequence[str]:
        idle = [s for s in view.slots if s.state is SlotState.READY and s.running == 0 and not s.pinned]
        names = [slot.adapter for slot in idle if slot.adapter is not None]
        return [name for name in names if not view.adapters[name].waiting]


class LFU(Replacement):
    """Evicts the least frequently used idle adapter; older uses count less.

    An adapter's count is the sum over its admitted requests of 2^(-age / half_life); it outlives the stay in
    a slot. score = log2(sum of 2^(t_i / half_life)) over the times t_i of these requests: all counts fade at
    the same rate, so neither this value nor the order changes with time.

    Args:
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
    """

    source = "Lee et al. 2001, LRFU: a spectrum of policies that subsumes LRU and LFU"

    def __init__(self, half_life: float = 300.0) -> None:
        at_least(0, "seconds", half_life=half_life)
        self._rate = 1 / half_life if half_life > 0 else 0.0
        self._weights: dict[str, float] = {}

    def on_event(self, event: PolicyEvent) -> None:
        name = event.adapter
        if event.kind != "request_admitted" or name is None:
            return
        now, old = event.now * self._rate, self._weights.get(name, -inf)
        self._weights[name] = max(now, old) + log2(1 + 2 ** -abs(now - old))
        if len(self._weights) > MAX_NAMES:
            for least in sorted(self._weights, key=self._weights.__getitem__)[: MAX_NAMES // 2]:
                del self._weights[least]

    def count(self, name: str, now: float) -> float:
        """Return the count at the time ``now``."""
        return float(2 ** (self._weights.get(name, -inf) - now * self._rate))

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self._weights.get(adapter.name, -inf)


class GreedyDual:
    """Values of the adapters in one place: H = L + max(1, uses since it came) * worth, with L as of its last
    use.

    L rises to the H of an evicted adapter, if it was scored since its last use. An adapter that was evicted
    for another reason (its slot was closed for a request that has waited too long) does not change L.
    """

    def __init__(self) -> None:
        self.inflation = 0.0
        self._stays: dict[str, tuple[int, float]] = {}
        """Uses since each adapter came, and L at the last one."""
        self._scored: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._stays)

    def came(self, name: str) -> None:
        self._stays[name] = 0, self.inflation

    def used(self, name: str) -> None:
        uses, _ = self._stays.get(name, (0, 0.0))
        self._stays[name] = uses + 1, self.inflation
        self._scored.pop(name, None)

    def left(self, name: str) -> None:
        self._stays.pop(name, None)
        self.inflation = max(self.inflation, self._scored.pop(name, 0.0))

    def forget(self, name: str) -> None:
        self._stays.pop(name, None)
        self._scored.pop(name, None)

    def value(self, name: str, worth: float) -> float:
        uses, base = self._stays.get(name, (0, self.inflation))
        value = self._scored[name] = base + max(1, uses) * worth
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
    """

    source = "Cherkasova 1998, Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching"

    def __init__(self) -> None:
        self.slots = GreedyDual()
        self.cpu = GreedyDual()

    def on_event(self, event: PolicyEvent) -> None:
        match event.kind, event.adapter:
            case "request_admitted", str(name):
                self.slots.used(name)
                self.cpu.used(name)
            case "adapter_loaded", str(name):
                self.cpu.came(name)
            case "adapter_placed", str(name):
                self.slots.came(name)
            case "adapter_evicted", str(name):
                self.slots.left(name)
            case "adapter_dropped", str(name):
                self.cpu.left(name)
            case "adapter_retired", _ if event.was is not None:
                self.slots.forget(event.was)
                self.cpu.forget(event.was)

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        read_again = view.cpu_room <= 0
        seconds = (adapter.slot_seconds or 0.0) + ((adapter.disk_seconds or 0.0) if read_again else 0.0)
        return self.slots.value(adapter.name, _worth(adapter, seconds))

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self.cpu.value(adapter.name, _worth(adapter, adapter.disk_seconds or 0.0))


def _worth(adapter: AdapterView, seconds: float) -> float:
    return seconds / (adapter.bytes / MEBIBYTE or adapter.rank or 1)


class Belady(Replacement):
    """Evicts the idle adapter whose next use lies furthest in the future; for replayed traces only.

    score = -(time of the next use): now if a request waits for it, else its next arrival in ``future``, or
    infinity. For slots filled on demand by one request after the other, no replacement makes fewer swaps.
    With prefetch, batches, or adapters of unequal load times it is a yardstick, not a bound.

    Args:
        future: (arrival time, adapter) of every request of the trace, in any order.
        start: What the engine's clock reads when the trace's clock reads 0.
    """

    source = "Belady 1966, A study of replacement algorithms for a virtual-storage computer"

    def __init__(self, future: Sequence[tuple[float, str]] | None = None, start: float = 0.0) -> None:
        if future is None:
            raise ValueError(
                "future=None: must be the (arrival time, adapter) of all future requests; this policy only "
                "makes sense where a trace is replayed, so that they are known"
            )
        self._arrivals: dict[str, list[float]] = {}
        for arrival, name in sorted(future):
            self._arrivals.setdefault(name, []).append(arrival + start)

    def next_use(self, name: str, now: float) -> float:
        """Return the time of the adapter's next request after ``now``; infinity if there is none."""
        arrivals = self._arrivals.get(name, [])
        index = bisect_right(arrivals, now)
        return arrivals[index] if index < len(arrivals) else inf

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return -view.now if adapter.waiting else -self.next_use(adapter.name, view.now)
