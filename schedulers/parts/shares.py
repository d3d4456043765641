"""Shares of slots, sequences and KV blocks between tenants, for :mod:`aioengine.schedulers.parts.compose`.

With n tenants that want some, a tenant's share is an n-th of them, at least one. A tenant that has less than
its share and waits may have what another has beyond its own, at once: running requests of the tenant that has
most, the last admitted first, are preempted for it. A preempted request keeps its output and its turn, and
what the prefix cache still holds of its KV. So that this cannot turn into mere recomputing, the next
preemption comes only after twice the steps that computing the last one's tokens again takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace, nsmallest
from itertools import islice, takewhile
from typing import NamedTuple

from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.parts.clients import Client, Clients, Waiting, rank
from aioengine.schedulers.parts.slot_pool import SlotPool, lacking
from aioengine.schedulers.policy import (
    AdapterView,
    Location,
    Place,
    RequestView,
    SchedulerView,
    SlotState,
    SlotView,
)

SCAN_LIMIT = 256
"""Cold adapters that one decision looks at."""
LOOKAHEAD = 32
"""Of those, how many it looks at where no slot is to be had."""
TENANTS_LIMIT, OLDEST = 64, 4
"""Tenants that it looks at, and adapters that were waited for longest, whose tenants it looks at besides."""
MAKE_WAY_LIMIT = 2
"""For how many of them it looks through the slots that others have."""


class SlotChanges(NamedTuple):
    """What is to become of the slots."""

    place: list[Place]
    read: list[str]
    """Adapters to read, because there is a slot that they could have."""
    closed: set[str | None]
    """Adapters whose slots admit nobody, so that they become idle."""
    preempt: list[str]
    """Requests that must leave their slots at once."""
    cold: list[str]
    """Adapters that wait for a slot, as far as was looked, in turn."""


class _Held(NamedTuple):
    """A slot that others could have."""

    slot: SlotView
    name: str
    users: tuple[Client, ...]
    """Who runs in it or waits for its adapter."""
    oldest: float
    """When the first of those who wait for it arrived; inf if nobody does."""
    settled: bool


class Shares:
    """Gives tenants what ``order.sharing`` says that they are sure of."""

    def __init__(self, order: Ordering, max_wait: float) -> None:
        self.clients = Clients(lambda request: request.tenant)
        self._order = order
        self._max_wait = max_wait
        self._equal = order.sharing == "equal"
        self._next_step = 0
        """Before it, nobody is preempted."""
        self._asked: set[str] = set()
        """Adapters whose reads the last decision asked for."""

    # Sequences and KV blocks

    def admit(
        self, view: SchedulerView, names: Sequence[str | None], seqs: int, gone: Sequence[str]
    ) -> tuple[list[RequestView], list[str]]:
        """(requests to admit for these adapters, whom to preempt for the first of them).

        ``seqs`` are the free sequences once those in ``gone`` are preempted.
        """
        if self._equal:
            chosen = self._in_turn(set(names), max(seqs, 1))
        else:
            chosen = self._of_who_has_none(set(names), max(seqs, 1))
            if seqs > len(chosen):
                ids = {request.request_id for request in chosen}
                chosen += [r for r in self._order.admit(view, names, seqs) if r.request_id not in ids]
        victims = self._make_room(view, chosen[0], seqs, gone) if chosen else []
        return chosen[: max(0, seqs + len(victims))], victims

    def _in_turn(self, names: set[str | None], limit: int) -> list[RequestView]:
        """Each time the oldest request of the tenant that has the fewest running, these counted."""
        ranked = iter(self.clients.ranked)
        following = next(ranked, None)
        heap: list[tuple[int, float, int, Iterator[Waiting]]] = []
        chosen: list[RequestView] = []
        while len(chosen) < limit:
            if following is not None and (not heap or rank(following) < heap[0][:3]):
                if not names.isdisjoint(following.queues):
                    heappush(heap, (*rank(following), following.waiting_for(names)))
                following = next(ranked, None)
            elif heap:
                running, arrival, number, waiting = heap[0]
                entry = next(waiting, None)
                if entry is None:
                    heappop(heap)
                else:
                    chosen.append(entry.request)
                    heapreplace(heap, (running + 1, arrival, number, waiting))
            else:
                break
        return chosen

    def _of_who_has_none(self, names: set[str | None], limit: int) -> list[RequestView]:
        """The oldest request of each tenant that has none running, if its ordering lets it go first."""
        idle = takewhile(lambda client: not client.running, self.clients.ranked)
        first = (next(client.waiting_for(names), None) for client in idle)
        able = (entry for entry in first if entry and self._order.may_go_first(entry.request))
        return [entry.request for entry in nsmallest(limit, able, key=lambda entry: entry[:2])]

    def _make_room(
        self, view: SchedulerView, request: RequestView, seqs: int, gone: Sequence[str]
    ) -> list[str]:
        """Whom to preempt so that ``request`` can be admitted.

        Nobody if it fits, if its tenant has its share, or if it takes more than what others have too much.
        """
        need = -(-(request.prompt_tokens + request.output_tokens) // view.block_size)
        blocks = view.free_blocks
        if (seqs >= 1 and blocks >= need) or view.step < self._next_step:
            return []
        client, count = self.clients.of(request), len(self.clients.by_name)
        running = [r for r in view.running if r.request_id not in gone]
        share = max(1, (len(running) + seqs) // count)
        if len(client.running) >= (share if self._equal else 1):
            return []
        held = {r.request_id: -(-r.computed_tokens // view.block_size) for r in running}
        block_share = (blocks + sum(held.values())) // count
        theirs: dict[Client, list[RequestView]] = {}
        for other in running:
            theirs.setdefault(self.clients.of(other), []).append(other)
        blocks_of = {who: sum(held[r.request_id] for r in rs) for who, rs in theirs.items()}
        own = blocks_of.pop(client, 0)
        theirs.pop(client, None)
        if blocks < need and own + need > block_share:
            return []
        victims: list[RequestView] = []
        while theirs and (seqs < 1 or blocks < need):
            if seqs < 1:
                most = max(theirs, key=lambda who: len(theirs[who]))
                enough = len(theirs[most]) > share
            else:
                most = max(blocks_of, key=lambda who: blocks_of[who])
                enough = blocks_of[most] > block_share and bool(theirs[most])
            if not enough:
                break
            victim = theirs[most].pop()
            victims.append(victim)
            seqs, blocks = seqs + 1, blocks + held[victim.request_id]
            blocks_of[most] -= held[victim.request_id]
        if seqs < 1 or blocks < need:
            return []
        return self._preempt(view, victims)

    def _preempt(self, view: SchedulerView, victims: Sequence[RequestView]) -> list[str]:
        if victims:
            tokens = sum(victim.computed_tokens for victim in victims)
            step_tokens = max(1, view.free_tokens + len(view.running))
            self._next_step = view.step + 1 + 2 * (tokens // step_tokens)
        return [victim.request_id for victim in victims]

    # Slots

    def assign_slots(self, view: SchedulerView, pool: SlotPool, settling: set[str | None]) -> SlotChanges:
        """Slots for cold adapters, by turns: first those of the tenant that has the fewest slots."""
        changes = SlotChanges([], [], set(), [], [])
        slots = [slot for slot in view.slots if slot.adapter is not None]
        held: dict[Client, int] = {}
        for slot in slots:
            for client in self.clients.users(slot.adapter):
                held[client] = held.get(client, 0) + 1
        claims = held.copy()  # and what they will have when it has been read
        share = self._slot_share(view) if self._equal else 1
        others: list[_Held] | None = None
        tries, asked = MAKE_WAY_LIMIT, set[str]()
        for client, entry, name in self._cold(view, held, {slot.adapter for slot in slots}):
            changes.cold.append(name)
            idle = pool.has_idle(None)
            if len(changes.cold) > (SCAN_LIMIT if idle else LOOKAHEAD):
                break
            adapter = view.adapters[name]
            location = adapter.location
            under = claims.get(client, 0) < share
            if location is Location.CPU and idle and (free := pool.take_unwanted()) is not None:
                changes.place.append(Place(name, free.index))
                claims[client] = claims.get(client, 0) + 1
                continue
            if location is Location.DISK:
                if len(changes.read) >= view.load_room or not (under or idle):
                    continue  # reading comes first
                changes.read.append(name)
                asked.add(name)
                if name not in self._asked or _can_be_read(view, adapter):
                    claims[client] = claims.get(client, 0) + 1
                    continue
                # There was no room for it in the CPU cache: a slot's adapter must leave that too.
            if location is Location.LOADING:
                claims[client] = claims.get(client, 0) + 1
                continue
            if tries == 0:
                continue
            tries -= 1
            if others is None:
                others = self._others(view, slots, settling)
            missing = lacking(view, adapter)
            while found := self._choose(view, others, client, entry, held, share, under):
                others.remove(found)
                for user in found.users:
                    held[user] -= 1
                if found.slot.running == 0 or under:
                    changes.preempt.extend(self._empty(view, found))
                    changes.place.append(Place(name, found.slot.index))
                    claims[client] = claims.get(client, 0) + 1
                else:
                    changes.closed.add(found.name)
                missing -= view.adapters[found.name].bytes
                if missing <= 0:
                    break
        self._asked = asked
        return changes

    def _slot_share(self, view: SchedulerView) -> int:
        return max(1, sum(not slot.pinned for slot in view.slots) // max(self.clients.using_adapters, 1))

    def _cold(
        self, view: SchedulerView, held: dict[Client, int], in_slots: set[str | None]
    ) -> Iterator[tuple[Client, Waiting, str]]:
        """(tenant, its oldest request, adapter) of the adapters in no slot, each once.

        Each time the oldest of the tenant that has the fewest slots, those given counted.
        """
        heap: list[tuple[int, Waiting, str, Client, Iterator[tuple[Waiting, str]]]] = []
        for client in self._candidates(view):
            cold = client.cold(in_slots)
            first = next(cold, None)
            if first is not None:
                heap.append((held.get(client, 0), *first, client, cold))
        heapify(heap)
        seen: set[str] = set()
        while heap:
            turns, entry, name, client, cold = heap[0]
            new = name not in seen
            if new:
                seen.add(name)
                yield client, entry, name
            following = next(cold, None)
            if following is None:
                heappop(heap)
            else:
                heapreplace(heap, (turns + new, *following, client, cold))

    def _candidates(self, view: SchedulerView) -> Iterable[Client]:
        """Tenants to look at: those with the fewest running, and who has waited longest for an adapter."""
        found = dict.fromkeys(islice(self.clients.ranked, TENANTS_LIMIT))
        for name in islice(view.waiting_adapters, OLDEST):
            found |= dict.fromkeys(self.clients.waiting_for(name))
        return found

    def _others(
        self, view: SchedulerView, slots: Sequence[SlotView], settling: set[str | None]
    ) -> list[_Held]:
        found: list[_Held] = []
        for slot in slots:
            name = slot.adapter
            if name is not None and slot.state is SlotState.READY and not slot.pinned:
                oldest = view.adapters[name].oldest_arrival
                when = float("inf") if oldest is None else oldest
                found.append(_Held(slot, name, tuple(self.clients.users(name)), when, name not in settling))
        return found

    def _choose(
        self,
        view: SchedulerView,
        others: list[_Held],
        client: Client,
        entry: Waiting,
        held: dict[Client, int],
        share: int,
        under: bool,
    ) -> _Held | None:
        """The slot that a tenant's adapter may have: an idle one, else that in which least was computed."""
        aged = view.now - entry.arrival >= self._max_wait
        may_preempt = view.step >= self._next_step

        def can_be_had(other: _Held) -> bool:
            least = min([held[user] for user in other.users], default=share + 1)
            if not under:  # as among the requests of one tenant: by age
                fits = aged and other.oldest > entry.arrival and (other.slot.running == 0 or other.settled)
                return fits and (least > share or other.users == (client,))
            # Where nobody has more than its share, there are more tenants than slots: they take turns.
            if least > share or (aged and other.settled and least == share):
                return client not in other.users and (may_preempt or other.slot.running == 0)
            return False

        able = [other for other in others if can_be_had(other)]
        computed: dict[str | None, int] = {}
        if any(other.slot.running for other in able):
            for request in view.running:
                computed[request.adapter] = computed.get(request.adapter, 0) + request.computed_tokens
        return min(able, key=lambda o: (computed.get(o.name, 0), o.slot.last_used), default=None)

    def _empty(self, view: SchedulerView, found: _Held) -> list[str]:
        """Preempt whoever runs in a slot."""
        if found.slot.running == 0:
            return []
        return self._preempt(view, [r for r in view.running if r.adapter == found.name])


def _can_be_read(view: SchedulerView, adapter: AdapterView) -> bool:
    """Whether the CPU cache has room for it as it is."""
    return view.cpu_room > 0 and lacking(view, adapter) <= 0
