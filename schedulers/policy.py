"""The scheduler policy interface: what a policy sees, and what it answers.

A policy is asked once before every model step. It looks at a :class:`SchedulerView` and returns a
:class:`Decision`: which requests to admit, which adapters to place in slots, which to prefetch into the CPU
cache, and which requests to preempt. The engine's core checks every item, refuses those that would break an
invariant, keeps to the budgets, and carries out the rest. So a policy can be wrong but cannot do harm.

This module, like all of ``aioengine.schedulers``, is pure Python: no torch, no engine, no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol, Self

API_VERSION = 2
"""Version 2 has ``RequestView.cached_tokens``, ``Decision.reject`` and ``evict``, and ``SchedulerView.costs``
and ``memory``. Policies that were written for version 1 run unchanged, and so do those of version 2 that know
neither ``Decision.ask_again`` nor ``SchedulerView.refused``."""


class SlotState(StrEnum):
    """FREE: empty. LOADING: being written. READY: usable. DRAINING: holds a version that has been replaced
    or is being unloaded; usable by the requests that were accepted for it, those that still wait, too, and
    free when all of them have ended."""

    FREE = "FREE"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"


class Location(StrEnum):
    """The fastest place that holds an adapter now. LOADING: on its way from disk to the CPU."""

    DISK = "DISK"
    LOADING = "LOADING"
    CPU = "CPU"
    SLOT = "SLOT"


class RequestView(Protocol):
    """A request, read-only and live. Times are in seconds on the view's clock."""

    @property
    def request_id(self) -> str: ...
    @property
    def adapter(self) -> str | None:
        """The adapter's name; None for the base model. A version that has been replaced, and only finishes
        its accepted requests, is called "name@version"."""

    @property
    def arrival(self) -> float: ...
    @property
    def priority(self) -> int:
        """Higher is more urgent."""

    @property
    def deadline(self) -> float | None: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def expected_tokens(self) -> int:
        """Output tokens that the caller expects; ``max_tokens`` if the caller gave no number."""

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""

    @property
    def computed_tokens(self) -> int:
        """Tokens whose KV is in the cache; 0 while waiting."""

    @property
    def cached_tokens(self) -> int:
        """For a waiting request: prompt tokens that the prefix cache would save if it were admitted now (0 if
        its adapter has never been read). The first access costs as much as hashing the prompt. After
        admission: the tokens that the cache has saved."""


class SlotView(Protocol):
    """A device slot, read-only and live."""

    @property
    def index(self) -> int: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def state(self) -> SlotState: ...
    @property
    def running(self) -> int:
        """Running requests that use the slot."""

    @property
    def last_used(self) -> float:
        """Time of its last use by a batch, or else the time when it was filled."""

    @property
    def pinned(self) -> bool: ...


class AdapterView(Protocol):
    """A registered adapter, read-only and live."""

    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int:
        """0 until it has been read once."""

    @property
    def bytes(self) -> int:
        """Size in the CPU cache; 0 until it has been read once."""

    @property
    def location(self) -> Location: ...
    @property
    def slot(self) -> int | None: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def oldest_arrival(self) -> float | None:
        """Arrival of its oldest waiting request."""

    @property
    def last_used(self) -> float: ...
    @property
    def disk_seconds(self) -> float | None:
        """Seconds of its last read from disk to the CPU."""

    @property
    def slot_seconds(self) -> float | None:
        """Seconds of its last copy into a slot."""


class CostsView(Protocol):
    """Costs in seconds, measured in the engine and modelled in the lab. None if not known yet.

    An engine begins to measure its steps when a policy first looks at ``view.costs``.
    """

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        """Return the seconds of a step in which ``tokens`` requests generate a token each.

        Args:
            ranks: The rank of each distinct adapter in the step; the tokens are spread evenly over them.
                Empty: all are the base model's.
            context: Number of earlier tokens whose keys and values each token reads.
        """

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        """Return the seconds of all steps that compute ``tokens`` of a prompt, alone, after ``cached``
        tokens, with an adapter of this rank (0: the base model)."""

    def load(self, adapter: str, stage: Literal["disk", "slot"]) -> float | None:
        """Return the seconds to move an adapter from disk to the CPU ("disk"), or from the CPU into a slot
        ("slot"), without other moves at the same time. In the engine: the last measured time, else the
        average of other adapters."""


class MemoryView(Protocol):
    """The memory of the slots, in bytes.

    Where slots share it by bytes, an adapter takes only as much as its own ranks and modules need; otherwise
    a slot of one size or, if it is larger, several. ``elastic`` says whether adapters differ in what they
    take at present. Free memory in several holes is used when what lies between them leaves."""

    @property
    def elastic(self) -> bool: ...
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def largest_hole(self) -> int:
        """Bytes of the largest adapter that can be placed without an eviction."""

    @property
    def evictable(self) -> int:
        """Bytes of the adapters in slots that are idle and not pinned."""

    def bytes_of(self, adapter: str) -> int:
        """Return the bytes that an adapter takes in a slot; 0 before it has been read."""


class WaitingView(Protocol):
    """Waiting requests in arrival order."""

    def __iter__(self) -> Iterator[RequestView]: ...
    def __len__(self) -> int: ...


class WaitingAdaptersView(Protocol):
    """Names of adapters (None: the base model) in order of their oldest waiting request."""

    def __iter__(self) -> Iterator[str | None]: ...
    def __reversed__(self) -> Iterator[str | None]: ...
    def __len__(self) -> int: ...


class SchedulerView(Protocol):
    """The state that a policy sees. It is live and indexed: nothing is copied for the call."""

    @property
    def now(self) -> float: ...
    @property
    def step(self) -> int: ...
    @property
    def slots(self) -> Sequence[SlotView]: ...
    @property
    def adapters(self) -> Mapping[str, AdapterView]: ...
    @property
    def waiting(self) -> WaitingView: ...
    def waiting_for(self, adapter: str | None) -> WaitingView:
        """Return the waiting requests of one adapter (None: of the base model)."""

    @property
    def waiting_adapters(self) -> WaitingAdaptersView: ...
    @property
    def running(self) -> Sequence[RequestView]: ...
    @property
    def refused(self) -> Sequence[Refusal]:
        """The items of the policy's last decision that the core has refused."""

    @property
    def tokens_left(self) -> Mapping[str | None, int]:
        """By adapter (None: the base model), the most tokens that one of its running requests has left to
        generate; they come in order of admission."""

    @property
    def free_blocks(self) -> int:
        """KV blocks that can be allocated now, unused cached ones included."""

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""

    @property
    def free_seqs(self) -> int:
        """Requests that may still be admitted under ``max_num_seqs``."""

    @property
    def free_tokens(self) -> int:
        """Tokens left in this step's budget after every running request has its decode token."""

    @property
    def cpu_room(self) -> int:
        """Number of adapters for which the CPU cache has room without an eviction (the core can make more
        room by evicting). Where its bytes are bounded, each counts as large as the largest one in it."""

    @property
    def cpu_bytes_room(self) -> int | None:
        """Free bytes in the CPU cache; None where they are not bounded."""

    @property
    def load_room(self) -> int:
        """Reads from disk that may be started now."""

    @property
    def costs(self) -> CostsView: ...
    @property
    def memory(self) -> MemoryView: ...


class Place(NamedTuple):
    """Put an adapter into a slot. None: a free slot, else the least recently used idle one. If the adapter is
    not in the CPU cache yet, its load is started and no slot is taken."""

    adapter: str
    slot: int | None = None


class _DecisionFields(NamedTuple):
    """The fields of a :class:`Decision`."""

    admit: Sequence[str] = ()
    """Request ids to start, in order. Running requests continue without being named."""
    place: Sequence[Place] = ()
    prefetch: Sequence[str] = ()
    """Adapters to bring from disk to the CPU cache."""
    preempt: Sequence[str] = ()
    """Request ids to preempt; they lose their KV and wait again."""
    reject: Sequence[tuple[str, str]] = ()
    """(request id, reason) of waiting requests to end with ``RequestRejected``. Only requests that never ran;
    a request that has delivered output is served to its end."""
    evict: Sequence[str] = ()
    """Adapters that may leave their slots for those in ``place``, in this order. Only as many leave as
    needed, and never one that is running, pinned or being copied. If these are too few, the core evicts the
    least recently used adapters that no request waits for, and for a ``Place`` without a slot the others,
    too."""
    discard: Sequence[str] = ()
    """Adapters that leave their slots now, although nothing needs the room. They stay in the CPU cache. None
    leaves that is running, pinned, being copied, or named by a request in ``admit``."""
    ask_again: float | None = None
    """Time on the view's clock: ask me then, and not before unless there is an event. None: ask before every
    step and, while requests wait and nothing runs, every 50 ms. Infinity: only after an event.

    An event is everything that changes what a policy sees, but not the tokens of running requests, and not
    the effects of this decision. If a part of the decision is refused or cannot be carried out yet, the
    policy is asked before the next step, whatever it said."""


class Decision(_DecisionFields):
    """A policy's answer. Every field may be empty; the core keeps to the given order."""

    __slots__ = ()

    def _replace(self, **fields: Any) -> Self:
        """Return a decision with other fields. ``ask_again`` need not be right for it, so it is kept only if
        it is among ``fields``."""
        return super()._replace(**{"ask_again": None, **fields})


class Refusal(NamedTuple):
    """An item of a decision that the core has refused."""

    item: str
    """The request's id, or the adapter's name."""
    reason: str
    """One of the reasons of docs/policies.md, such as "place_slot_busy"."""


class PolicyEvent(NamedTuple):
    """Something that happened.

    ``kind`` is one of: "request_added", "request_admitted", "request_preempted", "request_finished"
    (however it ended), "adapter_loaded" (it is on the CPU), "adapter_placed" (it is in a slot),
    "adapter_evicted" (it has left its slot), "adapter_dropped" (it has left the CPU cache),
    "adapter_retired" (it was unloaded or replaced: it is called "name@version" from now on, and ``name`` is
    the new version, if there is one).
    """

    kind: str
    now: float
    request: RequestView | None = None
    adapter: str | None = None
    """The adapter concerned; None for a request to the base model."""
    was: str | None = None
    """Earlier name of the adapter, for "adapter_retired"."""


class SchedulerPolicy(ABC):
    """Base of all policies. ``schedule`` must be fast, synchronous, and must not change the view."""

    starvation_bound: str = "none"
    """Text that says how long a request can wait while the engine makes progress."""
    source: str = ""
    """Its source, a paper or a project, in one line."""

    @abstractmethod
    def schedule(self, view: SchedulerView) -> Decision:
        """Decide the next step."""

    def on_event(self, event: PolicyEvent) -> None:  # noqa: B027 - optional hook
        """Called for every event, in order."""

    def cpu_victims(self, view: SchedulerView, candidates: Sequence[str]) -> Sequence[str]:
        """Return the order of eviction from the CPU cache, when room is needed there.

        It is optional, and must be as fast as ``schedule``. All ``candidates`` may be evicted; they come
        least recently used first. None is pinned, running, being read or copied, or needed by a request that
        has waited longer than the one that needs the room. Candidates that are not in the answer are evicted
        last, in that order.
        """
        return ()
