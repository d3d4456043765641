"""What happened in a run, compared with what was asked: differences that make its figures those of something
else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any

import polars as pl

from aioengine.lab.analysis.summary import finished
from aioengine.lab.runs.rows import Frames
from aioengine.lab.workload.draw import adapter_names
from aioengine.lab.workload.popularity import Shift, parse_popularity
from aioengine.lab.workload.requests import Offered

if TYPE_CHECKING:
    from aioengine.lab.runs.experiment import Experiment

USED = 0.8
"""Share of the adapters to be expected that must have been used."""
SPREADS = 4.0
"""Standard deviations that are chance."""
UNLIKELY = 0.001
"""Probability below which a popularity is not taken to be the one that was asked."""
LEAST_EXPECTED = 5.0
"""Requests that each group of the test must expect."""
REFUSED = 0.01
END = 0.1
"""Part of a run that is a beginning or an end."""
DECIDES = 0.2
"""Change of a figure, by the beginning, that is too much."""
BACKLOG = 0.05
"""Share of all requests that wait when the last one comes: the queue grows."""
FEW = 50
"""Requests, of which fewer say nothing about a queue, or a beginning."""


def warnings(
    experiment: Experiment, offered: Offered, frames: Frames, summary: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what a reader of the figures has to know: where it is not what was asked. Each begins with its
    kind, and a colon."""
    adapters = experiment.workload.adapters
    if adapters:
        yield from _adapters(experiment, offered)
    if (refused := summary["requests_refused"]) > REFUSED * summary["requests_offered"]:
        reasons = ", ".join(f"{count:,} {name}" for name, count in summary["requests_by_error"].items())
        share = refused / summary["requests_offered"]
        yield f"refused: {share:.0%} of the requests were never accepted ({reasons})"
    ends = frames.slots["end"]
    if len(offered.by_adapter) > 1 and ends.n_unique() <= 1:
        yield "slots: they were never contended, because no adapter had to leave one; policies decide nothing"
    yield from _times(experiment, frames.requests)


def _adapters(experiment: Experiment, offered: Offered) -> Iterator[str]:
    """Compare the adapters, and how often each was wanted, with what was asked."""
    spec = experiment.workload
    popularity = parse_popularity("popularity", spec.popularity)
    shares = popularity.shares(spec.adapters)
    counts = [count for name, count in offered.by_adapter.items() if name is not None]
    if not counts:
        return
    absent = [(1.0 - share) ** sum(counts) for share in shares]
    expected = len(shares) - sum(absent)
    chance = SPREADS * sqrt(sum(share * (1.0 - share) for share in absent))
    if len(counts) < min(USED * expected, expected - chance):
        yield (
            f"adapters: {len(counts):,} of {spec.adapters:,} were used, and {expected:,.0f} were to be "
            f"expected of {sum(counts):,} requests; they are of {offered.sizes.total():,} "
            "conversations, each of which keeps its adapter"
        )
    if not isinstance(popularity, Shift):
        yield from _popularity(shares, offered)


def _popularity(shares: list[float], offered: Offered) -> Iterator[str]:
    """Test the popularity of the adapters (chi-squared). The requests of a conversation are no draws of their
    own: all together weigh as much as ``draws`` that are."""
    from scipy.special import chdtrc

    counts = {name: count for name, count in offered.by_adapter.items() if name is not None}
    total, sizes = sum(counts.values()), offered.sizes
    draws = total * offered.requests / sum(size * size * number for size, number in sizes.items())
    groups, wanted, found = [], 0.0, 0.0
    for name, share in zip(adapter_names(len(shares)), shares, strict=True):
        wanted, found = wanted + share * draws, found + counts.pop(name, 0) * draws / total
        if wanted >= LEAST_EXPECTED:
            groups.append((wanted, found))
            wanted = found = 0.0
    groups.append((wanted, found + sum(counts.values()) * draws / total))  # of adapters that nobody asked for
    distance = sum((found - wanted) ** 2 / max(wanted, 1.0) for wanted, found in groups)
    if chdtrc(max(len(groups) - 1, 1), distance) < UNLIKELY:
        most_wanted, most = offered.by_adapter.most_common(1)[0]
        yield (
            f"popularity: it is not the one that was asked; {most_wanted or 'the base model'} had "
            f"{most / offered.requests:.0%} of the requests (chi-squared {distance:,.0f}, {len(groups) - 1} "
            f"degrees of freedom, of {draws:,.0f} independent requests)"
        )


def _times(experiment: Experiment, requests: pl.DataFrame) -> Iterator[str]:
    """Look for a queue that grows, and for a beginning or an end that decides the figures."""
    requests = requests.filter(pl.col("reason") != "refused").sort("arrival")
    if requests.height < FEW:
        return
    arrivals = requests["arrival"]
    last, over = float(arrivals[-1]), float(requests["ended"].max() or 0.0)  # type: ignore[arg-type] # floats

    def waiting(now: float) -> int:
        came = requests.filter(pl.col("arrival") <= now)
        return came.filter(pl.coalesce("admitted", "ended") > now).height

    backlog, before = waiting(last), waiting(last / 2)
    overloaded = experiment.workload.concurrency is None and backlog > BACKLOG * requests.height
    if overloaded and backlog > 1.5 * before:
        yield (
            f"overloaded: the queue grows, from {before:,} requests at half of the time to {backlog:,} at "
            "the last arrival; times are as long as the run"
        )
    if experiment.warmup is not None:
        return
    done = finished(requests).with_columns(ttft=pl.col("first_token") - pl.col("arrival"))
    means = [
        float(frame["ttft"].mean() or 0.0)  # type: ignore[arg-type] # a column of floats
        for frame in (done, done.filter(pl.col("arrival") > last * END))
    ]
    if not overloaded and abs(means[0] - means[1]) > DECIDES * max(means[1], 1e-9):
        yield (
            f"warm-up: the first tenth of the time decides the figures; with it the mean time to first token "
            f"is {means[0]:.3g} s, without it {means[1]:.3g} s; leave it out with --warmup {last * END:.0f}"
        )
    if over - last > END * over:
        yield (
            f"drain: {(over - last) / over:.0%} of the time is after the last arrival, when the engine only "
            "empties; --warmup leaves this out"
        )
