"""Asks routers and placement policies, and validates their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aioengine.schedulers.checks import error_text
from aioengine.schedulers.overruns import Overruns
from aioengine.schedulers.routing.interface import (
    FleetView,
    Move,
    PlacementPolicy,
    Route,
    RouteRequest,
    RouterPolicy,
)
from aioengine.schedulers.routing.routers.common import candidates
from aioengine.schedulers.routing.routers.simple import LeastLoaded

MAX_REASON = 200
"""Characters of a reason that are kept."""
MAX_REASONS = 100
"""Reasons of decisions that are counted apart; the rest counts as "other"."""
MAX_MOVES = 1000
"""Maximum number of moves of one plan that are carried out."""

Failed = Callable[[str, str], None]
"""Callback for a failure: its kind ("raised", "nonsense", "slow" or "replaced"), and a description."""


class Guard:
    """Counts the failures of a policy, and tells ``failed`` of them. None of its errors is raised here."""

    def __init__(
        self, policy: RouterPolicy | PlacementPolicy, failed: Failed = lambda kind, text: None
    ) -> None:
        self.name = type(policy).__name__
        self.failures: Counter[str] = Counter()
        """Failures by kind, as ``Failed`` gets them."""
        self._report = failed

    def _fail(self, kind: str, text: str) -> None:
        self.failures[kind] += 1
        self._report(kind, text)

    def _call(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return what the policy answers; None if it raises."""
        try:
            return call(*args)
        except BaseException as error:
            # Nothing is awaited here, so the policy itself has raised this CancelledError.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            kind = "nonsense" if isinstance(error, _Nonsense) else "raised"
            self._fail(kind, f"{self.name}: {error_text(error).lstrip('_')}")
            return None


class _Nonsense(ValueError):
    """The answer is none that can be used."""


class RouterGuard(Guard):
    """Stands between a gateway and a router.

    If a router raises or returns an invalid answer, ``LeastLoaded`` decides for that request. If it takes
    longer than ``budget`` seconds ``max_overruns`` times, ``LeastLoaded`` replaces it for good; see
    :class:`~aioengine.schedulers.overruns.Overruns`.

    Args:
        timer: Seconds, for measuring decisions; without one they are not measured.
        processor: Seconds of processor time of this thread. None: as ``timer``.
    """

    def __init__(
        self,
        router: RouterPolicy,
        *,
        timer: Callable[[], float] = lambda: 0.0,
        processor: Callable[[], float] | None = None,
        budget: float = 1e-3,
        max_overruns: int = 100,
        failed: Failed = lambda kind, text: None,
    ) -> None:
        super().__init__(router, failed)
        self.router = router
        self.reasons: Counter[str] = Counter()
        """Decisions by the reason that the router gave; rejected ones as "rejected". At most ``MAX_REASONS``,
        and "other"."""
        self._safe = LeastLoaded()
        self._timer, self._processor = timer, processor or timer
        self._overruns = Overruns(budget, max_overruns)

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        """Return a route whose replicas all accept requests and have not been tried; an empty one with a
        reason if the request is rejected or no such replica exists."""
        route = Route(reject="no replica accepts requests now")
        if candidates(request, view):
            began, used = self._timer(), self._processor()
            found = self._call(self._ask, request, view)
            route = self._safe.route(request, view) if found is None else found
            self._measure(self._timer() - began, self._processor() - used)
        reason = "rejected" if route.reject is not None else route.reason
        known = reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[reason if known else "other"] += 1
        return route

    def _ask(self, request: RouteRequest, view: FleetView) -> Route:
        """Return the router's answer, without the replicas that cannot take the request."""
        answer = self.router.route(request, view)
        try:
            # A Route itself would not be checked.
            replicas, reject, reason = msgspec.convert(tuple(answer), Route)
        except Exception as error:  # of the answer's own methods, too
            raise _Nonsense(f"route() returned no Route: {error_text(error)}") from error
        reason = reason[:MAX_REASON]
        if reject is not None:
            return Route((), reject[:MAX_REASON] or "rejected by the router", reason)
        for replica_id in replicas:
            if replica_id not in view.replicas:
                raise _Nonsense(f"there is no replica {replica_id!r}")
        usable = [i for i in replicas if view.replicas[i].accepting and i not in request.tried]
        if not usable:
            raise _Nonsense("named no replica that can take the request, and no reason why")
        return Route(usable, None, reason)

    def _measure(self, took: float, used: float) -> None:
        if self._overruns.add(took, used):
            limit = f"more than {self._overruns.budget * 1e3:g} ms"
            self._fail("slow", f"{self.name} took {used * 1e3:.3g} ms of processor time, {limit}")
        complaint = self._overruns.complaint
        if complaint and self.router is not self._safe:
            self.router = self._safe
            self._fail("replaced", f"{self.name} {complaint}: it is asked no more")


class PlacementGuard(Guard):
    """Stands between a fleet and a placement policy."""

    def __init__(self, placement: PlacementPolicy, failed: Failed = lambda kind, text: None) -> None:
        super().__init__(placement, failed)
        self.placement = placement

    def plan(self, view: FleetView) -> Sequence[Move] | None:
        """Return moves that can be carried out, or None if there is no plan."""
        moves: list[Move] | None = self._call(self._ask, view)
        return moves

    def _ask(self, view: FleetView) -> list[Move]:
        answer = self.placement.plan(view)
        try:
            moves = msgspec.convert([tuple(move) for move in answer], list[Move])
        except Exception as error:  # of the answer's own methods, too
            raise _Nonsense(f"plan() returned no sequence of Move: {error_text(error)}") from error
        for move in moves:
            if move.replica not in view.replicas or move.adapter not in view.adapters:
                raise _Nonsense(f"{move}: there is no such adapter or replica")
        return moves[:MAX_MOVES]
