"""Asks the policy for decisions, and validates them.

The guard checks a decision's form and its time, and resolves its names once. The core checks whether each
item is allowed when it applies it.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from aioengine import events
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry, Request, Status
from aioengine.schedulers.checks import error_text
from aioengine.schedulers.overruns import Overruns
from aioengine.schedulers.policy import (
    Decision,
    Location,
    Place,
    PolicyEvent,
    Refusal,
    SchedulerPolicy,
    SchedulerView,
)

MAX_ITEMS = msgspec.Meta(max_length=4096)
"""Maximum number of items in one field of a decision, because the core's checks take time too."""
T = TypeVar("T")
_Names = Annotated[list[str], MAX_ITEMS]


class _Checked(msgspec.Struct):
    """A decision whose fields have the right types."""

    admit: _Names
    place: Annotated[list[tuple[str, int | None]], MAX_ITEMS]
    prefetch: _Names
    preempt: _Names
    reject: Annotated[list[tuple[str, str]], MAX_ITEMS]
    evict: _Names
    discard: _Names
    ask_again: float | None


class Resolved(NamedTuple):
    """A decision with its names resolved to the core's records; unknown names have been refused."""

    admit: list[Request]
    place: list[tuple[AdapterEntry, Place]]
    prefetch: list[AdapterEntry]
    preempt: list[Request]
    reject: list[tuple[Request, str]]
    evict: list[AdapterEntry]
    discard: list[AdapterEntry]

    @property
    def is_whole(self) -> bool:
        """Whether all of it has been carried out: requests run, reads and copies have begun."""
        return (
            all(request.status is Status.RUNNING for request in self.admit)
            and all(entry.location is not Location.DISK for entry in self.prefetch)
            and all(entry.slot is not None or entry.location is Location.LOADING for entry, _ in self.place)
        )


_KINDS: Mapping[Callable[..., events.Event], str] = MappingProxyType(
    {
        events.RequestAdded: "request_added",
        events.RequestAdmitted: "request_admitted",
        events.RequestPreempted: "request_preempted",
        events.RequestEnded: "request_finished",
    }
)
"""What policies call the events of a request."""
_NOTHING = Resolved([], [], [], [], [], [], [])


class PolicyGuard:
    """Stands between the core and a policy. Events pass through it, because the policy may decide differently
    after each. If a policy raises, or returns something other than a Decision, the safe policy decides that
    step. If it takes too long too often (see :class:`~aioengine.schedulers.overruns.Overruns`), the safe
    policy replaces it for good; ``make_safe`` makes that when it is first needed. ``timer`` measures the
    time; without one there is no budget, because the core itself has no clock. ``processor`` measures this
    thread's processor time; None: as ``timer``. ``requests`` has the requests that have not ended, by id, and
    ``adapters`` the adapters that the policy knows, by name.
    """

    def __init__(
        self,
        policy: SchedulerPolicy,
        make_safe: Callable[[], SchedulerPolicy],
        limits: CoreLimits,
        requests: Mapping[str, Request],
        adapters: Mapping[str, AdapterEntry],
        timer: Callable[[], float] | None,
        processor: Callable[[], float] | None,
    ) -> None:
        self.seconds = 0.0
        """Seconds that the policy took for the last decision, including nested calls."""
        self.outbox: list[events.Event] = []
        self.changes = 0
        """Number of events so far; tokens of running requests do not count."""
        self.refusals: list[Refusal] = []
        """Items of the last decision that were refused."""
        self._make_safe = make_safe
        self._safe: SchedulerPolicy | None = None
        self._requests = requests
        self._adapters = adapters
        self._timer = timer or (lambda: 0.0)
        self._processor = processor or self._timer
        self._limits = limits
        self._now = 0.0
        """Time of the last decision."""
        self.change(policy)

    def change(self, policy: SchedulerPolicy) -> None:
        """Ask ``policy`` from now on. It is told of nothing that happened before."""
        self.policy = policy
        self.name = type(policy).__name__
        self._overruns = Overruns(self._limits.policy_time_budget, self._limits.policy_max_overruns)
        self._has_failed = False
        self._ask_again: float | None = None
        """``ask_again`` of the last decision."""
        self._quiet_since = -1
        """``changes`` after the last decision that was carried out whole and named a time."""

    # Decisions

    def decide(self, view: SchedulerView) -> Resolved:
        """Ask the policy, unless it wants not to be asked now. After the decision has been carried out, the
        core calls :meth:`carried_out`."""
        self.seconds, self._now = 0.0, view.now
        if view.now < self.quiet_until:
            return _NOTHING
        start = self._timer(), self._processor()
        decision = self._ask("schedule", view.now, lambda: _checked(self.policy.schedule(view)))
        self._ask_again = None if decision is None else decision.ask_again
        self._quiet_since = -1
        if decision is None:
            decision = _checked(self._in_its_place().schedule(view))
        self.refusals.clear()
        self._measure(view.now, start)
        requests, adapters, known = self._requests, self._adapters, self._known
        return Resolved(
            admit=known(decision.admit, requests, "admit_unknown_request"),
            place=[
                (entry, Place(entry.name, slot))
                for adapter, slot in decision.place
                for entry in known([adapter], adapters, "place_unknown_adapter")
            ],
            prefetch=known(decision.prefetch, adapters, "prefetch_unknown_adapter"),
            preempt=known(decision.preempt, requests, "preempt_not_running"),
            reject=[
                (request, str.__str__(reason))
                for request_id, reason in decision.reject
                for request in known([request_id], requests, "reject_unknown_request")
            ],
            evict=known(decision.evict, adapters, "evict_unknown_adapter"),
            discard=known(decision.discard, adapters, "discard_unknown_adapter"),
        )

    def carried_out(self, decision: Resolved) -> None:
        """Note that the core has done what it could of ``decision``. If that was all of it, the policy is not
        asked again before the time that it named, unless something else happens."""
        asked = decision is not _NOTHING
        if asked and self._ask_again is not None and not self.refusals and decision.is_whole:
            self._quiet_since = self.changes

    @property
    def quiet_until(self) -> float:
        """The time until which the policy wants not to be asked unless there is an event."""
        if self._ask_again is None or self.changes != self._quiet_since:
            return -math.inf
        return self._ask_again

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> list[str]:
        """Ask for the policy's order of eviction; invalid answers are dropped."""
        start = self._timer(), self._processor()
        names = self._ask(
            "cpu_victims",
            view.now,
            lambda: msgspec.convert(_as_list(self.policy.cpu_victims(view, candidates)), list[str]),
        )
        self._measure(view.now, start)
        return [str.__str__(name) for name in names or ()]

    def _ask(
        self, call: Literal["schedule", "cpu_victims", "on_event"], now: float, question: Callable[[], T]
    ) -> T | None:
        """Return the policy's answer; None if it has failed."""
        try:
            return question()
        except BaseException as error:
            # Nothing is awaited here, so the policy itself raised this CancelledError.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            where = self.name if call == "schedule" else f"{self.name}.{call}"
            trace = None if self._has_failed else "".join(traceback.format_exception(error))
            self._has_failed = True
            text = f"{where}: {error_text(error)}"
            self.emit(events.PolicyFailed(time=now, error=text, call=call, traceback=trace))
            return None

    def _known(self, names: Sequence[str], known: Mapping[str, T], otherwise: str) -> list[T]:
        """Resolve names to records; unknown names are refused."""
        found: list[T] = []
        for name in names:
            # A class derived from str may have methods that raise where it is looked up.
            item = known.get(plain := str.__str__(name))
            if item is None:
                self.refuse(otherwise, plain)
            else:
                found.append(item)
        return found

    # Events

    def emit(self, event: events.Event) -> None:
        """Tell listeners of the engine."""
        self.changes += 1
        self.outbox.append(event)

    def note(self, kind: Callable[..., events.Event], request: Request, now: float, **what: Any) -> None:
        """Tell listeners, and the policy, what happened to a request."""
        self.emit(kind(time=now, request_id=request.id, adapter=request.label, **what))
        self.tell(_KINDS[kind], now, request=request)

    def say(self, kind: Callable[..., events.Event], entry: AdapterEntry, now: float, **what: Any) -> None:
        """Tell listeners what happened to a version of an adapter."""
        self.emit(kind(time=now, adapter=entry.label, version=entry.version, **what))

    def refuse(self, reason: str, item: str) -> None:
        """Note that an item of the decision was refused; ``item`` is a request's id or an adapter's name."""
        self.refusals.append(Refusal(item, reason))
        self.emit(events.PolicyRefused(time=self._now, reason=reason, item=item))

    def tell(
        self,
        kind: str,
        now: float,
        *,
        request: Request | None = None,
        adapter: str | None = None,
        was: str | None = None,
    ) -> None:
        """Tell the policy what happened to a request, or to the adapter of this name."""
        self.changes += 1
        view = None if request is None else request.view
        event = PolicyEvent(kind, now, view, adapter if view is None else view.adapter, was)
        if self._safe is not None and self.policy is not self._safe:
            self._safe.on_event(event)
        self._ask("on_event", now, lambda: self.policy.on_event(event))

    # Failures

    def _in_its_place(self) -> SchedulerPolicy:
        self._safe = self._safe or self._make_safe()
        return self._safe

    def _measure(self, now: float, start: tuple[float, float]) -> None:
        """Count what has taken since ``start``."""
        end = self._timer(), self._processor()
        took, used = end[0] - start[0], end[1] - start[1]
        self.seconds += took
        if self._overruns.add(took, used):
            self.emit(events.PolicyOverran(time=now, seconds=used, budget=self._limits.policy_time_budget))
        complaint = self._overruns.complaint
        if complaint and self.policy is not self._safe:
            self.policy = self._in_its_place()
            self._ask_again = None
            self.emit(events.PolicyReplaced(time=now, reason=f"{self.name} {complaint}"))


def _checked(answer: Any) -> _Checked:
    """Check the types of what ``schedule`` has returned. Raises TypeError or msgspec.ValidationError, which
    name the field."""
    if not isinstance(answer, Decision):
        raise TypeError(f"schedule() returned {type(answer).__name__}, not Decision")
    if answer.ask_again != answer.ask_again:
        raise TypeError("ask_again is not a number")
    return msgspec.convert({name: _as_list(value) for name, value in answer._asdict().items()}, _Checked)


def _as_list(value: Any) -> Any:
    """Return a collection, such as a deque or the keys of a dict, as a list, which is what msgspec takes."""
    plain = isinstance(value, (list, tuple, str)) or not isinstance(value, Collection)
    return value if plain else list(value)
