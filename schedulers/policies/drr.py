"""Deficit round robin over adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aioengine.schedulers.parts.arrival import Arrival
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView

Flow = str | None


class DRR(Arrival):
    """Deficit round robin: adapters take turns, each turn worth the same number of tokens.

    At its turn an adapter's deficit grows by ``quantum``; its requests are admitted in order of arrival
    while cost = prompt_tokens + max_tokens - output_tokens <= deficit, each lowering the deficit by its cost.
    The rest is kept for the next turn, unless no request waits any more. Only adapters in slots (and the base
    model) take turns. The cost counts ``max_tokens``, and not the tokens that are really generated.

    Bound: between two adapters that are waited for, and in slots, all the time, the cost admitted
    differs by at most quantum + 2 x the largest cost.

    Args:
        quantum: Tokens a turn, >= 1. Small ones alternate more, large ones serve an adapter in runs.
    """

    source = "Shreedhar and Varghese, 'Efficient fair queueing using deficit round robin', SIGCOMM 1995"
    starvation_bound = (
        "ceil(cost / quantum) rounds, each at most quantum + largest cost for each other adapter"
    )

    def __init__(self, quantum: int = 512) -> None:
        if quantum < 1:
            raise ValueError(f"quantum={quantum}: must be >= 1 token")
        self.quantum = quantum
        self._deficits: OrderedDict[Flow, int] = OrderedDict()
        """Flows in the order of turns; the last has its turn now."""
        self._plan: list[_Turn] = []
        self._fewer: set[Flow] = set()
        """Flows that may have lost their last request since the last decision."""

    def admit(self, view: SchedulerView, names: Sequence[Flow], limit: int) -> Sequence[RequestView]:
        self._enlist(view, names)
        self._plan = []
        chosen: list[RequestView] = []
        for turn in self._turns(view, names):
            self._plan.append(turn)
            if turn.request is not None:
                chosen.append(turn.request)
                if len(chosen) >= limit:
                    break
        return chosen

    def on_event(self, event: PolicyEvent) -> None:
        """Carry out the part of the plan that was admitted; the rest is not charged."""
        if event.kind in ("request_admitted", "request_finished"):
            self._fewer.add(event.adapter)
        elif event.kind == "adapter_retired":
            self._fewer.add(event.was)
        if event.kind != "request_admitted" or event.request is None:
            return
        admitted = event.request.request_id
        found = (i for i, turn in enumerate(self._plan) if turn.request_id == admitted)
        done = next(found, -1) + 1
        for turn in self._plan[:done]:
            self._deficits[turn.flow] = self._deficits.get(turn.flow, 0) + turn.grant
            if turn.begins:
                self._deficits.move_to_end(turn.flow)
        flow = event.adapter
        if flow in self._deficits:
            self._deficits[flow] -= _cost(event.request)
            if done > 0 and self._plan[done - 1].ends:
                del self._deficits[flow]
        del self._plan[:done]

    def _enlist(self, view: SchedulerView, names: Sequence[Flow]) -> None:
        """Forget flows without waiting requests; new ones join at the end of the round."""
        for flow in self._fewer:
            if flow in self._deficits and not _is_waited_for(view, flow):
                del self._deficits[flow]
        self._fewer.clear()
        now = next(reversed(self._deficits), None)
        for flow in names:
            if flow not in self._deficits and _is_waited_for(view, flow):
                self._deficits[flow] = 0
        if now in self._deficits:
            self._deficits.move_to_end(now)

    def _turns(self, view: SchedulerView, names: Sequence[Flow]) -> Iterator[_Turn]:
        """Yield the turns as if every proposed request were admitted, until no request is left."""
        able = set(names)
        deficits = OrderedDict((f, d) for f, d in self._deficits.items() if f in able)
        queues: dict[Flow, Iterator[RequestView]] = {}
        heads: dict[Flow, RequestView] = {}
        fruitless = 0

        def head(flow: Flow) -> RequestView:
            if flow not in heads:
                queues[flow] = iter(view.waiting_for(flow))
                heads[flow] = next(queues[flow])
            return heads[flow]

        while deficits:
            flow = next(reversed(deficits))
            while flow in deficits and _cost(request := head(flow)) <= deficits[flow]:
                following = next(queues[flow], None)
                deficits[flow] -= _cost(request)
                yield _Turn(flow, request_id=request.request_id, request=request, ends=following is None)
                fruitless = 0
                if following is None:
                    del heads[flow], deficits[flow]
                else:
                    heads[flow] = following
            if not deficits:
                return
            if fruitless == len(deficits):  # no flow can afford a request: skip such rounds
                rounds = min(-(-(_cost(head(f)) - d) // self.quantum) for f, d in deficits.items()) - 1
                for f in deficits:
                    deficits[f] += rounds * self.quantum
                    yield _Turn(f, grant=rounds * self.quantum)
                fruitless = 0
            flow = next(iter(deficits))
            deficits.move_to_end(flow)
            deficits[flow] += self.quantum
            yield _Turn(flow, grant=self.quantum, begins=True)
            fruitless += 1


class _Turn(NamedTuple):
    """One event of a flow: a grant, perhaps at the beginning of its turn, or an admission."""

    flow: Flow
    grant: int = 0
    begins: bool = False
    request_id: str | None = None
    request: RequestView | None = None
    ends: bool = False
    """Whether no request waits for it any more."""


def _cost(request: RequestView) -> int:
    return request.prompt_tokens + request.max_tokens - request.output_tokens


def _is_waited_for(view: SchedulerView, flow: Flow) -> bool:
    return (flow is None or flow in view.adapters) and len(view.waiting_for(flow)) > 0
