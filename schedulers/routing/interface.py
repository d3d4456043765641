"""The routing interface: how routers and placement policies see a fleet, and what they answer.

A fleet is several replicas of one engine behind a gateway. For every request the gateway asks a
:class:`RouterPolicy` which replica the request should go to. At intervals it asks a :class:`PlacementPolicy`
which adapters should be on which replicas. Both see a :class:`FleetView`, the gateway's knowledge, which is
never quite up to date: each replica's ``age`` says how old it is.

This package is pure Python: no engine, no clock, no network. The same classes route in a live fleet and in
the policy lab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Literal, NamedTuple, Protocol

from aioengine.schedulers.policy import Location

API_VERSION = 1


class RouteRequest(NamedTuple):
    """A request as a router sees it."""

    request_id: str
    adapter: str | None
    """None for the base model. A mix has a name of its own, under which replicas hold it."""
    prompt_tokens: int
    max_tokens: int
    expected_tokens: int | None = None
    """Output tokens that its caller expects; None if not given."""
    tenant: str | None = None
    priority: int = 0
    """Higher is more urgent."""
    deadline: float | None = None
    """Seconds on the view's clock."""
    prefixes: Sequence[int] = ()
    """Chained hashes of the prompt's first blocks, as
    :func:`~aioengine.schedulers.routing.prefixes.prefix_hashes` makes them; () if nobody looked."""
    prefix_block: int = 256
    """Tokens in each of these blocks."""
    tried: Collection[str] = ()
    """Replicas that have failed it already; a router must not name them."""


class Route(NamedTuple):
    """A router's answer: the replicas for a request, or the reason why there is none."""

    replicas: Sequence[str] = ()
    """Replica ids, the preferred one first. The gateway takes the next if one cannot be reached."""
    reject: str | None = None
    """Reason to reject the request, which the caller gets; None: it is not rejected."""
    reason: str = ""
    """Reason for the first replica, in a word or two; metrics count decisions by it."""


class ReplicaView(Protocol):
    """A replica as far as the gateway knows, read-only and live.

    The values are those of its last report, corrected by this gateway's messages since then. Counts are
    numbers of requests, ``*_tokens`` numbers of tokens, and ``*_seconds`` what it has measured; None if it
    has not measured it yet."""

    @property
    def replica_id(self) -> str: ...
    @property
    def accepting(self) -> bool:
        """Whether requests may be sent to it: it is connected, reports, and is not draining."""

    @property
    def age(self) -> float:
        """Seconds since its last report came."""

    @property
    def waiting(self) -> int:
        """Queued requests, those on their way to it included."""

    @property
    def running(self) -> int: ...
    @property
    def max_running(self) -> int:
        """Requests that it runs at once."""

    @property
    def kv_tokens(self) -> int:
        """Number of tokens that its KV cache has room for."""

    @property
    def free_kv_tokens(self) -> int: ...
    @property
    def slots(self) -> int:
        """Adapter slots on its device."""

    @property
    def free_slots(self) -> int:
        """Slots without an adapter."""

    @property
    def adapters_waiting(self) -> int:
        """Distinct adapters with queued requests that are in no slot there."""

    @property
    def load_seconds(self) -> float | None:
        """To read an adapter from disk to its CPU cache."""

    @property
    def slot_seconds(self) -> float | None:
        """To copy an adapter into a slot."""

    @property
    def seconds_per_token(self) -> float | None:
        """Step time for each prompt token computed."""

    @property
    def service_seconds(self) -> float | None:
        """From a request's admission to its end."""

    @property
    def queue_seconds(self) -> float:
        """Seconds of computing before a request that is sent now: prompt tokens that it has still to compute,
        and a token for each running request, at the measured speed (at first, at a guessed speed)."""

    def location(self, adapter: str) -> Location:
        """Return the fastest place of the replica that holds the adapter. Also LOADING if a request for it
        has been sent and the replica has not answered yet."""


class AdapterView(Protocol):
    """An adapter in the fleet, read-only and live. Holders are replica ids."""

    @property
    def name(self) -> str: ...
    @property
    def demand(self) -> float:
        """Requested tokens (prompt and expected output) a second, as an exponential moving average."""

    @property
    def in_flight(self) -> int:
        """Requests for it that this gateway has sent and that have not ended."""

    @property
    def holders(self) -> Set[str]:
        """Those that have it in a slot or in the CPU cache, or are loading it."""

    @property
    def target_holders(self) -> Set[str]:
        """Those that should hold it by the last plan; empty if no plan names any."""

    @property
    def nbytes(self) -> int:
        """Size in a CPU cache, as the last replica reported that has read it; 0: not known yet."""


class FleetView(Protocol):
    """Knowledge of a router. All of it is live and indexed: nothing is copied for the call."""

    @property
    def now(self) -> float: ...
    @property
    def replicas(self) -> Mapping[str, ReplicaView]:
        """All that are known, by id, in order of joining."""

    @property
    def accepting(self) -> Sequence[ReplicaView]:
        """Replicas that requests can be sent to, in order of joining; another object whenever a replica
        joins, leaves, or changes between accepting and not."""

    @property
    def adapters(self) -> Mapping[str, AdapterView]:
        """Adapters by name: registered ones, and those that are held or requested."""

    @property
    def demand(self) -> float:
        """Tokens requested from the fleet a second, for the base model, too."""

    @property
    def changed(self) -> Collection[str]:
        """Adapters whose demand or holders have changed since the last plan."""

    def cached_blocks(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        """Return the number of these leading blocks that a replica's KV cache probably has, by replica id;
        replicas with none are left out. The memory behind it is bounded, so it forgets."""


class RouterPolicy(ABC):
    """Base of all routers. ``route`` must be fast and synchronous, and must not change the view. It is asked
    only if there is a replica that accepts requests and has not failed this one."""

    source: str = ""
    """The paper or project that it is from, in one line."""
    worst_case: str = ""
    """Text with the worst effect that it can have on a request or on the fleet."""

    @abstractmethod
    def route(self, request: RouteRequest, view: FleetView) -> Route:
        """Choose where the request goes."""


class Move(NamedTuple):
    """One step towards a plan: bring an adapter to a replica, or release it there."""

    kind: Literal["load", "unload", "pin", "unpin"]
    """"load": into the CPU cache. "unload": it is not wanted there any more, and its replica may drop it.
    "pin": into a slot, to stay. "unpin": it may be evicted again."""
    adapter: str
    replica: str


class PlacementPolicy(ABC):
    """Base of all placement policies, which decide which replicas have which adapters."""

    source: str = ""
    worst_case: str = ""

    @abstractmethod
    def plan(self, view: FleetView) -> Sequence[Move]:
        """Return the moves to make. It is called outside the event loop, on a fixed view, and should read
        only ``view.changed``: the rest is unchanged since the last plan."""
