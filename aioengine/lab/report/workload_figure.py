"""One figure of a workload: when requests come, how long they are, and for whom."""

from __future__ import annotations

from collections import Counter

from aioengine.lab.analysis.numbers import share_text, shorten
from aioengine.lab.analysis.offered import OfferedRequests, describe_offered
from aioengine.lab.report.charts import Figure, Row, figure, shares_up_to

BINS = 60
DRIFT_BINS = 24
SHOWN = 5
"""Adapters that are told apart over time."""


def workload_figure(offered: OfferedRequests) -> Figure:
    """Draw a workload."""
    import polars as pl

    found = describe_offered(offered)
    title = (
        f"{found['requests']:,} requests for {found['adapters_asked_for']:,} adapters; "
        f"{share_text(found['cacheable_prompt_share'])} of the prompts' tokens are beginnings that came "
        "before"
    )
    lengths = {"prompt": offered.prompts, "output": offered.outputs}
    asked = Counter(name for name in offered.adapters if name is not None).most_common()
    return figure(
        "workload",
        title,
        rate=_rate(offered),
        lengths=[
            row for name, values in lengths.items() for row in shares_up_to(pl.Series(values), name=name)
        ],
        popularity=[
            {"place": place, "share": count / len(offered.times)} for place, (_, count) in enumerate(asked, 1)
        ],
        drift=_drift(offered, [name for name, _ in asked[:SHOWN]]),
    )


def _bin(time: float, end: float, bins: int) -> int:
    return min(int(time / end * bins), bins - 1)


def _rate(offered: OfferedRequests) -> list[Row]:
    end = offered.times[-1] if offered.times else 0.0
    counts = Counter(_bin(time, end, BINS) for time in offered.times if end)
    return [{"time": at * end / BINS, "rate": counts[at] * BINS / end} for at in range(BINS) if end]


def _drift(offered: OfferedRequests, favourites: list[str]) -> list[Row]:
    end = offered.times[-1] if offered.times else 0.0
    if not end:
        return []
    pairs = zip(offered.times, offered.adapters, strict=True)
    of = Counter((name, _bin(time, end, DRIFT_BINS)) for time, name in pairs)
    total: Counter[int] = Counter()
    for (_, place), count in of.items():
        total[place] += count
    return [
        {
            "time": (place + 0.5) * end / DRIFT_BINS,
            "share": of[name, place] / max(total[place], 1),
            "adapter": shorten(name, 12),
        }
        for name in favourites
        for place in range(DRIFT_BINS)
    ]
