"""Equal shares for tenants, first come, first served among the requests of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from heapq import heapify, heappop, heapreplace, nsmallest
from math import inf
from operator import attrgetter
from typing import NamedTuple

from aioengine.schedulers.parts.clients import Client, Clients, in_turn
from aioengine.schedulers.policies.fcfs import (
    BUSY,
    FCFS,
    LOOKAHEAD,
    SETTLING,
    SLOT_BOUND,
    UNWANTED,
    HeldSlot,
    SlotPlan,
)
from aioengine.schedulers.policy import (
    AdapterView,
    Decision,
    Location,
    Place,
    PolicyEvent,
    RequestView,
    SchedulerView,
)

TENANTS_LIMIT = 32  # tenants whose cold adapters one decision examines, those with the fewest slots first
SCAN_LIMIT = 128  # adapters that it examines
MAKE_WAY_LIMIT = 2  # adapters for which it takes slots from other tenants
_adapter_of = attrgetter("adapter")


class Fair(FCFS):
    """Gives each tenant an equal share of the running places, the slots and the KV blocks, and serves the
    requests of one tenant in the order of their arrival.

    The next request that starts is the oldest of the tenant with the fewest running ones; the next adapter
    that gets a slot is one of the tenant with the fewest. If n tenants want some, the share of each is an
    n-th, at least one. A waiting tenant with less takes at once from the tenant with the most, whose running
    requests are preempted, the last admitted first; they keep their output and their turn. The next
    preemption comes only after twice the steps that it takes to compute the last one's tokens again. If there
    are more tenants than slots, they take turns: a slot is kept for 2 ``max_wait``. Requests without a tenant
    count as one tenant's, and with one tenant everything is as with ``fcfs``.

    Args:
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    source = "aioengine's own"
    starvation_bound = (
        "a tenant with less than its share: a step, a read and one longest prompt; else "
        f"{SLOT_BOUND}; then those of its tenant who arrived before it"
    )

    def __init__(self, max_wait: float = 1.0) -> None:
        super().__init__(max_wait)
        self.tenants = Clients(lambda request: request.tenant)
        self._preempts_from = 0
        """Step from which on requests may be preempted."""
        self._asked: set[str] = set()
        """Adapters whose reads the last decision asked for."""

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        self.tenants.on_event(event)

    def schedule(self, view: SchedulerView) -> Decision:
        self.tenants.sync(view)
        if len(self.tenants.by_name) < 2 or not len(view.waiting):
            return super().schedule(view)
        use = _Use(view, self.tenants)
        plan, read, preempt = self._give_slots(view, use)
        seqs = view.free_seqs + len(preempt)
        clients = [client for client in self.tenants.by_name.values() if client.queues]
        ranked = [(len(client.running), client.turn, client) for client in clients]
        ranked.sort(key=lambda rank: rank[:2])
        admit = in_turn(ranked, plan.open, max(seqs, 1), lambda client, request: 1)
        victims = self._make_room(view, admit[0], seqs, preempt) if admit else []
        admit = admit[: seqs + len(victims)]
        admit += plan.fill(seqs + len(victims) - len(admit))
        return Decision(
            admit=[request.request_id for request in admit],
            place=plan.place,
            prefetch=read[: view.load_room],
            preempt=[*preempt, *victims],
            evict=plan.evict,
        )

    # Running places and KV blocks

    def _make_room(
        self, view: SchedulerView, request: RequestView, seqs: int, gone: Sequence[str]
    ) -> list[str]:
        """Return the requests to preempt so that ``request`` can start; none if it fits, if its tenant has
        its share, or if it needs more than the others have beyond theirs."""
        need = -(-(request.prompt_tokens + request.output_tokens) // view.block_size)
        blocks = view.free_blocks
        if (seqs >= 1 and blocks >= need) or view.step < self._preempts_from:
            return []
        client, clients = self.tenants.of(request), self.tenants.by_name.values()
        running = {who: [r for r in who.running.values() if r.request_id not in gone] for who in clients}
        count, running_count = len(clients), sum(map(len, running.values()))
        share = max(1, (running_count + seqs) // count)
        if len(running[client]) >= share:
            return []
        size_of = {who: sum(_blocks(view, r) for r in rs) for who, rs in running.items()}
        block_share = (blocks + sum(size_of.values())) // count
        if blocks < need and size_of.pop(client, 0) + need > block_share:
            return []
        others = {who: rs for who, rs in running.items() if who is not client and rs}
        victims: list[RequestView] = []
        while others and (seqs < 1 or blocks < need):
            if seqs < 1:
                most = max(others, key=lambda who: len(others[who]))
                enough = len(others[most]) > share
            else:
                most = max(others, key=lambda who: size_of[who])
                enough = size_of[most] > block_share
            if not enough or not others[most]:
                return []
            victim = others[most].pop()
            victims.append(victim)
            seqs, blocks = seqs + 1, blocks + _blocks(view, victim)
            size_of[most] -= _blocks(view, victim)
        return self._preempt(view, victims) if seqs >= 1 and blocks >= need else []

    def _preempt(self, view: SchedulerView, victims: Sequence[RequestView]) -> list[str]:
        """Return their ids, and let steps go by before the next preemption, so that most make progress."""
        if victims:
            tokens = sum(victim.computed_tokens for victim in victims)
            step_tokens = max(1, view.free_tokens + len(view.running))
            self._preempts_from = view.step + 1 + 2 * (tokens // step_tokens)
        return [victim.request_id for victim in victims]

    # Slots

    def _give_slots(self, view: SchedulerView, use: _Use) -> tuple[SlotPlan, list[str], list[str]]:
        """Give slots to cold adapters in turns. Returns the plan, the adapters to read, and the requests that
        are preempted for others."""
        plan = SlotPlan(view, lambda slot, adapter: slot.last_used, self)
        read, preempt, tries = list[str](), list[str](), MAKE_WAY_LIMIT
        for number, cold in enumerate(_turns(view, self.tenants, use)):
            client, adapter, name = cold.client, cold.adapter, cold.adapter.name
            spare = plan.free or any(held.kind == UNWANTED for held in plan.held[:1])
            if number >= LOOKAHEAD and not spare:
                break
            if adapter.location is Location.LOADING:
                use.claims[client] += 1
                continue
            if adapter.location is Location.DISK:
                if len(read) >= view.load_room:
                    continue
                read.append(name)
                if name not in self._asked or plan.lack(adapter) <= 0:
                    use.claims[client] += 1
                    continue
                # There was no room for it in the CPU cache: a slot's adapter must leave the cache, too.
            else:
                unwanted = plan.find(adapter, (held for held in plan.held if held.kind == UNWANTED))
                if unwanted is not None:
                    plan.take(unwanted, adapter, now=True)
                    use.claims[client] += 1
                    continue
            if tries > 0:
                tries -= 1
                preempt += self._take_slots(view, use, plan, cold)
        self._asked = set(read)
        return plan, read, preempt

    def _take_slots(self, view: SchedulerView, use: _Use, plan: SlotPlan, cold: Cold) -> list[str]:
        """Give slots of other tenants to an adapter: at once if its tenant has less than its share, else when
        they are idle. Returns the requests that are preempted."""
        under = use.claims[cold.client] < use.share
        found = plan.find(cold.adapter, self._takable(view, use, plan, cold, under=under))
        if not found:
            return []
        use.claims[cold.client] += 1
        at_once = under or all(held.kind < BUSY for held in found)
        if cold.adapter.location is Location.CPU or not at_once:
            plan.take(found, cold.adapter, now=at_once)
        else:
            plan.place.append(Place(cold.adapter.name))  # the read begins
            plan.evict += [held.name for held in found]
        names = {held.name for held in found}
        return self._preempt(view, [r for r in view.running if at_once and r.adapter in names])

    def _takable(
        self, view: SchedulerView, use: _Use, plan: SlotPlan, cold: Cold, *, under: bool
    ) -> Iterator[HeldSlot]:
        """Yield the slots that a tenant's adapter may take, those first where the least is computed again."""
        for held in sorted(plan.held, key=lambda held: (use.computed[held.name], held.value)):
            if self._may_take(view, use, cold, held, under=under):
                yield held
                use.held.subtract(use.users_of(held.adapter))

    def _may_take(self, view: SchedulerView, use: _Use, cold: Cold, held: HeldSlot, *, under: bool) -> bool:
        """Whether a tenant's adapter gets this slot. ``under``: the tenant has less than its share."""
        users = use.users_of(held.adapter)
        least = min((use.held[user] for user in users), default=use.share + 1)
        aged = cold.request.arrival + self.take_after <= view.now
        settled = self.placed.get(held.name, -inf) <= view.now - self.stay
        if under:
            if cold.client in users or (held.kind >= BUSY and view.step < self._preempts_from):
                return False
            return least > use.share or (aged and settled and least == use.share)
        if not aged or held.oldest <= cold.request.arrival or held.kind == SETTLING:
            return False  # as among the requests of one tenant
        return least > use.share or users == {cold.client}


class Cold(NamedTuple):
    """A cold adapter, for the tenant whose turn it is."""

    client: Client
    request: RequestView
    """The first of the tenant's requests that wait for it."""
    adapter: AdapterView


class _Use:
    """What tenants use at the time of a decision."""

    def __init__(self, view: SchedulerView, tenants: Clients) -> None:
        self._view, self._tenants = view, tenants
        self._runs_on: dict[str | None, set[Client]] = {}
        users = 0
        for client in tenants.by_name.values():
            names = set(map(_adapter_of, client.running.values()))
            for name in names:
                self._runs_on.setdefault(name, set()).add(client)
            users += bool(names - {None} or client.queues.keys() - {None})
        self.held: Counter[Client] = Counter()
        """Slots whose adapters each tenant uses."""
        for slot in view.slots:
            if slot.adapter is not None:
                self.held.update(self.users_of(view.adapters[slot.adapter]))
        self.claims = self.held.copy()
        """The same, with slots that they are to get."""
        pinned = sum(slot.pinned for slot in view.slots)
        several = len(view.slots) >= 2 * users > 0
        self.share = max(1, (len(view.slots) - pinned) // users) if several else 1
        """Slots that each tenant may have at least."""

    def users_of(self, adapter: AdapterView) -> set[Client]:
        """Return the tenants that run on an adapter or, if none does, the one that has waited for it
        longest."""
        running = self._runs_on.get(adapter.name)
        if running is None and adapter.waiting:
            return {self._tenants.of(next(iter(self._view.waiting_for(adapter.name))))}
        return running or set()

    @cached_property
    def computed(self) -> Counter[str | None]:
        """Tokens that running requests on each adapter would have to compute again."""
        tokens = Counter[str | None]()
        for request in self._view.running:
            tokens[request.adapter] += request.computed_tokens
        return tokens


def _turns(view: SchedulerView, tenants: Clients, use: _Use) -> Iterator[Cold]:
    """Yield the cold adapters, each once: each time the one of the tenant with the fewest slots, those
    included that it is to get, that has been waited for longest."""
    heap: list[tuple[int, float, int, RequestView, Client, Iterator[RequestView]]] = []
    for number, client in enumerate(tenants.by_name.values()):
        requests = client.cold(view)
        first = next(requests, None)
        if first is not None:
            heap.append((use.held[client], first.arrival, number, first, client, requests))
    heap = nsmallest(TENANTS_LIMIT, heap)
    heapify(heap)
    seen: set[str] = set()
    while heap and len(seen) < SCAN_LIMIT:
        turns, _, number, request, client, requests = heap[0]
        name = request.adapter
        new = name is not None and name not in seen
        if name is not None and new:
            seen.add(name)
            yield Cold(client, request, view.adapters[name])
        following = next(requests, None)
        if following is None:
            heappop(heap)
        else:
            heapreplace(heap, (turns + new, following.arrival, number, following, client, requests))


def _blocks(view: SchedulerView, request: RequestView) -> int:
    return -(-request.computed_tokens // view.block_size)
