"""The figures of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.analysis.measures import MEASURES, Measure
from aioengine.lab.report import style as drawing
from aioengine.lab.report.compare_results import Compare, setting_text
from aioengine.lab.report.run_figures import cdf
from aioengine.lab.runs.rows import load_frame

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vXph"
"""Markers by which policies can be told apart without colours."""
_DASHES: Sequence[Any] = ("-", (0, (6, 2)), (0, (3, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_MOST_PANELS = 4
"""Numbers of slots that have a panel each."""


class Plot(NamedTuple):
    name: str
    caption: str
    applies: Callable[[Compare], bool]
    draw: Callable[[Compare, drawing.Theme], Figure]


def draw_ranking(compare: Compare, theme: drawing.Theme) -> Figure:
    """Means with their intervals: a panel for each setting, a row for each policy."""
    settings, measure = compare.settings(), compare.measure
    rows = len(compare.policies)
    title = f"{_head(measure)} ({measure.better} is better)"
    means = _means(compare, *settings[0])
    if means:
        title += f": {_range(means, measure.text)} with {setting_text(compare, *settings[0])}"
    height = 0.9 + len(settings) * (0.4 + 0.27 * rows)
    figure, panels = drawing.new_figure(title, height=height, rows=len(settings), sharex=True)
    colors = _colors(compare.policies, theme)
    for axes, (slots, scale) in zip(panels, settings, strict=True):
        table = compare.of(measure.name, slots=slots, scale=scale)
        table = table.sort("mean", descending=measure.better == "higher", maintain_order=True)
        for row, (policy, mean, low, high) in enumerate(
            table.select("policy", "mean", "low", "high").iter_rows()
        ):
            if low is not None:
                axes.plot([low, high], [row, row], color=colors[policy], linewidth=5, alpha=0.35)
            axes.scatter([mean], [row], s=34, color=colors[policy], zorder=3, linewidth=0)
            end = mean if high is None else high
            _value(axes, measure.text(mean), (end, row), theme, xytext=(9, 0), textcoords="offset points")
        axes.set_yticks(range(table.height), [drawing.policy_label(name) for name in table["policy"]])
        axes.set(ylim=(max(table.height, 1) - 0.4, -0.6))
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_title(setting_text(compare, slots, scale), loc="left")
        _unit_axis(axes.xaxis, measure)
    panels[-1].set_xlabel(_axis_label(measure))
    panels[-1].set_xlim(left=0)  # shared: only now are all marks there that it has to hold
    return figure


def _value(axes: Axes, text: str, at: tuple[float, float], theme: drawing.Theme, **kwargs: Any) -> None:
    """A number next to a mark; grid lines end around it."""
    box = {"facecolor": theme.background, "edgecolor": "none", "pad": 1.5}
    axes.annotate(text, at, va="center_baseline", fontsize=9, color=theme.muted, bbox=box, **kwargs)


def draw_load(compare: Compare, theme: drawing.Theme) -> Figure:
    """Throughput against latency: a panel for each number of slots, a line for each policy."""
    slots = sorted(compare.results["slots"].unique())
    x, y = "output_tokens_per_second", "ttft_seconds.p99"
    title = "What throughput costs in latency, as the load grows along each line"
    figure, panels = drawing.new_figure(title, height=0.9 + 2.6 * len(slots), rows=len(slots), sharex=True)
    for axes, count in zip(panels, slots, strict=True):
        for policy, style in _styles(compare.policies, theme):
            across, up = (compare.of(name, slots=count, policy=policy).sort("scale") for name in (x, y))
            both = across.join(up, on="scale", suffix="_up")
            _points(axes, both["mean"], both, "_up", label=drawing.policy_label(policy), **style)
        axes.set_yscale("log")
        drawing.plain_log_axis(axes.yaxis)
        axes.set_ylabel("p99 first token, s")
        axes.set_title(f"{count} slots", loc="left")
        drawing.thousands_axis(axes.xaxis)
    panels[-1].set_xlabel("output tokens a second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_slots(compare: Compare, theme: drawing.Theme) -> Figure:
    """Draw the measure against the number of slots: a panel for each scale, a line for each policy."""
    scales = sorted(compare.results["scale"].unique())
    measure = compare.measure
    title = f"{_head(measure)} by the number of slots ({measure.better} is better)"
    best = max if measure.better == "higher" else min
    shown = [(setting, _means(compare, *setting)) for setting in _shown(compare)]
    parts = [
        f"{measure.text(best(means.values()))} with {setting_text(compare, *setting)}"
        for setting, means in (shown[0], shown[-1])
        if means
    ]
    if parts:
        title += f": at best {', '.join(parts)}"
    figure, panels = drawing.new_figure(title, height=0.9 + 2.6 * len(scales), rows=len(scales), sharex=True)
    counts = sorted(compare.results["slots"].unique())
    apart = _apart(counts, len(compare.policies))
    edge = 1.1 * apart ** (len(compare.policies) / 2)
    for axes, scale in zip(panels, scales, strict=True):
        for index, (policy, style) in enumerate(_styles(compare.policies, theme)):
            table = compare.of(measure.name, scale=scale, policy=policy).sort("slots")
            style["linewidth"] = 1.4
            aside = apart ** (index - (len(compare.policies) - 1) / 2)
            _points(axes, table["slots"] * aside, table, "", label=drawing.policy_label(policy), **style)
        axes.set(ylabel=_axis_label(measure), ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlim(counts[0] / edge, counts[-1] * edge)
        if len(scales) > 1:
            axes.set_title(f"load ×{scale:g}", loc="left")
        _unit_axis(axes.yaxis, measure)
    panels[-1].set_xlabel("slots")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _head(measure: Measure) -> str:
    return measure.label[:1].upper() + measure.label[1:]


def _means(compare: Compare, slots: int, scale: float) -> dict[str, float]:
    """Draw the means of the ranked measure, by policy."""
    found = compare.of(compare.measure.name, slots=slots, scale=scale)
    return dict(found.select("policy", "mean").iter_rows())


def _apart(counts: Sequence[int], policies: int) -> float:
    """Return the factor between the places of two policies at the same number of slots, so that no mark hides
    another; less where there would be no room before the next number."""
    steps = [math.log(b / a) for a, b in itertools.pairwise(counts)]
    return math.exp(min(0.022 * sum(steps), 0.6 * min(steps) / policies))


def draw_cdf(compare: Compare, theme: drawing.Theme) -> Figure:
    """Times to first token, of all seeds together: a panel for each number of slots."""
    settings = _shown(compare)
    waits = [_first_tokens(compare, *setting) for setting in settings]
    title = "No request finished"
    if waits[0]:
        half, most = ({name: _at(times, share) for name, times in waits[0].items()} for share in (0.5, 0.99))
        title = (
            f"With {setting_text(compare, *settings[0])}, half of the first tokens came within "
            f"{_range(half, drawing.seconds_text)}, 99% within {_range(most, drawing.seconds_text)}"
        )
    height = 1.2 + (3 if len(settings) == 1 else 2.4 * len(settings))
    figure, panels = drawing.new_figure(title, height=height, rows=len(settings), sharex=True)
    for axes, setting, found in zip(panels, settings, waits, strict=True):
        for policy, style in _styles(compare.policies, theme):
            if policy in found:
                del style["marker"]
                cdf(axes, found[policy], drawing.policy_label(policy), style.pop("color"), **style)
        axes.set(ylabel="share of requests", ylim=(0, 1.01))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99])
        drawing.percent_axis(axes.yaxis)
        if len(settings) > 1:
            axes.set_title(setting_text(compare, *setting), loc="left")
    for axes in panels:
        axes.set_xscale("log")
        axes.margins(x=0.01)
    drawing.plain_log_axis(panels[-1].xaxis)
    panels[-1].set_xlabel("seconds (logarithmic)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3)
    return figure


def _shown(compare: Compare) -> list[tuple[int, float]]:
    """Return the settings with the highest load: one for each panel, with different numbers of slots."""
    slots = sorted(compare.results["slots"].unique())
    load: Any = compare.results["scale"].max()
    return [(count, load) for count in slots[:: -(-len(slots) // _MOST_PANELS)]]


def _first_tokens(compare: Compare, slots: int, scale: float) -> dict[str, pl.Series]:
    """Times to first token by policy, of those that finished a request."""
    import polars as pl

    found = {}
    runs = compare.results.filter(pl.col("error").is_null(), slots=slots, scale=scale)
    for policy in compare.policies:
        folders = runs.filter(policy=policy)["folder"]
        frames = [load_frame(compare.folder / "runs" / folder, "requests") for folder in folders]
        if frames:
            done = pl.concat(frames).filter(pl.col("reason").is_in(["stop", "length"]))
            found[policy] = done["first_token"] - done["arrival"]
    return {policy: times for policy, times in found.items() if len(times)}


def _at(times: pl.Series, share: float) -> float:
    return float(times.quantile(share, "linear"))  # type: ignore[arg-type] # there are some


def _range(values: Mapping[str, float], text: Callable[[float], str], *, named: bool = True) -> str:
    """ "0.3 s (vtc) to 0.5 s (fcfs)", or "0.3 s" if that is what all of them are."""
    ends = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
    texts = [text(values[policy]) for policy in ends]
    if texts[0] == texts[1]:
        return f"{texts[0]} under each policy" if named and len(values) > 1 else texts[0]
    names = [f" ({drawing.policy_label(policy)})" if named else "" for policy in ends]
    return " to ".join(map("".join, zip(texts, names, strict=True)))


def draw_regret(compare: Compare, theme: drawing.Theme) -> Figure:
    """Draw how much worse than the oracle, in four figures: a row of panels for each, a column for each
    number of slots."""
    names = ("ttft_seconds.mean", "ttft_seconds.p99", "latency_seconds.mean", "swaps.slot_copies_per_request")
    measures = [measure for measure in MEASURES if measure.name in names]
    settings = _shown(compare)
    policies = [policy for policy in compare.policies if policy != "oracle"]
    height = 1.1 + len(measures) * (0.4 + 0.22 * len(policies))
    figure, panels = drawing.new_figure(
        _regret_title(compare, settings[0]),
        height=height,
        rows=len(measures),
        columns=len(settings),
        sharex=True,
        sharey=True,
    )
    colors = _colors(compare.policies, theme)
    ends = [0.0]
    for at, (axes, (measure, setting)) in enumerate(
        zip(panels, itertools.product(measures, settings), strict=True)
    ):
        for row, policy in enumerate(policies):
            mean, low, high = _regret(compare, measure, policy, setting)
            if mean is None:
                continue
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=colors[policy], linewidth=4.5, alpha=0.35)
                ends += low, high
            axes.scatter([mean], [row], s=28, color=colors[policy], zorder=3, linewidth=0)
            ends.append(mean)
            _value(
                axes,
                drawing.change_text(mean),
                (1, row),
                theme,
                xycoords=("axes fraction", "data"),
                ha="right",
            )
        axes.axvline(0, color=theme.muted, linewidth=0.8)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        drawing.percent_axis(axes.xaxis)
        heads = [setting_text(compare, *setting)] if at < len(settings) > 1 else []
        heads += [measure.label] if at % len(settings) == 0 else [" "]
        axes.set_title("\n".join(heads), loc="left")
    axes = panels[0]
    span = max(ends) - min(ends) or 0.01
    axes.set_xlim(min(ends) - 0.04 * span, max(ends) + (0.04 + 0.12 * len(settings)) * span)
    axes.locator_params(axis="x", nbins=max(8 // len(settings), 3))
    axes.set_yticks(range(len(policies)), [drawing.policy_label(policy) for policy in policies])
    axes.set_ylim(len(policies) - 0.4, -0.6)
    figure.supxlabel("more than with the oracle; left of 0 is less", fontsize=10, color=theme.muted)
    return figure


def _regret(
    compare: Compare, measure: Measure, policy: str, setting: tuple[int, float]
) -> tuple[float | None, float | None, float | None]:
    """Mean, low and high; None where there is none."""
    found = compare.of(measure.name, slots=setting[0], scale=setting[1], policy=policy)
    columns = found.select("regret", "regret_low", "regret_high")
    return columns.row(0) if columns.height else (None, None, None)


def _regret_title(compare: Compare, setting: tuple[int, float]) -> str:
    parts = []
    shown = (
        ("ttft_seconds.mean", "mean time to first token"),
        ("swaps.slot_copies_per_request", "copies into slots"),
    )
    for name, words in shown:
        found = compare.of(name, slots=setting[0], scale=setting[1]).drop_nulls("regret")
        regrets = dict(found.filter(found["policy"] != "oracle").select("policy", "regret").iter_rows())
        if regrets:
            parts.append(f"{words} {_range(regrets, drawing.change_text, named=False)}")
    return f"Next to the oracle, with {setting_text(compare, *setting)}: {', '.join(parts) or 'nothing'}"


def _colors(policies: Sequence[str], theme: drawing.Theme) -> dict[str, str]:
    return {policy: theme.palette[i % len(theme.palette)] for i, policy in enumerate(policies)}


def _styles(policies: Sequence[str], theme: drawing.Theme) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a colour, a marker and a dash for each policy. Later lines are thinner, so that those which
    coincide show as stripes, and through each other's gaps."""
    colors = _colors(policies, theme)
    for index, policy in enumerate(policies):
        yield (
            policy,
            {
                "color": colors[policy],
                "marker": _MARKERS[index % len(_MARKERS)],
                "linestyle": _DASHES[index % len(_DASHES)],
                "linewidth": max(1.6 + 0.45 * (min(len(policies), 6) - 1 - index), 1.6),
            },
        )


def _points(axes: Axes, x: pl.Series, table: pl.DataFrame, suffix: str, **style: Any) -> None:
    """A line through means, with their intervals upright."""
    if table.is_empty():
        return
    means = table[f"mean{suffix}"].to_list()
    lows, highs = (
        table[f"low{suffix}"].fill_null(float("nan")),
        table[f"high{suffix}"].fill_null(float("nan")),
    )
    axes.plot(x, means, markersize=7, markeredgewidth=0, **style)
    axes.vlines(x, lows, highs, color=style["color"], linewidth=4, alpha=0.3)


def _axis_label(measure: Measure) -> str:
    return f"{measure.label}, s" if measure.unit == "seconds" else measure.label


def _unit_axis(axis: Any, measure: Measure) -> None:
    (drawing.percent_axis if measure.unit == "share" else drawing.thousands_axis)(axis)


PLOTS = (
    Plot(
        "ranking", "Dots are means over the seeds, bands their 95% intervals.", lambda _: True, draw_ranking
    ),
    Plot(
        "load",
        "To the right and down is better. Bands are 95% intervals.",
        lambda compare: compare.results["scale"].n_unique() > 1,
        draw_load,
    ),
    Plot(
        "slots",
        "What a slot more is worth under each policy. Bands are 95% intervals, beside each other.",
        lambda compare: compare.results["slots"].n_unique() > 1,
        draw_slots,
    ),
    Plot("ttft", "All seeds together. To the left is faster.", lambda _: True, draw_cdf),
    Plot(
        "regret",
        "The oracle knows when adapters will be asked for. Dots are means, bands 95% intervals.",
        lambda compare: "oracle" in compare.policies and len(compare.policies) > 1,
        draw_regret,
    ),
)


def draw_compare(compare: Compare, theme: drawing.Theme = drawing.LIGHT) -> Iterator[drawing.Drawn]:
    """Draw each figure for which there are data."""
    for plot in PLOTS:
        if plot.applies(compare):
            yield drawing.draw(plot.name, plot.caption, theme, partial(plot.draw, compare, theme))
