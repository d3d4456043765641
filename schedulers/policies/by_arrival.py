"""Orders that begin with that of arrival: vLLM's, adapter clustering, and cached prefixes first."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import merge
from itertools import islice, takewhile
from math import inf

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class VLLMOrder(Arrival):
    """Arrival order as in vLLM V1: a busy slot is never closed for a cold adapter, however long that waits.

    vLLM walks its waiting queue in arrival order. A request whose adapter is among those scheduled in
    this step (running, or admitted earlier in the walk) is admitted; one that would need a further
    adapter is skipped when ``max_loras`` distinct ones are scheduled, and keeps its place. So an idle
    slot is taken at once by the first request that needs one, although later requests wait for the
    adapter in it (``take_after = 0``), and a busy slot goes on admitting (``close_after = inf``).

    What differs here: vLLM loads an adapter inside the step that admits its request, and all others wait
    for that. Here reads and copies take time beside the steps, and a slot that is idle while another adapter
    is read may be busy again after the read. No adapter is read ahead (``default_prefetch = "none"``).
    """

    source = "vLLM V1, vllm/v1/core/sched/scheduler.py (the loop over waiting requests, max_loras)"
    starvation_bound = "none"
    take_after = 0.0
    close_after = inf
    default_prefetch = "none"


class SLoRA(Arrival):
    """Requests for the adapters of the running batch first, so that a batch has few distinct ones.

    The adapters of running requests are "in the batch". Requests for them, and for the base model, which does
    not count as an adapter, are admitted in order of arrival. Another adapter joins only when no request
    waits for an adapter in the batch, or when there is room left, and only while there are fewer than
    ``clusters``. It is the one whose request has waited longest. A request outside the batch that has waited
    ``age`` seconds brings its adapter in at once; if the batch is full, nothing that arrived later is
    admitted to the adapters in it until one of them has no request left.

    In the paper's system they are preferred only once the batch has ``clusters`` adapters, and others may
    still fill it up; here the number is never exceeded, and ``age`` bounds how long others are put off.

    Args:
        clusters: Maximum number of distinct adapters in a batch; 0: the number of slots.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Sheng et al. 2023, S-LoRA: Serving Thousands of Concurrent LoRA Adapters (adapter clustering)"
    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, clusters: int = 0, age: float = 5.0) -> None:
        at_least(0, clusters=clusters, age=age)
        self.clusters, self.age = clusters, age

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        adapters, able = view.adapters, set(names)
        batch = {request.adapter for request in view.running} - {None}
        room = (self.clusters or len(view.slots)) - len(batch)
        inside = [name for name in names if name is not None and name in batch]
        asked_for = any(adapters[name].waiting for name in inside)
        outside = (n for n in view.waiting_adapters if n is not None and n in able and n not in batch)
        last_arrival = inf
        head = next(outside, None)
        while head is not None and (not asked_for or self._aged(view, head)):
            if room <= 0:
                if self._aged(view, head):
                    last_arrival = adapters[head].oldest_arrival or 0.0
                break
            inside.append(head)
            head = next(outside, None)
            room -= 1
            asked_for = True

        due = takewhile(lambda r: r.arrival <= last_arrival, by_arrival(view, inside))
        base = view.waiting_for(None) if None in able else ()
        admit = list(islice(merge(base, due, key=lambda request: request.arrival), limit))
        while head is not None and room > 0 and len(admit) < limit:
            admit += islice(view.waiting_for(head), limit - len(admit))
            head = next(outside, None)
            room -= 1
        return admit

    def _aged(self, view: SchedulerView, name: str) -> bool:
        oldest = view.adapters[name].oldest_arrival
        return oldest is not None and view.now - oldest >= self.age


class LPM(Arrival):
    """The longest prefix in the KV cache first, so that it is used before it is evicted.

    The keys change while requests wait, so a decision sorts only the first ``window`` requests that could
    run. Those that have waited for ``age`` seconds go before the others, in order of arrival. SGLang sorts
    its waiting queue in this order, too, but serves in order of arrival when more than 128 requests wait, and
    the wait of a request without a cached prefix has no bound there.

    Args:
        window: Most waiting requests that a decision looks at, the oldest first.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Zheng et al. 2024, SGLang: Efficient Execution of Structured Language Model Programs"
    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, window: int = 128, age: float = 5.0) -> None:
        at_least(1, window=window)
        at_least(0, "seconds", age=age)
        self.window, self.age = window, age

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        first = list(islice(by_arrival(view, names), self.window))
        due = view.now - self.age
        aged = sum([request.arrival <= due for request in first])  # they are in order of arrival
        if aged >= limit or len(first) - aged <= 1:
            return first[:limit]
        rest = sorted(first[aged:], key=lambda request: -request.cached_tokens)
        return [*first[:aged], *rest][:limit]
