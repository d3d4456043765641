"""Fairness of a run between its clients, which are its adapters or its tenants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from aioengine.lab.runs.rows import BASE

Array = NDArray[Any]
Client = Literal["adapter", "tenant"]
NO_TENANT = "(none)"

MAX_PAIRED_CLIENTS = 64
"""Differences of service are computed for all pairs of this many clients, those with the most service."""


class ServiceGap(NamedTuple):
    """The largest difference in service between two clients while both had requests waiting."""

    tokens: int
    clients: tuple[str, str] | None
    """The two clients, first the one that got more; None: no two clients ever waited at the same time."""
    series: list[tuple[float, int]]
    """By time: the largest difference so far among the clients that wait at that time."""


def jain(values: Iterable[float]) -> float | None:
    """Compute Jain's index: 1 if all values are equal, 1/n if one client has everything; None without any.

    R. Jain, D. Chiu, W. Hawe: A quantitative measure of fairness and discrimination for resource allocation
    in shared computer systems, DEC-TR-301, 1984 (arXiv cs/9809099).
    """
    values = list(values)
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares > 0 else None


def max_min(values: Iterable[float]) -> float | None:
    """Divide the largest value by the smallest; None if the smallest is 0 or there are no values."""
    values = list(values)
    return max(values) / min(values) if values and min(values) > 0 else None


def by_client(requests: pl.DataFrame, client: Client) -> pl.DataFrame:
    """Return a row for each client, the one with the most requests first (then by name).

    Columns: ``client``; ``offered``, ``finished``; ``tokens`` computed (prompt and output); means over the
    finished of ``ttft_seconds`` and ``latency_seconds``; ``tokens_per_second``: tokens over the seconds that
    its requests spent in the engine, which is the speed that it sees; ``worst_wait_seconds`` for a first
    token (or for the end, if there was none). Refused requests count as offered only.
    """
    done = pl.col("reason").is_in(["stop", "length"])
    accepted = pl.col("reason") != "refused"
    latency = pl.col("ended") - pl.col("arrival")
    waited = pl.coalesce("first_token", "ended") - pl.col("arrival")
    served = pl.col("first_token").is_not_null()
    tokens = pl.col("output_tokens") + pl.when(served).then("prompt_tokens").otherwise(0)
    name = BASE if client == "adapter" else NO_TENANT
    return (
        requests.sort("request_id")
        .group_by(pl.col(client).fill_null(name).alias("client"), maintain_order=True)
        .agg(
            offered=pl.len(),
            finished=done.sum(),
            tokens=tokens.filter(accepted).sum(),
            ttft_seconds=(pl.col("first_token") - pl.col("arrival")).filter(done).mean(),
            latency_seconds=latency.filter(done).mean(),
            tokens_per_second=tokens.filter(accepted).sum() / latency.filter(accepted).sum(),
            worst_wait_seconds=waited.filter(accepted).max(),
        )
        .sort("offered", "client", descending=[True, False])
    )


def service_gap(requests: pl.DataFrame, samples: pl.DataFrame) -> ServiceGap:
    """Compute what fair schedulers bound: the difference of service between clients that both wait.

    The clients are tenants, and adapters for requests without a tenant. For clients f and g and any time
    [s, t) in which both have requests waiting without a break, W is the tokens computed for each, and VTC's
    bound is on ``|W_f(s, t) - W_g(s, t)|`` (Y. Sheng et al.: Fairness in Serving Large Language Models, OSDI
    2024, arXiv 2401.00588; it weighs output tokens by two, here all count alike). It is taken at the times of
    the samples; a preempted request that waits again is not counted as waiting.
    """
    decode = msgspec.json.Decoder(dict[str, int]).decode
    service = [decode(text or "{}") for text in samples["service"]]
    totals: Counter[str] = Counter()
    for row in service:
        totals.update(row)
    names = sorted(totals, key=lambda name: (-totals[name], name))[:MAX_PAIRED_CLIENTS]
    if len(names) < 2:
        return ServiceGap(0, None, [])
    waits = _backlogs(requests)
    times = samples["time"].to_numpy()
    waiting = np.array([_covered(times, waits.get(name, [])) for name in names]).T
    tokens = np.array([[row.get(name, 0) for name in names] for row in service])
    got = np.zeros(len(names), dtype=np.int64)
    least = np.zeros((len(names), len(names)), dtype=np.int64)  # of got[f] - got[g], since both wait
    both = np.zeros((len(names), len(names)), dtype=bool)
    worst, pair, series = 0, None, []
    for time, more, now in zip(times.tolist(), tokens, waiting, strict=True):
        before, both = both, now[:, None] & now
        np.copyto(least, np.subtract.outer(got, got), where=both & ~before)
        got += more
        difference = np.subtract.outer(got, got)
        np.minimum(least, difference, out=least)
        grown = np.where(both, difference - least, 0)
        first, second = np.unravel_index(int(grown.argmax()), grown.shape)
        largest = int(grown[first, second])
        series.append((time, largest))
        if largest > worst:
            worst, pair = largest, (names[first], names[second])
    return ServiceGap(worst, pair, series)


def _backlogs(requests: pl.DataFrame) -> dict[str, list[tuple[float, float]]]:
    """Client -> the times in which it had a request waiting, as spans that do not touch, in order."""
    waits: dict[str, list[tuple[float, float]]] = {}
    accepted = requests.filter(requests["reason"] != "refused").sort("arrival")
    client = pl.coalesce("tenant", "adapter", pl.lit(BASE))
    rows = accepted.select(client.alias("client"), "arrival", "admitted", "ended").iter_rows()
    for name, arrival, admitted, ended in rows:
        end = ended if admitted is None else admitted
        spans = waits.setdefault(name, [])
        if spans and arrival <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((arrival, end))
    return waits


def _covered(times: Array, spans: Sequence[tuple[float, float]]) -> Array:
    """Return for each interval between two times (the first from 0) whether it lies within a span."""
    starts, ends = np.array([*spans, (np.inf, np.inf)]).T
    covered: Array = starts[np.searchsorted(ends, times)] <= np.array([0.0, *times[:-1]])
    return covered
