"""Orderings whose key does not change while a request waits: shortest job, earliest deadline, priority."""

from __future__ import annotations

from aioengine.schedulers.checks import finite_weights
from aioengine.schedulers.parts.fixed_key import FixedKeyOrdering
from aioengine.schedulers.policy import RequestView


class SJF(FixedKeyOrdering):
    """Shortest job first: the least prompt plus expected output tokens.

    key = input_weight x prompt_tokens + output_weight x expected_tokens

    The expected length of the output is the caller's ``expected_tokens``, or else ``max_tokens``. If it is
    exact, the mean waiting time is the smallest possible. A long request may wait as long as shorter ones
    arrive.

    Args:
        input_weight: Weight of a prompt token, >= 0.
        output_weight: Weight of an expected output token, >= 0.
    """

    source = "Smith, 'Various optimizers for single-stage production', Naval Res. Logist. Q. 3, 1956"
    starvation_bound = "none"

    def __init__(self, input_weight: float = 1.0, output_weight: float = 1.0) -> None:
        super().__init__()
        finite_weights(input_weight=input_weight, output_weight=output_weight)
        self.input_weight, self.output_weight = input_weight, output_weight

    def fixed_key(self, request: RequestView) -> float:
        return self.input_weight * request.prompt_tokens + self.output_weight * request.expected_tokens


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


class Priority(FixedKeyOrdering):
    """The highest priority first, equal ones in order of arrival.

    key = -priority
    """

    source = "static priorities, as in vLLM's 'priority' scheduling policy (there a lower value goes first)"
    starvation_bound = "none"

    def fixed_key(self, request: RequestView) -> int:
        return -request.priority
