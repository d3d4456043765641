"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.figures import cdf
from aioengine.lab.frames import load_frame
from aioengine.lab.measures import MEASURES, Measure
from aioengine.lab.style import (
    LIGHT,
    Drawn,
    Theme,
    draw,
    new_figure,
    percent_axis,
    plain_log_axis,
    policy_label,
    thousands_axis,
)

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

_MARKERS = "osD^vXph"
"""So that policies are told apart without colours too."""


class Compare(NamedTuple):
    """What figures are drawn from."""

    folder: Path
    results: pl.DataFrame
    estimates: pl.DataFrame
    measure: Measure
    """That policies are ranked by."""

    @property
    def policies(self) -> list[str]:
        """In the order in which they were given, which is that of their colours."""
        return self.results["policy"].unique(maintain_order=True).to_list()

    def settings(self) -> list[tuple[int, float]]:
        """Slots and scale, of all there are."""
        return sorted(self.results.select("slots", "scale").unique().iter_rows())

    def of(self, figure: str, **where: Any) -> pl.DataFrame:
        """The estimates of a figure, where columns have these values."""
        frame = self.estimates.filter(self.estimates["figure"] == figure)
        for column, value in where.items():
            frame = frame.filter(frame[column] == value)
        return frame


class Plot(NamedTuple):
    name: str
    caption: str
    applies: Callable[[Compare], bool]
    draw: Callable[[Compare, Theme], Figure]


def setting_text(compare: Compare, slots: int, scale: float) -> str:
    """ "8 slots", "8 slots, load x1.5" """
    text = f"{slots} slot{'s' * (slots != 1)}"
    return f"{text}, load ×{scale:g}" if compare.results["scale"].n_unique() > 1 else text


def draw_ranking(compare: Compare, theme: Theme) -> Figure:
    """Means with their intervals: a panel for each setting, a row for each policy."""
    settings, measure = compare.settings(), compare.measure
    rows = len(compare.policies)
    title = f"{measure.label.capitalize()} by policy ({measure.better} is better)"
    figure, panels = new_figure(title, height=0.9 + len(settings) * (0.55 + 0.27 * rows), rows=len(settings))
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
            axes.annotate(
                measure.text(mean),
                (mean if high is None else max(high, mean), row),
                (9, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=theme.muted,
            )
        axes.set_yticks(range(table.height), [policy_label(name) for name in table["policy"]])
        axes.set(ylim=(max(table.height, 1) - 0.4, -0.6), xlim=(0, None))
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_title(setting_text(compare, slots, scale), loc="left")
        _unit_axis(axes.xaxis, measure)
    panels[-1].set_xlabel(_axis_label(measure))
    return figure


def draw_load(compare: Compare, theme: Theme) -> Figure:
    """Throughput against latency: a panel for each number of slots, a line for each policy."""
    slots = sorted(compare.results["slots"].unique())
    x, y = "output_tokens_per_second", "ttft_seconds.p99"
    title = "What throughput costs in latency, as the load grows along each line"
    figure, panels = new_figure(title, height=0.9 + 2.6 * len(slots), rows=len(slots), sharex=True)
    for axes, count in zip(panels, slots, strict=True):
        for policy, style in _styles(compare.policies, theme):
            across, up = (compare.of(name, slots=count, policy=policy).sort("scale") for name in (x, y))
            both = across.join(up, on="scale", suffix="_up")
            _points(axes, both["mean"], both, "_up", label=policy_label(policy), **style)
        axes.set_yscale("log")
        plain_log_axis(axes.yaxis)
        axes.set_ylabel("p99 first token, s")
        axes.set_title(f"{count} slots", loc="left")
        thousands_axis(axes.xaxis)
    panels[-1].set_xlabel("output tokens a second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_slots(compare: Compare, theme: Theme) -> Figure:
    """The measure against the number of slots: a panel for each scale, a line for each policy."""
    scales = sorted(compare.results["scale"].unique())
    measure = compare.measure
    title = f"{measure.label.capitalize()} by the number of slots ({measure.better} is better)"
    figure, panels = new_figure(title, height=0.9 + 2.6 * len(scales), rows=len(scales), sharex=True)
    for axes, scale in zip(panels, scales, strict=True):
        for policy, style in _styles(compare.policies, theme):
            table = compare.of(measure.name, scale=scale, policy=policy).sort("slots")
            _points(axes, table["slots"], table, "", label=policy_label(policy), **style)
        axes.set(ylabel=_axis_label(measure), ylim=(0, None))
        axes.set_xscale("log", base=2)
        counts = sorted(compare.results["slots"].unique())
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlim(counts[0] / 1.15, counts[-1] * 1.15)
        if len(scales) > 1:
            axes.set_title(f"load ×{scale:g}", loc="left")
        _unit_axis(axes.yaxis, measure)
    panels[-1].set_xlabel("slots")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_cdf(compare: Compare, theme: Theme) -> Figure:
    """Times to first token, of all seeds together: of the setting with the fewest slots and the most load."""
    import polars as pl

    slots, scale = min(compare.settings(), key=lambda setting: (setting[0], -setting[1]))
    where = (pl.col("slots") == slots) & (pl.col("scale") == scale) & pl.col("error").is_null()
    title = f"Time to first token, with {setting_text(compare, slots, scale)}"
    figure, (axes,) = new_figure(title, height=4.2)
    for policy, style in _styles(compare.policies, theme):
        folders = compare.results.filter(where & (pl.col("policy") == policy))["folder"]
        frames = [load_frame(compare.folder / "runs" / folder, "requests") for folder in folders]
        if frames:
            done = pl.concat(frames).filter(pl.col("reason").is_in(["stop", "length"]))
            values = done["first_token"] - done["arrival"]
            del style["marker"]
            cdf(axes, values, policy_label(policy), style.pop("color"), **style)
    axes.set_xscale("log")
    plain_log_axis(axes.xaxis)
    axes.set(xlabel="seconds (logarithmic)", ylabel="share of requests", ylim=(0, 1.01))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99])
    percent_axis(axes.yaxis)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_regret(compare: Compare, theme: Theme) -> Figure:
    """How much worse than the oracle, in four figures."""
    names = ("ttft_seconds.mean", "ttft_seconds.p99", "latency_seconds.mean", "swaps.slot_copies_per_request")
    measures = [measure for measure in MEASURES if measure.name in names]
    slots, scale = min(compare.settings(), key=lambda setting: (setting[0], -setting[1]))
    title = f"How much more than the oracle's, with {setting_text(compare, slots, scale)}"
    policies = [policy for policy in compare.policies if policy != "oracle"]
    height = 0.9 + len(measures) * (0.45 + 0.2 * len(policies))
    figure, panels = new_figure(title, height=height, rows=len(measures), sharex=True)
    colors = _colors(compare.policies, theme)
    for axes, measure in zip(panels, measures, strict=True):
        table = compare.of(measure.name, slots=slots, scale=scale)
        rows = {policy: row for row, policy in enumerate(policies)}
        for policy, mean, low, high in table.select(
            "policy", "regret", "regret_low", "regret_high"
        ).iter_rows():
            if policy in rows and mean is not None:
                axes.barh([rows[policy]], [mean], 0.72, color=colors[policy])
                if low is not None:
                    axes.plot([low, high], [rows[policy]] * 2, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(policies)), [policy_label(policy) for policy in policies])
        axes.set_ylim(len(policies) - 0.4, -0.6)
        axes.axvline(0, color=theme.muted, linewidth=0.8)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_title(measure.label, loc="left")
        percent_axis(axes.xaxis)
    panels[-1].set_xlabel("more than the oracle's; left of 0 is less")
    return figure


def _colors(policies: Sequence[str], theme: Theme) -> dict[str, str]:
    return {policy: theme.palette[i % len(theme.palette)] for i, policy in enumerate(policies)}


def _styles(policies: Sequence[str], theme: Theme) -> Iterator[tuple[str, dict[str, Any]]]:
    """A colour, a marker and, past the last colour, another dash for each policy. Later lines are thinner, so
    that those which coincide show as stripes."""
    colors = _colors(policies, theme)
    for index, policy in enumerate(policies):
        dash = ("-", "--", ":")[index // len(theme.palette) % 3]
        yield (
            policy,
            {
                "color": colors[policy],
                "marker": _MARKERS[index % len(_MARKERS)],
                "linestyle": dash,
                "linewidth": max(1.6 + 0.55 * (min(len(policies), 6) - 1 - index), 1.6),
            },
        )


def _points(axes: Any, x: pl.Series, table: pl.DataFrame, suffix: str, **style: Any) -> None:
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
    (percent_axis if measure.unit == "share" else thousands_axis)(axis)


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
        "What a slot more is worth under each policy. Bands are 95% intervals.",
        lambda compare: compare.results["slots"].n_unique() > 1,
        draw_slots,
    ),
    Plot("ttft", "All seeds together. To the left is faster.", lambda _: True, draw_cdf),
    Plot(
        "regret",
        "The oracle knows when adapters will be asked for. Thin lines are 95% intervals.",
        lambda compare: "oracle" in compare.policies and len(compare.policies) > 1,
        draw_regret,
    ),
)


def draw_compare(compare: Compare, theme: Theme = LIGHT) -> Iterator[Drawn]:
    """Each figure that there is something to show in."""
    for plot in PLOTS:
        if plot.applies(compare):
            yield draw(plot.name, plot.caption, theme, partial(plot.draw, compare, theme))
