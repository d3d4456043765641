"""What happened: typed events, for metrics, live views and applications.

``engine.add_listener(callback)`` delivers them in order, on the event loop; ``engine.events()`` is an async
iterator over them. Times are seconds on the loop's clock. ``adapter`` is None for the base model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from aioengine.errors import Bound

EndReason = Literal["stop", "length", "abort", "error"]
LoadFailure = Literal["invalid", "too_large", "io", "internal"]


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all events."""

    time: float


class RequestAdded(Event, frozen=True, kw_only=True, gc=False):
    request_id: str
    adapter: str | None
    prompt_tokens: int
    tenant: str | None
    location: Literal["disk", "loading", "cpu", "slot"] | None = None
    """Where its adapter was when it arrived; None for the base model."""
    priority: int = 0
    deadline: float | None = None
    """The time by which it must have ended."""


class RequestRefused(Event, frozen=True, kw_only=True, gc=False):
    """A request that found as many waiting as may, and was not accepted."""

    adapter: str | None
    tenant: str | None
    bound: Bound
    """Whose bound was reached."""


class RequestAdmitted(Event, frozen=True, kw_only=True, gc=False):
    request_id: str
    adapter: str | None
    slot: int | None
    cached_tokens: int
    queue_seconds: float
    """Since its arrival."""
    resumed: bool
    """It had been preempted before."""


class RequestPreempted(Event, frozen=True, kw_only=True, gc=False):
    request_id: str
    adapter: str | None


class FirstToken(Event, frozen=True, kw_only=True, gc=False):
    request_id: str
    adapter: str | None
    seconds: float
    """Time to first token, from arrival."""


class RequestEnded(Event, frozen=True, kw_only=True, gc=False):
    """The one end of every accepted request."""

    request_id: str
    adapter: str | None
    reason: EndReason
    error: Exception | None
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """From arrival to the end."""
    tenant: str | None
    worst_gap: float | None = None
    """The longest time between two of its tokens; None if it had less than two."""


class AdapterEvent(Event, frozen=True, kw_only=True, gc=False):
    """Base of the adapter events."""

    adapter: str
    version: int


class AdapterRegistered(AdapterEvent, frozen=True, kw_only=True, gc=False):
    path: str
    replaces: int | None
    """The version that it supersedes."""


class AdapterLoading(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """Its read from disk to the CPU cache begins."""


class AdapterLoaded(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """It is in the CPU cache."""

    rank: int
    nbytes: int
    seconds: float


class AdapterRetrying(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """Its read failed for a passing reason and is tried again."""

    attempt: int
    """How many reads have failed so far."""
    seconds: float
    """Until the next one."""
    error: Exception


class AdapterPlacing(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """Its copy from the CPU cache into a slot begins."""

    slot: int


class AdapterPlaced(AdapterEvent, frozen=True, kw_only=True, gc=False):
    slot: int
    rank: int
    nbytes: int
    seconds: float


class AdapterEvicted(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """It left a slot, or the CPU cache."""

    level: Literal["slot", "cpu"]
    slot: int | None
    nbytes: int = 0
    """What it takes on the CPU."""


class AdapterFailed(AdapterEvent, frozen=True, kw_only=True, gc=False):
    reason: LoadFailure
    error: Exception


class ResolverFailed(Event, frozen=True, kw_only=True, gc=False):
    """Where an adapter is could not be found out; a name that the resolver does not know is no failure."""

    adapter: str
    reason: LoadFailure
    error: Exception


class AdapterPinned(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """It is to be in a slot, and to stay there."""


class AdapterUnpinned(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """It may be evicted again."""


class AdapterUnloaded(AdapterEvent, frozen=True, kw_only=True, gc=False):
    """This version is gone: nothing of it is held any more."""


class PolicyRefused(Event, frozen=True, kw_only=True, gc=False):
    """The core refused one item of a policy's decision."""

    reason: str
    item: str


class PolicyFailed(Event, frozen=True, kw_only=True, gc=False):
    """The policy raised or returned no Decision. Where it was asked for one, the built-in safe policy
    decided in its place."""

    error: str
    call: Literal["schedule", "cpu_victims", "on_event"] = "schedule"
    traceback: str | None = None
    """Of the first failure of this policy; None for those that follow."""


class PolicyOverran(Event, frozen=True, kw_only=True, gc=False):
    """A decision took longer than ``policy_time_budget``."""

    seconds: float
    budget: float


class PolicyReplaced(Event, frozen=True, kw_only=True, gc=False):
    """The policy overran too often; from now on the built-in safe policy decides."""

    reason: str


class TokenInterval(NamedTuple):
    """Requests for one adapter had a token each, ``seconds`` after the ones before."""

    adapter: str | None
    seconds: float
    tokens: int


class StepFinished(Event, frozen=True, kw_only=True, gc=False):
    step: int
    seconds: float
    """The device's time for it."""
    schedule_seconds: float
    """The policy's and the core's time for it."""
    sequences: int
    adapters: int
    """Distinct adapters in the batch."""
    prefill_tokens: int
    decode_tokens: int
    slots: tuple[int, ...]
    """The slots that it used."""
    policy_seconds: float = 0.0
    """The policy's part of ``schedule_seconds``."""
    intervals: tuple[TokenInterval, ...] = ()
    """Between its tokens and the ones before; requests that had their first are not in it."""


class EventsLost(Event, frozen=True, kw_only=True, gc=False):
    """In an event stream: its reader fell behind, and ``count`` events before the next are gone."""

    count: int


class EngineRestarted(Event, frozen=True, kw_only=True, gc=False):
    """The model's processes were lost and run again; the requests that were running have failed."""

    seconds: float
    """From the loss until steps could be run again."""
    error: Exception
    """How they were lost."""


class LoopLag(Event, frozen=True, kw_only=True, gc=False):
    """The event loop ran a timer ``seconds`` late; measured regularly while the engine runs."""

    seconds: float
