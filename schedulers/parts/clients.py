"""The clients that have requests, and what each of them waits for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from heapq import heappop, heappush, heapreplace, merge

from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView


class Client:
    """A client with requests."""

    def __init__(self, name: Hashable, turn: int) -> None:
        self.name = name
        self.turn = turn
        """Number of all clients' admissions up to its own last one, or up to its coming."""
        self.running: dict[str, RequestView] = {}
        """Running requests by id, in order of admission."""
        self.queues: dict[str | None, OrderedDict[str, RequestView]] = {}
        """Waiting requests by adapter, in order of arrival; the adapter that is waited for since the longest
        time first. None is empty."""

    def waiting_for(self, names: Collection[str | None]) -> Iterator[RequestView]:
        """Yield its waiting requests for these adapters (None: the base model), in order of arrival."""
        queues = self.queues
        few, many = (names, queues) if len(names) < len(queues) else (queues, names)
        found = [queues[name].values() for name in few if name in many]
        return merge(*found, key=lambda request: request.arrival)

    def cold(self, view: SchedulerView) -> Iterator[RequestView]:
        """Yield the first waiting request for each adapter that is in no slot."""
        for name, queue in self.queues.items():
            if name is not None and view.adapters[name].slot is None:
                yield next(iter(queue.values()))


class Clients:
    """All clients that have requests, kept by events. ``client_of`` returns the client of a new request."""

    def __init__(self, client_of: Callable[[RequestView], Hashable]) -> None:
        self._client_of = client_of
        self.by_name: dict[Hashable, Client] = {}
        self._of: dict[str, Client] = {}
        self._waiting = self._turns = 0
        self._is_new = True

    def of(self, request: RequestView) -> Client:
        """Return the client of a request, which may be new."""
        client = self._of.get(request.request_id)
        if client is None:
            name = self._client_of(request)
            client = self._of[request.request_id] = self.by_name.setdefault(name, Client(name, self._turns))
        return client

    def sync(self, view: SchedulerView) -> None:
        """Read everything again if events were missed; call it before a decision."""
        if self._waiting == len(view.waiting) and not self._is_new:
            return
        self._is_new = False
        self.by_name.clear()
        self._of.clear()
        self._waiting = 0
        for request in view.running:
            self.of(request).running[request.request_id] = request
        for request in view.waiting:
            self._wait(request)

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            if event.kind == "adapter_retired":
                for client in self.by_name.values():
                    if event.was in client.queues:
                        client.queues[event.adapter] = client.queues.pop(event.was)
            return
        client = self.of(request)
        client.running.pop(request.request_id, None)
        if event.kind in ("request_added", "request_preempted"):
            self._wait(request)
            return
        queue: OrderedDict[str, RequestView] = client.queues.get(request.adapter, OrderedDict())
        if queue.pop(request.request_id, None) is not None:
            self._waiting -= 1
            if not queue:
                del client.queues[request.adapter]
        if event.kind == "request_admitted":
            self._turns += 1
            client.turn = self._turns
            client.running[request.request_id] = request
        else:
            del self._of[request.request_id]
            if not client.running and not client.queues:
                del self.by_name[client.name]

    def _wait(self, request: RequestView) -> None:
        self._waiting += 1
        queue = self.of(request).queues.setdefault(request.adapter, OrderedDict())
        first = next(iter(queue.values()), request)
        queue[request.request_id] = request
        if request.arrival < first.arrival:  # it was preempted
            queue.move_to_end(request.request_id, last=False)


def in_turn(
    ranked: Sequence[tuple[float, int, Client]],
    names: Sequence[str | None],
    limit: int,
    cost: Callable[[Client, RequestView], float],
) -> list[RequestView]:
    """Return the next requests for these adapters: one after the other the oldest of the client with the
    least service, which grows by ``cost`` with each request. ``ranked``: (service, turn, client) of all
    clients, sorted; of clients with equal service the one with the smaller turn goes first.
    """
    able = dict.fromkeys(names)
    heap: list[tuple[float, int, float, int, RequestView, Client, Iterator[RequestView]]] = []
    chosen: list[RequestView] = []
    opened = 0
    while len(chosen) < limit:
        if opened < len(ranked) and (not heap or ranked[opened][:2] <= heap[0][:2]):
            service, turn, client = ranked[opened]
            opened += 1
            requests = client.waiting_for(able)
            first = next(requests, None)
            if first is not None:
                heappush(heap, (service, turn, first.arrival, opened, first, client, requests))
            continue
        if not heap:
            break
        service, turn, _, number, request, client, requests = heap[0]
        chosen.append(request)
        after = next(requests, None)
        if after is None:
            heappop(heap)
        else:
            service += cost(client, request)
            heapreplace(heap, (service, turn, after.arrival, number, after, client, requests))
    return chosen
