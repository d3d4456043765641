"""The tokens of a step, by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from aioengine.step import StepResult


def tokens_of(result: StepResult) -> list[Sequence[int]]:
    ends = accumulate(result.counts, initial=0)
    return [result.tokens[first:until] for first, until in pairwise(ends)]
