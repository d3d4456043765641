"""Writes the Grafana dashboard ``aioengine.json``: python metrics/dashboards/generate.py [FILE]

Built with Grafana's own SDK, so that what is written is what Grafana's schema calls a dashboard. Edit
this file and charts.py rather than the JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from charts import ADAPTERS, ENGINE, FLEET, FREE, HERE, LIMITS, PROCESS, REQUESTS, SERVICE, SUMMARY, Chart
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TARGET = Path(__file__).with_name("aioengine.json")
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

NAME_COLORS = {
    "aku4AKU": "blue",
    "blv5BLV": "orange",
    "cmw6CMW": "green",
    "dnx7DNX": "purple",
    "eoy8EOY": "yellow",
    "fpz9FPZ": "light-blue",
    "gq0GQ_": "semi-dark-orange",
    "hr1HR.": "dark-green",
    "is2IS:": "light-purple",
    "jt3JT/+-": "dark-yellow",
}
"""Colours by the last character of an adapter's name, so that an adapter has the same colour in every slot
and on every day. Without this Grafana gives all the texts in a row of a timeline one colour."""


def build() -> models.Dashboard:
    board = (
        dashboard.Dashboard("aioengine")
        .uid("aioengine")
        .description("LoRA adapters in their slots, requests, and the engine that serves them.")
        .tags(["aioengine", "lora", "inference"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
    )
    board.with_variable(
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    ).with_variable(
        _label_variable("instance", "Instance", "label_values(aioengine_requests_running, instance)")
    ).with_variable(
        _label_variable(
            "engine", "Engine", 'label_values(aioengine_requests_running{instance=~"$instance"}, engine)'
        )
    ).with_variable(
        _label_variable(
            "adapter", "Adapter", f"label_values(aioengine_requests_finished_total{{{HERE}}}, adapter)"
        )
    )
    for chart in SUMMARY:
        board.with_panel(_stat(chart))
    board.with_row(dashboard.Row("Slots and adapters")).with_panel(_slot_timeline())
    rows = (
        ("", ADAPTERS),
        ("Service", SERVICE),
        ("Requests", REQUESTS),
        ("Engine", ENGINE),
        ("Limits and failures", LIMITS),
        ("Process", PROCESS),
        ("Fleet", FLEET),
    )
    for title, charts in rows:
        if title:
            board.with_row(dashboard.Row(title))
        for chart in charts:
            board.with_panel(_timeseries(chart))
    built = board.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def _label_variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Return a choice of any number of a label's values, all of them to begin with."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _slot_timeline() -> statetimeline.Panel:
    """One row a slot, its adapter as the state.

    Prometheus has adapters as labels, and a state timeline wants one text column a row: so labels become
    fields, all series one table, and that table a matrix of times by slots. A slot that has been used and
    is empty is filled in, or its last adapter would seem to stay.
    """
    two_digits = 'label_replace({}, "slot", "0$1", "slot", "(.)")'  # rows are sorted as texts
    row = f'label_join({two_digits}, "row", " ", "instance", "engine", "slot")'
    held = "aioengine_lora_slot_info{" + HERE + "}"
    used = "aioengine_lora_slot_busy_seconds_total{" + HERE + "}"
    empty = f"({used} unless on (instance, engine, slot) {held})"
    queries = [
        f"group by (row, adapter) ({row.format(held)})",
        f'label_replace(group by (row) ({row.format(empty)}), "adapter", "{FREE}", "", "")',
    ]
    panel = (
        statetimeline.Panel()
        .title("Slot timeline: adapter by slot")
        .description(
            "Which adapter each slot holds, adapters on their way in or out included. Many short bars: the "
            "slots thrash. A slot appears once it has held an adapter."
        )
        .unit(units.NoUnit)
        .datasource(SOURCE)
        .span(24)
        .height(10)
        .show_value(options.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.85)
        .line_width(1)
        .fill_opacity(75)
        .legend(common.VizLegendOptions().show_legend(False))
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.SINGLE))
        .mappings(_name_mappings())
        .transformations(
            [
                models.DataTransformerConfig(id_val="labelsToFields", options={"mode": "columns"}),
                models.DataTransformerConfig(id_val="merge", options={}),
                models.DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": "row"}]}),
                models.DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": "Time"}]}),
                models.DataTransformerConfig(
                    id_val="groupingToMatrix",
                    options={
                        "rowField": "Time",
                        "columnField": "row",
                        "valueField": "adapter",
                        "emptyValue": "null",
                    },
                ),
            ]
        )
    )
    for ref, expr in zip("AB", queries, strict=True):
        panel.with_target(_target(ref, expr, "{{row}}"))
    return panel


def _name_mappings() -> list[models.ValueMapping]:
    free = models.ValueMappingResult(text="free", color="rgba(128, 128, 128, 0.15)", index=0)
    mappings: list[models.ValueMapping] = [models.ValueMap(options={FREE: free})]
    for index, (ends, color) in enumerate(NAME_COLORS.items(), start=1):
        ends = ends.replace("/", r"\/").replace("-", r"\-")
        result = models.ValueMappingResult(color=color, index=index)
        pattern = models.DashboardRegexMapOptions(pattern=f"/[{ends}]$/", result=result)
        mappings.append(models.RegexMap(options=pattern))
    return mappings


def _target(ref: str, expr: str, legend: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(ref)
        .expr(expr)
        .legend_format(legend)
        .range()
        .format(PromQueryFormat.TIME_SERIES)
        .datasource(SOURCE)
    )


def _timeseries(chart: Chart) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.description)
        .unit(chart.unit)
        .datasource(SOURCE)
        .span(chart.width)
        .height(8)
        .min(0)
        .line_width(1)
        .fill_opacity(40 if chart.stacked else 8)
        .show_points(options.VisibilityMode.NEVER)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
        )
    )
    if chart.stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if chart.top is not None:
        panel.max(chart.top)
    for ref, query in zip("ABCDEF", chart.queries, strict=False):
        panel.with_target(_target(ref, query.expr, query.legend))
    return panel


def _stat(chart: Chart) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(chart.title)
        .description(chart.description)
        .unit(chart.unit)
        .datasource(SOURCE)
        .span(6)
        .height(4)
        .min(0)
        .graph_mode(options.BigValueGraphMode.AREA)
        .color_mode(options.BigValueColorMode.VALUE)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color("blue"))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    for ref, query in zip("ABCDEF", chart.queries, strict=False):
        panel.with_target(_target(ref, query.expr, query.legend))
    return panel


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    text = json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True)
    target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
