"""Asks the policy for decisions, and validates them.

The guard checks a decision's form and its time, and resolves its names once. The core checks whether each
item is allowed when it applies it.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

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

_Call = Literal["schedule", "cpu_victims", "on_event"]

MAX_ITEMS = 4096
"""Maximum number of items in one field of a decision, because the core's checks take time too."""
T = TypeVar("T")


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
    def moves(self) -> bool:
        """Whether it says anything about where adapters are to be."""
        return bool(self.place or self.prefetch or self.evict or self.discard)

    @property
    def is_whole(self) -> bool:
        """Whether all of it has been carried out: requests run, reads and copies have begun."""
        return (
            all(request.status is Status.RUNNING for request in self.admit)
            and all(entry.location is not Location.DISK for entry in self.prefetch)
            and all(entry.slot is not None or entry.location is Location.LOADING for entry, _ in self.place)
        )


_EMPTY, _NOTHING = Decision(), Resolved([], [], [], [], [], [], [])


class PolicyGuard:
    """Stands between the core and a policy. Events pass through it, because the policy may decide differently
    after each.

    If a policy raises, or returns something other than a Decision, the safe policy decides that step.
    ``make_safe`` makes the safe policy when it is first needed. If a policy takes longer than
    ``limits.policy_time_budget`` seconds ``policy_max_overruns`` times (see
    :class:`~aioengine.schedulers.overruns.Overruns`), the safe policy replaces it for good. ``timer``
    measures the time; without one there is no budget, because the core itself has no clock. ``processor``
    measures this thread's processor time; None: as ``timer``. ``requests`` has the requests that have not
    ended, by id, and ``adapters`` the adapters that the policy knows, by name.
    """

    def __init__(
        self,
        policy: SchedulerPolicy,
        make_safe: Callable[[], SchedulerPolicy],
        limits: CoreLimits,
        *,
        requests: Mapping[str, Request],
        adapters: Mapping[str, AdapterEntry],
        timer: Callable[[], float] | None,
        processor: Callable[[], float] | None = None,
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
        self._timer = timer
        self._processor = timer if processor is None else processor
        self._limits = limits
        self._ask_again: float | None = None
        """``ask_again`` of the decision that is being carried out."""
        self._named: set[str] = set()
        """Requests that this decision preempts or rejects, and adapters that it lets leave their slots."""
        self._now = 0.0
        """Time of the last decision."""
        self._quiet_until = -math.inf
        self.change(policy)

    def change(self, policy: SchedulerPolicy) -> None:
        """Ask ``policy`` from now on. It is told of nothing that happened before."""
        self.policy = policy
        self.name = type(policy).__name__
        self._overruns = Overruns(self._limits.policy_time_budget, self._limits.policy_max_overruns)
        self._has_failed = False
        self._ask_again, self._quiet_since = None, -1
        """The latter: ``changes`` after the last decision that was carried out whole and named a time."""

    # Decisions

    def decide(self, view: SchedulerView) -> Resolved:
        """Ask the policy, unless it wants not to be asked now. After the decision has been carried out, the
        core calls :meth:`carried_out`."""
        self.seconds, self._now = 0.0, view.now
        if view.now < self.quiet_until:
            return _NOTHING
        start = self._times()
        decision = self._ask("schedule", view.now, lambda: _well_formed(self.policy.schedule(view)))
        self._ask_again = None if decision is None else decision.ask_again
        if decision is None:
            decision = self._in_its_place().schedule(view)
        self.refusals.clear()
        self._measure(view.now, start)
        resolved = _NOTHING if decision is _EMPTY else self._resolve(decision)
        self._named = {request.id for request in resolved.preempt}
        self._named.update(request.id for request, _ in resolved.reject)
        self._named.update(entry.name for entry in (*resolved.evict, *resolved.discard))
        return resolved

    def carried_out(self, decision: Resolved) -> None:
        """Note that the core has done what it could of ``decision``. If that was all of it, and nothing else
        happened meanwhile, the policy is not asked again before the time that it named."""
        if self._ask_again is not None and not self.refusals and decision.is_whole:
            self._quiet_until, self._quiet_since = self._ask_again, self.changes
        self._ask_again = None

    @property
    def quiet_until(self) -> float:
        """The time until which the policy wants not to be asked unless there is an event."""
        return self._quiet_until if self.changes == self._quiet_since else -math.inf

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> list[str]:
        """Ask for the policy's order of eviction; invalid entries are dropped."""
        start = self._times()
        names = self._ask(
            "cpu_victims",
            view.now,
            lambda: _strings("cpu_victims", self.policy.cpu_victims(view, candidates)),
        )
        self._measure(view.now, start)
        return names or []

    def _ask(self, call: _Call, now: float, question: Callable[[], T]) -> T | None:
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

    def _resolve(self, decision: Decision) -> Resolved:
        requests, adapters, known = self._requests, self._adapters, self._known
        return Resolved(
            reject=[
                (request, reason)
                for request_id, reason in decision.reject
                for request in known([request_id], requests, "reject_unknown_request")
            ],
            place=[
                (entry, item)
                for item in decision.place
                for entry in known([item.adapter], adapters, "place_unknown_adapter")
            ],
            admit=known(decision.admit, requests, "admit_unknown_request"),
            prefetch=known(decision.prefetch, adapters, "prefetch_unknown_adapter"),
            preempt=known(decision.preempt, requests, "preempt_not_running"),
            evict=known(decision.evict, adapters, "evict_unknown_adapter"),
            discard=known(decision.discard, adapters, "discard_unknown_adapter"),
        )

    def _known(self, names: Sequence[str], known: Mapping[str, T], otherwise: str) -> list[T]:
        """Resolve names to records; unknown names are refused."""
        found: list[T] = []
        for name in names:
            item = known.get(name)
            if item is None:
                self.refuse(otherwise, name)
            else:
                found.append(item)
        return found

    # Events

    def emit(self, event: events.Event) -> None:
        """Tell listeners of the engine."""
        self.changes += 1
        self.outbox.append(event)

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
        if self._ask_again is not None and not self._is_expected(event):
            self._ask_again = None
        if self._safe is not None and self.policy is not self._safe:
            self._safe.on_event(event)
        self._ask("on_event", now, lambda: self.policy.on_event(event))

    def _is_expected(self, event: PolicyEvent) -> bool:
        """Whether the event, which comes while a decision is carried out, is an effect of this decision."""
        if event.kind in ("request_preempted", "request_finished"):
            return event.request is not None and event.request.request_id in self._named
        if event.kind == "adapter_dropped":  # from the CPU cache, for an adapter that is to be read
            entry = self._adapters.get(event.adapter or "")
            return entry is None or not entry.waiting
        return event.kind == "request_admitted" or event.adapter in self._named

    # Failures

    def _in_its_place(self) -> SchedulerPolicy:
        if self._safe is None:
            self._safe = self._make_safe()
        return self._safe

    def _times(self) -> tuple[float, float]:
        if self._timer is None or self._processor is None:
            return 0.0, 0.0
        return self._timer(), self._processor()

    def _measure(self, now: float, start: tuple[float, float]) -> None:
        """Count what has taken since ``start``."""
        if self._timer is None:
            return
        end = self._times()
        took, used = end[0] - start[0], end[1] - start[1]
        self.seconds += took
        if self._overruns.add(took, used, end[0]):
            self.emit(events.PolicyOverran(time=now, seconds=used, budget=self._limits.policy_time_budget))
        complaint = self._overruns.complaint
        if complaint and self.policy is not self._safe:
            self.policy = self._in_its_place()
            self._ask_again = None
            self.emit(events.PolicyReplaced(time=now, reason=f"{self.name} {complaint}"))


def _well_formed(answer: Any) -> Decision:
    if not isinstance(answer, Decision):
        raise TypeError(f"schedule() returned {type(answer).__name__}, not Decision")
    ask_again = None if answer.ask_again is None else _time(answer.ask_again)
    if all(type(field) in (list, tuple) and not field for field in answer[:-1]):
        return _EMPTY if ask_again is None else Decision(ask_again=ask_again)
    return Decision(
        admit=_strings("admit", answer.admit),
        place=[_place(item) for item in _items("place", answer.place)],
        prefetch=_strings("prefetch", answer.prefetch),
        preempt=_strings("preempt", answer.preempt),
        reject=[_rejection(item) for item in _items("reject", answer.reject)],
        evict=_strings("evict", answer.evict),
        discard=_strings("discard", answer.discard),
        ask_again=ask_again,
    )


def _rejection(item: Any) -> tuple[str, str]:
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return _plain(item[0]), _plain(item[1])
    raise TypeError(f"reject contains {item!r}, not a tuple of a request id and a reason")


def _place(item: Any) -> Place:
    adapter, slot = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(adapter, str) or not (slot is None or type(slot) is int):
        raise TypeError(f"place contains {item!r}, not Place(adapter: str, slot: int | None)")
    return Place(_plain(adapter), slot)


def _strings(field: str, items: Any) -> list[str]:
    found = list(_items(field, items))
    for index, item in enumerate(found):
        if type(item) is not str:
            if not isinstance(item, str):
                raise TypeError(f"{field} contains {item!r}, not a str")
            found[index] = _plain(item)
    return found


def _plain(text: str) -> str:
    """Return the text itself: the methods of a class derived from ``str`` may raise where it is looked up."""
    return text if type(text) is str else str.__str__(text)


def _time(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    raise TypeError(f"ask_again is {value!r}, not a time in seconds or None")


def _items(field: str, items: Any) -> Collection[Any]:
    """Refuse a field without a length, which might never end, and a field longer than ``MAX_ITEMS``."""
    if type(items) not in (list, tuple) and (isinstance(items, str) or not isinstance(items, Collection)):
        raise TypeError(f"{field} is {items!r}, not a sequence")
    if len(items) > MAX_ITEMS:
        raise TypeError(f"{field} has {len(items)} items; at most {MAX_ITEMS} are looked at")
    found: Collection[Any] = items
    return found
