"""Fair shares by virtual token counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace, nsmallest
from typing import Any

from aioengine.schedulers.checks import finite_weights
from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.parts.clients import Client, Clients, Waiting
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView

IDLE_LIMIT = 4096
"""Maximum number of counters that are kept for clients without requests."""


class VTC(Ordering):
    """Virtual token counter: the client that has been served least goes first.

    A client is a tenant; requests without one count for their adapter, or for "base". Its counter grows
    by (input_weight x prompt tokens) / weight when a request is first admitted, and by output_weight /
    weight with each token generated. The next request admitted is the first of the client with the
    smallest counter. The counter of a client that begins to wait is raised to the smallest counter of the
    waiting clients (or, if none waits, to that of the last client that stopped waiting). So a client cannot
    save up service by being idle.

    Bound (proved in the paper for equal weights): between two clients that both wait all the time,
    with their adapters in slots, the service received differs by at most 2 x max(input_weight x
    longest prompt, output_weight x M), M being the tokens that fit in a batch. With weights, it is
    service / weight that is compared.

    Args:
        input_weight: Cost of a prompt token, >= 0.
        output_weight: Cost of a generated token, >= 0.
        weights: Shares by client, > 0; 1 for clients that are not named.
    """

    sharing = "one"
    source = "Sheng et al., 'Fairness in Serving Large Language Models', OSDI 2024"
    starvation_bound = "2 max(input_weight x longest prompt, output_weight x batch tokens) of service"

    def __init__(
        self,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: dict[str, float] | None = None,
    ) -> None:
        finite_weights(input_weight=input_weight, output_weight=output_weight)
        for client, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights: {client!r}: {weight}: must be > 0 and finite")
        self.input_weight, self.output_weight = input_weight, output_weight
        self.weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._last_to_leave: str | None = None
        self._waiting: dict[str, int] = {}
        self._heap: list[tuple[float, str]] = []
        """Clients that wait or have waited, each with an earlier value of its counter, which can only have
        grown since."""
        self._in_heap: set[str] = set()
        self._live: dict[str, int] = {}
        self._idle: dict[str, None] = {}
        self._accounts: dict[str, _Account] = {}
        self._clients = Clients(self._client_of)
        self._charged_step = -1

    def counter(self, client: str) -> float:
        """Return a client's weighted service so far, lifts included; 0 for an unknown one."""
        return self._counters.get(client, 0.0)

    def may_go_first(self, request: RequestView) -> bool:
        """Whether the request's client has been served no more than any other waiting client; true for a new
        one."""
        return self.counter(self._client_of(request)) <= self._lowest()

    def key(self, request: RequestView, view: SchedulerView) -> float:
        self._charge_running(view)
        return self.counter(self._client_of(request))

    def adapter_key(self, view: SchedulerView, name: str) -> Any:
        self._clients.sync(view)
        waiting = self._clients.waiting_for(name)
        return min((self.counter(str(one.name)), one.queues[name][0].arrival) for one in waiting)

    def _turn(self, client: Client) -> tuple[float, float]:
        assert client.first is not None
        return self.counter(str(client.name)), client.first.arrival

    def cold(self, view: SchedulerView) -> Iterator[str]:
        self._charge_running(view)
        return super().cold(view)

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        self._charge_running(view)
        clients = self._clients
        clients.sync(view)
        clients.set_open(set(names))
        least = nsmallest(limit, clients.ready, key=self._turn)
        heap: list[tuple[float, float, str, Waiting, Iterator[Waiting]]] = []
        for one in least:
            entries = one.waiting_for(clients.open)
            first = next(entries)
            name = str(one.name)
            heap.append((self.counter(name), first.arrival, name, first, entries))
        heapify(heap)
        chosen: list[RequestView] = []
        while heap and len(chosen) < limit:
            counter, _arrival, client, entry, entries = heap[0]
            chosen.append(entry.request)
            counter += self._prompt_cost(client, entry.request)
            following = next(entries, None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (counter, following.arrival, client, following, entries))
        return chosen

    def on_event(self, event: PolicyEvent) -> None:
        self._clients.on_event(event)
        request = event.request
        if request is None:
            return
        if event.kind == "request_added":
            self._added(request)
        account = self._accounts.get(request.request_id)
        if account is None:  # accepted before this policy was
            account = self._added(request)
        client = account.client
        if event.kind == "request_admitted":
            self._stops_waiting(account)
            if not account.prompt_charged:
                self._counters[client] += self._prompt_cost(client, request)
                account.prompt_charged = True
        elif event.kind == "request_preempted":
            self._starts_waiting(account)
        elif event.kind == "request_finished":
            self._charge_output(request)
            self._stops_waiting(account)
            del self._accounts[request.request_id]
            self._live[client] -= 1
            if self._live[client] == 0:
                del self._live[client]
                self._idle[client] = None
                self._forget_idle()

    def _added(self, request: RequestView) -> _Account:
        account = self._accounts[request.request_id] = _Account(self._client_of(request))
        self._live[account.client] = self._live.get(account.client, 0) + 1
        self._idle.pop(account.client, None)
        self._starts_waiting(account)
        return account

    def _client_of(self, request: RequestView) -> str:
        account = self._accounts.get(request.request_id)
        if account is not None:  # an adapter's name changes when a new version comes
            return account.client
        return request.tenant or request.adapter or "base"

    def _starts_waiting(self, account: _Account) -> None:
        if account.waiting:
            return
        account.waiting, client = True, account.client
        if client not in self._waiting:
            if self._waiting:
                floor = self._lowest()
            else:
                floor = 0.0 if self._last_to_leave is None else self.counter(self._last_to_leave)
            counter = self._counters[client] = max(self.counter(client), floor)
            if client not in self._in_heap:
                self._in_heap.add(client)
                heappush(self._heap, (counter, client))
        self._waiting[client] = self._waiting.get(client, 0) + 1

    def _lowest(self) -> float:
        """Return the smallest counter of the waiting clients; inf if none waits."""
        heap = self._heap
        while heap:
            known, client = heap[0]
            if client not in self._waiting:
                heappop(heap)
                self._in_heap.remove(client)
            elif (counter := self.counter(client)) > known:
                heapreplace(heap, (counter, client))
            else:
                return counter
        return float("inf")

    def _stops_waiting(self, account: _Account) -> None:
        if not account.waiting:
            return
        account.waiting, client = False, account.client
        self._waiting[client] -= 1
        if self._waiting[client] == 0:
            del self._waiting[client]
            self._last_to_leave = client

    def _prompt_cost(self, client: str, request: RequestView) -> float:
        account = self._accounts.get(request.request_id)
        if account is not None and account.prompt_charged:
            return 0.0
        return self.input_weight * request.prompt_tokens / self.weights.get(client, 1.0)

    def _charge_running(self, view: SchedulerView) -> None:
        if view.step != self._charged_step:
            self._charged_step = view.step
            for request in view.running:
                self._charge_output(request)

    def _charge_output(self, request: RequestView) -> None:
        account = self._accounts.get(request.request_id)
        if account is not None:
            new = request.output_tokens - account.output_charged
            cost = self.output_weight * new / self.weights.get(account.client, 1.0)
            self._counters[account.client] += cost
            account.output_charged += new

    def _forget_idle(self) -> None:
        """Drop the smallest counters of idle clients: the next lift would cancel those anyway."""
        if len(self._idle) > IDLE_LIMIT:
            for client in sorted(self._idle, key=self.counter)[: IDLE_LIMIT // 2]:
                if client != self._last_to_leave:
                    del self._idle[client], self._counters[client]
            self._heap = [(self.counter(client), client) for client in self._waiting]
            heapify(self._heap)
            self._in_heap = set(self._waiting)


class _Account:
    """Account of a live request."""

    __slots__ = ("client", "output_charged", "prompt_charged", "waiting")

    def __init__(self, client: str) -> None:
        self.client = client
        self.waiting = False
        self.prompt_charged = False
        self.output_charged = 0
