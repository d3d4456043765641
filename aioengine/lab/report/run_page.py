"""A run's report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aioengine.checks import read_json
from aioengine.lab.analysis.measures import MEASURES
from aioengine.lab.analysis.numbers import seconds_text, share_text
from aioengine.lab.analysis.summary import flatten
from aioengine.lab.report.page import versions_text, write_report_files
from aioengine.lab.report.run_figures import draw_run, load_run

_SPREADS = (
    ("time to first token", "ttft_seconds"),
    ("whole answer", "latency_seconds"),
    ("between tokens", "inter_token_seconds"),
    ("worst gap between tokens", "worst_gap_seconds"),
    ("in the queue", "queue_seconds"),
    ("load from disk", "swaps.disk_load_seconds"),
    ("copy into a slot", "swaps.slot_copy_seconds"),
    ("stay in a slot", "slots.stay_seconds"),
)


def write_report(
    folder: str | Path, progress: Callable[[], None] | None = None, *, vector: bool = False
) -> Path:
    """Draw the figures of the run in ``folder``, and write ``figures/*.png`` and ``report.html`` there.

    They depend on the run's files alone. Returns the page's path.

    Args:
        progress: Called for each figure that is drawn.
        vector: Write the figures as PDF and SVG too, and ``figures/captions.md`` with what each shows and all
            parameters.

    Raises ConfigError if a file of the run is missing or broken, or the report cannot be written.
    """
    folder = Path(folder)
    run = load_run(folder)
    experiment = read_json(folder / "experiment.json")
    summary = read_json(folder / "summary.json")
    parameters = experiment.get("experiment", {})
    flat = flatten(summary)
    return write_report_files(
        folder,
        "run",
        list(draw_run(run)),
        parameters,
        vector=vector,
        progress=progress,
        title=f"{parameters.get('policy')} on {parameters.get('preset')}",
        subtitle=_subtitle(summary),
        tiles=list(_tiles(summary)),
        spreads=[
            (label, [seconds_text(flat.get(f"{name}.{of}")) for of in ("mean", "p50", "p90", "p99", "max")])
            for label, name in _SPREADS
        ],
        measures=[(measure.label, measure.text(flat.get(measure.name))) for measure in MEASURES],
        summary=json.dumps(summary, indent=2, ensure_ascii=False),
        versions=versions_text(experiment),
    )


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [
        f"{summary['requests_offered']:,} requests in {seconds_text(summary['duration_seconds'])}",
        f"{summary['fairness']['adapters']['count']:,} adapters in {summary['slots']['slots']:,} slots",
    ]
    bad = {name: summary[f"requests_{name}"] for name in ("refused", "failed", "aborted")}
    return ", ".join([*parts, *(f"{count:,} {name}" for name, count in bad.items() if count)])


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "requests finished", f"{summary['requests_finished']:,}"
    yield "output tokens a second", f"{summary['output_tokens_per_second'] or 0:,.0f}"
    yield "first token, median", seconds_text(summary["ttft_seconds"]["p50"])
    yield "first token, p99", seconds_text(summary["ttft_seconds"]["p99"])
    yield "between tokens, mean", seconds_text(summary["inter_token_seconds"]["mean"])
    yield "adapter was in a slot", share_text(summary["hits"]["slot_share"])
    if summary["slo"]["requests_with_deadline"]:
        yield "deadlines met", share_text(summary["slo"]["in_time_share"])
