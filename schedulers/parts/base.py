"""The four parts of a composed policy, each a small class that can be replaced separately.

- :class:`Ordering`: which request goes first.
- :class:`Replacement`: which idle adapter gives up its slot, and which one leaves the CPU cache.
- :class:`Prefetch`: which adapters to bring from disk to the CPU.
- :class:`Preemption`: which requests leave the batch.

:mod:`aioengine.schedulers.parts.compose` puts them together. Parts may keep state, which ``on_event``
updates. They must not assume that their proposals were carried out; the events say which were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from heapq import nsmallest
from itertools import chain, islice
from typing import Any

from aioengine.schedulers.arrival import by_arrival, cold_by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.policy import (
    AdapterView,
    Location,
    PolicyEvent,
    RequestView,
    SchedulerView,
    SlotView,
)


class Part(ABC):  # noqa: B024 - its children have the abstract methods
    """Base of the parts."""

    source: str = ""
    """Its source, a paper or a project, in one line."""

    def on_event(self, event: PolicyEvent) -> None:  # noqa: B027 - optional hook
        """Called for every event, in order."""


class Ordering(Part):
    """The order of requests, and of the adapters to bring in.

    Only ``key`` is required; a smaller key goes first, equal keys in order of arrival. Override the other
    methods where there is a faster way, or where the order depends on earlier choices.
    """

    starvation_bound: str = "none"
    """Worst case of the ordering alone: how long a request whose adapter is in a slot can be passed over."""
    take_after: float | None = None
    """Seconds after which an idle slot that later requests wait for may be taken; None: ``max_wait``."""
    close_after: float | None = None
    """Seconds after which a busy slot is closed to new requests so that it becomes idle; None as above."""
    ages: bool = True
    """Whether cold adapters that have been waited for ``take_after`` seconds go before all others, the oldest
    first. Set it to False only if the order of ``cold`` lets none starve, as that of arrival does."""

    default_replace: str = "lru"
    default_prefetch: str = "lookahead"
    """The other parts for this ordering if none are named."""

    @abstractmethod
    def key(self, request: RequestView, view: SchedulerView) -> Any:
        """Return the sort key, comparable with the keys of other requests."""

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        """Return the first ``limit`` waiting requests for these adapters (None: the base model), in order.
        Adapters that no request waits for may be left out of ``names``."""
        waiting = chain.from_iterable(map(view.waiting_for, names))
        return nsmallest(limit, waiting, key=lambda r: (self.key(r, view), r.arrival))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        """Yield adapters that requests wait for and that no slot holds, in the order to bring them in: that
        of their first requests."""

        def first(name: str) -> Any:
            return min((self.key(r, view), r.arrival) for r in view.waiting_for(name))

        return iter(sorted(cold_by_arrival(view), key=first))


class Arrival(Ordering):
    """Order of arrival. The cost does not grow with the length of the queues."""

    ages = False
    starvation_bound = "those who arrived before it"
    source = "first come, first served"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.arrival

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        return list(islice(by_arrival(view, names), limit))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        return cold_by_arrival(view)


class Replacement(Part):
    """Chooses the idle adapter that gives up its slot, and the one that leaves the CPU cache."""

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        """Value of keeping ``adapter`` in ``slot``, by default ``cpu_score``; the lowest is evicted first."""
        return self.cpu_score(view, adapter)

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        """Value of keeping ``adapter`` in the CPU cache; by default, the time of its last use."""
        return adapter.last_used

    def discard(self, view: SchedulerView) -> Sequence[str]:
        """Return the idle adapters that leave their slots although nothing needs the room; by default,
        none."""
        return ()


class Prefetch(Part):
    """Chooses the adapters to bring from disk to the CPU. A cold adapter is read in any case as soon as there
    is an idle slot that it could have."""

    @abstractmethod
    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str] | None:
        """Return at most ``view.load_room`` names; None if there is nothing to read before the next event:
        after any other answer the policy is asked before the next step. ``cold`` yields the adapters that
        requests wait for and that no slot holds, the most urgent first; it is lazy, so take no more than
        needed. Not called while no read can begin."""


class NoPrefetch(Prefetch):
    """Reads an adapter only when a slot is available."""

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> None:
        return None


class Lookahead(Prefetch):
    """Brings the next ``k`` adapters that requests wait for to the CPU, the most urgent first.

    Args:
        k: Number of adapters outside the slots to consider; those already on the CPU count, those that are
            being read do not.
    """

    source = "aioengine's own; S-LoRA (Sheng et al. 2023) reads ahead for its waiting queue likewise"

    def __init__(self, k: int = 8) -> None:
        at_least(1, k=k)
        self.k = k

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str] | None:
        ahead = islice((n for n in cold if view.adapters[n].location is not Location.LOADING), self.k)
        return [name for name in ahead if view.adapters[name].location is Location.DISK] or None


class Preemption(Part):
    """Chooses requests to preempt, beyond those that the core preempts for lack of KV blocks."""

    @abstractmethod
    def choose(self, view: SchedulerView) -> Sequence[str] | None:
        """Return the ids of the requests to preempt; None as of a :class:`Prefetch`."""


class NoPreemption(Preemption):
    """Lets every running request finish."""

    def choose(self, view: SchedulerView) -> None:
        return None
