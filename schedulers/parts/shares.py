"""Shares of slots, sequences and KV blocks between tenants, for :mod:`aioengine.schedulers.parts.compose`.

If n tenants want some, each tenant's share is an n-th, at least one. A waiting tenant with less than its
share takes at once from a tenant with more: running requests of the tenant with the most are preempted for
it, the last admitted first. A preempted request keeps its output and its turn, and the KV that the prefix
cache still holds. The next preemption comes only after twice the steps that are needed to compute the last
one's tokens again, so that most steps make progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, islice, takewhile
from typing import NamedTuple

from aioengine.schedulers.parts.base import Ordering, Replacement
from aioengine.schedulers.parts.clients import Client, Clients, Waiting, rank
from aioengine.schedulers.parts.slot_pool import lacking
from aioengine.schedulers.parts.spare_slots import HeldSlot, RoomByBytes, SpareSlots, slot_of
from aioengine.schedulers.policy import (
    AdapterView,
    Location,
    Place,
    RequestView,
    SchedulerView,
)

SCAN_LIMIT = 128
"""Maximum cold adapters that one decision examines, each once for each tenant that waits for it."""
LOOKAHEAD = 32
"""Maximum cold adapters that it examines where no slot is available."""
TENANTS_LIMIT, OLDEST = 32, 4
"""Number of tenants that it examines, and of the longest waiting adapters whose tenants it examines, too."""
LOOKS = 24
"""Number of slots that it examines for one of them before it examines all; only turns by age need all."""
MAKE_WAY_LIMIT = 2
"""Number of them for which it examines the slots of other tenants."""


class SlotChanges(NamedTuple):
    """Decision about the slots."""

    place: list[Place]
    read: list[str]
    """Adapters to read, because a slot is available for them."""
    closed: set[str | None]
    """Adapters whose slots admit no requests, so that they become idle."""
    preempt: list[str]
    """Requests to preempt at once."""
    evict: list[str]
    """Adapters that may leave their slots for those in ``place``."""
    cold: list[str]
    """Examined adapters that wait for a slot, in the order of turns."""


class _Counts(dict[Client, int]):
    """Counts of clients that change during a decision."""

    def __init__(self, of: Callable[[Client], int]) -> None:
        self._of = of

    def __missing__(self, client: Client) -> int:
        return self._of(client)


class Shares:
    """Gives tenants the guarantees of ``order.sharing``."""

    def __init__(self, order: Ordering, max_wait: float) -> None:
        self.clients = Clients(lambda request: request.tenant, only_several=True)
        self._order = order
        self._max_wait = max_wait
        self._equal = order.sharing == "equal"
        self._next_step = 0
        """Step before which no request is preempted."""
        self._refused: dict[str, int] = {}
        """Number of consecutive decisions that placed each adapter, where slots share a memory by bytes."""
        self._asked: set[str] = set()
        """Adapters whose reads the last decision asked for."""
        self._computed: dict[str | None, int] = {}
        """Computed tokens of the running requests by adapter, once a decision has asked for them."""

    # Sequences and KV blocks

    def admit(
        self, view: SchedulerView, names: Sequence[str | None], seqs: int, gone: Sequence[str]
    ) -> tuple[list[RequestView], list[str]]:
        """Return the requests to admit for these adapters, and those to preempt for the first of them.

        ``seqs`` counts the free sequences once those in ``gone`` are preempted.
        """
        self.clients.set_open(set(names))
        if self._equal:
            chosen = self._in_turn(self.clients.open, max(seqs, 1))
        else:
            chosen = self._of_who_has_none(self.clients.open, max(seqs, 1))
            if seqs > len(chosen):
                ids = {request.request_id for request in chosen}
                chosen += [r for r in self._order.admit(view, names, seqs) if r.request_id not in ids]
        victims = self._make_room(view, chosen[0], seqs, gone) if chosen else []
        return chosen[: max(0, seqs + len(victims))], victims

    def _in_turn(self, names: AbstractSet[str | None], limit: int) -> list[RequestView]:
        """Yield, one after the other, the oldest request of the tenant with the fewest running ones; yielded
        requests count as running."""
        ranked = iter(self.clients.ready)
        following = next(ranked, None)
        heap: list[tuple[int, int, float, int, Iterator[Waiting]]] = []
        chosen: list[RequestView] = []
        while len(chosen) < limit:
            if following is not None and (not heap or rank(following) < heap[0][:4]):
                heappush(heap, (*rank(following), following.waiting_for(names)))
                following = next(ranked, None)
            elif heap:
                running, turn, arrival, number, waiting = heap[0]
                entry = next(waiting, None)
                if entry is None:
                    heappop(heap)
                else:
                    chosen.append(entry.request)
                    heapreplace(heap, (running + 1, turn, arrival, number, waiting))
            else:
                break
        return chosen

    def _of_who_has_none(self, names: AbstractSet[str | None], limit: int) -> list[RequestView]:
        """Return the oldest request of each tenant without a running request, in turn, if the ordering lets
        it go first."""
        firsts = (
            next(client.waiting_for(names)).request
            for client in takewhile(lambda client: not client.running, self.clients.ready)
        )
        return list(islice(filter(self._order.may_go_first, firsts), limit))

    def _make_room(
        self, view: SchedulerView, request: RequestView, seqs: int, gone: Sequence[str]
    ) -> list[str]:
        """Return the requests to preempt so that ``request`` can be admitted.

        Empty if it fits, if its tenant has its share, or if it needs more than the others have beyond theirs.
        """
        need = -(-(request.prompt_tokens + request.output_tokens) // view.block_size)
        blocks = view.free_blocks
        if (seqs >= 1 and blocks >= need) or view.step < self._next_step:
            return []
        client, count = self.clients.of(request), len(self.clients.by_name)
        places = len(view.running) - len(gone) + seqs
        share = max(1, places // count)
        if len(client.running) >= (share if self._equal else 1):
            return []
        if seqs < 1 and max(self.clients.running_counts) <= share:
            return []  # nobody has too many
        running = [r for r in view.running if r.request_id not in gone]
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

    def assign_slots(
        self, view: SchedulerView, replace: Replacement, settling: set[str | None]
    ) -> SlotChanges:
        """Assign slots to cold adapters in turns: first those of the tenant with the fewest slots."""
        changes = SlotChanges([], [], set(), [], [], [])
        self._computed = {}
        names = [slot.adapter for slot in view.slots]
        self.clients.set_slots(names)
        spare = SpareSlots(view, replace, names, self.clients)
        held = _Counts(lambda client: client.held)
        claims = _Counts(lambda client: client.held)  # with the slots that they will have after the reads
        share = self._slot_share(view) if self._equal else 1
        taken = spare.taken
        tries, asked = MAKE_WAY_LIMIT, set[str]()
        load_room = view.load_room
        waiting: dict[str, int] = {}
        for client, entry, name in self._cold(view):
            changes.cold.append(name)
            idle = spare.has_any()
            reads = len(changes.read) < load_room
            if not (idle or (len(changes.cold) <= LOOKAHEAD and (reads or tries))):
                break
            adapter = view.adapters[name]
            location = adapter.location
            under = claims[client] < share
            refused = self._refused.get(name, 0) if location is Location.CPU else 0
            if location is Location.CPU and idle and not refused and (room := spare.take(name)) is not None:
                changes.place.append(room[0])
                changes.evict.extend(room[1])
                claims[client] += 1
                continue
            if location is Location.DISK:
                if not reads or not (under or idle):
                    continue  # reading comes first
                changes.read.append(name)
                asked.add(name)
                if name not in self._asked or _can_be_read(view, adapter):
                    claims[client] += 1
                    continue
                # There was no room for it in the CPU cache: a slot's adapter must leave the cache, too.
            if location is Location.LOADING:
                claims[client] += 1
                continue
            if tries == 0:
                continue
            tries -= 1
            missing = lacking(view, adapter)
            by_bytes = RoomByBytes(view, spare, name, refused) if view.memory.elastic else None
            while found := self._choose(view, client, entry, held, share, under, settling, taken):
                taken.add(found.name)
                for user in found.users:
                    held[user] -= 1
                missing -= view.adapters[found.name].bytes
                if by_bytes is not None:
                    by_bytes.add(found)
                    if missing <= 0 and by_bytes.missing <= 0:
                        break
                    continue
                if found.slot.running == 0 or under:
                    changes.preempt.extend(self._empty(view, found))
                    changes.place.append(Place(name, found.slot.index))
                    claims[client] += 1
                else:
                    changes.closed.add(found.name)
                if missing <= 0:
                    break
            if by_bytes is not None and (by_bytes.found or refused):
                self._make_way(view, changes, by_bytes, under)
                claims[client] += 1
                if refused:
                    waiting[name] = refused
        if view.memory.elastic:
            again = {item.adapter: self._refused.get(item.adapter, -1) + 1 for item in changes.place}
            self._refused = {**waiting, **again}
        self._asked = asked
        return changes

    def _make_way(self, view: SchedulerView, changes: SlotChanges, room: RoomByBytes, under: bool) -> None:
        """Empty the slots that were found, or close them until they are idle. They are closed even if they
        are too few: by its turn, the adapter gets the memory that becomes free."""
        changes.evict.extend(room.evict)
        if (room.missing <= 0 or room.refused) and (
            under or all(found.slot.running == 0 for found in room.found)
        ):
            for found in room.found:
                changes.preempt.extend(self._empty(view, found))
                changes.evict.append(found.name)
            changes.place.append(Place(room.name))
        else:
            changes.closed.update(found.name for found in room.found)

    def _slot_share(self, view: SchedulerView) -> int:
        users = max(self.clients.using_adapters, 1)
        if len(view.slots) < 2 * users:
            return 1
        pinned = sum([slot.pinned for slot in view.slots])
        return max(1, (len(view.slots) - pinned) // users)

    def _cold(self, view: SchedulerView) -> Iterator[tuple[Client, Waiting, str]]:
        """Yield (tenant, its oldest request, adapter) of the adapters in no slot, each once:

        each time the oldest of the tenant with the fewest slots, assigned ones included.
        """
        in_slots = self.clients.in_slots.keys()
        candidates = dict.fromkeys(islice(self.clients.cold, TENANTS_LIMIT))
        for waited_for in islice(view.waiting_adapters, OLDEST):
            candidates |= dict.fromkeys(islice(self.clients.waiting_for(waited_for), OLDEST))
        heap: list[tuple[int, Waiting, str, Client, Iterator[tuple[Waiting, str]]]] = []
        for client in candidates:
            cold = client.cold(in_slots)
            first = next(cold, None)
            if first is not None:
                heap.append((client.held, *first, client, cold))
        heapify(heap)
        seen: set[str] = set()
        for _ in range(SCAN_LIMIT):
            if not heap:
                return
            turns, entry, name, client, cold = heap[0]
            new = name not in seen
            if new:
                seen.add(name)
                yield client, entry, name
            next_one = next(cold, None)
            if next_one is None:
                heappop(heap)
            else:
                heapreplace(heap, (turns + new, *next_one, client, cold))

    def _choose(
        self,
        view: SchedulerView,
        client: Client,
        entry: Waiting,
        held: _Counts,
        share: int,
        under: bool,
        settling: set[str | None],
        taken: set[str],
    ) -> HeldSlot | None:
        """Choose the slot for a tenant's adapter: an idle slot, else the slot with the least computed
        tokens."""
        aged = view.now - entry.arrival >= self._max_wait
        may_preempt = view.step >= self._next_step
        clients = self.clients
        rich = max(clients.holding) > share
        if not (aged or (under and rich)):
            return None

        def can_be_had(name: str) -> HeldSlot | None:
            users = tuple(clients.users(name))
            least = held[users[0]] if len(users) == 1 else min((held[u] for u in users), default=share + 1)
            settled = name not in settling
            if not under:  # as among the requests of one tenant: by age
                if not (least > share or users == (client,)):
                    return None
                oldest = view.adapters[name].oldest_arrival
                if oldest is not None and oldest <= entry.arrival:
                    return None
                if not settled and name not in clients.idle:
                    return None
            # No tenant has more than its share, so there are more tenants than slots: they take turns.
            elif (
                client in users
                or not (least > share or (aged and settled and least == share))
                or (not may_preempt and name not in clients.idle)
            ):
                return None
            slot = slot_of(view, view.adapters[name])
            return None if slot is None else HeldSlot(slot, name, users)

        def among(names: Iterable[str | None]) -> list[HeldSlot]:
            fresh = (name for name in names if name in clients.in_slots and name not in taken)
            return [found for name in fresh if name is not None and (found := can_be_had(name))]

        rich_ones = clients.in_slots_of_who_has_more(share) if rich and (may_preempt or not under) else ()
        near = chain(() if under else client.runs_on, clients.idle, rich_ones)
        able = among(dict.fromkeys(islice(near, LOOKS)))
        if not able and under and aged and may_preempt:
            able = among(name for name in clients.in_slots if name not in settling)
        if len(able) > 1 and any(other.slot.running for other in able):
            computed = self._computed = self._computed or _computed_tokens(view)
            return min(able, key=lambda o: (computed.get(o.name, 0), o.slot.last_used))
        return min(able, key=lambda o: o.slot.last_used, default=None)

    def _empty(self, view: SchedulerView, found: HeldSlot) -> list[str]:
        """Preempt the requests that run in a slot."""
        if found.slot.running == 0:
            return []
        return self._preempt(view, [r for r in view.running if r.adapter == found.name])


def _computed_tokens(view: SchedulerView) -> dict[str | None, int]:
    computed: dict[str | None, int] = {}
    for request in view.running:
        name = request.adapter
        computed[name] = computed.get(name, 0) + request.computed_tokens
    return computed


def _can_be_read(view: SchedulerView, adapter: AdapterView) -> bool:
    """Whether the CPU cache has room for the adapter without an eviction."""
    return view.cpu_room > 0 and lacking(view, adapter) <= 0
