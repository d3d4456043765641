"""Bounds on waiting requests: which are accepted, which are refused, and which are displaced.

A bound over all tenants is shared fairly. When it is reached, a new request of a tenant with fewer waiting
requests displaces the newest one of the tenant with the most, so a tenant that fills the queue cannot shut
the others out. With a single tenant, or none named, new requests are refused.

A bound on the tokens of their prompts is shared in equal parts. A tenant may have all of it while nobody else
waits; when others come, the newest requests of those that have more than their part are displaced. One
request of each tenant is always accepted, or else a long prompt would never be.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from math import inf

from aioengine.core.limits import CoreLimits
from aioengine.errors import Bound, EngineOverloaded

Tenant = str | None


class Reservation:
    """A request's waiting place, held from before its prompt is tokenized until it first runs."""

    __slots__ = ("_room", "adapter", "displaced", "tenant")

    def __init__(self, tenant: Tenant, adapter: str | None, room: WaitingRoom) -> None:
        self.tenant = tenant
        self.adapter = adapter
        self.displaced: Callable[[EngineOverloaded, float], None] = lambda error, now: None
        """Called with the reason and the time when another tenant's request displaces this one."""
        self._room = room

    def leave(self) -> None:
        """Give the place back; safe to call again."""
        self._room.leave(self)


class WaitingRoom:
    """Places for waiting requests: ``max_waiting`` in all, and as many for each tenant as the limits say
    (None: no bound). Preempted requests count in all, but are never displaced, because their callers already
    have the first tokens."""

    def __init__(self, limits: CoreLimits) -> None:
        self.limits = limits
        """Their bounds on waiting requests hold; they may be replaced at any time."""
        self.max_of_tenant: Mapping[str, int] = {}
        """Bounds of single tenants, which take precedence over ``max_waiting_per_tenant``; may be replaced at
        any time."""
        self.returned = 0
        """Preempted requests that wait again."""
        self._all = _Shares()
        self._tokens = _Shares()

    @property
    def tokens(self) -> int:
        """Prompt tokens of the requests that have a place, as far as they are counted."""
        return self._tokens.total

    def __len__(self) -> int:
        return self._all.total + self.returned

    def enter(
        self, tenant: Tenant, adapter: str | None, now: float, tokens: int | None = None
    ) -> Reservation:
        """Take a place for a request of ``tenant``. ``tokens`` is the length of its prompt; None if it is not
        known yet (then :meth:`weigh` follows). Raises EngineOverloaded, which says which bound is reached."""
        if tokens is not None:
            self._check_tokens(tenant, tokens)
        own = self.limits.max_waiting_per_tenant
        if tenant is not None:
            own = self.max_of_tenant.get(tenant, own)
        has = self._all.sums[tenant]
        if own is not None and has >= own:
            text = f"{has} requests of tenant {tenant!r} are waiting, and it may have {own}; retry later, or "
            raise EngineOverloaded(f"{text}raise max_waiting_per_tenant", bound="tenant")
        bound = self.limits.max_waiting
        if bound is not None and len(self) >= bound:
            named = f"{len(self)} requests are waiting and max_waiting={bound}"
            victim = self._displaced_by(tenant, named)
            self._displace(victim, f"{named}; tenant {victim.tenant!r} has most", now)
        reservation = Reservation(tenant, adapter, self)
        self._all.add(reservation)
        if tokens is not None:
            self._count_tokens(reservation, tokens, now)
        return reservation

    def weigh(self, reservation: Reservation, tokens: int, now: float) -> None:
        """Count the tokens of a request's prompt, once they are known; does nothing without a place. Raises
        EngineOverloaded, which says which bound is reached; the reservation keeps its place."""
        if self._all.has(reservation):
            self._check_tokens(reservation.tenant, tokens)
            self._count_tokens(reservation, tokens, now)

    def _check_tokens(self, tenant: Tenant, tokens: int) -> None:
        """Raise EngineOverloaded if the bounds on tokens refuse a prompt of this length, whomever it could
        displace."""
        has, tenants = self._tokens.sums[tenant], len(self._tokens.of)
        if not has:
            return
        named = f"prompts of {has} tokens of tenant {tenant!r} are waiting, and {tokens} more exceed "
        own, most = self.limits.max_waiting_tokens_per_tenant, self.limits.max_waiting_tokens
        bound: Bound = "tenant"
        if own is not None and has + tokens > own:
            named += f"max_waiting_tokens_per_tenant={own}"
        elif most is not None and self.tokens + tokens > most and has + tokens > most / tenants:
            named += f"its part of max_waiting_tokens={most}"
            bound = "server" if tenants == 1 else "tenant"
        else:
            return
        raise EngineOverloaded(f"{named}; retry later, or raise it", bound=bound)

    def _count_tokens(self, newcomer: Reservation, tokens: int, now: float) -> None:
        """Count the newcomer's tokens, and displace what makes the prompts too long, except the newcomer."""
        self._tokens.add(newcomer, tokens)
        most = self.limits.max_waiting_tokens
        part = inf if most is None else most / len(self._tokens.of)
        while most is not None and self.tokens > most:
            victim = self._tokens.newest_of_largest()
            if victim is None or victim.tenant == newcomer.tenant or self._tokens.sums[victim.tenant] <= part:
                break
            named = f"prompts of more than max_waiting_tokens={most} tokens are waiting; "
            self._displace(victim, f"{named}tenant {victim.tenant!r} has more than its part", now)

    def _displaced_by(self, newcomer: Tenant, named: str) -> Reservation:
        """Choose the reservation that the new request displaces: the newest of the tenant with the most, if
        the newcomer's tenant would still have no more than that tenant. Raises EngineOverloaded if there is
        none."""
        places = self._all
        victim = places.newest_of_largest()
        if victim is None or places.sums[newcomer] + 1 >= places.sums[victim.tenant]:
            raise EngineOverloaded(f"{named}; retry later, or raise this bound", bound="server")
        return victim

    def _displace(self, victim: Reservation, text: str, now: float) -> None:
        victim.leave()
        text += ", and another's took this one's place; retry later"
        victim.displaced(EngineOverloaded(text, bound="tenant"), now)

    def leave(self, reservation: Reservation) -> None:
        """Give the reservation's place back, if it has one."""
        self._tokens.remove(reservation)
        self._all.remove(reservation)

    def check(self) -> None:
        """Assert that all counts agree."""
        for shares in (self._all, self._tokens):
            assert shares.sums == Counter({tenant: sum(own.values()) for tenant, own in shares.of.items()})
            assert all(shares.of.values()) and shares.total == shares.sums.total()


class _Shares:
    """Reservations under one bound, by tenant, each with what it counts for."""

    def __init__(self) -> None:
        self.total = 0
        self.of: dict[Tenant, OrderedDict[Reservation, int]] = {}
        """Each tenant's reservations, the newest at the end."""
        self.sums: Counter[Tenant] = Counter()
        """What they count for."""

    def has(self, reservation: Reservation) -> bool:
        return reservation in self.of.get(reservation.tenant, ())

    def add(self, reservation: Reservation, weight: int = 1) -> None:
        self.of.setdefault(reservation.tenant, OrderedDict())[reservation] = weight
        self.sums[reservation.tenant] += weight
        self.total += weight

    def remove(self, reservation: Reservation) -> None:
        """Remove a reservation, if it is here."""
        if self.has(reservation):
            own = self.of[reservation.tenant]
            weight = own.pop(reservation)
            self.sums[reservation.tenant] -= weight
            self.total -= weight
            if not own:
                del self.of[reservation.tenant], self.sums[reservation.tenant]

    def newest_of_largest(self) -> Reservation | None:
        """Return the newest reservation of the tenant whose own count for the most, among those with several:
        only such a tenant still has a request if one is displaced. None if there is none."""
        several = [tenant for tenant, own in self.of.items() if len(own) > 1]
        if not several:
            return None
        return next(reversed(self.of[max(several, key=lambda tenant: (self.sums[tenant], repr(tenant)))]))
