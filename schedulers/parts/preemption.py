"""The built-in preemptions: which requests leave the batch for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aioengine.schedulers.parts.base import Preemption
from aioengine.schedulers.policies.by_key import SortedRequests
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView, SlotState


class NoPreemption(Preemption):
    """Lets every running request finish."""

    asks_always = False

    def choose(self, view: SchedulerView) -> Sequence[str]:
        return ()


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
        for request in self._candidates(view):
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

    def _candidates(self, view: SchedulerView) -> Iterator[RequestView]:
        """Yield waiting requests that could run now, the highest priority first."""
        usable = (SlotState.READY, SlotState.DRAINING)
        able = {None, *(slot.adapter for slot in view.slots if slot.state in usable)}
        self._requests.sync(view)
        return self._requests.waiting_for(able)
