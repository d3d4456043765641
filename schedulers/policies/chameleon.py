"""Chameleon: lanes for requests of different size, and a cache that weighs the cost of a miss."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import islice
from math import inf

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.parts.replacement import LFU
from aioengine.schedulers.policy import AdapterView, PolicyEvent, RequestView, SchedulerView, SlotView

FIRST_LANES = 16
"""Requests seen before the lanes are formed for the first time; until then there is one."""


class ChameleonOrder(Arrival):
    """Lanes by request size, each with its own share of the running places, small ones first.

    size = (0.4 input / largest input + 0.6 output / largest output) x adapter bytes / largest adapter,
    where output is ``expected_tokens``; the base model, and an adapter that has never been read, count as the
    smallest one. Every ``refresh`` requests the lanes' borders are set so that each lane has the same share
    of the work of the last ``window`` requests; lanes of one size become one, with the places of all. First
    every lane, the smallest sizes first, fills its places in order of arrival. Then the places of lanes
    without waiting requests go to the other lanes, again the smallest sizes first. A request that has waited
    for ``age`` seconds goes before all of these.

    Differences from the paper: shares are of ``max_num_seqs`` and not of memory; they follow the load instead
    of a latency target; the caller may predict the output; borders are by equal work and not by k-means; an
    adapter in no slot delays no other request, so there is nothing to bypass.

    Args:
        queues: Maximum number of lanes.
        refresh: Requests after which the borders are set again.
        window: Recent requests that borders are set by, and waiting requests that a decision looks at, the
            oldest first.
        age: Seconds for which a request may be delayed in favour of later ones.
    """

    source = "Iliakopoulou et al. 2024, Chameleon: Adaptive Caching for Many-Adapter LLM Inference"
    starvation_bound = "age, those who arrived before it, and one longest generation"
    default_replace = "chameleon"

    def __init__(self, queues: int = 4, refresh: int = 256, window: int = 512, age: float = 5.0) -> None:
        at_least(1, queues=queues, refresh=refresh, window=window)
        at_least(0, "seconds", age=age)
        self.queues, self.refresh, self.window, self.age = queues, refresh, window, age
        self.borders: list[float] = []
        """Largest size of each lane but the last, ascending."""
        self.weights = [queues]
        """Places of each lane, as parts of ``queues``."""
        self._recent: deque[tuple[int, int, str | None]] = deque(maxlen=window)
        self._until_refresh = min(refresh, FIRST_LANES)
        self._largest = (1, 1, 1, 1)
        """Most tokens of a prompt and of an output, bytes of the largest and of the smallest adapter."""
        self._lane_of: dict[str, int] = {}
        """Lanes of the requests that wait or run, since the borders were set."""

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            return
        if event.kind == "request_added":
            self._recent.append((request.prompt_tokens, request.expected_tokens, request.adapter))
            self._until_refresh -= 1
        elif event.kind == "request_finished":
            self._lane_of.pop(request.request_id, None)

    def size(self, view: SchedulerView, tokens_in: int, tokens_out: int, adapter: str | None) -> float:
        """Return the weighted request size."""
        most_in, most_out, largest, smallest = self._largest
        length = 0.4 * tokens_in / most_in + 0.6 * tokens_out / most_out
        return length * min(1.0, (_bytes_of(view, adapter) or smallest) / largest)

    def lane(self, view: SchedulerView, request: RequestView) -> int:
        """Return a request's lane; 0 is that of the smallest."""
        lane = self._lane_of.get(request.request_id)
        if lane is None:
            size = self.size(view, request.prompt_tokens, request.expected_tokens, request.adapter)
            lane = self._lane_of[request.request_id] = bisect_left(self.borders, size)
        return lane

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        if self._until_refresh <= 0:
            self._set_borders(view)
        places, due = self._free_places(view), view.now - self.age
        admit: list[RequestView] = []
        lanes: list[list[RequestView]] = [[] for _ in places]
        for request in islice(by_arrival(view, names), self.window):
            lane = self.lane(view, request)
            if request.arrival <= due:
                admit.append(request)
                places[lane] -= 1
            else:
                lanes[lane].append(request)
            if len(admit) + _surely_first(lanes, places, limit) >= limit:
                break  # later requests change nothing
        rest: list[RequestView] = []
        spare = 0
        for requests, free in zip(lanes, places, strict=True):
            taken = min(len(requests), max(0, free))
            admit += requests[:taken]
            rest += requests[taken:]
            if taken == len(requests):
                # Less than 0 if the lane has borrowed places, which are already taken.
                spare += free - taken
        return (admit + rest[: max(0, spare)])[:limit]

    def _free_places(self, view: SchedulerView) -> list[int]:
        """Return the places of each lane, at least one each (the first go first), less its running
        requests."""
        running = view.running
        left = total = len(running) + view.free_seqs
        places: list[int] = []
        for weight in self.weights:
            places.append(min(left, max(1, total * weight // self.queues)))
            left -= places[-1]
        places[0] += left
        for request in running:
            places[self.lane(view, request)] -= 1
        return places

    def _set_borders(self, view: SchedulerView) -> None:
        self._until_refresh = self.refresh
        adapters = [size for size in {_bytes_of(view, name) for _, _, name in self._recent} if size]
        self._largest = (
            max(1, *(tokens_in for tokens_in, _, _ in self._recent)),
            max(1, *(tokens_out for _, tokens_out, _ in self._recent)),
            max(adapters, default=1),
            min(adapters, default=1),
        )
        sizes = sorted(self.size(view, *request) for request in self._recent)
        part, done = sum(sizes) / self.queues or 1.0, 0.0
        self.borders, self.weights = [], []
        for size in sizes:
            before, done = done, done + size
            ends = min(int(done / part), self.queues) - int(before / part)
            if ends and size < sizes[-1]:
                if self.borders[-1:] != [size]:
                    self.borders.append(size)
                    self.weights.append(0)
                self.weights[-1] += ends
        self.weights.append(self.queues - sum(self.weights))
        self._lane_of.clear()


def _surely_first(lanes: Sequence[Sequence[RequestView]], places: Sequence[int], limit: int) -> int:
    """Return how many of these requests go before all that are not in ``lanes`` yet, at most ``limit``."""
    count = 0
    for requests, free in zip(lanes, places, strict=True):
        count += min(len(requests), max(0, free))
        if len(requests) < free or count >= limit:
            break
    return count


def _bytes_of(view: SchedulerView, name: str | None) -> int:
    """Return the adapter's bytes; 0 for the base model, and for an adapter that has not been read or is
    gone."""
    adapter = None if name is None else view.adapters.get(name)
    return 0 if adapter is None else adapter.bytes


class ChameleonCache(LFU):
    """Keeps adapters that are used often, were used lately, and are large, hence slow to load.

    score = 0.45 frequency + 0.10 recency + 0.45 size, each between 0 and 1 among the adapters in slots:
    admitted requests (faded by half every ``half_life`` seconds) over those of the most used; last use,
    from the longest ago (0) to the latest (1); bytes over those of the largest. For the CPU cache, adapters
    outside the slots are compared with those in slots, too.

    Args:
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
    """

    source = ChameleonOrder.source

    def __init__(self, half_life: float = 300.0) -> None:
        super().__init__(half_life)
        self._scale = (-inf, 0.0, 0.0, 0.0, 0)
        """Time, most uses, longest ago and latest use, and largest size of the adapters in slots."""

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return self._weigh(view, adapter, slot.last_used)

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self._weigh(view, adapter, adapter.last_used)

    def _weigh(self, view: SchedulerView, adapter: AdapterView, last_used: float) -> float:
        if self._scale[0] != view.now:
            slots = {slot.adapter: slot.last_used for slot in view.slots if slot.adapter is not None}
            uses = max((self.count(name, view.now) for name in slots), default=0.0)
            times = slots.values() or (0.0,)
            largest = max((view.adapters[name].bytes for name in slots), default=0)
            self._scale = (view.now, uses, min(times), max(times), largest)
        _, most_used, longest_ago, latest, largest = self._scale
        uses = self.count(adapter.name, view.now) / (most_used or 1.0)
        recent = (last_used - longest_ago) / ((latest - longest_ago) or 1.0)
        return 0.45 * uses + 0.10 * recent + 0.45 * adapter.bytes / (largest or 1)
