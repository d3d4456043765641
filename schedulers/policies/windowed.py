"""Orderings whose key changes while a request waits, of a window of the oldest requests: those with cached
prefixes, and those that add the least to a step's time, go first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.policy import RequestView, SchedulerView


class Windowed(Arrival):
    """The first ``window`` requests that could run, in the order of :meth:`rank`. Requests that have waited
    for ``age`` seconds go before them, in order of arrival.

    It is for keys that change while a request waits. The cost of a decision grows with the window, and not
    with the queue. Adapters are brought in by arrival.
    """

    starvation_bound = "age, those who arrived before it, and one longest generation"

    def __init__(self, window: int = 128, age: float = 5.0) -> None:
        at_least(1, window=window)
        at_least(0, "seconds", age=age)
        self.window = window
        self.age = age

    @abstractmethod
    def rank(self, request: RequestView, view: SchedulerView) -> Any:
        """Return a key: requests with smaller keys go first, equal ones by arrival."""

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        first = list(islice(by_arrival(view, names), self.window))
        due = view.now - self.age
        aged = sum(request.arrival <= due for request in first)  # they are in order of arrival
        if aged >= limit or len(first) - aged <= 1:
            return first[:limit]
        rest = sorted(first[aged:], key=lambda request: self.rank(request, view))
        return [*first[:aged], *rest][:limit]


class LPM(Windowed):
    """The longest prefix in the KV cache first, so that it is used before it is evicted.

    SGLang sorts its waiting queue in this order, and serves in order of arrival when more than 128 requests
    wait. Here the 128 oldest are sorted then. In SGLang the wait of a request without a cached prefix has no
    bound; here the bound is ``age``.

    Args:
        window: Most waiting requests that a decision looks at, the oldest first.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = (
        "Zheng et al. 2024, SGLang: Efficient Execution of Structured Language Model Programs (2312.07104)"
    )

    def rank(self, request: RequestView, view: SchedulerView) -> int:
        return -request.cached_tokens


class Session(Windowed):
    """Sessions that continue go before new ones: requests with at least ``share`` of their prompt in the
    cache go first, in order of arrival.

    A session's next turn finds its history in the cache if it comes soon enough. New sessions take blocks
    from the cache, so under load they wait until the earlier sessions have had their turn. Unlike with
    ``lpm``, a longer history gives no advantage.

    Args:
        share: Share of a prompt, between 0 and 1, that must be cached so that a request counts as a continued
            session.
        window: Most waiting requests that a decision looks at, the oldest first.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "aioengine's own, after Gao et al. 2024, CachedAttention (ATC'24)"

    def __init__(self, share: float = 0.5, window: int = 128, age: float = 5.0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must be > 0 and <= 1")
        super().__init__(window, age)
        self.share = share

    def rank(self, request: RequestView, view: SchedulerView) -> bool:
        return request.cached_tokens < self.share * request.prompt_tokens


class Toppings(Windowed):
    """Requests in the order of the time that their adapter adds to the step: those for adapters in the batch
    and of low ranks first.

    A step waits for its largest rank, so one request for a large adapter makes all others slower.
    ``view.costs`` gives the time that each adapter would add: the time of a step with one more request and
    the ranks that it would then have, minus the time of the present step. Equal requests go in order of
    arrival. With ``max_step``, no request is admitted that would make a step longer than that, unless nothing
    runs.

    The paper's system chooses between servers: a request goes to the server where it adds the least to a
    step, within its objective. Here it is the order within one engine.

    Args:
        max_step: Maximum seconds of a decoding step; 0: no limit.
        window: Most waiting requests that a decision looks at, the oldest first.
        age: Seconds for which a request may be put off in favour of later ones.
    """

    source = "Li et al. 2025, Toppings: CPU-Assisted, Rank-Aware Adapter Serving for LLM Inference (ATC'25)"

    def __init__(self, max_step: float = 0.0, window: int = 128, age: float = 5.0) -> None:
        super().__init__(window, age)
        at_least(0, "seconds", max_step=max_step)
        self.max_step = max_step
        self._batch: dict[str | None, int] = {}
        """Ranks of the adapters in the batch, 0 for the base model."""
        self._added: dict[int, float] = {}
        """Seconds that each rank would add to this decision's step."""

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        running = view.running
        self._batch = {name: _rank(view, name) for name in {request.adapter for request in running}}
        self._added.clear()
        admit = super().admit(view, names, limit)
        if self.max_step:
            batch = self._batch.copy()
            for index, request in enumerate(admit, len(running)):
                batch[request.adapter] = _rank(view, request.adapter)
                seconds = _step(view, index + 1, batch.values())
                if index > 0 and seconds is not None and seconds > self.max_step:
                    return admit[: index - len(running)]
        return admit

    def rank(self, request: RequestView, view: SchedulerView) -> float:
        rank = 0 if request.adapter in self._batch else _rank(view, request.adapter)
        if rank not in self._added:
            running, ranks = len(view.running), self._batch.values()
            now = _step(view, running, ranks) if running else 0.0
            then = _step(view, running + 1, [*ranks, rank])
            # To the microsecond, so that what makes no difference is no difference.
            self._added[rank] = 0.0 if now is None or then is None else round(then - now, 6)
        return self._added[rank]


def _rank(view: SchedulerView, name: str | None) -> int:
    return 0 if name is None or name not in view.adapters else view.adapters[name].rank


def _step(view: SchedulerView, tokens: int, ranks: Iterable[int]) -> float | None:
    return view.costs.step(tokens, sorted(filter(None, ranks)))
