"""Longest prefix match, and sessions that continue: requests with cached prefixes go first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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
        first = list(islice(by_arrival(view, names), max(self.window, 1)))
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
