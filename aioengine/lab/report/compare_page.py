"""A comparison's report: rankings with intervals, figures, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import read_json
from aioengine.lab.analysis.measures import DEFAULT_RANKING, MEASURES, Measure, find_measure
from aioengine.lab.analysis.numbers import change_text
from aioengine.lab.analysis.statistics import Estimate, paired
from aioengine.lab.report.compare_figures import draw_compare
from aioengine.lab.report.compare_results import Compare, setting_text
from aioengine.lab.report.page import versions_text, write_report_files
from aioengine.lab.runs.comparison import Failure, estimates, load_results, read_comparison
from aioengine.lab.runs.simulate import ageing_text

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


class Cell(NamedTuple):
    value: str
    interval: str | None
    """Half of it, as in "± 0.2 s"."""
    difference: str | None
    """Difference to the first policy, if its interval leaves out 0: in percent of that policy's mean, or in
    percentage points for shares."""
    verdict: str
    """ "good" or "bad", for a difference."""


class Row(NamedTuple):
    name: str
    """Name of a policy, or of a figure."""
    cells: list[Cell]
    place: str = ""
    """ "1", or "1=" where others share it."""
    best: bool = False
    """Whether the seeds say that it is better than all others."""


class Ranking(NamedTuple):
    """A table of policies, best first."""

    title: str
    heads: list[str]
    rows: list[Row]


def load_compare(folder: str | Path, rank_by: str = DEFAULT_RANKING) -> Compare:
    """Read the results of a comparison from ``folder``.

    Raises ConfigError if the folder has none, or if ``rank_by`` names no figure."""
    measure = find_measure(rank_by)
    results = load_results(folder)
    return Compare(Path(folder), results, estimates(results), measure)


def write_compare_report(
    folder: str | Path,
    rank_by: str = DEFAULT_RANKING,
    progress: Callable[[], None] | None = None,
    *,
    vector: bool = False,
) -> Path:
    """Write ``figures/*.png`` and ``report.html`` for the comparison in ``folder``; returns the page's path.

    With ``vector``, also figures as PDF and SVG, and ``figures/captions.md``.

    Raises ConfigError if it is none, or ``rank_by`` names no figure.
    """
    compare = load_compare(folder, rank_by)
    described = read_json(compare.folder / "comparison.json")
    comparison = read_comparison(compare.folder / "comparison.json")
    results, seeds = compare.results, len(comparison.seeds)
    failed = results.drop_nulls("error").select("folder", "error").iter_rows()
    return write_report_files(
        compare.folder,
        "compare",
        list(draw_compare(compare)),
        msgspec.to_builtins(comparison),
        vector=vector,
        progress=progress,
        title=f"{len(compare.policies)} policies on {comparison.experiment.preset}",
        subtitle=(
            f"{results.height:,} runs: {len(compare.policies)} policies, {len(compare.settings())} settings, "
            f"each over {seeds} seeds"
        ),
        runs=results.height,
        failures=[Failure(*row) for row in failed],
        rankings=list(rankings(compare)),
        details=list(_details(compare)),
        note=_note(compare, seeds, ageing_text(comparison.policies, comparison.experiment.ageing)),
        versions=versions_text(described),
        example=results["folder"][0],
    )


def rankings(compare: Compare) -> Iterator[Ranking]:
    """Yield a table for each setting, in the order of places."""
    measures = [find_measure(name) for name in dict.fromkeys((compare.measure.name, *COLUMNS))]
    tells = compare.results["seed"].n_unique() > 1 < len(compare.policies)
    for slots, scale in compare.settings():
        rows = [
            Row(policy, _cells(compare, measures, policy, slots, scale), place, best=place == "1" and tells)
            for policy, place in places(compare, slots, scale).items()
        ]
        title = f"{setting_text(compare, slots, scale)}: by {compare.measure.label}"
        yield Ranking(title, [measure.label for measure in measures], rows)


def places(compare: Compare, slots: int, scale: float) -> dict[str, str]:
    """Return the place of each policy of a setting, best first. Policies that these seeds cannot tell from
    the best share its place; then the rest are compared in the same way. "–" without a figure."""
    setting = compare.results.filter(slots=slots, scale=scale).sort("seed")
    values = {
        policy: setting.filter(policy=policy)[compare.measure.name].to_list() for policy in compare.policies
    }
    table = compare.of(compare.measure.name, slots=slots, scale=scale)
    best_first = table.sort("mean", descending=compare.measure.better == "higher", maintain_order=True)
    rest = best_first["policy"].to_list()
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


def _details(compare: Compare) -> Iterator[Ranking]:
    """Yield all figures of a setting: a row for each, a column for each policy."""
    for slots, scale in compare.settings():
        columns = [_cells(compare, MEASURES, policy, slots, scale) for policy in compare.policies]
        rows = [
            Row(measure.label, list(cells))
            for measure, cells in zip(MEASURES, zip(*columns, strict=True), strict=True)
        ]
        yield Ranking(setting_text(compare, slots, scale), compare.policies, rows)


def _cells(
    compare: Compare, measures: Iterable[Measure], policy: str, slots: int, scale: float
) -> list[Cell]:
    """Return a policy's figures in a setting."""
    cells = []
    for measure in measures:
        found = compare.of(measure.name, slots=slots, scale=scale, policy=policy)
        if found.is_empty():
            cells.append(Cell("–", None, None, ""))
            continue
        row = found.row(0, named=True)
        mean, high = row["mean"], row["high"]
        interval = None if high is None else measure.interval_text(mean, high - mean)
        cells.append(Cell(measure.text(mean), interval, *_difference(row, measure)))
    return cells


def _difference(row: dict[str, Any], measure: Measure) -> tuple[str | None, str]:
    """Return the difference to the first policy, where the seeds show one."""
    low, high, change = row["difference_low"], row["difference_high"], row["difference"]
    if low is None or low <= 0 <= high:
        return None, ""
    base = row["mean"] - change
    if measure.unit == "share":
        text = f"{change_text(change).removesuffix('%')} pp"
    else:
        text = change_text(change / base) if base else f"{change:+.3g}"
    return text, "good" if (change < 0) == (measure.better == "lower") else "bad"


def _note(compare: Compare, seeds: int, ageing: str) -> str:
    ageing = f"{ageing[0].upper()}{ageing[1:]}."
    if seeds == 1:
        return (
            "One seed: there are no intervals, and places may be chance. With --seeds 5 there are. " + ageing
        )
    return (
        "± is half of a 95% interval of the mean over the seeds (Student's t). Policies share a place (1=) "
        "if the interval of their difference to the best of them, paired by seed, includes 0; bold is who "
        f"has the first place alone. In colour: the difference to {compare.policies[0]}, where its interval "
        "leaves out 0, in percent of its mean; of shares, as their ±, in percentage points (pp). " + ageing
    )
