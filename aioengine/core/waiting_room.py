"""Bounds on waiting requests: which are accepted, which are refused, and which are displaced.

A bound over all tenants is shared fairly. When it is reached, a new request of a tenant with fewer waiting
requests displaces the newest one of the tenant with the most, so a tenant that fills the queue cannot shut
the others out. With a single tenant, or none named, new requests are refused.

A bound on the tokens of their prompts is shared in equal parts. A tenant may have all of it while nobody else
waits; when others come, the newest requests of those that have more than their part are displaced. One
request of each tenant is always accepted, or else a long prompt would never be.

Every change takes O(log tenants).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import inf

from sortedcontainers import SortedDict

from aioengine.core.limits import CoreLimits
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
    """Places for waiting requests: ``max_waiting`` in all, and as many for each tenant and each adapter as
    the limits say. A request for a mix counts for each of its adapters.

    None is no bound. Preempted requests count in all, but are never displaced, because their callers already
    have the first tokens.
    """

    def __init__(self, limits: CoreLimits) -> None:
        self.max_waiting = limits.max_waiting
        self.max_per_tenant = limits.max_waiting_per_tenant
        self.max_per_adapter = limits.max_waiting_per_adapter
        self.max_tokens = limits.max_waiting_tokens
        self.max_tokens_per_tenant = limits.max_waiting_tokens_per_tenant
        self.max_of_tenant: Mapping[str, int] = {}
        """Bounds of single tenants, which take precedence over ``max_per_tenant``; may be replaced at any
        time."""
        self.returned = 0
        """Preempted requests that wait again."""
        self._all = _Shares()
        self._of_adapter: dict[str, _Shares] = {}
        self._tokens = _Shares()

    @property
    def tokens(self) -> int:
        """Prompt tokens of the requests that have a place, as far as they are counted."""
        return self._tokens.total

    def __len__(self) -> int:
        return self._all.total + self.returned

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
            places = self._of_adapter.get(adapter, _NOBODY)
            if places.total - sum(adapter in victim.adapters for victim in victims) >= most:
                named = f"max_waiting_per_adapter={most} requests wait for {adapter!r}"
                victims[_displaced_by(tenant, places, named, "adapter", places.total, adapter)] = named
        if self.max_waiting is not None and len(self) - len(victims) >= self.max_waiting:
            named = f"{len(self)} requests are waiting and max_waiting={self.max_waiting}"
            places = _NOBODY if victims else self._all
            victims[_displaced_by(tenant, places, named, "server", len(self))] = named
        for victim, named in victims.items():
            text = f"{named}; tenant {victim.tenant!r} has most, so another tenant's took this one's place"
            self._displace(victim, text, now)
        ticket = Ticket(tenant, adapters, self)
        self._all.add(ticket)
        for adapter in adapters if most < inf else ():
            self._of_adapter.setdefault(adapter, _Shares()).add(ticket)
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
        if not self._tokens.count(tenant):
            return
        has, tenants = self._tokens.of(tenant), self._tokens.tenants
        named = f"prompts of {has} tokens of tenant {tenant!r} are waiting"
        own = self.max_tokens_per_tenant
        if own is not None and has + tokens > own:
            text = f"{named}, and {tokens} more exceed max_waiting_tokens_per_tenant={own}"
            count = self._all.count(tenant)
            raise EngineOverloaded(f"{text}; retry later, or raise it", bound="tenant", waiting=count)
        most = self.max_tokens
        if most is not None and self.tokens + tokens > most and has + tokens > most / tenants:
            text = f"{named}, and {tokens} more exceed its part of max_waiting_tokens={most}"
            bound: Bound = "server" if tenants == 1 else "tenant"
            count = len(self) if bound == "server" else self._all.count(tenant)
            raise EngineOverloaded(f"{text}; retry later, or raise it", bound=bound, waiting=count)

    def _share_tokens(self, newcomer: Ticket, now: float) -> None:
        """Displace what makes the prompts too long, except the newcomer."""
        most = self.max_tokens
        if most is None or self.tokens <= most:
            return
        part = most / self._tokens.tenants
        while self.tokens > most and self._tokens.largest[0] > part:
            victim = self._tokens.newest_of_largest()
            if victim.tenant == newcomer.tenant:
                break
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
        self._all.remove(ticket)
        for adapter in ticket.adapters:
            places = self._of_adapter.get(adapter, _NOBODY)
            places.remove(ticket)
            if places is not _NOBODY and not places.total:
                del self._of_adapter[adapter]

    def check(self) -> None:
        """Assert that all counts agree."""
        for shares in (self._all, self._tokens, *self._of_adapter.values()):
            shares.check()
        assert all(places.total for places in self._of_adapter.values())
        if self.max_per_adapter is not None:
            named = Counter(adapter for ticket in self._all.tickets() for adapter in ticket.adapters)
            assert named == {adapter: places.total for adapter, places in self._of_adapter.items()}


class _Shares:
    """Tickets under one bound, each with what it counts for, by tenant; and the tenants with several tickets
    by what these count for. Only such a tenant still has a request if one is displaced."""

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[Tenant, OrderedDict[Ticket, int]] = {}
        self._sums: dict[Tenant, int] = {}
        self._several: SortedDict[tuple[int, str], Tenant] | None = None
        """None until that is asked."""

    @property
    def tenants(self) -> int:
        """Number of tenants that have a ticket."""
        return len(self._of)

    def count(self, tenant: Tenant) -> int:
        """Return the number of a tenant's tickets."""
        return len(self._of.get(tenant, ()))

    def of(self, tenant: Tenant) -> int:
        """Return what a tenant's tickets count for."""
        return self._sums.get(tenant, 0)

    def has(self, ticket: Ticket) -> bool:
        return ticket in self._of.get(ticket.tenant, ())

    def tickets(self) -> list[Ticket]:
        return [ticket for own in self._of.values() for ticket in own]

    def add(self, ticket: Ticket, weight: int = 1) -> None:
        self._change(ticket, weight)

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket, if it is here."""
        if self.has(ticket):
            self._change(ticket, None)

    @property
    def largest(self) -> tuple[int, str]:
        """What the tickets of the tenant with the most count for, and its name."""
        if self._several is None:
            self._several = SortedDict(self._having_several())
        found: tuple[int, str] = self._several.peekitem()[0] if self._several else (0, "")
        return found

    def newest_of_largest(self) -> Ticket:
        """Return the newest ticket of that tenant."""
        assert self._several
        return next(reversed(self._of[self._several[self.largest]]))

    def _change(self, ticket: Ticket, weight: int | None) -> None:
        tenant = ticket.tenant
        own, before = self._of.setdefault(tenant, OrderedDict()), self.of(tenant)
        if self._several is not None and len(own) > 1:
            del self._several[before, repr(tenant)]
        if weight is None:
            weight = -own.pop(ticket)
        else:
            own[ticket] = weight
        self.total += weight
        self._sums[tenant] = before + weight
        if not own:
            del self._of[tenant], self._sums[tenant]
        elif self._several is not None and len(own) > 1:
            self._several[before + weight, repr(tenant)] = tenant

    def _having_several(self) -> dict[tuple[int, str], Tenant]:
        return {(self._sums[who], repr(who)): who for who, own in self._of.items() if len(own) > 1}

    def check(self) -> None:
        assert self._sums == {tenant: sum(own.values()) for tenant, own in self._of.items()}
        assert all(self._of.values()) and self.total == sum(self._sums.values())
        assert self._several is None or dict(self._several) == self._having_several()


_NOBODY = _Shares()


def _displaced_by(
    newcomer: Tenant, places: _Shares, named: str, bound: Bound, waiting: int, adapter: str | None = None
) -> Ticket:
    """Choose the ticket that the new request displaces: the newest of the tenant with the most, if the
    newcomer's tenant would still have no more than that tenant. Raises EngineOverloaded if there is none."""
    if places.count(newcomer) + 1 >= places.largest[0]:
        text = f"{named}; retry later, or raise this bound"
        raise EngineOverloaded(text, bound=bound, waiting=waiting, adapter=adapter)
    return places.newest_of_largest()
