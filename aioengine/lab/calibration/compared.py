"""Figures of live and simulated runs, and their differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from aioengine.lab.runs.rows import Move, RequestRecord, Sample, SlotSpan


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a run that are compared. A mean over no requests is 0."""

    output_tokens_per_second: float
    """From the start to the end of the last request."""
    median_ttft: float
    """Seconds."""
    mean_inter_token: float
    """Seconds: the mean over requests of the time between the first token and the last, a token."""


METRICS = Measured.__struct_fields__


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One load. ``error`` is (simulated - live) / live of each metric."""

    load: str
    """"40%" of what the simulated engine can do, or "as given"."""
    requests_per_second: float | None
    live: Measured
    """Over the requests of all runs."""
    runs: tuple[Measured, ...]
    """Each live run."""
    waited: tuple[float, ...]
    """Time that threads waited for a processor in each live run while no adapter was moved, as a share of the
    time in those steps. It shows how much other processes took."""
    simulated: Measured
    error: dict[str, float]
    step_error: float
    """The error of the cost model alone, in the time of the live runs' steps, each to the beginning of the
    next, while no adapter was moved."""
    error_as_live: dict[str, float]
    """``error``, with all steps longer or shorter by one factor, so that they take as long as the live ones.
    What is left of ``error`` has other causes. Near saturation a small error of the steps is a large one of
    the figures, because sequences that take longer run beside more others."""


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    preset: str
    comparisons: tuple[Comparison, ...]
    rounds: str = ""
    """How much the machine's speed varied, if the calibration was made in turns with the live runs."""

    @property
    def worst(self) -> float:
        """Largest absolute error."""
        return max(abs(error) for one in self.comparisons for error in one.error.values())

    def rows(self) -> list[tuple[str, str, float, float, float]]:
        """(load, metric, live, simulated, error), for a table."""
        return [
            (one.load, metric, getattr(one.live, metric), getattr(one.simulated, metric), one.error[metric])
            for one in self.comparisons
            for metric in METRICS
        ]

    def to_dict(self) -> dict[str, Any]:
        values = msgspec.to_builtins(self)
        assert isinstance(values, dict)
        return values


def errors(found: Measured, truth: Measured) -> dict[str, float]:
    """Return the relative error of each metric."""
    return {metric: relative_error(getattr(found, metric), getattr(truth, metric)) for metric in METRICS}


def relative_error(found: float, truth: float) -> float:
    """Return the error as a share of the truth; 0 if that is 0."""
    return (found - truth) / truth if truth else 0.0


class Kept:
    """A sink that keeps the requests that have finished."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []

    def request(self, record: RequestRecord) -> None:
        if record.error is None and record.first_token is not None:
            self.requests.append(record)

    def span(self, record: SlotSpan) -> None: ...
    def move(self, record: Move) -> None: ...
    def sample(self, record: Sample) -> None: ...

    @property
    def seconds(self) -> float:
        return max((record.ended for record in self.requests), default=0.0)


def measured(runs: Sequence[Kept]) -> Measured:
    """Compute the figures over the requests of all runs."""
    ttfts, gaps, tokens = [], [], 0
    for record in chain.from_iterable(run.requests for run in runs):
        assert record.first_token is not None
        tokens += record.output_tokens
        ttfts.append(record.first_token - record.arrival)
        if record.output_tokens > 1:
            gaps.append((record.ended - record.first_token) / (record.output_tokens - 1))
    seconds = sum(run.seconds for run in runs)
    return Measured(
        output_tokens_per_second=tokens / seconds if seconds else 0.0,
        median_ttft=statistics.median(ttfts) if ttfts else 0.0,
        mean_inter_token=statistics.fmean(gaps) if gaps else 0.0,
    )
