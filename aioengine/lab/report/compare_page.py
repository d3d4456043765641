"""A comparison's report: rankings with intervals, figures, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from aioengine.checks import read_json
from aioengine.lab.analysis.measures import DEFAULT_RANKING, Measure, change_text, find_measure, policy_label
from aioengine.lab.analysis.statistics import Estimate, paired
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.report.charts import Figure, Row, figure, shares_up_to
from aioengine.lab.report.page import versions_text, write_report_files
from aioengine.lab.runs.comparison import Failure, estimates, load_results, read_comparison
from aioengine.lab.runs.rows import load_frame

COLUMNS = (
    "ttft_seconds.mean",
    "ttft_seconds.p99",
    "latency_seconds.mean",
    "output_tokens_per_second",
    "hits.slot_share",
    "fairness.adapters.jain_latency",
    "starvation.worst_wait_seconds",
)
"""Columns of the ranked table, beside the ranked measure."""
MOST_PANELS = 4
"""Numbers of slots that have a panel each."""


class Compare(NamedTuple):
    """The results of a comparison."""

    folder: Path
    results: pl.DataFrame
    estimates: pl.DataFrame
    measure: Measure
    """Measure that policies are ranked by."""

    @property
    def policies(self) -> list[str]:
        """Return the policies in the order in which they were given, which is that of their colours."""
        return self.results["policy"].unique(maintain_order=True).to_list()

    def settings(self) -> list[tuple[int, float]]:
        """Slots and scale, of all there are."""
        return sorted(self.results.select("slots", "scale").unique().iter_rows())

    def of(self, figure: str, **where: Any) -> Iterator[dict[str, Any]]:
        """Yield the estimates of a figure, where columns have these values."""
        yield from self.estimates.filter(figure=figure, **where).iter_rows(named=True)

    def setting_text(self, slots: int, scale: float) -> str:
        """ "8 slots", "8 slots, load x1.5" """
        text = f"{slots} slot{'s' * (slots != 1)}"
        return f"{text}, load ×{scale:g}" if self.results["scale"].n_unique() > 1 else text


class Cell(NamedTuple):
    value: str
    interval: str | None = None
    """Half of it, as in "± 0.2 s"."""
    difference: str | None = None
    """Difference to the first policy, if its interval leaves out 0: in percent of that policy's mean, or in
    percentage points for shares."""
    verdict: str = ""
    """ "good" or "bad", for a difference."""


class Ranked(NamedTuple):
    name: str
    cells: list[Cell]
    place: str
    """ "1", or "1=" where others share it."""
    best: bool
    """Whether the seeds say that it is better than all others."""


class Ranking(NamedTuple):
    """A table of policies, best first."""

    title: str
    heads: list[str]
    rows: list[Ranked]


def load_compare(folder: str | Path, rank_by: str = DEFAULT_RANKING) -> Compare:
    """Read the results of a comparison from ``folder``.

    Raises ConfigError if the folder has none, or if ``rank_by`` names no figure."""
    measure = find_measure(rank_by)
    results = load_results(folder)
    return Compare(Path(folder), results, estimates(results), measure)


def write_compare_report(folder: str | Path, rank_by: str = DEFAULT_RANKING, *, vector: bool = False) -> Path:
    """Write ``figures/*.png`` and ``report.html`` for the comparison in ``folder``; returns the page's path.

    With ``vector``, also figures as PDF and SVG, and ``figures/captions.md``.

    Raises ConfigError if it is none, or ``rank_by`` names no figure.
    """
    compare = load_compare(folder, rank_by)
    described = compare.folder / "comparison.json"
    comparison = read_comparison(described)
    results, seeds = compare.results, len(comparison.seeds)
    failed = results.drop_nulls("error").select("folder", "error").iter_rows()
    return write_report_files(
        compare.folder,
        "compare",
        list(draw_compare(compare)),
        msgspec.to_builtins(comparison),
        vector=vector,
        title=f"{len(compare.policies)} policies on {comparison.experiment.preset}",
        subtitle=(
            f"{results.height:,} runs: {len(compare.policies)} policies, {len(compare.settings())} settings, "
            f"each over {seeds} seeds"
        ),
        runs=results.height,
        failures=[Failure(*row) for row in failed],
        rankings=list(rankings(compare)),
        note=_note(compare, seeds),
        versions=versions_text(read_json(described)),
        example=results["folder"][0],
    )


def rankings(compare: Compare) -> Iterator[Ranking]:
    """Yield a table for each setting, in the order of places."""
    measures = [find_measure(name) for name in dict.fromkeys((compare.measure.name, *COLUMNS))]
    tells = compare.results["seed"].n_unique() > 1 < len(compare.policies)
    for slots, scale in compare.settings():
        rows = []
        for policy, place in places(compare, slots, scale).items():
            of_policy = {"slots": slots, "scale": scale, "policy": policy}
            cells = [_cell(next(compare.of(one.name, **of_policy), None), one) for one in measures]
            rows.append(Ranked(policy, cells, place, best=place == "1" and tells))
        title = f"{compare.setting_text(slots, scale)}: by {compare.measure.label}"
        yield Ranking(title, [measure.label for measure in measures], rows)


def places(compare: Compare, slots: int, scale: float) -> dict[str, str]:
    """Return the place of each policy of a setting, best first. Policies that these seeds cannot tell from
    the best share its place; then the rest are compared in the same way. "–" without a figure."""
    setting = compare.results.filter(slots=slots, scale=scale).sort("seed")
    values = {
        policy: setting.filter(policy=policy)[compare.measure.name].to_list() for policy in compare.policies
    }
    means = {row["policy"]: row["mean"] for row in compare.of(compare.measure.name, slots=slots, scale=scale)}
    rest = sorted(means, key=means.__getitem__, reverse=compare.measure.better == "higher")
    found: dict[str, str] = {}
    while rest:
        tied = [policy for policy in rest if _is_tie(paired(values[policy], values[rest[0]]))]
        found |= dict.fromkeys(tied, f"{len(found) + 1}{'=' * (len(tied) > 1)}")
        rest = [policy for policy in rest if policy not in found]
    return found | {policy: "–" for policy in compare.policies if policy not in found}


def _is_tie(difference: Estimate | None) -> bool:
    if difference is None:
        return False
    low, high = difference.low, difference.high
    return difference.mean == 0 if low is None or high is None else low <= 0 <= high


def _cell(row: Mapping[str, Any] | None, measure: Measure) -> Cell:
    """Return a policy's figure, and its difference to the first policy's, where the seeds show one."""
    if row is None:
        return Cell("–")
    mean, low, high, change = (
        row[name] for name in ("mean", "difference_low", "difference_high", "difference")
    )
    interval = None if row["high"] is None else measure.interval_text(mean, row["high"] - mean)
    if low is None or low <= 0 <= high:
        return Cell(measure.text(mean), interval)
    base = mean - change
    if measure.unit == "share":
        text = f"{change_text(change).removesuffix('%')} pp"
    else:
        text = change_text(change / base) if base else f"{change:+.3g}"
    verdict = "good" if (change < 0) == (measure.better == "lower") else "bad"
    return Cell(measure.text(mean), interval, text, verdict)


def _note(compare: Compare, seeds: int) -> str:
    if seeds == 1:
        return "One seed: there are no intervals, and places may be chance. With --seeds 5 there are."
    return (
        "± is half of a 95% interval of the mean over the seeds (Student's t). Policies share a place (1=) "
        "if the interval of their difference to the best of them, paired by seed, includes 0; bold is who "
        f"has the first place alone. In colour: the difference to {compare.policies[0]}, where its interval "
        "leaves out 0, in percent of its mean; of shares, as their ±, in percentage points (pp)."
    )


# Figures


def draw_compare(compare: Compare) -> Iterator[Figure]:
    """Draw each figure for which there are data."""
    measure = compare.measure
    head = f"{measure.label[:1].upper()}{measure.label[1:]}"
    better = f"({measure.better} is better)"
    axis = f"{measure.label}, s" if measure.unit == "seconds" else measure.label
    policies = [policy_label(policy) for policy in compare.policies]
    format_ = ".3~%" if measure.unit == "share" else ",.6~g"
    words: dict[str, str | list[str]] = {"value": axis, "format": format_, "policies": policies}
    rows = estimate_rows(compare, measure.name)
    best_first = sorted(rows, key=lambda row: row["mean"], reverse=measure.better == "higher")
    yield figure("ranking", f"{head} {better}", best_first, words=words)
    if compare.results["scale"].n_unique() > 1:
        title = "What throughput costs in latency, as the load grows along each line"
        yield figure("throughput", title, load_rows(compare), words=words)
    if compare.results["slots"].n_unique() > 1:
        panels = [{**row, "panel": f"load ×{row['scale']:g}"} for row in rows]
        yield figure("slots", f"{head} by the number of slots {better}", panels, words=words)
    yield figure("ttft", "Time to the first token", first_token_rows(compare), words=words)


def estimate_rows(compare: Compare, name: str) -> list[Row]:
    """Return the estimates of a figure, by slots and scale."""
    return [
        {
            "policy": policy_label(row["policy"]),
            "slots": row["slots"],
            "scale": row["scale"],
            "setting": compare.setting_text(row["slots"], row["scale"]),
            "mean": row["mean"],
            "low": row["mean"] if row["low"] is None else row["low"],
            "high": row["mean"] if row["high"] is None else row["high"],
        }
        for row in sorted(compare.of(name), key=lambda row: (row["slots"], row["scale"]))
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


def first_token_rows(compare: Compare) -> list[Row]:
    """Return the distributions of times to the first token, over all seeds, at the highest load: one for each
    panel, with different numbers of slots."""
    rows: list[Row] = []
    slots, load = sorted(compare.results["slots"].unique()), compare.results["scale"].max()
    for count in slots[:: -(-len(slots) // MOST_PANELS)]:
        runs = compare.results.filter(pl.col("error").is_null(), slots=count, scale=load)
        labels = {"setting": compare.setting_text(count, load)}  # type: ignore[arg-type] # a column of floats
        for policy, folders in runs.group_by("policy", maintain_order=True):
            frames = [load_frame(compare.folder / "runs" / name, "requests") for name in folders["folder"]]
            times = times_of(pl.concat(frames))["ttft_seconds"]
            rows += shares_up_to(times, policy=policy_label(str(policy[0])), **labels)
    return rows
