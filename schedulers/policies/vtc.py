"""Fair shares by virtual token counters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from operator import attrgetter, itemgetter

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.parts.clients import Client, Clients, in_turn
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView

IDLE_LIMIT = 4096
"""Maximum number of counters that are kept for clients without requests."""
_output_tokens = attrgetter("output_tokens")


class VTC(Ordering):
    """Virtual token counter: the client that has been served least goes first.

    A client is a tenant; requests without one count for their adapter, or for "base". Its counter grows
    by (input_weight x prompt tokens) / weight when a request is first admitted, and by output_weight /
    weight with each token generated. The next request admitted is the first of the client with the
    smallest counter, and the next cold adapter one of this client's. The counter of a client that begins to
    wait is raised to the smallest counter of the waiting clients (or, if none waits, to that of the last
    client that stopped waiting). So a client cannot save up service by being idle.

    Bound (proved in the paper for equal weights): between two clients that both wait all the time,
    with their adapters in slots, the service received differs by at most 2 x max(input_weight x
    longest prompt, output_weight x M), M being the tokens that fit in a batch. With weights, it is
    service / weight that is compared.

    Args:
        input_weight: Cost of a prompt token, >= 0.
        output_weight: Cost of a generated token, >= 0.
        weights: Shares by client, > 0; 1 for clients that are not named.
    """

    ages = False
    source = "Sheng et al., 'Fairness in Serving Large Language Models', OSDI 2024"
    starvation_bound = "2 max(input_weight x longest prompt, output_weight x batch tokens) of service"

    def __init__(
        self,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: dict[str, float] | None = None,
    ) -> None:
        at_least(0, input_weight=input_weight, output_weight=output_weight)
        for client, weight in (weights or {}).items():
            if not 0 < weight < inf:
                raise ValueError(f"weights: {client!r}: {weight}: must be > 0 and finite")
        self.input_weight, self.output_weight = input_weight, output_weight
        self.weights = dict(weights or {})
        self._clients = Clients(lambda request: request.tenant or request.adapter or "base")
        self._counters: dict[str, float] = {}
        """What each client has been served, without what its running requests have generated since they were
        admitted."""
        self._before: dict[str, int] = {}
        """Output tokens that each request whose prompt has been charged had when it was last admitted."""
        self._last_to_leave: str | None = None

    def counter(self, client: str) -> float:
        """Return a client's weighted service so far, lifts included; 0 for an unknown one."""
        known = self._clients.by_name.get(client)
        served = self._counters.get(client, 0.0)
        if known is None or not known.running:
            return served
        before = sum([self._before.get(request_id, 0) for request_id in known.running])
        return served + self._output_cost(client, sum(map(_output_tokens, known.running.values())) - before)

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return self.counter(self._name_of(request))

    def cold(self, view: SchedulerView) -> Iterator[str]:
        seen: set[str | None] = set()
        for _, _, client in self._ranked(view):
            for request in client.cold(view):
                if request.adapter is not None and request.adapter not in seen:
                    seen.add(request.adapter)
                    yield request.adapter

    def admit(self, view: SchedulerView, names: Sequence[str | None], limit: int) -> Sequence[RequestView]:
        return in_turn(self._ranked(view), names, limit, lambda _, request: self._prompt_cost(request))

    def _ranked(self, view: SchedulerView) -> list[tuple[float, int, Client]]:
        """Return (counter, 0, client) of the waiting clients; of equal ones the first that has come leads."""
        self._clients.sync(view)
        waiting = [client for client in self._clients.by_name.values() if client.queues]
        return sorted([(self.counter(str(client.name)), 0, client) for client in waiting], key=itemgetter(0))

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if request is None:
            self._clients.on_event(event)
            return
        client, name, request_id = self._clients.of(request), self._name_of(request), request.request_id
        waited, ran = bool(client.queues), request_id in client.running
        self._clients.on_event(event)
        if ran:
            self._add(name, self._output_cost(name, request.output_tokens - self._before.get(request_id, 0)))
        if client.queues and not waited:
            self._lift(name)
        elif waited and not client.queues:
            self._last_to_leave = name
        if event.kind == "request_admitted":
            self._add(name, self._prompt_cost(request))
            self._before[request_id] = request.output_tokens
        elif event.kind == "request_finished":
            self._before.pop(request_id, None)
            self._forget_idle()

    def _name_of(self, request: RequestView) -> str:
        return str(self._clients.of(request).name)

    def _lift(self, name: str) -> None:
        """Raise the counter of a client that begins to wait."""
        known = self._clients.by_name.values()
        others = [str(client.name) for client in known if client.queues and client.name != name]
        if not others and self._last_to_leave is not None:
            others = [self._last_to_leave]
        floor = min(map(self.counter, others), default=0.0)
        self._add(name, max(floor - self.counter(name), 0.0))

    def _prompt_cost(self, request: RequestView) -> float:
        if request.request_id in self._before:
            return 0.0
        return self.input_weight * request.prompt_tokens / self.weights.get(self._name_of(request), 1.0)

    def _output_cost(self, name: str, tokens: int) -> float:
        return self.output_weight * tokens / self.weights.get(name, 1.0)

    def _add(self, name: str, service: float) -> None:
        self._counters[name] = self._counters.get(name, 0.0) + service

    def _forget_idle(self) -> None:
        """Drop the smallest counters of clients without requests: the next lift would cancel these anyway."""
        live = self._clients.by_name
        if len(self._counters) > len(live) + IDLE_LIMIT:
            idle = [name for name in self._counters if name not in live]
            for name in sorted(idle, key=self._counters.__getitem__)[: IDLE_LIMIT // 2]:
                if name != self._last_to_leave:
                    del self._counters[name]
