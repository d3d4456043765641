"""Cases that take turns, so that a drift of the machine's speed falls on all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Run(NamedTuple, Generic[T]):
    """One run of a case."""

    result: T
    seconds: float
    processor: float
    """Processor seconds of all threads, which change less than ``seconds`` on a busy machine."""


async def in_turns(cases: Mapping[K, Callable[[], Awaitable[T]]], rounds: int) -> dict[K, list[Run[T]]]:
    """Run each case once a round, in every other round in the reverse order."""
    found: dict[K, list[Run[T]]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in cases if turn % 2 == 0 else reversed(list(cases)):
            began, used = time.perf_counter(), time.process_time()
            result = await cases[name]()
            run = Run(result, time.perf_counter() - began, time.process_time() - used)
            found[name].append(run)
    return found


def median_seconds(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each case, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(repeats + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def least_processor_seconds(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least processor time of each case, after one run that is not counted. With one thread it
    says more on a busy machine than the time on the clock."""
    seconds = dict.fromkeys(cases, math.inf)
    for run in range(repeats + 1):
        for name, case in cases.items():
            start = time.process_time()
            case()
            if run:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def quartiles(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios of ``values`` to those of ``base`` in the same rounds."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high
