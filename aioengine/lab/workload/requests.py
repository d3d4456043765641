"""Workload of a run: requests in order of arrival, and the adapters that they ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PREFIX_BLOCK = 512
"""Tokens of a prompt that one number in ``Arrival.prefix`` stands for."""

Objective = Callable[[int], float]


class AdapterShape(NamedTuple):
    """An adapter as far as scheduling is concerned."""

    name: str
    rank: int
    nbytes: int | None = None
    """Bytes on disk and on the CPU; None: what the model's shape gives for the rank."""


class Arrival(NamedTuple):
    """A request to come."""

    time: float
    """Seconds from the start of the workload."""
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    """Number of tokens that it will generate, including the end of the sequence, if ``max_tokens`` allows
    it."""
    max_tokens: int | None = None
    """Bound that the request sets, which policies see; None: exactly ``output_tokens``, so that policies know
    the length."""
    expected_tokens: int | None = None
    """Prediction of the length that policies see; None: no prediction."""
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    """Seconds from arrival after which the engine ends it with an error; policies see it."""
    prefix: tuple[int, ...] = ()
    """Beginning of the prompt, as a number for each :data:`PREFIX_BLOCK` tokens. Prompts whose first numbers
    are equal share these tokens. (): it shares none."""
    after: int = 0
    """Distance back, in the workload, to the request of its session that has to end first; 0: there is none.
    This one is sent ``think`` seconds after that end, and ``time`` is when its session began."""
    think: float = 0.0
    more: bool = False
    """Whether requests that wait for this one follow."""
    first: bool = True
    """Whether it is the first request of its session (or without one)."""
    last: bool = True
    """Whether it is the last request of its session (or without one)."""
    conversation: Hashable = None
    """Conversation of a trace that it belongs to; None: it is alone, or of a session."""

    @property
    def is_alone(self) -> bool:
        """Whether it belongs to no session."""
        return self.first and self.last


class Workload(ABC):
    """Requests of a run. Every iteration gives the same arrivals, one at a time, sorted by time."""

    adapters: Sequence[AdapterShape]
    """All adapters that may be requested, whether or not they are."""
    objective: Objective | None = None
    """Seconds from its arrival within which a request should end, by its output tokens. This is measured but
    not enforced. None: requests are measured by their deadlines."""
    concurrency: int | None = None
    """Number of callers, each of which sends its next request when its previous one has ended (a closed
    loop), without regard to arrival times. None: requests are sent at their times (an open loop)."""
    think: float = 0.0
    """Seconds between the end of a caller's request or session and its next one, in a closed loop."""

    @abstractmethod
    def __iter__(self) -> Iterator[Arrival]: ...


@dataclass
class Offered:
    """Facts that one reading of a workload finds out."""

    limit: int
    """The model's context (``max_model_len``)."""
    requests: int = 0
    too_long: int = 0
    """Requests that do not fit into the context."""
    longest: int = 0
    """Tokens of prompt and output."""
    by_adapter: Counter[str | None] = field(default_factory=Counter)
    by_conversation: Counter[Hashable] = field(default_factory=Counter)
    """Requests of each conversation of a trace."""
    sessions: Counter[int] = field(default_factory=Counter)
    """Number of sessions by their requests; a request that belongs to none, nor to a conversation, is one."""

    @property
    def sizes(self) -> Counter[int]:
        """Number of conversations and sessions, by their requests."""
        return self.sessions + Counter(self.by_conversation.values())

    def __str__(self) -> str:
        return (
            f"{self.too_long:,} of {self.requests:,} requests are longer than the model's context of "
            f"{self.limit:,} tokens (the longest has {self.longest:,})"
        )

    def summary(self) -> dict[str, int]:
        """Return the part ``too_long`` of a run's summary."""
        return {"requests": self.too_long, "of": self.requests, "longest": self.longest, "limit": self.limit}


def look_through(workload: Workload, limit: int) -> Offered:
    """Read through the workload once. ``limit``: tokens of prompt and output that the model takes."""
    found, turns = Offered(limit), 0
    for arrival in workload:
        tokens = arrival.prompt_tokens + arrival.output_tokens
        found.requests += 1
        found.too_long += tokens > limit
        found.longest = max(found.longest, tokens)
        found.by_adapter[arrival.adapter] += 1
        if arrival.conversation is not None:
            found.by_conversation[arrival.conversation] += 1
            continue
        if arrival.first and turns:
            found.sessions[turns] += 1
            turns = 0
        turns += 1
    if turns:
        found.sessions[turns] += 1
    return found
