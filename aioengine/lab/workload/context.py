"""Requests longer than the model's context: counts them before a run, and cuts them if requested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from aioengine.lab.workload.requests import AdapterShape, Arrival, Objective, Workload


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


COUNTED = 100_000
"""Maximum number of requests that are counted before a run, so that a run of millions begins soon."""


def count_too_long(workload: Workload, limit: int, first: int | None = COUNTED) -> TooLong:
    """Read through the workload once, or its ``first`` requests. ``limit``: tokens of prompt and output."""
    too_long = total = longest = 0
    for arrival in islice(workload, first):
        tokens = arrival.prompt_tokens + arrival.output_tokens
        total += 1
        too_long += tokens > limit
        longest = max(longest, tokens)
    return TooLong(too_long, total, longest, limit)


class Truncated(Workload):
    """A workload whose prompts are cut, and then its outputs, until they fit into ``limit`` tokens."""

    def __init__(self, workload: Workload, limit: int) -> None:
        self._workload = workload
        self._limit = limit

    @property
    def adapters(self) -> Sequence[AdapterShape]:
        return self._workload.adapters

    @property
    def objective(self) -> Objective | None:
        return self._workload.objective

    @property
    def concurrency(self) -> int | None:
        return self._workload.concurrency

    @property
    def think(self) -> float:
        return self._workload.think

    def describe(self) -> dict[str, Any]:
        return {**self._workload.describe(), "truncated_to": self._limit}

    def __iter__(self) -> Iterator[Arrival]:
        for arrival in self._workload:
            output = min(arrival.output_tokens, self._limit - 1)
            prompt = min(arrival.prompt_tokens, self._limit - output)
            yield arrival._replace(prompt_tokens=prompt, output_tokens=output)
