"""The built-in prefetches: which adapters to bring from disk to the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Prefetch
from aioengine.schedulers.parts.replacement import DecayedCounts
from aioengine.schedulers.policy import Location, PolicyEvent, SchedulerView


class NoPrefetch(Prefetch):
    """Reads an adapter only when a slot is available."""

    asks_always = False

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        return ()


class Lookahead(Prefetch):
    """Brings the next ``k`` adapters that requests wait for to the CPU, the most urgent first.

    Args:
        k: Number of adapters outside the slots to consider; those already on the CPU count, those that are
            being read do not.
    """

    source = "aioengine's own; S-LoRA (Sheng et al. 2023) reads ahead for its waiting queue likewise"
    asks_always = False

    def __init__(self, k: int = 8) -> None:
        at_least(1, k=k)
        self.k = k

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        ahead = islice((n for n in cold if view.adapters[n].location is not Location.LOADING), self.k)
        return [name for name in ahead if view.adapters[name].location is Location.DISK]


class Popular(Lookahead):
    """Reads adapters that requests wait for, as lookahead does, and then the most requested ones, if there is
    room.

    An adapter's popularity is its request rate, faded: the sum over its requests of
    2^(-age / half_life). It is read for its popularity only when no waiting request needs a read, and only
    into free room of the CPU cache: nothing is evicted for a guess.

    Args:
        k: Number of adapters outside the slots that requests wait for to consider.
        top: Number of most requested adapters to keep on the CPU.
        half_life: Seconds after which a request counts half; 0: it counts in full for ever.
    """

    source = "popularity with exponential decay, as in caching of web objects"

    def __init__(self, k: int = 8, top: int = 64, half_life: float = 600.0) -> None:
        super().__init__(k)
        at_least(0, top=top)
        self.top = top
        self.requests = DecayedCounts(half_life)

    def on_event(self, event: PolicyEvent) -> None:
        if event.kind == "request_added" and event.adapter is not None:
            self.requests.add(event.adapter, event.now)

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        names = list(super().choose(view, cold))
        room = min(view.load_room, view.cpu_room) - len(names)
        if room <= 0 or next(cold, None) is not None:
            return names  # keep the rest of the room for adapters of later requests
        popular = (name for name in islice(self.requests.most(), self.top) if name in view.adapters)
        on_disk = (name for name in popular if view.adapters[name].location is Location.DISK)
        return names + list(islice((name for name in on_disk if name not in names), room))
