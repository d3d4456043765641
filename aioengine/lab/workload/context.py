"""Requests longer than the model's context, which are counted before a run."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from aioengine.lab.workload.requests import Workload

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
