"""Asks routers and placement policies, and validates their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aioengine.schedulers.checks import error_text
from aioengine.schedulers.overruns import Overruns
from aioengine.schedulers.routing import interface
from aioengine.schedulers.routing.routers.simple import LeastLoaded

MAX_REPLICAS = 4096
"""Maximum replicas of one answer that are examined."""
MAX_REASON = 200
"""Characters of a reason that are kept."""
PLAN_SECONDS = 5.0
"""Seconds of processor time after which a plan is dropped; on a busy machine, a good one may take long."""
MAX_REASONS = 100
"""Reasons of decisions that are counted apart; the rest counts as "other"."""
MAX_MOVES = 1000
"""Maximum number of moves of one plan that are carried out; the rest is left to the next plan."""
NO_REPLICA = "no replica accepts requests now"

FAILURES = ("raised", "nonsense", "slow", "replaced")
"""Kinds of failures."""
Failed = Callable[[str, str], None]
"""Callback for a failure: its kind, one of ``FAILURES``, and a description."""


class RouterGuard:
    """Stands between a door and a router.

    If a router raises or returns an invalid answer, ``LeastLoaded`` decides for that request. If it takes
    longer than ``budget`` seconds ``max_overruns`` times, ``LeastLoaded`` replaces it for good; see
    :class:`~aioengine.schedulers.overruns.Overruns`. No error of a router is raised here.

    Args:
        timer: Seconds, for measuring decisions. None: they are not measured.
        processor: Seconds of processor time of this thread. None: as ``timer``.
        failed: Called for every failure; failures are counted in any case.
    """

    def __init__(
        self,
        router: interface.RouterPolicy,
        *,
        timer: Callable[[], float] | None = None,
        processor: Callable[[], float] | None = None,
        budget: float = 1e-3,
        max_overruns: int = 100,
        failed: Failed = lambda kind, text: None,
    ) -> None:
        self.router = router
        self.name = type(router).__name__
        self.failures: Counter[str] = Counter()
        """Failures by kind, one of ``FAILURES``."""
        self.reasons: Counter[str] = Counter()
        """Decisions by the reason that the router gave; rejected ones as "rejected". At most ``MAX_REASONS``,
        and "other"."""
        self.seconds = 0.0
        """Seconds of the last decision."""
        self._safe = LeastLoaded()
        self._timer = timer
        self._processor = timer if processor is None else processor
        self._report = failed
        self._overruns = Overruns(budget, max_overruns)

    def route(self, request: interface.RouteRequest, view: interface.FleetView) -> interface.Route:
        """Return a route whose replicas all accept requests and have not been tried; an empty one with a
        reason if the request is rejected or no such replica exists."""
        start = 0.0 if self._timer is None else self._timer()
        used = 0.0 if self._processor is None else self._processor()
        route = self._ask(self.router, request, view)
        if route is None and self.router is not self._safe:
            route = self._ask(self._safe, request, view)
        if route is None:
            route = interface.Route(reject=NO_REPLICA, reason="no replica")
        if self._timer is not None and self._processor is not None:
            used = self._processor() - used
            self._measure(start, used)
        reason = "rejected" if route.reject is not None else route.reason
        known = reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[reason if known else "other"] += 1
        return route

    def tell(self, event: interface.RouteEvent) -> None:
        """Pass an event on; exceptions of the router are counted."""
        for router in {id(self._safe): self._safe, id(self.router): self.router}.values():
            try:
                router.on_event(event)
            except BaseException as error:  # as in _ask
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                self._fail("raised", f"{type(router).__name__}.on_event: {error_text(error)}")

    def _ask(
        self, router: interface.RouterPolicy, request: interface.RouteRequest, view: interface.FleetView
    ) -> interface.Route | None:
        name, kind = type(router).__name__, "raised"
        try:
            answer = router.route(request, view)
            kind = "nonsense"
            route = _usable(answer, request, view)
        except BaseException as error:  # also of the answer's own methods
            # Nothing is awaited here, so the router itself raised this CancelledError.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._fail(kind, f"{name}: {error_text(error)}")
            return None
        if route is None and view.accepting and not _all_tried(request, view):
            self._fail("nonsense", f"{name}: named no replica that can take the request, and no reason why")
        return route

    def _fail(self, kind: str, text: str) -> None:
        self.failures[kind] += 1
        self._report(kind, text)

    def _measure(self, start: float, used: float) -> None:
        assert self._timer is not None
        end = self._timer()
        self.seconds = end - start
        if self._overruns.add(self.seconds, used, end):
            limit = f"more than {self._overruns.budget * 1e3:g} ms"
            self._fail("slow", f"{self.name} took {used * 1e3:.3g} ms of processor time, {limit}")
        complaint = self._overruns.complaint
        if complaint and self.router is not self._safe:
            self.router = self._safe
            self._fail("replaced", f"{self.name} {complaint}: it is asked no more")


class PlacementGuard:
    """Stands between a fleet and a placement policy. No error of the policy is raised here.

    Args:
        timer: Seconds of processor time of the calling thread, for measuring plans. None: they are not
            measured.
        failed: Called for every failure; failures are counted in any case.
    """

    def __init__(
        self,
        placement: interface.PlacementPolicy,
        *,
        timer: Callable[[], float] | None = None,
        failed: Failed = lambda kind, text: None,
    ) -> None:
        self.placement = placement
        self.name = type(placement).__name__
        self.failures: Counter[str] = Counter()
        self._timer = timer
        self._report = failed

    def plan(self, view: interface.FleetView) -> Sequence[interface.Move] | None:
        """Return moves that can be carried out, or None if there is no plan."""
        start = self._timer() if self._timer is not None else 0.0
        try:
            moves = _moves(self.placement.plan(view), view)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            kind = "nonsense" if isinstance(error, _Nonsense) else "raised"
            self._fail(kind, f"{self.name}: {error_text(error).lstrip('_')}")
            return None
        if self._timer is not None and (seconds := self._timer() - start) > PLAN_SECONDS:
            limit = f"more than {PLAN_SECONDS:g} s"
            self._fail("slow", f"{self.name} took {seconds:.3g} s of processor time, {limit}")
            return None
        return moves[:MAX_MOVES]

    def _fail(self, kind: str, text: str) -> None:
        self.failures[kind] += 1
        self._report(kind, text)


class _Nonsense(ValueError):
    """The answer is not a valid plan."""


def _usable(
    answer: Any, request: interface.RouteRequest, view: interface.FleetView
) -> interface.Route | None:
    """Return the route without the replicas that cannot take the request; None if none is left."""
    if type(answer) is not interface.Route:
        raise TypeError(f"route() returned {type(answer).__name__}, not Route")
    replicas, reject, reason = answer
    if type(reason) is not str:
        raise TypeError(f"reason is {reason!r}, not a str")
    if reject is not None:
        if not isinstance(reject, str):
            raise TypeError(f"reject is {reject!r}, not a str")
        return interface.Route((), reject[:MAX_REASON] or "rejected by the router", reason[:MAX_REASON])
    if isinstance(replicas, str) or not isinstance(replicas, Collection) or len(replicas) > MAX_REPLICAS:
        raise TypeError(f"replicas is {str(replicas)[:MAX_REASON]!r}, not a sequence of replica ids")
    known, tried = view.replicas, request.tried
    usable = []
    for replica_id in replicas:
        if type(replica_id) is not str:
            raise TypeError(f"replicas contains {replica_id!r}, not a str")
        found = known.get(replica_id)
        if found is None:
            raise ValueError(f"there is no replica {replica_id!r}")
        if found.accepting and replica_id not in tried:
            usable.append(replica_id)
    return interface.Route(usable, None, reason[:MAX_REASON]) if usable else None


def _all_tried(request: interface.RouteRequest, view: interface.FleetView) -> bool:
    return all(replica.replica_id in request.tried for replica in view.accepting)


def _moves(answer: Any, view: interface.FleetView) -> list[interface.Move]:
    if isinstance(answer, str) or not isinstance(answer, Collection):
        raise _Nonsense(f"plan() returned {str(answer)[:MAX_REASON]!r}, not a sequence of Move")
    for move in answer:
        if type(move) is not interface.Move or move.kind not in ("load", "unload", "pin", "unpin"):
            raise _Nonsense(f"the plan contains {str(move)[:MAX_REASON]!r}, not a Move")
        if move.replica not in view.replicas:
            raise _Nonsense(f"there is no replica {move.replica!r}")
        if move.adapter not in view.adapters:
            raise _Nonsense(f"there is no adapter {move.adapter!r}")
    return list(answer)
