"""The figures of one run. Each says in its title what is to be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.analysis.fairness import by_client, service_gap
from aioengine.lab.analysis.numbers import seconds_text, share_text, shorten
from aioengine.lab.analysis.summary import slots_of, summarize_frames, times_of
from aioengine.lab.report import charts
from aioengine.lab.report.charts import Figure, Row, Spec
from aioengine.lab.runs.rows import Frames, load_frames

if TYPE_CHECKING:
    import polars as pl

BINS = 48
"""Number of intervals in charts of counts over time."""
MOST = 20
"""Maximum number of adapters in a chart with their names."""
MOST_STAYS = 4000
"""Stays in slots above which only a part of the run is shown."""
NO_GAP = (
    "no difference of service is shown: as VTC defines it, it counts only clients that have requests queued "
    "at the same time"
)
LEVELS = {"slot": "in a slot", "cpu": "on the CPU", "loading": "being loaded", "disk": "on disk"}
LEVEL_COLORS = ("#0072b2", "#7cc1ea", "#f3c766", "#d55e00")
OTHERS = "others"
BY_TIME = {"x": charts.field("time", title="seconds", bin={"binned": True}), "x2": {"field": "end"}}
"""Encoding of what :func:`binned` returns."""


class Run(NamedTuple):
    """The results of a run, as the figures need them."""

    frames: Frames
    summary: dict[str, Any]

    @property
    def end(self) -> float:
        """End of the run, in seconds; more than 0."""
        ends = [self.frames.samples["time"].max(), self.frames.requests["ended"].max()]
        return max([float(end) for end in ends if end is not None], default=0.0) or 1.0  # type: ignore[arg-type] # floats


def binned(run: Run, frame: pl.DataFrame, time: str, by: str, amount: pl.Expr) -> list[Row]:
    """Return the amounts by interval of a time, and by a column."""
    import polars as pl

    width = run.end / BINS
    at = (pl.col(time) / width).cast(pl.Int64).clip(upper_bound=BINS - 1)
    found = frame.group_by(at.alias("at"), by).agg(amount.alias("amount")).sort("at", by)
    return [
        {"time": place * width, "end": (place + 1) * width, by: key, "amount": number}
        for place, key, number in found.iter_rows()
    ]


def draw_latency(run: Run) -> tuple[str, Spec]:
    """The height of a curve at a time is the share that was served by then."""
    ttft, latency = run.summary["ttft_seconds"], run.summary["latency_seconds"]
    title = (
        f"Half of the first tokens came within {seconds_text(ttft['p50'])}, 99% within "
        f"{seconds_text(ttft['p99'])}; half of the answers were whole after {seconds_text(latency['p50'])}"
    )
    times = times_of(run.frames.requests)
    names = {
        "inter_token_seconds": "between tokens",
        "ttft_seconds": "first token",
        "latency_seconds": "whole answer",
    }
    rows = [row for group, name in names.items() for row in charts.shares_up_to(times[group], name=name)]
    if not rows:
        return title, charts.note("No request finished.")
    return title, charts.distributions(rows, list(names.values()), "seconds")


def draw_load(run: Run) -> tuple[str, Spec]:
    """Requests in the engine, and the tokens that it computed."""
    engine, samples = run.summary["engine"], run.frames.samples
    if samples.is_empty() or engine["mean_running"] is None:
        return "No step was sampled", charts.note("No sample was taken.")
    title = (
        f"{engine['mean_running']:.1f} requests ran and {engine['mean_waiting']:.1f} waited on average "
        f"(at most {engine['max_waiting']:,}); a step had {engine['tokens_per_step'] or 0:.0f} tokens"
    )
    table = thin(samples)
    levels = ("running", "waiting", "most_waiting")
    time = charts.field("time", title=None)
    queue = charts.mark(
        "line",
        {
            "x": time,
            "y": charts.number("requests", "requests"),
            "color": charts.color("what", levels, [charts.PALETTE[0], charts.PALETTE[1], "#f0b27a"]),
        },
    )
    queue["transform"] = [{"fold": list(levels), "as": ["what", "requests"]}]
    stages = [
        charts.panel(
            70,
            charts.mark(
                "area", {"x": time, "y": charts.number(stage, f"{stage} tokens/s")}, color=hue, opacity=0.8
            ),
        )
        for stage, hue in (("prefill", charts.PALETTE[4]), ("decode", charts.PALETTE[2]))
    ]
    return title, {
        "data": charts.data(table.iter_rows(named=True)),
        "vconcat": [charts.panel(140, queue), *stages],
    }


def thin(samples: pl.DataFrame) -> pl.DataFrame:
    """Merge neighbouring samples until there are few enough for a line: means of levels weighted by time,
    tokens a second; ``most_waiting`` is the highest. What is left over at the end, where the last sample is
    of a part of its time, goes with those before."""
    import polars as pl

    step = -(-samples.height // charts.MAX_POINTS)
    last = max((samples.height - 1) // step - 1, 1)
    length = pl.col("time").diff().fill_null(pl.col("time").first()).clip(1e-9)
    seconds = pl.col("length").sum()
    return (
        samples.with_columns(length.alias("length"))
        .group_by((pl.int_range(pl.len()) // step).clip(upper_bound=last), maintain_order=True)
        .agg(
            time=pl.col("time").last(),
            running=(pl.col("running") * pl.col("length")).sum() / seconds,
            most_waiting=pl.col("waiting").max(),
            waiting=(pl.col("waiting") * pl.col("length")).sum() / seconds,
            prefill=pl.col("prefill_tokens").sum() / seconds,
            decode=pl.col("decode_tokens").sum() / seconds,
        )
        .drop("literal", strict=False)
    )


def draw_timeline(run: Run) -> tuple[str, Spec]:
    """A row is a slot, a bar an adapter's stay in it, pale while it is being written. On the page, the wheel
    zooms."""
    slots, spans = run.summary["slots"]["slots"], run.frames.slots
    if spans.is_empty():
        return "No adapter came into a slot", charts.note("The slots stayed empty.")
    shown = spans.sort("start", "slot")
    title = f"{spans.height:,} stays of {spans['adapter'].n_unique():,} adapters in {slots:,} slots"
    if spans.height > MOST_STAYS:
        shown = shown.slice((spans.height - MOST_STAYS) // 2, MOST_STAYS)
        title += f"; shown are {MOST_STAYS:,} in the middle"
    held: Counter[str] = Counter()
    rows = []
    for slot, adapter, start, ready, end, steps in shown.iter_rows():
        held[adapter] += end - start
        ready = end if ready is None else ready
        rows.append(
            {"slot": slot, "adapter": adapter, "start": start, "ready": ready, "end": end, "steps": steps}
        )
    most = sorted(held, key=lambda name: (-held[name], name))[: len(charts.PALETTE)]
    names = [shorten(name) for name in sorted(most)]
    for row in rows:
        row["shown"] = shorten(row["adapter"]) if row["adapter"] in most else OTHERS
    tooltip = [charts.field(name, "nominal", name) for name in ("adapter", "start", "ready", "end", "steps")]
    encoding = {
        "y": charts.field("slot", "ordinal", "slot"),
        "color": charts.color("shown", [*names, OTHERS], [*charts.PALETTE[: len(names)], charts.NEUTRAL]),
        "tooltip": tooltip,
    }
    ends = [
        charts.mark(
            "bar",
            {**encoding, "x": charts.field(begin, title="seconds"), "x2": {"field": end}},
            opacity=opacity,
            clip=True,
        )
        for begin, end, opacity in (("start", "ready", 0.35), ("ready", "end", 1.0))
    ]
    zoom = {"name": "zoom", "select": {"type": "interval", "encodings": ["x"]}, "bind": "scales"}
    ends[0]["params"] = [zoom]
    return title, {"data": charts.data(rows), **charts.panel(12 * min(max(slots, 3), 60), *ends)}


def draw_hits(run: Run) -> tuple[str, Spec]:
    """By the time of arrival. What is in a slot runs at once, what is on disk waits longest."""
    import polars as pl

    hits = run.summary["hits"]
    parts = [f"{share_text(share)} {LEVELS[level]}" for level in LEVELS if (share := hits[f"{level}_share"])]
    title = f"Requests found their adapter {', '.join(parts)}" if parts else "No request had an adapter"
    wanted = run.frames.requests.drop_nulls("found").with_columns(pl.col("found").replace(LEVELS))
    if wanted.is_empty():
        return title, charts.note("All requests were for the base model.")
    encoding = {
        **BY_TIME,
        "y": charts.number("amount", "share of requests", "share", stack="normalize"),
        "color": charts.color("found", list(LEVELS.values()), LEVEL_COLORS),
        "order": {"field": "found"},
    }
    rows = binned(run, wanted, "arrival", "found", pl.len())
    return title, {"data": charts.data(rows), **charts.panel(170, charts.mark("bar", encoding))}


def draw_swaps(run: Run) -> tuple[str, Spec]:
    """Bytes of adapters that were moved, by the time at which the move ended."""
    import polars as pl

    swaps = run.summary["swaps"]
    title = (
        f"{swaps['slot_copies']:,} copies into slots ({swaps['slot_copy_bytes'] / 1e9:.3g} GB), "
        f"{swaps['disk_loads']:,} loads from disk ({swaps['disk_load_bytes'] / 1e9:.3g} GB)"
    )
    if swaps["failed_moves"]:
        title += f"; {swaps['failed_moves']:,} failed"
    stages = {"slot": "CPU to slot", "disk": "disk to CPU"}
    moves = run.frames.moves.filter(pl.col("error").is_null()).with_columns(pl.col("stage").replace(stages))
    if moves.is_empty():
        return title, charts.note("Nothing was moved.")
    encoding = {
        **BY_TIME,
        "y": charts.number("amount", "MB a second"),
        "color": charts.field("stage", "nominal", legend=None),
        "row": charts.field("stage", "nominal"),
    }
    rows = binned(run, moves, "end", "stage", pl.col("nbytes").sum() / 1e6 / (run.end / BINS))
    return title, {"data": charts.data(rows), **charts.panel(80, charts.mark("bar", encoding))}


def draw_fairness(run: Run) -> tuple[str, Spec]:
    """Who is served how fast; below, if there is any, the difference that fair schedulers bound."""
    fairness = run.summary["fairness"]
    clients = fairness["service_between"]
    client: Any = clients.removesuffix("s")
    table = by_client(run.frames.requests, client)
    index = fairness[clients]["jain_latency"]
    difference = fairness["max_service_difference_tokens"]
    title = (
        f"{table.height:,} {clients if table.height != 1 else client}: Jain's index of their mean latencies "
        f"is {'–' if index is None else f'{index:.2f}'} (1 is even)"
    )
    seen = table.drop_nulls("latency_seconds").select("client", "offered", "latency_seconds")
    if seen.is_empty():
        return title, charts.note("No request finished.")
    latency = charts.number("latency_seconds", "mean latency, seconds")
    name = charts.field("client", "nominal", sort=None)
    if seen.height <= MOST // 2:
        bars = charts.mark(
            "bar", {"x": latency, "y": name, "tooltip": [name, charts.field("offered", title="requests")]}
        )
        spread = charts.panel(22 * seen.height, bars)
    else:
        requests = charts.logarithmic("offered", f"requests of the {client}")
        spread = charts.panel(160, charts.mark("point", {"x": requests, "y": latency, "tooltip": [name]}))
    spread["data"] = charts.data(seen.iter_rows(named=True))
    if not difference:
        return f"{title}; {NO_GAP}", spread
    title += f"; while two had requests queued, their service came to differ by {difference:,} tokens"
    series = service_gap(run.frames.requests, run.frames.samples).series
    step = -(-len(series) // charts.MAX_POINTS) or 1
    gaps = [
        {"time": series[at][0], "tokens": max(value for _, value in series[at : at + step])}
        for at in range(0, len(series), step)
    ]
    area = charts.mark(
        "area",
        {"x": charts.field("time", title="seconds"), "y": charts.number("tokens", "tokens")},
        interpolate="step-after",
        color=charts.PALETTE[3],
    )
    below = "Largest difference of service between two that both have requests queued"
    return title, {"vconcat": [spread, {"data": charts.data(gaps), **charts.panel(90, area, title=below)}]}


def draw_starvation(run: Run) -> tuple[str, Spec]:
    """The adapters with the longest waits."""
    table = by_client(run.frames.requests, "adapter").drop_nulls("worst_wait_seconds")
    count = table.height
    if not count:
        return "No request was accepted", charts.note("No request waited.")
    table = table.sort("worst_wait_seconds", "client", descending=[True, False]).head(MOST)
    title = (
        f"The longest wait for a first token was {seconds_text(table['worst_wait_seconds'][0])}, by "
        f"{shorten(table['client'][0], 30)}"
    )
    if count > table.height:
        title += f"; shown are the {table.height} longest of {count:,} adapters"
    name = charts.field("client", "nominal", sort=None)
    waits = charts.number("worst_wait_seconds", "seconds to the first token: the worst, and the mean")
    bars = charts.mark("bar", {"x": waits, "y": name}, color=charts.PALETTE[1])
    means = charts.mark("point", {"x": charts.number("ttft_seconds", None), "y": name}, color="#1b2230")
    rows = table.select("client", "worst_wait_seconds", "ttft_seconds").iter_rows(named=True)
    return title, {"data": charts.data(rows), **charts.panel(18 * table.height, bars, means)}


PLOTS: Mapping[str, Callable[[Run], tuple[str, Spec]]] = {
    "latency": draw_latency,
    "load": draw_load,
    "timeline": draw_timeline,
    "hits": draw_hits,
    "swaps": draw_swaps,
    "fairness": draw_fairness,
    "starvation": draw_starvation,
}
"""Figures by name: each returns its title and its chart, and its docstring is its caption."""


def draw_run(run: Run) -> Iterator[Figure]:
    """Draw all figures, one at a time."""
    for name, draw in PLOTS.items():
        yield Figure(name, *draw(run), caption=charts.caption_of(draw))


def load_run(folder: str | Path) -> Run:
    """Read a run from its folder. Raises ConfigError if the folder has no run."""
    frames = load_frames(folder)
    return Run(frames, summarize_frames(frames, slots_of(Path(folder))))
