"""What is recorded of a run, live or simulated: rows that are written out as they come."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class RequestRecord(NamedTuple):
    """One request, at its end. Times are seconds from the start of the run; None: it did not come to it."""

    request_id: str
    adapter: str | None
    tenant: str | None
    prompt_tokens: int
    output_tokens: int
    """Generated."""
    arrival: float
    admitted: float | None
    first_token: float | None
    ended: float
    reason: str
    """As in :class:`~aioengine.events.RequestEnded`, or "refused": it was never accepted."""
    found: str | None
    """Where its adapter was when it arrived: "slot", "cpu", "loading" or "disk"; None: the base model."""
    cached_tokens: int
    preemptions: int
    worst_gap: float | None
    """The longest time between two of its tokens."""
    deadline: float | None
    """Seconds from the start of the run."""
    rank: int = 0
    error: str | None = None


class SlotSpan(NamedTuple):
    """A slot's stay with one adapter: written from ``start`` to ``ready``, its until ``end``."""

    slot: int
    adapter: str
    start: float
    ready: float | None
    """None: the copy failed, or had not ended with the run."""
    end: float
    busy_steps: int
    """Steps that used it."""


class Move(NamedTuple):
    """A load from disk ("disk"), or a copy into a slot ("slot"), at its end."""

    stage: str
    adapter: str
    start: float
    end: float
    nbytes: int
    error: str | None = None


class Sample(NamedTuple):
    """The engine over an interval that ends at ``time``; counts are sums over it, the rest is at its end."""

    time: float
    running: int
    waiting: int
    steps: int
    step_seconds: float
    prefill_tokens: int
    decode_tokens: int
    adapters: int
    """Sum over the steps of the distinct adapters in them."""
    kv_used: float
    """Share of the KV blocks."""
    slots_ready: int
    cpu_adapters: int
    service: str
    """JSON: tokens computed in the interval by tenant (or by adapter where there are no tenants)."""


class Sink(Protocol):
    """Where records go."""

    def request(self, record: RequestRecord) -> None: ...
    def span(self, record: SlotSpan) -> None: ...
    def move(self, record: Move) -> None: ...
    def sample(self, record: Sample) -> None: ...
