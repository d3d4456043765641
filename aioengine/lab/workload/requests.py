"""Workload of a run: requests in order of arrival, and the adapters that they ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
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


COUNTED = 100_000
"""Maximum number of requests that are counted before a run, so that a run of millions begins soon."""


class TooLong(NamedTuple):
    """Number of a workload's requests that do not fit into the context."""

    requests: int
    of: int
    """Number of requests that were looked at."""
    longest: int
    """Tokens of prompt and output."""
    limit: int
    """The model's context (``max_model_len``)."""

    def __str__(self) -> str:
        return (
            f"{self.requests:,} of {self.of:,} requests are longer than the model's context of "
            f"{self.limit:,} tokens (the longest has {self.longest:,})"
        )


def count_too_long(workload: Workload, limit: int, first: int | None = COUNTED) -> TooLong:
    """Read through the workload once, or its ``first`` requests. ``limit``: tokens of prompt and output."""
    too_long = total = longest = 0
    for arrival in islice(workload, first):
        tokens = arrival.prompt_tokens + arrival.output_tokens
        total += 1
        too_long += tokens > limit
        longest = max(longest, tokens)
    return TooLong(too_long, total, longest, limit)
