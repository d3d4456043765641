"""Decides how many replicas a fleet should have, by the waiting work and not by the number of requests."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.routing.interface import FleetView, ReplicaView

ROOM = 0.7
"""Share of their places that requests may take on the replicas that stay when one is removed."""


class Scaling(NamedTuple):
    """A wanted number of replicas, and the reason."""

    replicas: int
    reason: str


class WaitingWork:
    """Adds replicas when the waiting work is more than ``target`` seconds for the fleet. Removes one when the
    work has been less than ``low`` times that for the remaining ones for ``cool_down`` seconds, and all
    requests, those that run included, would take at most 0.7 of the places there.

    Work is seconds of computing that wait (prompt tokens at the measured speed), seconds of loading and of
    waiting for slots for the adapters that wait, and, for requests beyond those that may run at once, the
    time until others have ended. Growth is at once and by at most a factor of 2 each ``settle`` seconds,
    because a new replica takes time before it helps.

    Args:
        least: Minimum number of replicas; 0 lets the fleet scale to zero.
        most: Maximum number of replicas.
        target: Seconds of work that may wait on each replica.
        low: Share of ``target`` below which one replica is removed.
        cool_down: Seconds for which that must hold.
        settle: Seconds between two steps of growth.
    """

    source = "own"
    """The paper or project that it is from, in one line."""
    worst_case = "has twice as many replicas as needed for one cool-down after a burst that has ended"
    """The worst effect that it can have on the fleet."""

    def __init__(
        self,
        least: int = 1,
        most: int = 8,
        target: float = 1.0,
        low: float = 0.3,
        cool_down: float = 60.0,
        settle: float = 10.0,
    ) -> None:
        if not 0 <= least <= most or most < 1:
            raise ValueError(f"least={least}, most={most}: must be 0 <= least <= most, and most at least 1")
        if not 0 < target < float("inf"):
            raise ValueError(f"target={target}: must be more than 0 seconds")
        if not 0 < low < 1:
            raise ValueError(f"low={low}: must be between 0 and 1")
        at_least(0, "seconds", cool_down=cool_down, settle=settle)
        self.least, self.most = least, most
        self._target, self._low = target, low
        self._cool_down, self._settle = cool_down, settle
        self._grown: float | None = None
        self._calm_since: float | None = None

    def replicas(self, view: FleetView, now: int, *, waiting: int = 0) -> Scaling:
        """Return the wanted number of replicas. Called every second or more often.

        Args:
            view: Only ``now`` and the ``accepting`` replicas' queues and speeds are known.
            now: Replicas now, starting ones included.
            waiting: Requests that wait at the gateway because no replica is there.
        """
        wanted, reason = self._wanted(view, now, waiting)
        return Scaling(min(max(wanted, self.least), self.most), reason)

    def _wanted(self, view: FleetView, now: int, waiting: int) -> Scaling:
        if now == 0:
            return Scaling(1, "requests wait") if waiting else Scaling(0, "nothing to do")
        work = sum(_work(replica) for replica in view.accepting)
        requests = sum(replica.running + replica.waiting for replica in view.accepting)
        need = ceil(work / self._target)
        if need > now:
            self._calm_since = None
            if self._grown is not None and view.now - self._grown < self._settle:
                return Scaling(now, "growing")
            self._grown = view.now
            return Scaling(min(need, 2 * now), "work waits")
        left = now - 1
        places = ROOM * left * max((replica.max_running for replica in view.accepting), default=0)
        idle = work < self._low * self._target * left and requests <= places
        calm = idle if left else not requests and not waiting
        if not calm:
            self._calm_since = None
            return Scaling(now, "enough")
        if self._calm_since is None:
            self._calm_since = view.now
        if view.now - self._calm_since < self._cool_down:
            return Scaling(now, "cooling down")
        self._calm_since = view.now
        return Scaling(left, "idle")


def _work(replica: ReplicaView) -> float:
    """Return the seconds of work that wait on a replica."""
    each = (replica.load_seconds or 0.0) + (replica.slot_seconds or 0.0)
    beyond = max(replica.waiting + replica.running - replica.max_running, 0)
    turns = beyond / replica.max_running * (replica.service_seconds or 0.0)
    return replica.queue_seconds + replica.adapters_waiting * each + turns
