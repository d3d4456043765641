"""A run's report, and its figures: each says in its title what is to be seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from aioengine.checks import read_json
from aioengine.lab.analysis.fairness import by_client, service_gap
from aioengine.lab.analysis.measures import MEASURES, seconds_text, share_text, shorten
from aioengine.lab.analysis.summary import flatten, settings_of, summarize_frames, times_of
from aioengine.lab.report.charts import COLORS, MAX_POINTS, Figure, figure, shares_up_to
from aioengine.lab.report.page import versions_text, write_report_files
from aioengine.lab.runs.rows import Frames, load_frames

BINS = 48
"""Number of intervals in charts of counts over time."""
MOST = 20
"""Maximum number of clients in a chart with their names."""
MOST_STAYS = 4000
"""Stays in slots above which only a part of the run is shown."""
TIMES = {
    "inter_token_seconds": "between tokens",
    "ttft_seconds": "first token",
    "latency_seconds": "whole answer",
}
LEVELS = {"slot": "in a slot", "cpu": "on the CPU", "loading": "being loaded", "disk": "on disk"}
OTHERS = "others"
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


class Run(NamedTuple):
    """The results of a run, as the figures need them."""

    frames: Frames
    summary: dict[str, Any]


def draw_latency(run: Run) -> Figure:
    ttft, latency = run.summary["ttft_seconds"], run.summary["latency_seconds"]
    title = (
        f"Half of the first tokens came within {seconds_text(ttft['p50'])}, 99% within "
        f"{seconds_text(ttft['p99'])}; half of the answers were whole after {seconds_text(latency['p50'])}"
    )
    times = times_of(run.frames.requests)
    rows = [row for group, name in TIMES.items() for row in shares_up_to(times[group], name=name)]
    return figure("latency", title, rows)


def draw_load(run: Run) -> Figure:
    engine = run.summary["engine"]
    title = (
        f"{engine['mean_running'] or 0:.1f} requests ran and {engine['mean_waiting'] or 0:.1f} waited on "
        f"average (at most {engine['max_waiting'] or 0:,}); a step had {engine['tokens_per_step'] or 0:.0f} "
        "tokens"
    )
    return figure("load", title, thin(run.frames.samples).iter_rows(named=True))


def thin(samples: pl.DataFrame) -> pl.DataFrame:
    """Merge neighbouring samples until there are few enough for a line: means of levels weighted by time,
    tokens a second; ``most_waiting`` is the highest. What is left over at the end, where the last sample is
    of a part of its time, goes with those before."""
    step = -(-samples.height // MAX_POINTS) or 1
    last = max((samples.height - 1) // step - 1, 1)
    length = pl.col("time").diff().fill_null(pl.col("time").first()).clip(1e-9)
    seconds = pl.col("length").sum()
    levels = [(pl.col(name) * pl.col("length")).sum() / seconds for name in ("running", "waiting")]
    return (
        samples.with_columns(length.alias("length"))
        .group_by((pl.int_range(pl.len()) // step).clip(upper_bound=last).alias("part"), maintain_order=True)
        .agg(
            pl.col("time").last(),
            *levels,
            most_waiting=pl.col("waiting").max(),
            prefill=pl.col("prefill_tokens").sum() / seconds,
            decode=pl.col("decode_tokens").sum() / seconds,
        )
        .drop("part")
    )


def draw_timeline(run: Run) -> Figure:
    spans = run.frames.slots
    title = f"{spans.height:,} stays of {spans['adapter'].n_unique():,} adapters in slots"
    shown = spans.sort("start", "slot")
    if spans.height > MOST_STAYS:
        shown = shown.slice((spans.height - MOST_STAYS) // 2, MOST_STAYS)
        title += f"; shown are {MOST_STAYS:,} in the middle"
    stays: Counter[str] = Counter()
    for _, adapter, start, _, end, _ in shown.iter_rows():
        stays[adapter] += end - start
    most = sorted(sorted(stays, key=lambda name: (-stays[name], name))[:COLORS])
    rows = [
        {
            "slot": slot,
            "adapter": adapter,
            "shown": shorten(adapter) if adapter in most else OTHERS,
            "start": start,
            "ready": end if ready is None else ready,
            "end": end,
            "steps": steps,
        }
        for slot, adapter, start, ready, end, steps in shown.iter_rows()
    ]
    return figure("timeline", title, rows, words={"shown": [*map(shorten, most), OTHERS]})


def draw_hits(run: Run) -> Figure:
    hits = run.summary["hits"]
    parts = [f"{share_text(share)} {LEVELS[level]}" for level in LEVELS if (share := hits[f"{level}_share"])]
    ends = [run.frames.samples["time"].max(), run.frames.requests["ended"].max()]
    known = [float(end) for end in ends if end is not None]  # type: ignore[arg-type] # columns of floats
    width = max(known, default=1.0) / BINS
    at = (pl.col("arrival") / width).cast(pl.Int64).clip(upper_bound=BINS - 1)
    wanted = run.frames.requests.drop_nulls("found").with_columns(pl.col("found").replace(LEVELS))
    counts = wanted.group_by(at.alias("at"), "found").len("amount").sort("at", "found")
    rows = [
        {"time": place * width, "end": (place + 1) * width, "found": found, "amount": amount}
        for place, found, amount in counts.iter_rows()
    ]
    return figure("hits", f"Requests found their adapter {', '.join(parts) or 'nowhere'}", rows)


def draw_fairness(run: Run) -> Figure:
    fairness = run.summary["fairness"]
    clients = fairness["service_between"]
    client: Any = clients.removesuffix("s")
    table = by_client(run.frames.requests, client)
    index = fairness[clients]["jain_latency"]
    difference = fairness["max_service_difference_tokens"]
    title = (
        f"{table.height:,} {clients}: Jain's index of their mean latencies is "
        f"{'–' if index is None else f'{index:.2f}'} (1 is even); while two had requests queued, their "
        f"service came to differ by {difference:,} tokens"
    )
    seen = table.drop_nulls("latency_seconds").select("client", "offered", "latency_seconds").head(MOST)
    series = service_gap(run.frames.requests, run.frames.samples).series
    step = -(-len(series) // MAX_POINTS) or 1
    gaps = [
        {"time": series[at][0], "tokens": max(value for _, value in series[at : at + step])}
        for at in range(0, len(series), step)
    ]
    return figure("fairness", title, clients=seen.iter_rows(named=True), gaps=gaps)


PLOTS: Mapping[str, Callable[[Run], Figure]] = {
    "latency": draw_latency,
    "load": draw_load,
    "timeline": draw_timeline,
    "hits": draw_hits,
    "fairness": draw_fairness,
}
"""Figures by name."""


def load_run(folder: str | Path) -> Run:
    """Read a run from its folder. Raises ConfigError if the folder has no run."""
    frames = load_frames(folder)
    return Run(frames, summarize_frames(frames, settings_of(Path(folder))))


def write_report(folder: str | Path, *, vector: bool = False) -> Path:
    """Draw the figures of the run in ``folder``, and write ``figures/*.png`` and ``report.html`` there.

    They depend on the run's files alone. Returns the page's path.

    Args:
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
        [draw(run) for draw in PLOTS.values()],
        parameters,
        vector=vector,
        title=f"{parameters.get('policy')} on {parameters.get('preset')}",
        subtitle=_subtitle(summary),
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
