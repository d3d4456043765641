"""Requests by client: who waits for what since when, and who runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import merge
from itertools import islice
from typing import NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView

Adapter = str | None


class Waiting(NamedTuple):
    """A waiting request; ``number`` is unique, so that requests are never compared."""

    arrival: float
    number: int
    request: RequestView


class Client:
    """What one client has waiting and running."""

    __slots__ = ("first", "heads", "name", "queues", "running", "runs_on")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.queues: dict[Adapter, SortedList[Waiting]] = {}
        """By adapter, in order of arrival; none is empty."""
        self.heads: SortedList[tuple[Waiting, Adapter]] = SortedList(key=lambda head: head[0][:2])
        """The first of each queue, the oldest first."""
        self.first: Waiting | None = None
        """The first of all that wait."""
        self.running: dict[str, RequestView] = {}
        """By id, in order of admission."""
        self.runs_on: dict[Adapter, int] = {}
        """Running requests by adapter."""

    @property
    def uses_adapters(self) -> bool:
        """Whether it waits for an adapter or runs on one."""
        return len(self.queues) > (None in self.queues) or len(self.runs_on) > (None in self.runs_on)

    def waiting_for(self, names: set[Adapter]) -> Iterator[Waiting]:
        """Its waiting requests for these adapters, in order of arrival."""
        queues = self.queues
        if len(queues) <= len(names):
            found = [queue for name, queue in queues.items() if name in names]
        else:
            found = [queues[name] for name in names if name in queues]
        return iter(found[0]) if len(found) == 1 else merge(*found)

    def cold(self, in_slots: set[Adapter]) -> Iterator[tuple[Waiting, str]]:
        """(first request, adapter) for each adapter that it waits for and no slot holds, the oldest first."""
        for head, name in self.heads:
            if name is not None and name not in in_slots:
                yield head, name

    def add(self, adapter: Adapter, entry: Waiting) -> None:
        queue = self.queues.get(adapter)
        if queue is None:
            queue = self.queues[adapter] = SortedList()
        elif entry > queue[0]:
            queue.add(entry)
            return
        else:
            self.heads.remove((queue[0], adapter))
        queue.add(entry)
        self.heads.add((entry, adapter))
        if self.first is None or entry < self.first:
            self.first = entry

    def remove(self, adapter: Adapter, entry: Waiting) -> None:
        queue = self.queues[adapter]
        first = queue[0]
        queue.remove(entry)
        if first is not entry:
            return
        self.heads.remove((first, adapter))
        if queue:
            self.heads.add((queue[0], adapter))
        else:
            del self.queues[adapter]
        if first is self.first:
            self.first = self.heads[0][0] if self.heads else None

    def rename(self, was: Adapter, adapter: Adapter) -> None:
        if was in self.queues:
            queue = self.queues[adapter] = self.queues.pop(was)
            self.heads.remove((queue[0], was))
            self.heads.add((queue[0], adapter))
        if was in self.runs_on:
            self.runs_on[adapter] = self.runs_on.pop(was)


class Clients:
    """All clients that have requests, by name.

    Fed by ``on_event``; a change costs O(log waiting). ``sync`` reads everything anew if the policy has not
    heard of all that happened.

    Args:
        client_of: Whose a request is; asked once for each.
    """

    def __init__(self, client_of: Callable[[RequestView], Hashable]) -> None:
        self.by_name: dict[Hashable, Client] = {}
        self._client_of = client_of
        self._live: dict[str, tuple[Client, Waiting]] = {}
        self._waiting = 0
        self._count = 0
        self._waiting_for: dict[Adapter, dict[Client, None]] = {}
        self._running_on: dict[Adapter, dict[Client, None]] = {}
        self.ranked: SortedList[Client] = SortedList(key=rank)
        """Those that have a waiting request, the one that has the fewest running first."""
        self.using_adapters = 0
        """How many wait for adapters or run on some."""
        self._stale = False

    @property
    def several(self) -> bool:
        """Whether more than one client has requests."""
        return len(self.by_name) > 1

    def of(self, request: RequestView) -> Client:
        """Whose request it is."""
        return self._live[request.request_id][0]

    def users(self, adapter: Adapter) -> Iterable[Client]:
        """Who runs on an adapter; if nobody does, the one who began to wait for it first."""
        return self._running_on.get(adapter) or islice(self._waiting_for.get(adapter, ()), 1)

    def waiting_for(self, adapter: Adapter) -> Iterable[Client]:
        """Who waits for an adapter."""
        return self._waiting_for.get(adapter, ())

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        try:
            if request is not None:
                self._happened(event.kind, request)
            elif event.kind == "adapter_retired":
                concerned: dict[Client, None] = {}
                for users in (self._waiting_for, self._running_on):
                    if event.was in users:
                        users[event.adapter] = users.pop(event.was)
                        concerned |= users[event.adapter]
                for client in concerned:
                    client.rename(event.was, event.adapter)
        except (KeyError, ValueError):  # of something that happened before, nothing was said
            self._stale = True

    def sync(self, view: SchedulerView) -> None:
        """Call before a decision."""
        if self._stale or self._waiting != len(view.waiting):
            self.by_name.clear()
            self._live.clear()
            self._waiting_for.clear()
            self._running_on.clear()
            self.ranked.clear()
            self.using_adapters = 0
            self._waiting = 0
            self._stale = False
            for request in view.running:
                self._happened("request_added", request)
                self._happened("request_admitted", request)
            for request in view.waiting:
                self._happened("request_added", request)

    def _happened(self, kind: str, request: RequestView) -> None:
        adapter = request.adapter
        if kind == "request_added":
            name = self._client_of(request)
            client = self.by_name.get(name)
            if client is None:
                client = self.by_name[name] = Client(name)
            entry = Waiting(request.arrival, self._count, request)
            self._count += 1
            self._live[request.request_id] = client, entry
        else:
            client, entry = self._live[request.request_id]
        if client.first is not None:
            self.ranked.remove(client)
        self.using_adapters -= client.uses_adapters
        if kind == "request_added":
            self._begins_to_wait(client, adapter, entry)
        elif request.request_id in client.running:
            del client.running[request.request_id]
            client.runs_on[adapter] -= 1
            if not client.runs_on[adapter]:
                del client.runs_on[adapter]
                _forget(self._running_on, adapter, client)
            if kind == "request_preempted":
                self._begins_to_wait(client, adapter, entry)
        else:
            self._waiting -= 1
            client.remove(adapter, entry)
            if adapter not in client.queues:
                _forget(self._waiting_for, adapter, client)
        if kind == "request_admitted":
            client.running[request.request_id] = request
            client.runs_on[adapter] = client.runs_on.get(adapter, 0) + 1
            self._running_on.setdefault(adapter, {})[client] = None
        elif kind == "request_finished":
            del self._live[request.request_id]
        self.using_adapters += client.uses_adapters
        if client.first is not None:
            self.ranked.add(client)
        elif not client.running:
            del self.by_name[client.name]

    def _begins_to_wait(self, client: Client, adapter: Adapter, entry: Waiting) -> None:
        self._waiting += 1
        client.add(adapter, entry)
        self._waiting_for.setdefault(adapter, {})[client] = None


def rank(client: Client) -> tuple[int, float, int]:
    """(running requests, arrival of the first that waits, its number): the order of turns."""
    first = client.first
    assert first is not None
    return len(client.running), first.arrival, first.number


def _forget(users: dict[Adapter, dict[Client, None]], adapter: Adapter, client: Client) -> None:
    del users[adapter][client]
    if not users[adapter]:
        del users[adapter]
