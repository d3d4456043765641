"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aioengine.lab.analysis.measures import MEASURES
from aioengine.lab.analysis.numbers import policy_label
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.report.charts import Figure, Row, figure, shares_up_to
from aioengine.lab.report.compare_results import Compare, setting_text
from aioengine.lab.runs.rows import load_frame

MOST_PANELS = 4
"""Numbers of slots that have a panel each."""
REGRETS = ("ttft_seconds.mean", "ttft_seconds.p99", "latency_seconds.mean", "swaps.slot_copies_per_request")


def draw_compare(compare: Compare) -> Iterator[Figure]:
    """Draw each figure for which there are data."""
    measure = compare.measure
    head = f"{measure.label[:1].upper()}{measure.label[1:]}"
    better = f"({measure.better} is better)"
    axis = f"{measure.label}, s" if measure.unit == "seconds" else measure.label
    words = {"value": axis, "format": ".3~%" if measure.unit == "share" else ",.6~g"}
    domains = {"policy": [policy_label(policy) for policy in compare.policies]}
    rows = estimate_rows(compare, measure.name)
    best_first = sorted(rows, key=lambda row: row["mean"], reverse=measure.better == "higher")
    yield figure("ranking", f"{head} {better}", best_first, domains=domains, words=words)
    if compare.results["scale"].n_unique() > 1:
        title = "What throughput costs in latency, as the load grows along each line"
        yield figure("throughput", title, load_rows(compare), domains=domains)
    if compare.results["slots"].n_unique() > 1:
        panels = [{**row, "panel": f"load ×{row['scale']:g}"} for row in rows]
        yield figure("slots", f"{head} by the number of slots {better}", panels, domains=domains, words=words)
    yield figure("ttft", "Time to the first token", first_token_rows(compare), domains=domains)
    if "oracle" in compare.policies and len(compare.policies) > 1:
        yield figure("regret", "Next to the oracle", regret_rows(compare), domains=domains)


def estimate_rows(compare: Compare, name: str, of: str = "mean") -> list[Row]:
    """Return the estimates of a figure; ``of`` is "mean" or "regret"."""
    low, high = ("low", "high") if of == "mean" else (f"{of}_low", f"{of}_high")
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
        for row in compare.of(name).sort("slots", "scale", maintain_order=True).iter_rows(named=True)
        if row[of] is not None
    ]


def load_rows(compare: Compare) -> list[Row]:
    """Return the estimates of the time to the first token, with the throughput of the same setting."""

    def setting(row: Row) -> tuple[Any, ...]:
        return row["policy"], row["slots"], row["scale"]

    tokens = {setting(row): row["mean"] for row in estimate_rows(compare, "output_tokens_per_second")}
    return [
        {**row, "throughput": tokens[setting(row)], "panel": f"{row['slots']} slots"}
        for row in estimate_rows(compare, "ttft_seconds.p99")
        if setting(row) in tokens
    ]


def shown_settings(compare: Compare) -> list[tuple[int, float]]:
    """Return the settings with the highest load: one for each panel, with different numbers of slots."""
    slots = sorted(compare.results["slots"].unique())
    load: Any = compare.results["scale"].max()
    return [(count, load) for count in slots[:: -(-len(slots) // MOST_PANELS)]]


def first_token_rows(compare: Compare) -> list[Row]:
    """Return the distributions of times to the first token, over all seeds."""
    import polars as pl

    rows: list[Row] = []
    for slots, scale in shown_settings(compare):
        runs = compare.results.filter(pl.col("error").is_null(), slots=slots, scale=scale)
        labels = {"setting": setting_text(compare, slots, scale)}
        for policy, folders in runs.group_by("policy", maintain_order=True):
            frames = [load_frame(compare.folder / "runs" / name, "requests") for name in folders["folder"]]
            times = times_of(pl.concat(frames))["ttft_seconds"]
            rows += shares_up_to(times, policy=policy_label(str(policy[0])), **labels)
    return rows


def regret_rows(compare: Compare) -> list[Row]:
    """Return how far each policy is from the oracle in some figures."""
    labels = {measure.name: measure.label for measure in MEASURES}
    shown = shown_settings(compare)
    return [
        {**row, "figure": labels[name]}
        for name in REGRETS
        for row in estimate_rows(compare, name, "regret")
        if (row["slots"], row["scale"]) in shown and row["policy"] != "oracle"
    ]
