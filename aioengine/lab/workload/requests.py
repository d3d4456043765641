"""What a run is offered: requests in order of arrival, and the adapters that they ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

PREFIX_BLOCK = 512
"""Tokens of a prompt that one number in ``Arrival.prefix`` stands for."""

Objective = Callable[[int], float]


class AdapterShape(NamedTuple):
    """An adapter as far as scheduling is concerned."""

    name: str
    rank: int
    nbytes: int | None = None
    """On disk and on the CPU; None: what the model's shape gives for the rank."""


class Arrival(NamedTuple):
    """A request to come."""

    time: float
    """Seconds from the start of the workload."""
    adapter: str | None
    prompt_tokens: int
    output_tokens: int
    """How many it will generate, the end-of-sequence token included, whatever is allowed."""
    max_tokens: int | None = None
    """What it allows itself, and what policies see; None: just ``output_tokens``, so that they know."""
    expected_tokens: int | None = None
    """A prediction that policies see beside it; None: no prediction."""
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    """Seconds from arrival, after which the engine gives it up; policies see it."""
    prefix: tuple[int, ...] = ()
    """What the prompt begins with, a number for each :data:`PREFIX_BLOCK` tokens: prompts are alike as far as
    these are. (): it has no content."""
    after: int = 0
    """In a session: how many requests before this one, in the workload, the one is that has to end first. It
    is sent ``think`` seconds after that, and ``time`` is when its session began. 0: it waits for none."""
    think: float = 0.0
    more: bool = False
    """Whether requests that wait for this one follow."""
    first: bool = True
    """Whether a session, or a request of its own, begins with it."""
    last: bool = True
    """Whether that ends with it."""

    @property
    def is_alone(self) -> bool:
        """Whether it belongs to no session."""
        return self.first and self.last


class Workload(ABC):
    """Deterministic: every iteration gives the same arrivals, one at a time, sorted by time."""

    @property
    @abstractmethod
    def adapters(self) -> Sequence[AdapterShape]:
        """All that may be asked for, asked for or not."""

    @property
    def objective(self) -> Objective | None:
        """In how many seconds from its arrival a request should end, by its output tokens; it is measured and
        not enforced. None: requests are measured by their deadlines."""
        return None

    @property
    def concurrency(self) -> int | None:
        """So many callers, each of which sends its next request when the one before has ended (a closed
        loop), whatever the arrivals' times are. None: requests are sent at their times (an open loop)."""
        return None

    @property
    def think(self) -> float:
        """In a closed loop: seconds between the end of a caller's request, or session, and its next one."""
        return 0.0

    @abstractmethod
    def __iter__(self) -> Iterator[Arrival]: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All parameters, as plain data; enough to build it again."""
