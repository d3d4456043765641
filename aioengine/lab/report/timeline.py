"""The slots over time: which adapter was in which, as a Gantt chart."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.report.style import WIDTH, Theme, legend_above, new_figure, say, shorten, text_on

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAYS_PER_SLOT = 40
"""Stays in a slot above which only a part of the run is shown, because the bars would be too thin."""

_CHARACTER = 0.075
"""Inches that a character of a bar's label takes."""


class Stay(NamedTuple):
    slot: int
    adapter: str
    start: float
    ready: float
    end: float


def draw_timeline(spans: pl.DataFrame, slots: int, end: float, theme: Theme) -> Figure:
    """Return the timeline of ``slots`` slots until ``end``, or of a part of it if there are many swaps."""
    stays = [
        Stay(slot, adapter, start, until if ready is None else ready, until)
        for slot, adapter, start, ready, until in spans.select(
            "slot", "adapter", "start", "ready", "end"
        ).iter_rows()
    ]
    height = 1.5 + 0.27 * min(max(slots, 3), 40)
    if not stays:
        figure, (axes,) = new_figure("No adapter came into a slot", height=height)
        say(axes, "The slots stayed empty.")
        return figure
    window = _window(stays, slots, end)
    shown = [stay for stay in stays if stay.end > window[0] and stay.start < window[1]]
    adapters = {stay.adapter for stay in shown}
    whole = window == (0.0, end)
    title = f"{len(shown):,} stays of {len(adapters):,} adapters in {slots:,} slots"
    if not whole:
        title += f", in {window[1] - window[0]:,.3g} of {end:,.0f} seconds: {len(stays):,} stays in all"
    figure, (axes,) = new_figure(title, height=height)
    _draw(axes, shown, window, theme)
    axes.set(xlabel="seconds", ylabel="slot", xlim=window, ylim=(slots - 0.5, -0.5))
    axes.set_yticks(range(0, slots, -(-slots // 20)))
    axes.grid(visible=False)
    return figure


def _window(stays: list[Stay], slots: int, end: float) -> tuple[float, float]:
    """Return the time that is shown: the whole run, or so much of its middle as ``STAYS_PER_SLOT`` stays in
    each slot take."""
    share = STAYS_PER_SLOT * max(slots, 1) / len(stays)
    if share >= 0.67:
        return 0.0, end
    starts = sorted(stay.start for stay in stays)
    count = max(round(len(starts) * share), 1)
    at = (len(starts) - count) // 2
    return starts[at], max(starts[min(at + count, len(starts) - 1)], starts[at] + end / 1000)


def _draw(axes: Axes, stays: list[Stay], window: tuple[float, float], theme: Theme) -> None:
    held: dict[str, float] = defaultdict(float)
    for stay in stays:
        held[stay.adapter] += min(stay.end, window[1]) - max(stay.start, window[0])
    most = sorted(held, key=lambda name: (-held[name], name))[: len(theme.palette)]
    colors = dict(zip(most, theme.palette, strict=False))
    groups: dict[tuple[str, bool], list[Stay]] = defaultdict(list)
    for stay in stays:
        groups[colors.get(stay.adapter, theme.neutral), stay.adapter in colors].append(stay)
    for color, group in ((color, group) for (color, _), group in groups.items()):
        _bars(axes, [(stay.slot, stay.ready, stay.end) for stay in group], color, theme)
        _bars(axes, [(stay.slot, stay.start, stay.ready) for stay in group], color, theme, written=True)
    for stay in stays:
        _label(axes, stay, window, text_on(colors.get(stay.adapter, theme.neutral), theme))
    for name in sorted(most):  # drawn nowhere, for the legend
        axes.barh([-9], [0], color=colors[name], label=shorten(name, 16))
    if len(held) > len(most):
        axes.barh([-9], [0], color=theme.neutral, label=f"{len(held) - len(most):,} others")
    legend_above(axes, ncols=5)


def _bars(
    axes: Axes, bars: list[tuple[int, float, float]], color: str, theme: Theme, *, written: bool = False
) -> None:
    from matplotlib.collections import PolyCollection

    low, high = -0.39, 0.39
    corners = [
        ((start, row + low), (end, row + low), (end, row + high), (start, row + high))
        for row, start, end in bars
        if end > start
    ]
    style: dict[str, Any] = {"facecolor": color, "edgecolor": theme.background, "linewidth": 0.6}
    if written:
        style = {"facecolor": theme.background, "edgecolor": color, "linewidth": 0.4, "hatch": "/////"}
    axes.add_collection(PolyCollection(corners, **style), autolim=False)


def _label(axes: Axes, stay: Stay, window: tuple[float, float], color: str) -> None:
    """The adapter's name in its bar, if there is room for enough of it to tell."""
    left, right = max(stay.ready, window[0]), min(stay.end, window[1])
    room = int((right - left) / (window[1] - window[0]) * (WIDTH - 1.0) / _CHARACTER)
    if room >= min(len(stay.adapter), 11):
        axes.text(
            (left + right) / 2,
            stay.slot,
            shorten(stay.adapter, room),
            ha="center",
            va="center_baseline",
            fontsize=7.5,
            color=color,
            clip_on=True,
        )
