"""Chameleon: lanes for requests of different size, and a cache that weighs the cost of a miss."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import islice, pairwise
from math import inf
from statistics import fmean

from aioengine.schedulers.arrival import by_arrival
from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival
from aioengine.schedulers.parts.replacement import Counted
from aioengine.schedulers.policy import AdapterView, PolicyEvent, RequestView, SchedulerView, SlotView

FIRST_CLUSTERING = 16
"""Requests seen before the lanes are formed for the first time; until then there is one. They are formed
again after as many more, then after twice as many, and so on up to ``refresh``."""
ENOUGH = 0.1
"""Share of the variance of the sizes; once the lanes leave no more than this, none is added."""


class ChameleonOrder(Arrival):
    """Lanes by request size, each with its own share of the running places, small ones first.

    size = (0.4 input / largest input + 0.6 output / largest output) x adapter bytes / largest adapter,
    where output is ``expected_tokens``; the base model, and an adapter that has never been read, count as the
    smallest one. The sizes of the last ``window`` requests are clustered (k-means in one dimension)
    every ``refresh`` requests, and the lanes' borders are halfway between the means. Places are divided
    in proportion to the work in each lane (requests x mean size), at least one each. First every lane, the
    smallest sizes first, fills its places in order of arrival. Then the places of lanes without waiting
    requests go to the other lanes, again the smallest sizes first. A request that has waited for ``age``
    seconds goes before all of these.

    Differences from the paper: shares are of ``max_num_seqs`` and not of memory, which the core guards; they
    follow the load instead of a latency target; the caller may predict the output; the number of lanes is the
    smallest that explains nine tenths of the variance (the paper takes the lowest variance, which the most
    lanes always have); an adapter in no slot delays no other request, so there is nothing to bypass and no
    request is squashed.

    Args:
        queues: Maximum number of lanes.
        refresh: Requests between two clusterings.
        window: Recent requests that are clustered, and waiting requests that a decision looks at, the oldest
            first.
        age: Seconds for which a request may be delayed in favour of later ones.
        input_weight, output_weight: The 0.4 and 0.6 above.
    """

    source = (
        "Iliakopoulou et al. 2024, Chameleon: Adaptive Caching and Scheduling for Many-Adapter LLM Inference"
    )
    starvation_bound = "age, those who arrived before it, and one longest generation"
    default_replace = "chameleon"

    def __init__(
        self,
        queues: int = 4,
        refresh: int = 256,
        window: int = 512,
        age: float = 5.0,
        input_weight: float = 0.4,
        output_weight: float = 0.6,
    ) -> None:
        at_least(1, queues=queues, refresh=refresh, window=window)
        at_least(0, age=age, input_weight=input_weight, output_weight=output_weight)
        self.queues = queues
        self.refresh = refresh
        self.window = window
        self.age = age
        self.input_weight = input_weight
        self.output_weight = output_weight
        self.borders: list[float] = []
        """Borders between the lanes, ascending."""
        self.load = [1.0]
        """Work seen in each lane."""
        self._recent: deque[tuple[int, int, str | None]] = deque(maxlen=window)
        self._period = self._until_refresh = min(refresh, FIRST_CLUSTERING)
        self._largest = (1, 1, 1, 1)
        """Most tokens of a prompt and of an output, bytes of the largest and of the smallest adapter."""
        self._lane_of: dict[str, int] = {}
        """Lanes of the requests that wait or run, since the last clustering."""

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
        length = self.input_weight * tokens_in / most_in + self.output_weight * tokens_out / most_out
        return length * min(1.0, (_bytes_of(view, adapter) or smallest) / largest)

    def lane(self, view: SchedulerView, request: RequestView) -> int:
        """Return a request's lane; 0 is that of the smallest."""
        lane = self._lane_of.get(request.request_id)
        if lane is None:
            size = self.size(view, request.prompt_tokens, request.expected_tokens, request.adapter)
            lane = self._lane_of[request.request_id] = bisect_right(self.borders, size)
        return lane

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        if self._until_refresh <= 0:
            self._cluster(view)
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
        running = view.running
        places = shares(self.load, len(running) + view.free_seqs)
        for request in running:
            places[self.lane(view, request)] -= 1
        return places

    def _cluster(self, view: SchedulerView) -> None:
        self._until_refresh = self._period
        self._period = min(self.refresh, 2 * self._period)
        adapters = [size for size in {_bytes_of(view, name) for _, _, name in self._recent} if size]
        self._largest = (
            max(1, *(tokens_in for tokens_in, _, _ in self._recent)),
            max(1, *(tokens_out for _, tokens_out, _ in self._recent)),
            max(adapters, default=1),
            min(adapters, default=1),
        )
        sizes = sorted(self.size(view, *request) for request in self._recent)
        clusters = cluster(sizes, self.queues)
        means = [sum(members) / len(members) for members in clusters]
        self.borders = [(low + high) / 2 for low, high in pairwise(means)]
        self.load = [sum(members) for members in clusters]
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


def cluster(sizes: Sequence[float], most: int) -> list[Sequence[float]]:
    """Split ascending numbers into the fewest clusters, at most ``most``, that leave at most a tenth of the
    variance within clusters. Uses k-means, which starts from equal parts."""
    total = spread([sizes])
    for k in range(1, most + 1):
        cuts = sorted({len(sizes) * i // k for i in range(k)} | {len(sizes)})
        for _ in range(50):
            means = [fmean(sizes[start:end]) for start, end in pairwise(cuts)]
            inner = {bisect_right(sizes, (low + high) / 2) for low, high in pairwise(means)}
            moved = sorted(inner | {0, len(sizes)})
            if moved == cuts:
                break
            cuts = moved
        clusters = [sizes[start:end] for start, end in pairwise(cuts)]
        if spread(clusters) <= ENOUGH * total:
            break
    return clusters


def spread(clusters: Sequence[Sequence[float]]) -> float:
    """Return the squared distances to the means of the clusters."""
    total = 0.0
    for members in clusters:
        mean = fmean(members)
        total += sum((size - mean) ** 2 for size in members)
    return total


def shares(load: Sequence[float], places: int) -> list[int]:
    """Divide the places in proportion to the load, at least one each (the first go first)."""
    given = [min(1, max(0, places - lane)) for lane in range(len(load))]
    left = places - sum(given)
    total = sum(load)
    exact = [left * part / total if total > 0 else left / len(load) for part in load]
    given = [have + int(more) for have, more in zip(given, exact, strict=True)]
    by_remainder = sorted(range(len(load)), key=lambda lane: int(exact[lane]) - exact[lane])
    for lane in by_remainder[: places - sum(given)]:
        given[lane] += 1
    return given


class ChameleonCache(Counted):
    """Keeps adapters that are used often, were used lately, and are large, hence slow to load.

    score = 0.45 frequency + 0.10 recency + 0.45 size, each between 0 and 1 among the adapters in slots:
    admitted requests (faded by half every ``half_life`` seconds) over those of the most used; last use,
    from the longest ago (0) to the latest (1); bytes over those of the largest. For the CPU cache, adapters
    outside the slots are compared with those in slots, too.

    Args:
        frequency, recency, size: The weights.
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
    """

    source = ChameleonOrder.source

    def __init__(
        self,
        frequency: float = 0.45,
        recency: float = 0.10,
        size: float = 0.45,
        half_life: float = 300.0,
    ) -> None:
        super().__init__(half_life)
        at_least(0, frequency=frequency, recency=recency, size=size)
        self.frequency, self.recency, self.size = frequency, recency, size
        self._scale = (-inf, 0.0, 0.0, 0.0, 0)
        """Time, most uses, longest ago and latest use, and largest size of the adapters in slots."""

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return self._weigh(view, adapter, slot.last_used)

    def cpu_score(self, view: SchedulerView, adapter: AdapterView) -> float:
        return self._weigh(view, adapter, adapter.last_used)

    def _weigh(self, view: SchedulerView, adapter: AdapterView, last_used: float) -> float:
        if self._scale[0] != view.now:
            slots = {slot.adapter: slot.last_used for slot in view.slots if slot.adapter is not None}
            uses = max((self.counts.count(name, view.now) for name in slots), default=0.0)
            times = slots.values() or (0.0,)
            largest = max((view.adapters[name].bytes for name in slots), default=0)
            self._scale = (view.now, uses, min(times), max(times), largest)
        _, most_used, longest_ago, latest, largest = self._scale
        uses = self.counts.count(adapter.name, view.now) / (most_used or 1.0)
        recent = (last_used - longest_ago) / ((latest - longest_ago) or 1.0)
        return self.frequency * uses + self.recency * recent + self.size * adapter.bytes / (largest or 1)
