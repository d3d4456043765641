"""An adapter as a door knows it: the demand for it, and the replicas that hold it."""

from __future__ import annotations

from collections.abc import Set
from math import exp

from aioengine.schedulers.routing.replica import _Clock

DEMAND_SECONDS = 60.0
"""Time constant of the moving average of demand."""
CHANGED_SHARE = 0.25
"""A demand has changed when it differs by more than this share from that of the last plan."""
NO_DEMAND = 1e-3
"""Tokens a second that count as none."""


class Demand:
    """Tokens a second as an exponential moving average over events at any times: each adds its tokens over
    the time constant, and all decay with it."""

    __slots__ = ("_as_of", "_rate")

    def __init__(self) -> None:
        self._rate = self._as_of = 0.0

    def add(self, tokens: float, now: float) -> None:
        self._rate = self.at(now) + tokens / DEMAND_SECONDS
        self._as_of = now

    def at(self, now: float) -> float:
        return self._rate * exp(min(self._as_of - now, 0.0) / DEMAND_SECONDS) if self._rate else 0.0


class Adapter:
    """An :class:`~aioengine.schedulers.routing.interface.AdapterView`."""

    __slots__ = (
        "_clock", "_demand", "_holders", "_holders_changed", "_planned", "_targets", "in_flight", "name",
        "nbytes", "registered",
    )  # fmt: skip

    def __init__(self, name: str, clock: _Clock) -> None:
        self.name = name
        self.nbytes = 0
        self.in_flight = 0
        self.registered = False
        self._clock = clock
        self._demand = Demand()
        self._holders: dict[str, None] = {}
        self._targets: dict[str, None] = {}
        self._holders_changed = False
        self._planned = 0.0
        """Demand when the last plan was made."""

    @property
    def demand(self) -> float:
        return self._demand.at(self._clock.now)

    @property
    def holders(self) -> Set[str]:
        return self._holders.keys()

    @property
    def target_holders(self) -> Set[str]:
        return self._targets.keys()

    def _hold(self, replica_id: str) -> None:
        self._holders[replica_id] = None
        self._holders_changed = True

    def _release(self, replica_id: str) -> None:
        self._holders.pop(replica_id, None)
        self._holders_changed = True

    def _changed(self) -> bool:
        if self._holders_changed:
            return True
        demand = self.demand
        return abs(demand - self._planned) > max(CHANGED_SHARE * self._planned, NO_DEMAND)

    def _used(self) -> bool:
        """Whether the fleet has it, or a request does."""
        return bool(self.registered or self.in_flight or self._holders or self._targets)

    def _needed(self) -> bool:
        """Whether the door must still remember the adapter."""
        return self._used() or self.demand >= NO_DEMAND

    def _copy(self, clock: _Clock) -> Adapter:
        found = Adapter(self.name, clock)
        found.nbytes, found.registered, found.in_flight = self.nbytes, self.registered, self.in_flight
        found._demand._rate, found._demand._as_of = self._demand._rate, self._demand._as_of
        found._holders, found._targets = self._holders.copy(), self._targets.copy()
        found._holders_changed, found._planned = self._holders_changed, self._planned
        return found
