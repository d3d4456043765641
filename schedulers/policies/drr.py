"""Deficit round robin over adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heapreplace

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class DRR(Arrival):
    """Deficit round robin: adapters take turns, each turn worth the same number of tokens.

    At its turn an adapter may have ``quantum`` more tokens than before; its requests are admitted in order of
    arrival while their cost = prompt_tokens + max_tokens - output_tokens is within what is left. The rest is
    kept for its next turn. Only adapters in slots (and the base model) take turns, and what those do not use
    that no request waits for is lost.

    A request's round follows from the cost admitted before it: round = ceil((this + its own cost) / quantum).
    So requests are admitted in the order of their rounds, and in one round one adapter after the other.

    Bound: between two adapters that are waited for, and in slots, all the time, the cost admitted
    differs by at most quantum + 2 x the largest cost.

    Args:
        quantum: Tokens a turn, >= 1. Small ones alternate more, large ones serve an adapter in runs.
    """

    source = "Shreedhar and Varghese, 'Efficient fair queueing using deficit round robin', SIGCOMM 1995"
    starvation_bound = "ceil(cost / quantum) rounds, each at most quantum + largest cost for each adapter"

    def __init__(self, quantum: int = 512) -> None:
        at_least(1, "token", quantum=quantum)
        self.quantum = quantum
        self._admitted: dict[str | None, int] = {}
        """Cost admitted for each adapter that takes turns, in their order. A new one begins where the one
        with the least is."""
        self._last: set[str] = set()
        """Requests after which no other waited for their adapter."""

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        waiting = dict.fromkeys(name for name in names if name is None or view.adapters[name].waiting)
        known = {name: cost for name, cost in self._admitted.items() if name in waiting}
        least = min((cost // self.quantum for cost in known.values()), default=0) * self.quantum
        self._admitted = known | {name: least for name in waiting if name not in known}
        turns: list[tuple[int, int, int, RequestView, Iterator[RequestView]]] = []
        for place, name in enumerate(self._admitted):
            requests = iter(view.waiting_for(name))
            first = next(requests, None)
            if first is not None:
                cost = self._admitted[name] + _cost(first)
                turns.append((-(-cost // self.quantum), place, cost, first, requests))
        heapify(turns)
        self._last.clear()
        chosen: list[RequestView] = []
        while turns and len(chosen) < limit:
            _, place, cost, request, requests = turns[0]
            chosen.append(request)
            following = next(requests, None)
            if following is None:
                self._last.add(request.request_id)
                heappop(turns)
            else:
                cost += _cost(following)
                heapreplace(turns, (-(-cost // self.quantum), place, cost, following, requests))
        return chosen

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if event.kind != "request_admitted" or request is None or event.adapter not in self._admitted:
            return
        if request.request_id in self._last:
            del self._admitted[event.adapter]
        else:
            self._admitted[event.adapter] += _cost(request)


def _cost(request: RequestView) -> int:
    return request.prompt_tokens + request.max_tokens - request.output_tokens
