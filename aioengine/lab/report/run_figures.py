"""The figures of one run. Each says in its title what is to be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.analysis.fairness import by_client, service_gap
from aioengine.lab.analysis.summary import slots_of, summarize_frames
from aioengine.lab.report import style
from aioengine.lab.report.timeline import draw_timeline
from aioengine.lab.runs.rows import Frames, load_frames

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 48
"""Number of intervals in charts of counts over time."""
MOST = 20
"""Maximum number of adapters in a chart with their names."""
NO_GAP = (
    "No difference of service is shown: as VTC defines it, it counts only clients that have requests queued "
    "at the same time while other requests of theirs are served, and there were none. How long requests "
    "waited is in the figure on starvation."
)
LEVELS = (("slot", "in a slot"), ("cpu", "on the CPU"), ("loading", "being loaded"), ("disk", "on disk"))


class Run(NamedTuple):
    """The results of a run, as the figures need them."""

    frames: Frames
    summary: dict[str, Any]

    @property
    def end(self) -> float:
        """End of the run, in seconds; more than 0."""
        ends = [self.frames.samples["time"].max(), self.frames.requests["ended"].max()]
        return max([float(end) for end in ends if end is not None], default=0.0) or 1.0  # type: ignore[arg-type] # floats


class Plot(NamedTuple):
    name: str
    """Name of its file without ".png"."""
    caption: str
    """Caption that says how to read it."""
    draw: Callable[[Run, style.Theme], Figure]


def draw_latency(run: Run, theme: style.Theme) -> Figure:
    ttft, latency = run.summary["ttft_seconds"], run.summary["latency_seconds"]
    title = (
        f"Half of the first tokens came within {style.seconds_text(ttft['p50'])}, "
        f"99% within {style.seconds_text(ttft['p99'])}; "
        f"half of the answers were whole after {style.seconds_text(latency['p50'])}"
    )
    figure, (axes,) = style.new_figure(title, height=3.9)
    done = run.frames.requests.filter(run.frames.requests["reason"].is_in(["stop", "length"]))
    several = done.filter(done["output_tokens"] > 1)
    curves = (
        ("between tokens", (several["ended"] - several["first_token"]) / (several["output_tokens"] - 1)),
        ("first token", done["first_token"] - done["arrival"]),
        ("whole answer", done["ended"] - done["arrival"]),
    )
    if done.is_empty():
        style.say(axes, "No request finished.")
        return figure
    for (label, values), color in zip(curves, theme.palette, strict=False):
        cdf(axes, values, label, color)
    axes.set_xscale("log")
    axes.margins(x=0.01)
    style.plain_log_axis(axes.xaxis)
    axes.set(xlabel="seconds (logarithmic)", ylabel="share of requests", ylim=(0, 1.01))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99])
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    return figure


def cdf(axes: Any, values: pl.Series, label: str, color: str, **kwargs: Any) -> None:
    """Draw the share of values up to each value, as a step line."""
    import numpy as np

    ordered = np.sort(values.drop_nulls().to_numpy())
    if not len(ordered):
        return
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    if len(ordered) > style.MAX_POINTS:
        kept = np.unique(np.linspace(0, len(ordered) - 1, style.MAX_POINTS).astype(int))
        ordered, shares = ordered[kept], shares[kept]
    ordered = np.maximum(ordered, 1e-5)  # a logarithmic axis has no zero
    axes.step([ordered[0], *ordered], [0, *shares], where="post", label=label, color=color, **kwargs)


def draw_load(run: Run, theme: style.Theme) -> Figure:
    engine = run.summary["engine"]
    title = "No step was sampled"
    if engine["mean_running"] is not None:
        title = (
            f"{engine['mean_running']:.1f} requests ran and {engine['mean_waiting']:.1f} waited on average "
            f"(at most {engine['max_waiting']:,}); a step had {engine['tokens_per_step'] or 0:.0f} tokens"
        )
    samples = run.frames.samples
    if samples.is_empty():
        figure, (queue,) = style.new_figure(title, height=3)
        style.say(queue, "No sample was taken.")
        return figure
    figure, (queue, *panels) = style.new_figure(
        title, height=6.2, rows=3, sharex=True, height_ratios=[3, 2, 2]
    )
    table = thin(samples)
    times = table["time"].to_list()
    running, waiting = table["running"].to_numpy(), table["waiting"].to_numpy()
    queue.fill_between(times, running, color=theme.palette[0], alpha=0.25, linewidth=0)
    queue.plot(times, running, color=theme.palette[0], label="running")
    queue.plot(times, waiting, color=theme.palette[1], label="waiting")
    most = table["most_waiting"].to_numpy()
    if (most > waiting).any():
        color = theme.palette[1]
        queue.fill_between(
            times, waiting, most, color=color, alpha=0.3, linewidth=0, label="waiting, at most"
        )
    queue.set(ylabel="requests", ylim=(0, None))
    style.legend_above(queue)
    lengths = table["length"].to_numpy()
    stages = (("prefill", theme.palette[4]), ("decode", theme.palette[2]))
    for axes, (stage, color) in zip(panels, stages, strict=True):
        axes.plot(times, table[f"{stage}_tokens"].to_numpy() / lengths, color=color)
        axes.set(ylabel="tokens a second", ylim=(0, None), xlim=(0, run.end))
        axes.set_title(stage, loc="left")
    for axes in (queue, *panels):
        style.thousands_axis(axes.yaxis)
    panels[-1].set_xlabel("seconds")
    return figure


def thin(samples: pl.DataFrame) -> pl.DataFrame:
    """Neighbouring samples merged until there are few enough for a line: means of levels weighted by time,
    sums of counts, ``length`` in seconds; ``most_waiting`` is the highest. What is left over at the end,
    where the last sample is of a part of its time, goes with those before."""
    import polars as pl

    step = -(-samples.height // (style.MAX_POINTS // 3))
    last = max((samples.height - 1) // step - 1, 1)
    length = pl.col("time").diff().fill_null(pl.col("time").first()).clip(1e-9)
    levels = [
        ((pl.col(name) * pl.col("length")).sum() / pl.col("length").sum()).alias(name)
        for name in ("running", "waiting")
    ]
    return (
        samples.with_columns(length.alias("length"))
        .group_by((pl.int_range(pl.len()) // step).clip(upper_bound=last), maintain_order=True)
        .agg(
            pl.col("time").last(),
            *levels,
            pl.col("waiting").max().alias("most_waiting"),
            pl.col("length", "prefill_tokens", "decode_tokens").sum(),
        )
    )


def draw_hits(run: Run, theme: style.Theme) -> Figure:
    import numpy as np

    hits = run.summary["hits"]
    wanted = run.frames.requests.drop_nulls("found")
    shares = {level: hits[f"{level}_share"] for level, _ in LEVELS}
    parts = [f"{style.share_text(shares[level])} {where}" for level, where in LEVELS if shares[level]]
    title = f"Requests found their adapter {', '.join(parts)}" if parts else "No request had an adapter"
    figure, (axes,) = style.new_figure(title, height=3.4)
    if wanted.is_empty():
        style.say(axes, "All requests were for the base model.")
        return figure
    edges = np.linspace(0, run.end, BINS + 1)
    counts = np.array(
        [np.histogram(wanted.filter(wanted["found"] == level)["arrival"], edges)[0] for level, _ in LEVELS]
    )
    total = counts.sum(axis=0)
    base = np.zeros(BINS)
    for (_, where), row, color in zip(LEVELS, counts / np.maximum(total, 1), theme.levels, strict=True):
        if row.any():
            axes.bar(
                edges[:-1], row, np.diff(edges), base, align="edge", color=color, label=where, linewidth=0
            )
        base += row
    axes.set(xlabel="seconds", ylabel="share of requests", xlim=(0, run.end), ylim=(0, 1))
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    if not total.all():
        style.footnote(figure, "Where there is no bar, no request with an adapter arrived.", theme)
    return figure


def draw_swaps(run: Run, theme: style.Theme) -> Figure:
    import numpy as np

    swaps = run.summary["swaps"]
    title = (
        f"{swaps['slot_copies']:,} copies into slots ({swaps['slot_copy_bytes'] / 1e9:.3g} GB), "
        f"{swaps['disk_loads']:,} loads from disk ({swaps['disk_load_bytes'] / 1e9:.3g} GB)"
    )
    if swaps["failed_moves"]:
        title += f"; {swaps['failed_moves']:,} failed"
    figure, panels = style.new_figure(title, height=4.4, rows=2, sharex=True, sharey=True)
    edges = np.linspace(0, run.end, BINS + 1)
    moves = run.frames.moves.filter(run.frames.moves["error"].is_null())
    stages = (("slot", "CPU to slot", theme.palette[0]), ("disk", "disk to CPU", theme.palette[1]))
    for axes, (stage, label, color) in zip(panels, stages, strict=True):
        rows = moves.filter(moves["stage"] == stage)
        megabytes, _ = np.histogram(rows["end"], edges, weights=rows["nbytes"].to_numpy() / 1e6)
        axes.stairs(megabytes / np.diff(edges), edges, fill=True, color=color, alpha=0.85)
        axes.set(ylabel="MB a second", ylim=(0, None), xlim=(0, run.end))
        axes.set_title(label, loc="left")
        style.thousands_axis(axes.yaxis)
    panels[-1].set_xlabel("seconds")
    return figure


def draw_fairness(run: Run, theme: style.Theme) -> Figure:
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
    seen = table.drop_nulls("latency_seconds")
    named = seen.height <= MOST // 2
    above = 0.8 + 0.27 * max(seen.height, 3) if named else 2.4
    if difference:
        title += f"; while two had requests queued, their service came to differ by {difference:,} tokens"
        figure, (spread, *gaps) = style.new_figure(
            title, height=above + 3.2, rows=2, height_ratios=[above, 2.4]
        )
    else:
        figure, (spread, *gaps) = style.new_figure(title, height=above + 1.2)
        style.footnote(figure, NO_GAP, theme)
    if named:
        _bars(spread, seen, theme)
    else:
        _cloud(spread, seen, client, theme)
    for axes in gaps:
        _gap(axes, run, theme)
    return figure


def _gap(axes: Axes, run: Run, theme: style.Theme) -> None:
    """The difference of service over time."""
    series = service_gap(run.frames.requests, run.frames.samples).series
    step = -(-len(series) // style.MAX_POINTS) or 1
    largest = [max(value for _, value in series[at : at + step]) for at in range(0, len(series), step)]
    times = [time for time, _ in series[::step]]
    axes.fill_between(times, largest, step="post", color=theme.palette[3], alpha=0.8, linewidth=0)
    axes.set(xlabel="seconds", ylabel="tokens", xlim=(0, run.end), ylim=(0, None))
    axes.set_title("Largest difference of service between two that both have requests queued", loc="left")
    style.thousands_axis(axes.yaxis)


def _bars(axes: Axes, clients: pl.DataFrame, theme: style.Theme) -> None:
    """A bar for each client: its mean latency."""
    rows = range(clients.height)
    axes.barh(rows, clients["latency_seconds"], 0.7, color=theme.palette[0])
    names = clients.select("client", "offered").iter_rows()
    axes.set_yticks(rows, [f"{style.shorten(name)} ({offered:,})" for name, offered in names])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds", xlim=(0, None))
    axes.set_title("Mean latency, and in brackets the requests", loc="left")


def _cloud(axes: Axes, clients: pl.DataFrame, client: str, theme: style.Theme) -> None:
    """A point for each client: mean latency by how much it asks for."""
    offered, latency = clients["offered"], clients["latency_seconds"]
    axes.scatter(offered, latency, s=26, color=theme.palette[0], alpha=0.75, linewidth=0)
    top = float(latency.max()) * 1.1  # type: ignore[arg-type] # a column of floats
    axes.set(xlabel=f"requests of the {client}", ylabel="mean latency, seconds", ylim=(0, top))
    if offered.max() > 20 * offered.min():  # type: ignore[operator] # a column of integers
        axes.set_xscale("log")
        style.plain_log_axis(axes.xaxis)
        axes.set_xlabel(f"requests of the {client} (logarithmic)")
    axes.set_title(f"Each {client} is a point: on a level, they are treated evenly", loc="left")


def draw_starvation(run: Run, theme: style.Theme) -> Figure:
    table = by_client(run.frames.requests, "adapter").drop_nulls("worst_wait_seconds")
    count = table.height
    table = table.sort("worst_wait_seconds", "client", descending=[True, False]).head(MOST)
    title = "No request was accepted"
    if table.height:
        title = (
            f"The longest wait for a first token was {style.seconds_text(table['worst_wait_seconds'][0])}, "
            f"by {style.shorten(table['client'][0], 30)}"
        )
    if count > table.height:
        title += f"; shown are the {table.height} longest of {count:,} adapters"
    figure, (axes,) = style.new_figure(title, height=1.3 + 0.23 * max(table.height, 4))
    if table.is_empty():
        style.say(axes, "No request waited.")
        return figure
    names = [style.shorten(name) for name in table["client"]]
    rows = range(len(names))
    axes.barh(rows, table["worst_wait_seconds"], 0.7, color=theme.palette[1], label="worst wait")
    axes.scatter(
        table["ttft_seconds"].fill_null(float("nan")),
        rows,
        s=22,
        color=theme.text,
        zorder=3,
        linewidth=0.8,
        edgecolor=theme.background,
        label="mean of the finished",
    )
    axes.set_yticks(rows, names)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="seconds to the first token", xlim=(0, None), ylim=(len(names) - 0.4, -0.6))
    style.legend_above(axes)
    return figure


PLOTS = (
    Plot(
        "latency",
        "The height of a curve at a time is the share that was served by then.",
        draw_latency,
    ),
    Plot("load", "Requests in the engine, and the tokens that it computed.", draw_load),
    Plot(
        "timeline",
        "A row is a slot, a bar an adapter's stay in it; hatched while it is being written.",
        lambda run, theme: draw_timeline(run.frames.slots, run.summary["slots"]["slots"], run.end, theme),
    ),
    Plot(
        "hits",
        "By the time of arrival. What is in a slot runs at once, what is on disk waits longest.",
        draw_hits,
    ),
    Plot("swaps", "Bytes of adapters that were moved, by the time at which the move ended.", draw_swaps),
    Plot(
        "fairness",
        "Who is served how fast; below, if there is any, the difference that fair schedulers bound.",
        draw_fairness,
    ),
    Plot("starvation", f"The {MOST} adapters with the longest waits.", draw_starvation),
)


def draw_run(run: Run, theme: style.Theme = style.LIGHT) -> Iterator[style.Drawn]:
    """Draw all figures, one at a time."""
    for plot in PLOTS:
        yield style.draw(plot.name, plot.caption, theme, partial(plot.draw, run, theme))


def load_run(folder: str | Path) -> Run:
    """Read a run from its folder. Raises ConfigError if the folder has no run."""
    frames = load_frames(folder)
    return Run(frames, summarize_frames(frames, slots_of(Path(folder))))
