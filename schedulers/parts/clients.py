"""Tracks the waiting and running requests of each client.

The file is long because each event changes all of the counts and orders.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import merge
from itertools import chain, islice
from operator import itemgetter
from typing import NamedTuple

from sortedcontainers import SortedList

from aioengine.schedulers.parts.lazy_merge import lazy_merge
from aioengine.schedulers.policy import PolicyEvent, RequestView, SchedulerView

Adapter = str | None
LISTED = 4
"""Up to this many queues are merged by listing them all."""


class Waiting(NamedTuple):
    """A waiting request; ``number`` is unique, so that requests are never compared."""

    arrival: float
    number: int
    request: RequestView


_place = itemgetter(0, 1)


class Client:
    """The waiting and running requests of one client."""

    __slots__ = ("first", "heads", "held", "in_slots", "name", "open", "queues", "running", "runs_on", "turn")

    def __init__(self, name: Hashable, turn: int = 0) -> None:
        self.name = name
        self.turn = turn
        """Number of all clients' admissions up to its own last one, or up to its coming."""
        self.queues: dict[Adapter, SortedList[Waiting]] = {}
        """Queues by adapter, in order of arrival; none is empty."""
        self.heads: SortedList[tuple[Waiting, Adapter]] = SortedList(key=lambda head: head[0][:2])
        """The first request of each queue, the oldest first."""
        self.first: Waiting | None = None
        """The first of all its waiting requests."""
        self.running: dict[str, RequestView] = {}
        """Running requests by id, in order of admission."""
        self.runs_on: dict[Adapter, int] = {}
        """Running requests by adapter."""
        self.held = 0
        """Slots whose adapters it uses."""
        self.open = self.in_slots = 0
        """Number of its queues whose adapters admit, and whose adapters are in slots."""

    @property
    def uses_adapters(self) -> bool:
        """Whether it waits for an adapter or runs on one."""
        return len(self.queues) > (None in self.queues) or len(self.runs_on) > (None in self.runs_on)

    @property
    def waits_for_cold(self) -> bool:
        """Whether it waits for an adapter that is in no slot."""
        return len(self.queues) > self.in_slots + (None in self.queues)

    def waiting_for(self, names: AbstractSet[Adapter]) -> Iterator[Waiting]:
        """Yield its waiting requests for these adapters, in order of arrival."""
        queues = self.queues
        if len(queues) <= LISTED:
            found = [queue for name, queue in queues.items() if name in names]
        elif len(names) <= LISTED:
            found = [queues[name] for name in names if name in queues]
        else:
            return lazy_merge((queues[name] for _, name in self.heads if name in names), _place)
        return iter(found[0]) if len(found) == 1 else merge(*found)

    def cold(self, in_slots: AbstractSet[Adapter]) -> Iterator[tuple[Waiting, str]]:
        """Yield (first request, adapter) for each adapter that it waits for and no slot holds, the oldest
        first."""
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
    """All clients that have requests, by name, and the order of their turns.

    Fed by ``on_event``; a change costs O(log waiting), and a change of a slot O(log clients) for each client
    that waits for its adapter. ``sync`` reads everything again if the policy has missed events. ``client_of``
    returns the client of a request.

    Args:
        only_several: Whether nothing but ``several`` is asked for as long as that is false. Then little is
            kept until a second client comes.
    """

    def __init__(self, client_of: Callable[[RequestView], Hashable], *, only_several: bool = False) -> None:
        self._client_of = client_of
        self._stale = True
        """Whether the state is incomplete, for example because this object was made late."""
        self._names: set[Hashable] | None = set() if only_several else None
        """The clients so far, at most one; None: all of the state is kept."""
        self._waiting_ids: set[str] = set()
        """The requests that wait, as long as there is one client."""
        self._count = self._turns = 0
        self._clear()

    def _clear(self) -> None:
        self.by_name: dict[Hashable, Client] = {}
        self._live: dict[str, tuple[Client, Waiting]] = {}
        self._waiting = 0
        self._waiting_for: dict[Adapter, dict[Client, None]] = {}
        self._running_on: dict[Adapter, dict[Client, None]] = {}
        self._ready: SortedList[Client] = SortedList(key=rank)
        self._cold: SortedList[Client] = SortedList(key=_slot_rank)
        """The orders of ``ready`` and ``cold``; empty unless there are several clients."""
        self.using_adapters = 0
        """Number of clients that wait for adapters or run on some."""
        self.running_counts: dict[int, int] = {}
        """Number of clients by their number of running requests, without clients that have no request."""
        self.holding: dict[int, dict[Client, None]] = {}
        """Clients with requests, by the number of slots that they use."""
        self.open: set[Adapter] = set()
        self.in_slots: dict[Adapter, None] = {}
        self.idle: dict[Adapter, None] = {}
        """Adapters in slots without running requests."""
        self._slots: list[Adapter] = []

    @property
    def several(self) -> bool:
        """Whether more than one client has requests, or may have: a second one has come since ``sync``."""
        return len(self.by_name) > 1 or (self._names is not None and len(self._names) > 1)

    @property
    def ready(self) -> Sequence[Client]:
        """Clients with a request that could be admitted: the one with the fewest running requests first, of
        equal ones (requests may end within a step) the one whose turn is longest ago."""
        return self._ready if self.several else [client for client in self.by_name.values() if client.open]

    @property
    def cold(self) -> Sequence[Client]:
        """Clients that wait for an adapter in no slot, the one with the fewest slots first."""
        cold: Sequence[Client] = self._cold
        return cold if self.several else [c for c in self.by_name.values() if c.waits_for_cold]

    def of(self, request: RequestView) -> Client:
        """Return the client of a request."""
        return self._live[request.request_id][0]

    def users(self, adapter: Adapter) -> Iterable[Client]:
        """Return the clients that run on an adapter or, if none does, the one that has waited for it
        longest."""
        return self._running_on.get(adapter) or islice(self._waiting_for.get(adapter, ()), 1)

    def waiting_for(self, adapter: Adapter) -> Iterable[Client]:
        """Return the clients that wait for an adapter."""
        return self._waiting_for.get(adapter, ())

    def set_slots(self, adapters: Sequence[Adapter]) -> None:
        """Set the contents of each slot (None: nothing)."""
        if adapters == self._slots:
            return
        self._slots = list(adapters)
        now = dict.fromkeys(adapters)
        now.pop(None, None)
        before, self.in_slots = self.in_slots, now
        # Not in the order of a set, which differs from process to process, and with it the orders below.
        changed = [adapter for adapter in (*before, *now) if (adapter in before) != (adapter in now)]
        for adapter in changed:
            more = 1 if adapter in now else -1
            for client in self.waiting_for(adapter):
                was_cold = client.waits_for_cold
                client.in_slots += more
                if self.several and was_cold != client.waits_for_cold:
                    self._cold.remove(client) if was_cold else self._cold.add(client)
            users = self._take_out(self.users(adapter))
            for client, _, _ in users:
                client.held += more
            self._put_back(users)
            if more < 0:
                self.idle.pop(adapter, None)
            elif adapter not in self._running_on:
                self.idle[adapter] = None

    def set_open(self, adapters: AbstractSet[Adapter]) -> None:
        """Set the adapters whose requests can be admitted (None: the base model)."""
        if adapters == self.open:
            return
        before, self.open = self.open, set(adapters)
        for adapter in before ^ self.open:
            more = 1 if adapter in self.open else -1
            for client in self.waiting_for(adapter):
                was_ready = client.open > 0
                client.open += more
                if self.several and was_ready != (client.open > 0):
                    self._ready.remove(client) if was_ready else self._ready.add(client)

    def on_event(self, event: PolicyEvent) -> None:
        request = event.request
        if self._names is not None:
            if request is not None:
                self._note(event.kind, request, self._names)
            return
        try:
            if request is not None:
                self._happened(event.kind, request)
            elif event.kind == "adapter_retired":
                self._rename(event.was, event.adapter)
        except (KeyError, ValueError):  # this object missed an earlier event
            self._stale = True

    def sync(self, view: SchedulerView) -> None:
        """Call before a decision."""
        if self._names is not None:
            if self._stale or len(self._waiting_ids) != len(view.waiting):
                self._stale = False
                self._waiting_ids = {request.request_id for request in view.waiting}
                self._names.update(map(self._client_of, chain(view.running, view.waiting)))
            if len(self._names) < 2:
                return
            self._names, self._stale = None, True
            self._waiting_ids.clear()
        if self._stale or self._waiting != len(view.waiting):
            self._clear()
            self._stale = False
            for request in view.running:
                self._happened("request_added", request)
                self._happened("request_admitted", request)
            for request in view.waiting:
                self._happened("request_added", request)

    def _note(self, kind: str, request: RequestView, names: set[Hashable]) -> None:
        """Follow what happened to a request, as long as there is one client."""
        if kind == "request_added":
            names.add(self._client_of(request))
        if kind == "request_added" or kind == "request_preempted":
            self._waiting_ids.add(request.request_id)
        else:
            self._waiting_ids.discard(request.request_id)

    def _rename(self, was: Adapter, adapter: Adapter) -> None:
        concerned = {**self._waiting_for.get(was, {}), **self._running_on.get(was, {})}
        moving = self._take_out(concerned)
        for client in concerned:
            client.rename(was, adapter)
        for users in (self._waiting_for, self._running_on):
            if was in users:
                users[adapter] = users.pop(was)
        self._put_back(moving)
        for names in (self.in_slots, self.idle):
            if was in names:
                names[adapter] = names.pop(was)
        if was in self.open:
            self.open.remove(was)
            self.open.add(adapter)
        self._slots = [adapter if name == was else name for name in self._slots]

    def _happened(self, kind: str, request: RequestView) -> None:
        adapter = request.adapter
        if kind == "request_added":
            name = self._client_of(request)
            client = self.by_name.get(name)
            if client is None:
                client = self.by_name[name] = Client(name, self._turns)
                if len(self.by_name) == 2:
                    self._add_to_orders(next(iter(self.by_name.values())))
                _count(self.running_counts, 0, 1)
                self._hold_list(client, 0, 1)
            entry = Waiting(request.arrival, self._count, request)
            self._count += 1
            self._live[request.request_id] = client, entry
        else:
            client, entry = self._live[request.request_id]
        in_slot = adapter in self.in_slots
        others = () if not in_slot or adapter in self._running_on else self.users(adapter)
        moving = self._take_out((client, *others))
        if in_slot:
            self._hold(adapter, client, -1)
        self.using_adapters -= client.uses_adapters
        if adapter in client.queues:
            client.open -= adapter in self.open
            client.in_slots -= in_slot
        self._change(kind, client, adapter, entry)
        if adapter in client.queues:
            client.open += adapter in self.open
            client.in_slots += in_slot
        self.using_adapters += client.uses_adapters
        if in_slot and adapter in self._running_on:
            self._hold(adapter, client, 1)
        self._put_back(moving)
        if in_slot and adapter not in self._running_on:
            moving = self._take_out(self.users(adapter))
            self._hold(adapter, client, 1)
            self._put_back(moving)
            self.idle[adapter] = None
        elif in_slot:
            self.idle.pop(adapter, None)
        if client.first is None and not client.running:
            del self.by_name[client.name]
            _count(self.running_counts, 0, -1)
            self._hold_list(client, client.held, -1)
            if len(self.by_name) == 1:
                self._ready.clear()
                self._cold.clear()

    def _hold(self, adapter: Adapter, client: Client, more: int) -> None:
        """Update the count of ``adapter``'s slot for the users that an event of ``client`` may concern."""
        running = self._running_on.get(adapter)
        if running is None:
            for user in self.users(adapter):
                user.held += more
        elif client in running:
            client.held += more

    def _change(self, kind: str, client: Client, adapter: Adapter, entry: Waiting) -> None:
        request_id = entry.request.request_id
        if kind == "request_added":
            self._begins_to_wait(client, adapter, entry)
        elif request_id in client.running:
            del client.running[request_id]
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
            self._turns += 1
            client.turn = self._turns
            client.running[request_id] = entry.request
            client.runs_on[adapter] = client.runs_on.get(adapter, 0) + 1
            self._running_on.setdefault(adapter, {})[client] = None
        elif kind == "request_finished":
            del self._live[request_id]

    def _begins_to_wait(self, client: Client, adapter: Adapter, entry: Waiting) -> None:
        self._waiting += 1
        client.add(adapter, entry)
        self._waiting_for.setdefault(adapter, {})[client] = None

    def _take_out(self, clients: Iterable[Client]) -> list[tuple[Client, int, int]]:
        """Take these clients out of the sorted orders before they change. Pass the result to
        :meth:`_put_back`."""
        moving = [(client, len(client.running), client.held) for client in dict.fromkeys(clients)]
        several = self.several
        for client, _, held in moving:
            if several and client.open:
                self._ready.remove(client)
            if several and client.waits_for_cold:
                self._cold.remove(client)
            if held:
                self._hold_list(client, held, -1)
        return moving

    def _put_back(self, moving: list[tuple[Client, int, int]]) -> None:
        several = self.several
        for client, running, held in moving:
            if several:
                self._add_to_orders(client)
            if running != len(client.running):
                _count(self.running_counts, running, -1)
                _count(self.running_counts, len(client.running), 1)
            if held:
                self._hold_list(client, client.held, 1)
            elif client.held:
                self._hold_list(client, 0, -1)
                self._hold_list(client, client.held, 1)

    def _add_to_orders(self, client: Client) -> None:
        if client.open:
            self._ready.add(client)
        if client.waits_for_cold:
            self._cold.add(client)

    def _hold_list(self, client: Client, held: int, more: int) -> None:
        if more > 0:
            self.holding.setdefault(held, {})[client] = None
        else:
            del self.holding[held][client]
            if not self.holding[held]:
                del self.holding[held]

    def in_slots_of_who_has_more(self, than: int) -> Iterator[Adapter]:
        """Yield adapters in slots whose users have more than ``slots`` slots, beginning with the client that
        has the most."""
        for held in sorted((held for held in self.holding if held > than), reverse=True):
            for client in self.holding[held]:
                yield from (name for name in client.runs_on if name in self.in_slots)


def rank(client: Client) -> tuple[int, int, float, int]:
    """Return (running requests, last turn, arrival of the first waiting one, its number)."""
    assert client.first is not None
    return len(client.running), client.turn, *client.first[:2]


def _slot_rank(client: Client) -> tuple[int, float, int]:
    _, _, arrival, number = rank(client)
    return client.held, arrival, number


def _count(counts: dict[int, int], value: int, more: int) -> None:
    counts[value] = counts.get(value, 0) + more
    if not counts[value]:
        del counts[value]


def _forget(users: dict[Adapter, dict[Client, None]], adapter: Adapter, client: Client) -> None:
    del users[adapter][client]
    if not users[adapter]:
        del users[adapter]
