"""Typed events, for metrics, live views and applications: see ``engine.add_listener``.

Times are seconds on the loop's clock. ``adapter`` is None for the base model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from aioengine.errors import Bound
from aioengine.info import AdapterLocation

EndReason = Literal["stop", "length", "abort", "error"]
LoadFailure = Literal["invalid", "too_large", "io", "internal"]


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all events."""

    time: float


class RequestEvent(Event, frozen=True, kw_only=True):
    """Base of the events of accepted requests."""

    request_id: str
    adapter: str | None


class RequestAdded(RequestEvent, frozen=True, kw_only=True):
    prompt_tokens: int
    tenant: str | None
    location: AdapterLocation | None = None
    """Location of its adapter when the request arrived."""
    priority: int = 0
    deadline: float | None = None
    """The time by which it must have ended."""


class RequestRefused(Event, frozen=True, kw_only=True):
    """A request was refused because a bound on waiting requests was reached."""

    adapter: str | None
    tenant: str | None
    bound: Bound


class RequestAdmitted(RequestEvent, frozen=True, kw_only=True):
    slot: int | None
    cached_tokens: int
    queue_seconds: float
    """Seconds since its arrival."""
    resumed: bool
    """Whether it had been preempted before."""


class RequestPreempted(RequestEvent, frozen=True, kw_only=True):
    """Removal of a request from the batch; it waits again."""


class FirstToken(RequestEvent, frozen=True, kw_only=True):
    seconds: float
    """Time to first token, from arrival."""


class RequestEnded(RequestEvent, frozen=True, kw_only=True):
    """End of a request; there is exactly one for each accepted request."""

    reason: EndReason
    error: Exception | None
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """Seconds from arrival to the end."""
    tenant: str | None
    worst_gap: float | None = None
    """The longest time between two of its tokens; None if it had less than two."""


class AdapterEvent(Event, frozen=True, kw_only=True):
    """Base of the adapter events."""

    adapter: str
    version: int


class AdapterRegistered(AdapterEvent, frozen=True, kw_only=True):
    path: str
    replaces: int | None
    """The version that it supersedes."""


class AdapterLoading(AdapterEvent, frozen=True, kw_only=True):
    """Start of an adapter's read from disk to the CPU cache."""


class AdapterLoaded(AdapterEvent, frozen=True, kw_only=True):
    """Arrival of an adapter in the CPU cache."""

    rank: int
    nbytes: int
    seconds: float


class AdapterPlacing(AdapterEvent, frozen=True, kw_only=True):
    """Start of an adapter's copy from the CPU cache into a slot."""

    slot: int


class AdapterPlaced(AdapterEvent, frozen=True, kw_only=True):
    slot: int
    rank: int
    nbytes: int
    seconds: float


class AdapterEvicted(AdapterEvent, frozen=True, kw_only=True):
    """Removal of an adapter from a slot, or from the CPU cache."""

    level: Literal["slot", "cpu"]
    slot: int | None
    nbytes: int = 0
    """Bytes on the CPU."""


class AdapterFailed(AdapterEvent, frozen=True, kw_only=True):
    reason: LoadFailure
    error: Exception


class ResolverFailed(Event, frozen=True, kw_only=True):
    """The resolver failed to look up an adapter; an unknown name is not a failure."""

    adapter: str
    reason: LoadFailure
    error: Exception


class AdapterPinned(AdapterEvent, frozen=True, kw_only=True):
    """Pin of an adapter: it goes to a slot and stays there. Or the end of a pin."""

    pinned: bool = True


class AdapterUnloaded(AdapterEvent, frozen=True, kw_only=True):
    """This version was freed completely."""


class PolicyRefused(Event, frozen=True, kw_only=True):
    """The core refused one item of a policy's decision."""

    reason: str
    item: str


class PolicyFailed(Event, frozen=True, kw_only=True):
    """The policy raised an exception or returned no Decision; the built-in safe policy decided."""

    error: str
    call: Literal["schedule", "cpu_victims", "on_event"] = "schedule"
    traceback: str | None = None
    """Traceback of this policy's first failure; None for later ones."""


class PolicyOverran(Event, frozen=True, kw_only=True):
    """A decision took more processor time than ``policy_time_budget``."""

    seconds: float
    budget: float


class PolicyReplaced(Event, frozen=True, kw_only=True):
    """The policy overran too often and was replaced by the built-in safe policy."""

    reason: str


class TokensProposed(Event, frozen=True, kw_only=True):
    """Proposal of tokens to a request in a step (``EngineConfig.speculation``)."""

    adapter: str | None
    proposed: int
    accepted: int
    """Number of proposed tokens that equal the sampled ones."""


class TokenInterval(NamedTuple):
    """``tokens`` requests for one adapter got a token each, ``seconds`` after their previous one."""

    adapter: str | None
    seconds: float
    tokens: int


class StepFinished(Event, frozen=True, kw_only=True):
    """End of a step, or of several with the same contents that a simulated device has taken at once."""

    step: int
    """Number of the first of them."""
    steps: int = 1
    seconds: float
    """Seconds that the device took for all of them."""
    schedule_seconds: float
    """Seconds that the policy and the core took."""
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
    """Times between its tokens and the previous ones; first tokens are left out."""


class EngineRestarted(Event, frozen=True, kw_only=True):
    """The model's processes were lost and restarted; the running requests have failed."""

    seconds: float
    """Seconds from the loss until steps could run again."""
    error: Exception
    """The cause of the loss."""


class LoopLag(Event, frozen=True, kw_only=True):
    """The event loop ran a timer ``seconds`` late; measured regularly while the engine runs."""

    seconds: float
