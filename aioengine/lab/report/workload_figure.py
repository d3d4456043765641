"""One figure of a workload: when requests come, how long they are, and for whom."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from aioengine.lab.analysis.offered import Offered, describe_offered
from aioengine.lab.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 60
SHOWN = 5
"""Adapters that are told apart over time."""


def workload_figure(offered: Offered, theme: style.Theme = style.LIGHT) -> style.Drawn:
    """Draw a workload."""
    caption = (
        "Top left: requests a second over time (those of a session where it begins). Top right: the share of "
        "requests with at most this number of tokens. Bottom left: the share of each adapter, the most "
        "popular first. Bottom right: the shares of the most popular adapters over time."
    )
    return style.draw("workload", caption, theme, partial(_draw, offered, theme))


def _draw(offered: Offered, theme: style.Theme) -> Figure:
    found = describe_offered(offered)
    cached = found["cacheable_prompt_share"]
    title = f"{found['requests']:,} requests for {found['adapters_asked_for']:,} adapters; "
    title += f"{style.share_text(cached)} of the prompts' tokens are beginnings that came before"
    figure, (rate, lengths, popularity, drift) = style.new_figure(title, height=6.4, rows=2, columns=2)
    if not offered.times:
        for axes in (rate, lengths, popularity, drift):
            style.say(axes, "No requests.")
        return figure
    _draw_rate(rate, offered, theme)
    _draw_lengths(lengths, offered, theme)
    _draw_popularity(popularity, offered, theme)
    _draw_drift(drift, offered, theme)
    return figure


def _draw_rate(axes: Any, offered: Offered, theme: style.Theme) -> None:
    end = offered.times[-1]
    if not end:
        style.say(
            axes,
            f"A closed loop of {offered.concurrency} callers." if offered.concurrency else "All at once.",
        )
        return
    width = end / BINS
    counts = Counter(min(int(time / width), BINS - 1) for time in offered.times)
    axes.stairs([counts[b] / width for b in range(BINS)], [b * width for b in range(BINS + 1)],
                color=theme.palette[0], fill=True, alpha=0.85)  # fmt: skip
    axes.set(xlabel="seconds", ylabel="requests a second", xlim=(0, end), ylim=(0, None))


def _draw_lengths(axes: Any, offered: Offered, theme: style.Theme) -> None:
    columns = (("prompt", offered.prompts), ("output", offered.outputs))
    for (label, values), color in zip(columns, theme.palette, strict=False):
        ordered = sorted(values)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        step = max(len(ordered) // 400, 1)
        axes.step(
            [*ordered[::step], ordered[-1]], [*shares[::step], 1.0], where="post", label=label, color=color
        )
    axes.set_xscale("log")
    style.thousands_axis(axes.xaxis)
    axes.set(xlabel="tokens (logarithmic)", ylabel="share of requests", ylim=(0, 1.01))
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)


def _draw_popularity(axes: Any, offered: Offered, theme: style.Theme) -> None:
    asked = Counter(name for name in offered.adapters if name is not None)
    if not asked:
        style.say(axes, "All requests are for the base model.")
        return
    shares = [count / len(offered.times) for _, count in asked.most_common()]
    axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3, color=theme.palette[2])
    if len(shares) > 1:
        axes.set_xscale("log")
        axes.set_yscale("log")
        style.plain_log_axis(axes.xaxis)
    style.percent_axis(axes.yaxis)
    axes.set(xlabel="adapters, the most popular first", ylabel="share of requests")


def _draw_drift(axes: Any, offered: Offered, theme: style.Theme) -> None:
    asked = Counter(name for name in offered.adapters if name is not None)
    end = offered.times[-1]
    if not asked or not end:
        style.say(axes, "No adapters over time.")
        return
    bins = 24
    total: Counter[int] = Counter()
    of: Counter[tuple[str, int]] = Counter()
    for time, name in zip(offered.times, offered.adapters, strict=True):
        place = min(int(time / end * bins), bins - 1)
        total[place] += 1
        if name is not None:
            of[name, place] += 1
    middle = [(place + 0.5) * end / bins for place in range(bins)]
    for (name, _), color in zip(asked.most_common(SHOWN), theme.palette, strict=False):
        shares = [of[name, place] / total[place] if total[place] else 0.0 for place in range(bins)]
        axes.plot(middle, shares, label=style.shorten(name, 12), color=color, linewidth=1.4)
    axes.set(xlabel="seconds", ylabel="share of requests", xlim=(0, end), ylim=(0, None))
    style.percent_axis(axes.yaxis)
    style.legend_above(axes, ncols=2)
