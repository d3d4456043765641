"""Orderings whose key does not change while a request waits: shortest job, earliest deadline, priority; and
the preemption by priority."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import Any

from sortedcontainers import SortedKeyList

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Ordering, Preemption
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView, SlotState


class SortedRequests:
    """The waiting requests of each adapter in the order of their keys, equal ones by arrival.

    Args:
        key: Must not change while a request waits.
    """

    def __init__(self, key: Callable[[RequestView], Any]) -> None:
        self._order = lambda request: (key(request), request.arrival)
        self._queues: dict[str | None, SortedKeyList[RequestView]] = {}
        self._firsts: SortedKeyList[RequestView] = SortedKeyList(key=self._order)  # of each queue
        self._waiting = 0

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            if event.kind == "adapter_retired" and event.was in self._queues:
                self._queues[event.adapter] = self._queues.pop(event.was)
        elif event.kind in ("request_added", "request_preempted"):
            self._add(request)
        elif request in (queue := self._queues.get(request.adapter, ())):
            queue.remove(request)
            self._waiting -= 1
            if request in self._firsts:
                self._firsts.remove(request)
                self._firsts.update(queue[:1])
            if not queue:
                del self._queues[request.adapter]

    def sync(self, view: SchedulerView) -> None:
        """Read all requests again if events were missed, so that the numbers differ."""
        if self._waiting != len(view.waiting):
            self._queues.clear()
            self._firsts.clear()
            self._waiting = 0
            for request in view.waiting:
                self._add(request)

    def waiting_for(self, names: Collection[str | None]) -> Iterator[RequestView]:
        """Yield the requests for these adapters (None: the base model)."""
        return merge(*(self._queues.get(name, ()) for name in names), key=self._order)

    def adapters(self) -> Iterator[str | None]:
        """Yield the adapters in the order of their first requests."""
        return (request.adapter for request in self._firsts)

    def _add(self, request: RequestView) -> None:
        queue = self._queues.setdefault(request.adapter, SortedKeyList(key=self._order))
        queue.add(request)
        self._waiting += 1
        if queue[0] is request:
            self._firsts.add(request)
            for second in queue[1:2]:
                self._firsts.remove(second)


class FixedKeyOrdering(Ordering):
    """Smallest ``key`` first, equal ones in order of arrival. The key must not need the view, nor change
    while a request waits."""

    def __init__(self) -> None:
        self._requests = SortedRequests(lambda request: self.key(request, None))

    @abstractmethod
    def key(self, request: RequestView, view: SchedulerView | None) -> Any: ...

    def on_event(self, event: PolicyEvent) -> None:
        self._requests.on_event(event)

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        self._requests.sync(view)
        return list(islice(self._requests.waiting_for(names), limit))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        self._requests.sync(view)
        return (
            name
            for name in self._requests.adapters()
            if name is not None and view.adapters[name].slot is None
        )


class SJF(FixedKeyOrdering):
    """Shortest job first: the least prompt plus expected output tokens.

    key = input_weight x prompt_tokens + output_weight x expected_tokens

    The expected length of the output is the caller's ``expected_tokens``, or else ``max_tokens``. If it is
    exact, the mean waiting time is the smallest possible. A long request may wait as long as shorter ones
    arrive.

    Args:
        input_weight, output_weight: Weights of a prompt token and of an expected output token, >= 0.
    """

    source = "Smith, 'Various optimizers for single-stage production', Naval Res. Logist. Q. 3, 1956"
    starvation_bound = "none"

    def __init__(self, input_weight: float = 1.0, output_weight: float = 1.0) -> None:
        super().__init__()
        at_least(0, input_weight=input_weight, output_weight=output_weight)
        self.input_weight, self.output_weight = input_weight, output_weight

    def key(self, request: RequestView, view: SchedulerView | None) -> float:
        return self.input_weight * request.prompt_tokens + self.output_weight * request.expected_tokens


class EDF(FixedKeyOrdering):
    """Earliest deadline first; requests without a deadline after all that have one, by arrival.

    On one machine, and with jobs that can be interrupted, this meets all deadlines if any order does.
    Here a running request is not interrupted, so an urgent one may find the batch full.
    """

    source = "Liu and Layland, 'Scheduling algorithms for multiprogramming', J. ACM 20(1), 1973"
    starvation_bound = "none for requests without a deadline; with one, until the deadline ends them"

    def key(self, request: RequestView, view: SchedulerView | None) -> float:
        return float("inf") if request.deadline is None else request.deadline


class Priority(FixedKeyOrdering):
    """The highest priority first, equal ones in order of arrival."""

    source = "static priorities, as in vLLM's 'priority' scheduling policy (there a lower value goes first)"
    starvation_bound = "none"

    def key(self, request: RequestView, view: SchedulerView | None) -> int:
        return -request.priority


class PreemptLower(Preemption):
    """When the batch is full, preempts the youngest request of the lowest priority for a higher one.

    "Full" means no free sequence, or not enough free KV blocks for the waiting request. Only requests of
    strictly lower priority are preempted, only for a request whose adapter is in a slot (or for the base
    model), and only if enough can be freed for it. This happens only once for each request, so a request that
    is then not admitted for another reason does no more harm. A preempted request keeps its output.
    """

    source = "recompute preemption by priority, as in vLLM's 'priority' scheduling policy"

    def __init__(self) -> None:
        self._requests = SortedRequests(lambda request: -request.priority)
        self._helped: set[str] = set()

    def on_event(self, event: PolicyEvent) -> None:
        self._requests.on_event(event)
        if event.request is not None and event.kind in ("request_admitted", "request_finished"):
            self._helped.discard(event.request.request_id)

    def choose(self, view: SchedulerView) -> Sequence[str]:
        victims = sorted(view.running, key=lambda r: (r.priority, -r.arrival))
        seqs, blocks = view.free_seqs, view.free_blocks
        chosen: list[str] = []
        usable = (SlotState.READY, SlotState.DRAINING)
        able = {None, *(slot.adapter for slot in view.slots if slot.state in usable)}
        self._requests.sync(view)
        for request in self._requests.waiting_for(able):
            if not victims or request.priority <= victims[0].priority:
                break
            need = -(-(request.prompt_tokens + request.output_tokens) // view.block_size)
            count = 0
            while (seqs < 1 or blocks < need) and count < len(victims):
                if victims[count].priority >= request.priority:
                    break
                seqs += 1
                blocks += victims[count].computed_tokens // view.block_size
                count += 1
            if seqs < 1 or blocks < need:
                break
            if count > 0 and request.request_id not in self._helped:
                self._helped.add(request.request_id)
                chosen += [victim.request_id for victim in victims[:count]]
            del victims[:count]
            seqs, blocks = seqs - 1, blocks - need
        return chosen
