"""Bounds on waiting requests: which are accepted, which are refused, and which are displaced.

A bound over all tenants is shared fairly. When it is reached, a new request of a tenant with fewer waiting
requests displaces the newest one of the tenant with the most, so a tenant that fills the queue cannot shut
the others out. With a single tenant, or none named, new requests are refused. Every change takes constant
time.

A bound on the tokens of their prompts is shared in equal parts. A tenant may have all of it while nobody else
waits; when others come, the newest requests of those that have more than their part are displaced. One
request of each tenant is always accepted, or else a long prompt would never be. Such a change takes
O(log tenants).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import inf

from sortedcontainers import SortedSet

from aioengine.errors import Bound, EngineOverloaded

Tenant = str | None


class Ticket:
    """A request's waiting place, held from before its prompt is tokenized until it first runs."""

    __slots__ = ("_room", "adapters", "displaced", "tenant")

    def __init__(self, tenant: Tenant, adapters: Sequence[str], room: WaitingRoom) -> None:
        self.tenant = tenant
        self.adapters = adapters
        self.displaced: Callable[[EngineOverloaded, float], None] = lambda error, now: None
        """Called with the reason and the time when another tenant's request displaces this one."""
        self._room = room

    def leave(self) -> None:
        """Give the place back; safe to call again."""
        self._room.leave(self)


class WaitingRoom:
    """Places for waiting requests: ``max_waiting`` in all, and as many for each tenant and each adapter. A
    request for a mix counts for each of its adapters.

    None is no bound. Preempted requests count in all, but are never displaced, because their callers already
    have the first tokens.
    """

    def __init__(
        self,
        max_waiting: int | None,
        max_per_tenant: int | None = None,
        max_per_adapter: int | None = None,
        *,
        max_tokens: int | None = None,
        max_tokens_per_tenant: int | None = None,
    ) -> None:
        self.max_waiting = max_waiting
        self.max_per_tenant = max_per_tenant
        self.max_per_adapter = max_per_adapter
        self.max_tokens = max_tokens
        self.max_tokens_per_tenant = max_tokens_per_tenant
        self.max_of_tenant: Mapping[str, int] = {}
        """Bounds of single tenants, which take precedence over ``max_per_tenant``; may be replaced at any
        time."""
        self.returned = 0
        """Preempted requests that wait again."""
        self._all = _Places()
        self._of_adapter: dict[str, _Places] = {}
        self._tokens = _Tokens()

    @property
    def tokens(self) -> int:
        """Prompt tokens of the requests that have a place, as far as they are counted."""
        return self._tokens.total

    def __len__(self) -> int:
        return len(self._all) + self.returned

    def enter(self, tenant: Tenant, adapters: Sequence[str], now: float, tokens: int | None = None) -> Ticket:
        """Take a place for a request of ``tenant`` for ``adapters`` (different names; none: the base model).

        ``tokens`` is the length of its prompt; None if it is not known yet (then :meth:`weigh` follows).
        Raises EngineOverloaded, which says which bound is reached.
        """
        if tokens is not None:
            self.check_tokens(tenant, tokens)
        own = self.max_per_tenant
        if tenant is not None:
            own = self.max_of_tenant.get(tenant, own)
        has = self._all.count(tenant)
        if own is not None and has >= own:
            text = f"{has} requests of tenant {tenant!r} are waiting, and it may have {own}; retry later, or "
            raise EngineOverloaded(f"{text}raise max_waiting_per_tenant", bound="tenant", waiting=has)
        victims: dict[Ticket, str] = {}
        most = inf if self.max_per_adapter is None else self.max_per_adapter
        for adapter in adapters:
            places = self._of_adapter.get(adapter, _NO_PLACES)
            if len(places) - sum(adapter in victim.adapters for victim in victims) >= most:
                named = f"max_waiting_per_adapter={most} requests wait for {adapter!r}"
                victims[_displaced_by(tenant, places, named, "adapter", len(places), adapter)] = named
        if self.max_waiting is not None and len(self) - len(victims) >= self.max_waiting:
            named = f"{len(self)} requests are waiting and max_waiting={self.max_waiting}"
            places = _NO_PLACES if victims else self._all
            victims[_displaced_by(tenant, places, named, "server", len(self))] = named
        for victim, named in victims.items():
            text = f"{named}; tenant {victim.tenant!r} has most, so another tenant's took this one's place"
            self._displace(victim, text, now)
        ticket = Ticket(tenant, adapters, self)
        self._all.add(ticket)
        for adapter in adapters if most < inf else ():
            self._of_adapter.setdefault(adapter, _Places()).add(ticket)
        if tokens is not None:
            self._tokens.add(ticket, tokens)
            self._share_tokens(ticket, now)
        return ticket

    def weigh(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Count the tokens of a request's prompt, once they are known; does nothing without a place.

        Raises EngineOverloaded, which says which bound is reached; the ticket keeps its place.
        """
        if self._all.has(ticket):
            self.check_tokens(ticket.tenant, tokens)
            self._tokens.add(ticket, tokens)
            self._share_tokens(ticket, now)

    def check_tokens(self, tenant: Tenant, tokens: int) -> None:
        """Raise EngineOverloaded if the bounds on tokens refuse a prompt of this length, whomever it could
        displace."""
        has = self._tokens.of(tenant)
        if has is None:
            return
        named = f"prompts of {has} tokens of tenant {tenant!r} are waiting"
        own = self.max_tokens_per_tenant
        if own is not None and has + tokens > own:
            text = f"{named}, and {tokens} more exceed max_waiting_tokens_per_tenant={own}"
            count = self._all.count(tenant)
            raise EngineOverloaded(f"{text}; retry later, or raise it", bound="tenant", waiting=count)
        most = self.max_tokens
        if most is not None and self.tokens + tokens > most and has + tokens > most / len(self._tokens):
            text = f"{named}, and {tokens} more exceed its part of max_waiting_tokens={most}"
            bound: Bound = "server" if len(self._tokens) == 1 else "tenant"
            count = len(self) if bound == "server" else self._all.count(tenant)
            raise EngineOverloaded(f"{text}; retry later, or raise it", bound=bound, waiting=count)

    def _share_tokens(self, newcomer: Ticket, now: float) -> None:
        """Displace what makes the prompts too long, except the newcomer."""
        most = self.max_tokens
        if most is None or self.tokens <= most:
            return
        part = most / len(self._tokens)
        while self.tokens > most and (victim := self._tokens.to_displace(part, newcomer)) is not None:
            text = f"prompts of more than max_waiting_tokens={most} tokens are waiting; tenant "
            text += f"{victim.tenant!r} has more than its part, and another's took this one's place"
            self._displace(victim, text, now)

    def _displace(self, victim: Ticket, text: str, now: float) -> None:
        victim.leave()
        count = self._all.count(victim.tenant)
        victim.displaced(EngineOverloaded(f"{text}; retry later", bound="tenant", waiting=count), now)

    def leave(self, ticket: Ticket) -> None:
        """Give the ticket's place back, if it has one."""
        self._tokens.remove(ticket)
        if not self._all.remove(ticket):
            return
        for adapter in ticket.adapters:
            places = self._of_adapter.get(adapter, _NO_PLACES)
            if places.remove(ticket) and not places:
                del self._of_adapter[adapter]

    def check(self) -> None:
        """Assert that all counts agree."""
        for places in (self._all, *self._of_adapter.values()):
            places.check()
        assert all(self._of_adapter.values())
        if self.max_per_adapter is not None:
            named = Counter(adapter for ticket in self._all.tickets() for adapter in ticket.adapters)
            assert named == {adapter: len(places) for adapter, places in self._of_adapter.items()}
        self._tokens.check()


class _Places:
    """Tickets under one bound, by tenant; and the tenants by how many they have."""

    def __init__(self) -> None:
        self._of: dict[Tenant, OrderedDict[Ticket, None]] = {}
        self._having: dict[int, OrderedDict[Tenant, None]] = {}
        self._most = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def count(self, tenant: Tenant) -> int:
        return len(self._of.get(tenant, ()))

    def has(self, ticket: Ticket) -> bool:
        return ticket in self._of.get(ticket.tenant, ())

    def tickets(self) -> list[Ticket]:
        return [ticket for own in self._of.values() for ticket in own]

    def add(self, ticket: Ticket) -> None:
        own = self._of.setdefault(ticket.tenant, OrderedDict())
        own[ticket] = None
        self._size += 1
        self._moved(ticket.tenant, len(own) - 1, len(own))
        self._most = max(self._most, len(own))

    def remove(self, ticket: Ticket) -> bool:
        """Remove a ticket; returns whether it was here."""
        own = self._of.get(ticket.tenant)
        if own is None or ticket not in own:
            return False
        del own[ticket]
        self._size -= 1
        if not own:
            del self._of[ticket.tenant]
        self._moved(ticket.tenant, len(own) + 1, len(own))
        if self._most not in self._having:
            self._most = len(own)  # this was the only tenant with that many
        return True

    def to_displace(self, tenant: Tenant) -> Ticket | None:
        """Return the newest ticket of the tenant with the most, if ``tenant`` would still have no more than
        that tenant."""
        if self.count(tenant) + 1 >= self._most:
            return None
        return next(reversed(self._of[next(reversed(self._having[self._most]))]))

    def _moved(self, tenant: Tenant, before: int, after: int) -> None:
        if before > 0:
            del self._having[before][tenant]
            if not self._having[before]:
                del self._having[before]
        if after > 0:
            self._having.setdefault(after, OrderedDict())[tenant] = None

    def check(self) -> None:
        assert self._size == sum(map(len, self._of.values()))
        assert self._most == max(map(len, self._of.values()), default=0)
        counts = {tenant: count for count, tenants in self._having.items() for tenant in tenants}
        assert counts == {tenant: len(own) for tenant, own in self._of.items()}


_NO_PLACES = _Places()


class _Tokens:
    """Prompt tokens of tickets, by tenant; and the tenants with several tickets by their tokens."""

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[Tenant, OrderedDict[Ticket, int]] = {}
        self._sums: dict[Tenant, int] = {}
        self._several: SortedSet[tuple[int, str]] | None = None
        """(tokens, tenant): those that still have a request if one is displaced. None until that is asked."""

    def __len__(self) -> int:
        """Number of tenants."""
        return len(self._of)

    def of(self, tenant: Tenant) -> int | None:
        """Return a tenant's tokens; None if it has no ticket."""
        return self._sums.get(tenant)

    def add(self, ticket: Ticket, tokens: int) -> None:
        own = self._of.setdefault(ticket.tenant, OrderedDict())
        own[ticket] = tokens
        self._changed(ticket.tenant, len(own) - 1, tokens)

    def remove(self, ticket: Ticket) -> None:
        own = self._of.get(ticket.tenant)
        if own is None or ticket not in own:
            return
        tokens = own.pop(ticket)
        self._changed(ticket.tenant, len(own) + 1, -tokens)
        if not own:
            del self._of[ticket.tenant], self._sums[ticket.tenant]

    def to_displace(self, part: float, newcomer: Ticket) -> Ticket | None:
        """Return the newest ticket of the tenant with the most tokens, if these are more than ``part`` and it
        has another ticket."""
        if self._several is None:
            self._several = SortedSet(self._having_several())
        if not self._several or self._several[-1][0] <= part:
            return None
        own = self._of[self._several[-1][1] or None]
        return None if newcomer in own else next(reversed(own))

    def _changed(self, tenant: Tenant, tickets_before: int, tokens: int) -> None:
        self.total += tokens
        before = self._sums.get(tenant, 0)
        self._sums[tenant] = before + tokens
        if self._several is None:
            return
        if tickets_before > 1:
            self._several.remove((before, tenant or ""))
        if len(self._of[tenant]) > 1:
            self._several.add((before + tokens, tenant or ""))

    def _having_several(self) -> list[tuple[int, str]]:
        return [(self._sums[tenant], tenant or "") for tenant, own in self._of.items() if len(own) > 1]

    def check(self) -> None:
        assert self._sums == {tenant: sum(own.values()) for tenant, own in self._of.items()}
        assert self.total == sum(self._sums.values())
        assert self._several is None or list(self._several) == sorted(self._having_several())


def _displaced_by(
    newcomer: Tenant, places: _Places, named: str, bound: Bound, waiting: int, adapter: str | None = None
) -> Ticket:
    """Choose the ticket that the new request displaces. Raises EngineOverloaded if there is none."""
    ticket = places.to_displace(newcomer)
    if ticket is None:
        text = f"{named}; retry later, or raise this bound"
        raise EngineOverloaded(text, bound=bound, waiting=waiting, adapter=adapter)
    return ticket
