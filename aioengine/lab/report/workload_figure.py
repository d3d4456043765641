"""One figure of a workload: when requests come, how long they are, and for whom."""

from __future__ import annotations

from collections import Counter

from aioengine.lab.analysis.numbers import share_text, shorten
from aioengine.lab.analysis.offered import Offered, describe_offered
from aioengine.lab.report import charts
from aioengine.lab.report.charts import Figure, Spec

BINS = 60
DRIFT_BINS = 24
SHOWN = 5
"""Adapters that are told apart over time."""
CAPTION = (
    "Top left: requests a second over time (those of a session where it begins). Top right: the share of "
    "requests with at most this number of tokens. Bottom left: the share of each adapter, the most popular "
    "first. Bottom right: the shares of the most popular adapters over time."
)


def workload_figure(offered: Offered) -> Figure:
    """Draw a workload."""
    found = describe_offered(offered)
    title = (
        f"{found['requests']:,} requests for {found['adapters_asked_for']:,} adapters; "
        f"{share_text(found['cacheable_prompt_share'])} of the prompts' tokens are beginnings that came "
        "before"
    )
    if not offered.times:
        return Figure("workload", title, charts.note("No requests."), CAPTION)
    rate, lengths, popularity, drift = (
        {**chart, "width": 280, "height": 170}
        for chart in (_rate(offered), _lengths(offered), _popularity(offered), _drift(offered))
    )
    columns = [{"vconcat": [rate, popularity]}, {"vconcat": [lengths, drift]}]
    independent = {"scale": {"color": "independent", "strokeDash": "independent"}}
    return Figure("workload", title, {"hconcat": columns, "resolve": independent}, CAPTION)


def _rate(offered: Offered) -> Spec:
    end = offered.times[-1]
    if not end:
        callers = offered.concurrency
        return charts.note(f"A closed loop of {callers} callers." if callers else "All at once.")
    width = end / BINS
    counts = Counter(min(int(time / width), BINS - 1) for time in offered.times)
    rows = [{"time": at * width, "rate": counts[at] / width} for at in range(BINS)]
    area = charts.mark(
        "area",
        {"x": charts.field("time", title="seconds"), "y": charts.number("rate", "requests a second")},
        interpolate="step-after",
        opacity=0.85,
        color=charts.PALETTE[0],
    )
    return {"data": charts.data(rows), **area}


def _lengths(offered: Offered) -> Spec:
    import polars as pl

    columns = {"prompt": offered.prompts, "output": offered.outputs}
    rows = [
        row for name, values in columns.items() for row in charts.shares_up_to(pl.Series(values), name=name)
    ]
    return charts.distributions(rows, list(columns), "tokens")


def _popularity(offered: Offered) -> Spec:
    asked = _asked(offered)
    if not asked:
        return charts.note("All requests are for the base model.")
    total = len(offered.times)
    rows = [
        {"place": place, "share": count / total} for place, (_, count) in enumerate(asked.most_common(), 1)
    ]
    encoding = {
        "x": charts.logarithmic("place", "adapters, the most popular first"),
        "y": charts.number("share", "share of requests", "share", scale={"type": "log"}),
    }
    return {"data": charts.data(rows), **charts.mark("line", encoding, point=True, color=charts.PALETTE[2])}


def _drift(offered: Offered) -> Spec:
    asked, end = _asked(offered), offered.times[-1]
    if not asked or not end:
        return charts.note("No adapters over time.")
    total: Counter[int] = Counter()
    of: Counter[tuple[str | None, int]] = Counter()
    for time, name in zip(offered.times, offered.adapters, strict=True):
        place = min(int(time / end * DRIFT_BINS), DRIFT_BINS - 1)
        total[place] += 1
        of[name, place] += 1
    favourites = [name for name, _ in asked.most_common(SHOWN)]
    rows = [
        {
            "time": (place + 0.5) * end / DRIFT_BINS,
            "share": of[name, place] / total[place] if total[place] else 0.0,
            "adapter": shorten(name, 12),
        }
        for name in favourites
        for place in range(DRIFT_BINS)
    ]
    encoding = {
        "x": charts.field("time", title="seconds"),
        "y": charts.number("share", "share of requests", "share"),
        "color": charts.color("adapter", [shorten(name, 12) for name in favourites]),
    }
    return {"data": charts.data(rows), **charts.mark("line", encoding)}


def _asked(offered: Offered) -> Counter[str]:
    return Counter(name for name in offered.adapters if name is not None)
