"""A comparison's report: rankings with intervals, figures, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.lab.compare_figures import Compare, draw_compare, setting_text
from aioengine.lab.comparison import Failure, estimates, load_results, read_comparison
from aioengine.lab.measures import DEFAULT_RANKING, MEASURES, Measure, find_measure
from aioengine.lab.report import (
    draw_both,
    parameter_rows,
    read_json,
    template,
    versions_text,
    write_files,
)

COLUMNS = (
    "ttft_seconds.mean",
    "ttft_seconds.p99",
    "latency_seconds.mean",
    "output_tokens_per_second",
    "hits.slot_share",
    "fairness.adapters.jain_latency",
    "starvation.worst_wait_seconds",
)
"""Of the ranked table, next to what is ranked by."""


class Cell(NamedTuple):
    value: str
    interval: str | None
    """Half of it, as in "± 0.2 s"."""
    difference: str | None
    """To the first policy, in percent of its mean, if it has an interval that leaves out 0."""
    verdict: str
    """ "good" or "bad", for a difference."""


class Row(NamedTuple):
    policy: str
    cells: list[Cell]


class Ranking(NamedTuple):
    """A table: best first."""

    title: str
    heads: list[str]
    rows: list[Row]


def load_compare(folder: str | Path, rank_by: str = DEFAULT_RANKING) -> Compare:
    """What a comparison has left in ``folder``. Raises ConfigError if it is none, or for ``rank_by``."""
    measure = find_measure(rank_by)
    results = load_results(folder)
    return Compare(Path(folder), results, estimates(results), measure)


def write_compare_report(
    folder: str | Path, rank_by: str = DEFAULT_RANKING, progress: Callable[[], None] | None = None
) -> Path:
    """Write ``figures/*.png`` and ``report.html`` for the comparison in ``folder``; returns the page's path.

    Raises ConfigError if it is none, or ``rank_by`` names no figure.
    """
    compare = load_compare(folder, rank_by)
    comparison = read_comparison(compare.folder / "comparison.json")
    results = compare.results
    failed = results.drop_nulls("error").select("folder", "error").iter_rows()
    drawn = draw_both(lambda theme: draw_compare(compare, theme), progress)
    page = template("compare").render(
        title=f"{len(compare.policies)} policies on {comparison.experiment.preset}",
        subtitle=(
            f"{results.height:,} runs: {len(compare.policies)} policies, {len(compare.settings())} settings, "
            f"each over {len(comparison.seeds)} seeds"
        ),
        runs=results.height,
        failures=[Failure(*row) for row in failed],
        rankings=list(rankings(compare)),
        details=list(_details(compare)),
        note=_note(compare, len(comparison.seeds)),
        drawn=drawn,
        parameters=list(parameter_rows(msgspec.to_builtins(comparison))),
        versions=versions_text(read_json(compare.folder / "comparison.json")),
        example=results["folder"][0],
    )
    return write_files(compare.folder, page, [light for light, _ in drawn])


def rankings(compare: Compare) -> Iterator[Ranking]:
    """A table for each setting, in the order of the figure that is ranked by."""
    names = dict.fromkeys((compare.measure.name, *COLUMNS))
    measures = [find_measure(name) for name in names]
    for slots, scale in compare.settings():
        rows = [
            Row(policy, [_cell(compare, measure, policy, slots, scale) for measure in measures])
            for policy in ranked(compare, slots, scale)
        ]
        title = f"{setting_text(compare, slots, scale)}: by {compare.measure.label}"
        yield Ranking(title, [measure.label for measure in measures], rows)


def ranked(compare: Compare, slots: int, scale: float) -> list[str]:
    """The policies of a setting, best first; those without a figure last."""
    table = compare.of(compare.measure.name, slots=slots, scale=scale)
    best = table.sort("mean", descending=compare.measure.better == "higher", maintain_order=True)
    order = best["policy"].to_list()
    return [*order, *(policy for policy in compare.policies if policy not in order)]


def _details(compare: Compare) -> Iterator[Ranking]:
    """All figures of a setting: a row for each, a column for each policy."""
    for slots, scale in compare.settings():
        rows = [
            Row(m.label, [_cell(compare, m, policy, slots, scale) for policy in compare.policies])
            for m in MEASURES
        ]
        yield Ranking(setting_text(compare, slots, scale), compare.policies, rows)


def _cell(compare: Compare, measure: Measure, policy: str, slots: int, scale: float) -> Cell:
    found = compare.of(measure.name, slots=slots, scale=scale, policy=policy)
    if found.is_empty():
        return Cell("–", None, None, "")
    row = found.row(0, named=True)
    interval = None if row["high"] is None else f"± {measure.text(row['high'] - row['mean'])}"
    return Cell(measure.text(row["mean"]), interval, *_difference(row, measure))


def _difference(row: dict[str, Any], measure: Measure) -> tuple[str | None, str]:
    """To the first policy, where the seeds say that there is one."""
    low, high, change = row["difference_low"], row["difference_high"], row["difference"]
    if low is None or low <= 0 <= high:
        return None, ""
    base = row["mean"] - change
    text = f"{change / base:+.0%}" if base else f"{change:+.3g}"
    return text, "good" if (change < 0) == (measure.better == "lower") else "bad"


def _note(compare: Compare, seeds: int) -> str:
    if seeds == 1:
        return "One seed: there are no intervals. With --seeds 5 there are."
    return (
        "± is half of a 95% interval of the mean over the seeds (Student's t). In colour: the difference to "
        f"{compare.policies[0]}, paired by seed, where its 95% interval leaves out 0."
    )
