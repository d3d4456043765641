"""Earliest deadline first."""

from __future__ import annotations

from aioengine.schedulers.parts.fixed_key import FixedKeyOrdering
from aioengine.schedulers.policy import RequestView


class EDF(FixedKeyOrdering):
    """Earliest deadline first; requests without a deadline after all that have one, by arrival.

    key = the deadline, or infinity

    On one machine, and with jobs that can be interrupted, this meets all deadlines if any order does.
    Here a running request is not interrupted, so an urgent one may find the batch full.
    """

    source = "Liu and Layland, 'Scheduling algorithms for multiprogramming', J. ACM 20(1), 1973"
    starvation_bound = "none for requests without a deadline; with one, until the deadline ends them"

    def fixed_key(self, request: RequestView) -> float:
        return float("inf") if request.deadline is None else request.deadline
