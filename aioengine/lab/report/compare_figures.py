"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aioengine.lab.analysis.measures import MEASURES, Measure
from aioengine.lab.analysis.numbers import change_text, policy_label, seconds_text
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.report import charts
from aioengine.lab.report.charts import Figure, Row, Spec
from aioengine.lab.report.compare_results import Compare, setting_text
from aioengine.lab.runs.rows import load_frame

if TYPE_CHECKING:
    import polars as pl

Setting = tuple[int, float]
"""Slots and scale."""
MOST_PANELS = 4
"""Numbers of slots that have a panel each."""
REGRETS = ("ttft_seconds.mean", "ttft_seconds.p99", "latency_seconds.mean", "swaps.slot_copies_per_request")


def draw_ranking(compare: Compare) -> tuple[str, Spec]:
    """Dots are means over the seeds, bands their 95% intervals."""
    measure, first = compare.measure, compare.settings()[0]
    title = f"{_head(measure)} ({measure.better} is better)"
    if means := _means(compare, first):
        title += f": {_range(means, measure.text)} with {setting_text(compare, *first)}"
    policy = charts.field("policy", "nominal", sort={"field": "mean", "order": _order(measure)})
    chart = _with_intervals(compare, _unit_field("mean", measure), policy)
    shape = {"width": 480, "height": {"step": 22}}
    return title, {
        "data": charts.data(_rows(compare, measure.name)),
        "facet": {"row": charts.field("setting", "nominal", sort=None, header={"orient": "top"})},
        "spec": {**chart, **shape},
        "resolve": {"scale": {"y": "independent"}},
    }


def draw_load(compare: Compare) -> tuple[str, Spec]:
    """To the right and down is better. Bands are 95% intervals."""
    rows = {
        (row["policy"], row["slots"], row["scale"]): {**row, "throughput": row["mean"]}
        for row in _rows(compare, "output_tokens_per_second")
    }
    up = [
        {**row, "throughput": rows[key]["throughput"]}
        for row in _rows(compare, "ttft_seconds.p99")
        if (key := (row["policy"], row["slots"], row["scale"])) in rows
    ]
    chart = _lines(
        compare,
        charts.number("throughput", "output tokens a second", scale={"zero": False}),
        charts.logarithmic("mean", "p99 first token, s"),
        order="scale",
    )
    return (
        "What throughput costs in latency, as the load grows along each line",
        _faceted([{**row, "panel": f"{row['slots']} slots"} for row in up], chart),
    )


def draw_slots(compare: Compare) -> tuple[str, Spec]:
    """What a slot more is worth under each policy. Bands are 95% intervals."""
    measure = compare.measure
    best = max if measure.better == "higher" else min
    shown = [(setting, _means(compare, setting)) for setting in _shown(compare)]
    parts = [
        f"{measure.text(best(means.values()))} with {setting_text(compare, *setting)}"
        for setting, means in (shown[0], shown[-1])
        if means
    ]
    title = f"{_head(measure)} by the number of slots ({measure.better} is better)"
    if parts:
        title += f": at best {', '.join(parts)}"
    slots = charts.field("slots", "ordinal", "slots", axis={"labelAngle": 0})
    chart = _lines(compare, slots, _unit_field("mean", measure), order="slots")
    rows = [{**row, "panel": f"load ×{row['scale']:g}"} for row in _rows(compare, measure.name)]
    return title, _faceted(rows, chart)


def draw_cdf(compare: Compare) -> tuple[str, Spec]:
    """All seeds together. To the left is faster."""
    settings = _shown(compare)
    waits = {setting: _first_tokens(compare, *setting) for setting in settings}
    first = waits[settings[0]]
    if not first:
        return "No request finished", charts.note("No request finished.")
    half, most = ({name: _at(times, share) for name, times in first.items()} for share in (0.5, 0.99))
    title = (
        f"With {setting_text(compare, *settings[0])}, half of the first tokens came within "
        f"{_range(half, seconds_text)}, 99% within {_range(most, seconds_text)}"
    )
    panels = []
    for setting, found in waits.items():
        rows = [
            row
            for name, times in found.items()
            for row in charts.shares_up_to(times, policy=policy_label(name))
        ]
        heading = setting_text(compare, *setting) if len(settings) > 1 else ""
        panels.append(charts.distributions(rows, _labels(compare), "seconds", "policy", title=heading))
    return title, {"vconcat": panels}


def draw_regret(compare: Compare) -> tuple[str, Spec]:
    """The oracle knows when adapters will be asked for. Dots are means, bands 95% intervals."""
    shown = set(_shown(compare))
    labels = {measure.name: measure.label for measure in MEASURES}
    rows = [
        {**row, "figure": labels[name]}
        for name in REGRETS
        for row in _rows(compare, name, "regret")
        if (row["slots"], row["scale"]) in shown and row["policy"] != "oracle" and row["mean"] is not None
    ]
    chart = _with_intervals(
        compare,
        charts.number("mean", "more than with the oracle; left of 0 is less", "share"),
        charts.field("policy", "nominal", sort=None),
    )
    title = f"Next to the oracle, with {setting_text(compare, *_shown(compare)[0])}: {_regrets(compare)}"
    return title, {
        "data": charts.data(rows),
        "facet": {
            "row": charts.field("figure", "nominal", sort=None, header={"orient": "top"}),
            "column": charts.field("setting", "nominal", sort=None),
        },
        "spec": {**chart, "width": 560 // len(shown), "height": {"step": 20}},
    }


def _regrets(compare: Compare) -> str:
    slots, scale = _shown(compare)[0]
    parts = []
    for name, words in (
        ("ttft_seconds.mean", "mean time to first token"),
        ("swaps.slot_copies_per_request", "copies into slots"),
    ):
        found = compare.of(name, slots=slots, scale=scale).drop_nulls("regret")
        regrets = dict(found.filter(found["policy"] != "oracle").select("policy", "regret").iter_rows())
        if regrets:
            parts.append(f"{words} {_range(regrets, change_text, named=False)}")
    return ", ".join(parts) or "nothing"


def _rows(compare: Compare, figure: str, of: str = "mean") -> list[Row]:
    """Return the estimates of a figure; ``of`` is "mean" or "regret"."""
    low, high = (f"{of}_{end}" if of != "mean" else end for end in ("low", "high"))
    return [
        {
            "policy": policy_label(row["policy"]),
            "slots": row["slots"],
            "scale": row["scale"],
            "setting": setting_text(compare, row["slots"], row["scale"]),
            "mean": row[of],
            "low": row[of] if row[low] is None else row[low],
            "high": row[of] if row[high] is None else row[high],
        }
        for row in compare.of(figure).sort("slots", "scale", maintain_order=True).iter_rows(named=True)
    ]


def _with_intervals(compare: Compare, value: Spec, other: Spec) -> Spec:
    """Return points with their intervals, from left to right."""
    ends = {"x": {**value, "field": "low"}, "x2": {"field": "high"}, "y": other}
    hue = {"color": {**charts.color("policy", _labels(compare)), "legend": None}}
    return {
        "layer": [
            charts.mark("rule", {**ends, **hue}, strokeWidth=5, opacity=0.35),
            charts.mark("point", {"x": value, "y": other, **hue}),
        ]
    }


def _lines(compare: Compare, x: Spec, y: Spec, *, order: str) -> Spec:
    """Return a line through the means for each policy, with a mark of its own and intervals upright."""
    labels = _labels(compare)
    shape = {"shape": charts.field("policy", "nominal", scale={"domain": labels})}
    common = {"x": x, "color": charts.color("policy", labels)}
    ends = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    return {
        "layer": [
            charts.mark("rule", {**common, **ends}, strokeWidth=4, opacity=0.3),
            charts.mark("line", {**common, "y": y, "order": {"field": order}}),
            charts.mark("point", {**common, **shape, "y": y}),
        ]
    }


def _faceted(rows: Sequence[Row], chart: Spec) -> Spec:
    return {
        "data": charts.data(rows),
        "facet": {"row": charts.field("panel", "nominal", sort=None, header={"orient": "top"})},
        "spec": charts.panel(190, chart),
    }


def _labels(compare: Compare) -> list[str]:
    return [policy_label(policy) for policy in compare.policies]


def _order(measure: Measure) -> str:
    return "descending" if measure.better == "higher" else "ascending"


def _head(measure: Measure) -> str:
    return measure.label[:1].upper() + measure.label[1:]


def _unit_field(name: str, measure: Measure) -> Spec:
    return charts.number(
        name, f"{measure.label}, s" if measure.unit == "seconds" else measure.label, measure.unit
    )


def _means(compare: Compare, setting: Setting) -> dict[str, float]:
    """Return the means of the ranked measure, by policy."""
    found = compare.of(compare.measure.name, slots=setting[0], scale=setting[1])
    return dict(found.select("policy", "mean").iter_rows())


def _shown(compare: Compare) -> list[Setting]:
    """Return the settings with the highest load: one for each panel, with different numbers of slots."""
    slots = sorted(compare.results["slots"].unique())
    load: Any = compare.results["scale"].max()
    return [(count, load) for count in slots[:: -(-len(slots) // MOST_PANELS)]]


def _first_tokens(compare: Compare, slots: int, scale: float) -> dict[str, pl.Series]:
    """Times to first token by policy, of those that finished a request."""
    import polars as pl

    found = {}
    runs = compare.results.filter(pl.col("error").is_null(), slots=slots, scale=scale)
    for policy in compare.policies:
        folders = runs.filter(policy=policy)["folder"]
        frames = [load_frame(compare.folder / "runs" / folder, "requests") for folder in folders]
        if frames:
            found[policy] = times_of(pl.concat(frames))["ttft_seconds"]
    return {policy: times for policy, times in found.items() if len(times)}


def _at(times: pl.Series, share: float) -> float:
    return float(times.quantile(share, "linear"))  # type: ignore[arg-type] # there are some


def _range(values: Mapping[str, float], text: Callable[[float], str], *, named: bool = True) -> str:
    """ "0.3 s (vtc) to 0.5 s (fcfs)", or "0.3 s" if that is what all of them are."""
    ends = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
    texts = [text(values[policy]) for policy in ends]
    if texts[0] == texts[1]:
        return f"{texts[0]} under each policy" if named and len(values) > 1 else texts[0]
    names = [f" ({policy_label(policy)})" if named else "" for policy in ends]
    return " to ".join(map("".join, zip(texts, names, strict=True)))


def draw_compare(compare: Compare) -> Iterator[Figure]:
    """Draw each figure for which there are data."""
    several = {name: compare.results[name].n_unique() > 1 for name in ("scale", "slots")}
    oracle = "oracle" in compare.policies and len(compare.policies) > 1
    plots = {
        "ranking": draw_ranking,
        "load": draw_load if several["scale"] else None,
        "slots": draw_slots if several["slots"] else None,
        "ttft": draw_cdf,
        "regret": draw_regret if oracle else None,
    }
    for name, draw in plots.items():
        if draw is not None:
            yield Figure(name, *draw(compare), caption=charts.caption_of(draw))
