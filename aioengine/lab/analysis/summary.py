"""The figures of a run, computed from its files: plain numbers, the same for the same files."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from aioengine.checks import read_json
from aioengine.lab.analysis.fairness import Client, by_client, jain, max_min, service_gap
from aioengine.lab.runs.rows import Frames, load_frames
from aioengine.lab.workload.lengths import Targets, parse_targets
from aioengine.schedulers.routing import load_autoscaler

DIGITS = 6
"""Decimal places of every figure: microseconds, where it is a time."""

MOST_STARVED = 10
"""Number of adapters that are listed by their worst wait."""


class Settings(NamedTuple):
    """Settings of a run that its figures depend on."""

    slots: int | None = None
    """Slots on all replicas; None: those that were used."""
    replicas: int = 1
    """Engines that took steps; the most of them if their number changes."""
    warmup: float | None = None
    """See :attr:`aioengine.lab.runs.experiment.Experiment.warmup`."""
    targets: Targets | None = None


def summarize(folder: str | Path) -> dict[str, Any]:
    """Return the figures of the run whose files are in ``folder``, by groups; docs/lab.md lists them.

    Units are in the names; a ``_share`` is between 0 and 1. A figure without measurements is None. Raises
    ConfigError if a file is missing or was not written by a run.
    """
    found: dict[str, Any] = rounded(summarize_frames(load_frames(folder), settings_of(Path(folder))))
    return found


def summarize_frames(frames: Frames, settings: Settings | None = None) -> dict[str, Any]:
    """Compute the same figures from data frames, without rounding them."""
    slots, replicas, warmup, targets = settings or Settings()
    ended = frames.requests
    if warmup is not None:
        frames, ended = measured_part(frames, warmup)
    requests = frames.requests
    done = finished(requests)
    reasons = dict(requests.group_by("reason").len().sort("reason").iter_rows())
    by_error = requests.drop_nulls("error").group_by("error").len().sort("error")
    ends: Any = (requests["ended"].max() or 0.0, requests["arrival"].min() or 0.0)
    measured: Any = frames.samples["time"].max() or 0.0
    seconds = float(ends[0] - ends[1] if warmup is None else measured)
    output_tokens = int(ended["output_tokens"].sum())
    kept = _in_time(ended, targets)
    return {
        "requests_offered": requests.height,
        "requests_finished": done.height,
        "requests_failed": reasons.get("error", 0),
        "requests_aborted": reasons.get("abort", 0),
        "requests_refused": reasons.get("refused", 0),
        "requests_by_reason": reasons,
        "requests_by_error": dict(by_error.iter_rows()),
        "duration_seconds": seconds,
        "requests_per_second": _ratio(finished(ended).height, seconds),
        "goodput_requests_per_second": (
            _ratio(kept["requests_in_time"], seconds) if kept["requests_with_deadline"] else None
        ),
        "prompt_tokens": int(requests.drop_nulls("admitted")["prompt_tokens"].sum()),
        "output_tokens": output_tokens,
        "output_tokens_per_second": _ratio(output_tokens, seconds),
        **{group: spread(values) for group, values in times_of(requests).items()},
        "slo": _in_time(requests, targets),
        "attainment": _attainment(requests, targets),
        "hits": _hits(requests),
        "swaps": _swaps(frames),
        "slots": _slot_use(frames, slots, seconds, replicas),
        "engine": _engine(frames.samples, replicas),
        "fairness": _fairness(frames),
        "starvation": _starvation(requests),
        "preemptions": int(requests["preemptions"].sum()),
        "preempted_requests": int((requests["preemptions"] > 0).sum()),
    }


def measured_part(frames: Frames, warmup: float) -> tuple[Frames, pl.DataFrame]:
    """Return the part of a run from the first sample after ``warmup`` to the last arrival, with times from
    there: requests that arrived in it, and what happened in it. The second frame is of the requests that
    ended in it."""
    last = float(frames.requests["arrival"].max() or 0.0)  # type: ignore[arg-type] # a column of floats
    times = frames.samples.filter(pl.col("time") >= warmup)["time"]
    begin = float(times.min() or warmup)  # type: ignore[arg-type] # a column of floats
    end = max(last, begin)

    def since(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
        return frame.with_columns(pl.col(*columns) - begin)

    requests = since(frames.requests, "arrival", "admitted", "first_token", "ended", "deadline")
    slots = frames.slots.filter(pl.col("end") > begin, pl.col("start") < end)
    inside = [pl.col(name).clip(begin, end) for name in ("start", "ready", "end")]
    stay = pl.col("end") - pl.col("start")
    part = inside[2] - inside[0]
    slots = slots.with_columns(*inside, busy_steps=pl.col("busy_steps") * (part / stay).fill_nan(1.0))
    moves = frames.moves.filter(pl.col("start") >= begin, pl.col("start") <= end)
    samples = frames.samples.filter(pl.col("time") > begin, pl.col("time") <= end)
    found = Frames(
        requests.filter(pl.col("arrival") >= 0),
        since(slots, "start", "ready", "end"),
        since(moves, "start", "end"),
        since(samples, "time"),
    )
    return found, requests.filter(pl.col("ended") >= 0, pl.col("ended") <= end - begin)


def finished(requests: pl.DataFrame) -> pl.DataFrame:
    """Return the requests that ended up to a stop or their length."""
    return requests.filter(requests["reason"].is_in(["stop", "length"]))


def times_of(requests: pl.DataFrame) -> dict[str, pl.Series]:
    """Return the times that a summary describes: for each group, a value for each request that has one."""
    done, admitted = finished(requests), requests.drop_nulls("admitted")
    several = done.filter(done["output_tokens"] > 1)
    return {
        "ttft_seconds": done["first_token"] - done["arrival"],
        "latency_seconds": done["ended"] - done["arrival"],
        "inter_token_seconds": (several["ended"] - several["first_token"]) / (several["output_tokens"] - 1),
        "worst_gap_seconds": done["worst_gap"],
        "queue_seconds": admitted["admitted"] - admitted["arrival"],
    }


def spread(values: pl.Series) -> dict[str, float | None]:
    """Compute mean, percentiles (interpolated) and maximum of values that are not null."""
    values = values.drop_nulls()
    quantiles = {f"p{p}": values.quantile(p / 100, "linear") for p in (50, 90, 95, 99)}
    # fsum's result does not depend on the order of its terms, nor on how the column lies in memory.
    mean = math.fsum(values) / len(values) if len(values) else None
    return {"mean": mean, **quantiles, "max": values.max()}  # type: ignore[dict-item] # a column of floats


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _objectives(targets: Targets | None) -> dict[str, pl.Expr]:
    """Return whether a finished request kept each of its objectives."""
    if targets is None:
        return {"in_time": pl.col("ended") <= pl.col("deadline")}
    after_first = pl.col("ended") - pl.col("first_token")
    return {
        "ttft": pl.col("first_token") - pl.col("arrival") <= targets.ttft,
        "tpot": after_first <= targets.tpot * (pl.col("output_tokens") - 1) + 10.0**-DIGITS,
    }


def _in_time(requests: pl.DataFrame, targets: Targets | None) -> dict[str, Any]:
    """Count the requests that kept all of their objectives; those that were not served kept none."""
    asked = requests.drop_nulls("deadline") if targets is None else requests
    done, objectives = finished(asked), _objectives(targets)
    met = done.filter(*objectives.values()).height
    return {
        "requests_with_deadline": asked.height,
        "requests_in_time": met,
        "in_time_share": _ratio(met, asked.height),
    }


def _attainment(requests: pl.DataFrame, targets: Targets | None) -> dict[str, float | None]:
    """Return the share of the requests that kept each objective, where they are apart."""
    kept = {} if targets is None else _objectives(targets)
    done = finished(requests)
    return {
        f"{name}_share": _ratio(done.filter(kept[name]).height, requests.height) if kept else None
        for name in ("ttft", "tpot")
    }


def _hits(requests: pl.DataFrame) -> dict[str, Any]:
    """Count where requests' adapters were when the requests arrived."""
    found = requests["found"].drop_nulls()
    counts = {level: int((found == level).sum()) for level in ("slot", "cpu", "loading", "disk")}
    shares = {f"{level}_share": _ratio(count, len(found)) for level, count in counts.items()}
    return {"requests_with_adapter": len(found), **shares}


def _swaps(frames: Frames) -> dict[str, Any]:
    whole = frames.moves.filter(frames.moves["error"].is_null())
    copies, loads = (whole.filter(whole["stage"] == stage) for stage in ("slot", "disk"))
    wanted = frames.requests["found"].drop_nulls().len()
    return {
        **_moves(copies, "slot_copies", "slot_copy", wanted),
        **_moves(loads, "disk_loads", "disk_load", wanted),
        "disk_loads_ahead": _ahead(frames.requests, loads),
        "failed_moves": frames.moves.height - whole.height,
    }


def _moves(moves: pl.DataFrame, several: str, one: str, wanted: int) -> dict[str, Any]:
    return {
        several: moves.height,
        f"{several}_per_request": _ratio(moves.height, wanted),
        f"{one}_bytes": int(moves["nbytes"].sum()),
        f"{one}_seconds": spread(moves["end"] - moves["start"]),
    }


def _ahead(requests: pl.DataFrame, loads: pl.DataFrame) -> int:
    """Count the loads that began while no request waited for the adapter."""
    arrivals, leaves = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    columns = ("adapter", "arrival", "admitted", "ended")
    accepted = requests.filter(requests["reason"] != "refused").drop_nulls("adapter")
    for adapter, arrival, admitted, ended in accepted.select(columns).iter_rows():
        arrivals[adapter].append(arrival)
        leaves[adapter].append(ended if admitted is None else admitted)
    for times in (*arrivals.values(), *leaves.values()):
        times.sort()
    return sum(
        bisect_right(arrivals[adapter], start) == bisect_right(leaves[adapter], start)
        for adapter, start in loads.select("adapter", "start").iter_rows()
    )


def _slot_use(frames: Frames, slots: int | None, seconds: float, replicas: int) -> dict[str, Any]:
    spans, steps = frames.slots, int(frames.samples["steps"].sum())
    count = len(spans["slot"].unique()) if slots is None else slots
    ready = spans.drop_nulls("ready")
    stays = ready["end"] - ready["ready"]
    written = spans["ready"].fill_null(spans["end"]) - spans["start"]
    return {
        "slots": count,
        "ready_share": _ratio(math.fsum(stays), count * seconds),
        "writing_share": _ratio(math.fsum(written), count * seconds),
        "busy_share": _ratio(int(spans["busy_steps"].sum()) * replicas, count * steps),
        "stay_seconds": spread(stays),
    }


def _engine(samples: pl.DataFrame, replicas: int) -> dict[str, Any]:
    steps = int(samples["steps"].sum())
    in_steps = math.fsum(samples["step_seconds"])
    lengths = samples["time"] - samples["time"].shift(1, fill_value=0.0)
    last = float(samples["time"].max() or 0.0)  # type: ignore[arg-type] # a column of floats

    def over_time(column: str) -> float | None:
        return _ratio(math.fsum(samples[column] * lengths), last)

    return {
        "steps": steps,
        "mean_step_seconds": _ratio(in_steps, steps),
        "stepping_share": _ratio(in_steps, last * replicas),
        "prefill_tokens": int(samples["prefill_tokens"].sum()),
        "decode_tokens": int(samples["decode_tokens"].sum()),
        "tokens_per_step": _ratio(int((samples["prefill_tokens"] + samples["decode_tokens"]).sum()), steps),
        "adapters_per_step": _ratio(int(samples["adapters"].sum()), steps),
        "mean_running": over_time("running"),
        "mean_waiting": over_time("waiting"),
        "max_waiting": samples["waiting"].max(),
        "mean_kv_used_share": over_time("kv_used"),
    }


def _fairness(frames: Frames) -> dict[str, Any]:
    """Compute the fairness between adapters, and between tenants where requests have them; the samples count
    the tenants' service."""
    tenants = frames.requests["tenant"].drop_nulls().len() > 0
    clients: tuple[Client, ...] = ("adapter", "tenant") if tenants else ("adapter",)
    found: dict[str, Any] = {}
    for client in clients:
        table = by_client(frames.requests, client)
        speeds = table["tokens_per_second"].drop_nulls().drop_nans().to_list()
        latencies = table["latency_seconds"].drop_nulls().to_list()
        found[f"{client}s"] = {
            "count": table.height,
            "jain_tokens_per_second": jain(speeds),
            "jain_latency": jain(latencies),
            "max_min_tokens_per_second": max_min(speeds),
            "max_min_latency": max_min(latencies),
        }
    gap = service_gap(frames.requests, frames.samples)
    found["service_between"] = f"{clients[-1]}s"
    found["max_service_difference_tokens"] = gap.tokens
    found["max_service_difference_between"] = list(gap.clients or ())
    return found


def _starvation(requests: pl.DataFrame) -> dict[str, Any]:
    """Return accepted requests' waits for a first token, or for the end if there was none."""
    accepted = requests.filter(requests["reason"] != "refused")
    table = by_client(requests, "adapter").drop_nulls("worst_wait_seconds")
    table = table.sort("worst_wait_seconds", "client", descending=[True, False])
    worst = table.select("client", "worst_wait_seconds").head(MOST_STARVED)
    return {
        "worst_wait_seconds": table["worst_wait_seconds"].max(),
        "ended_without_token": accepted["first_token"].null_count(),
        "worst_wait_seconds_by_adapter": dict(worst.iter_rows()),
    }


def settings_of(folder: Path) -> Settings:
    """Return the settings of the run's experiment; without that file, the defaults."""
    path = folder / "experiment.json"
    found = read_json(path) if path.exists() else {}
    experiment = found.get("experiment", found)
    if not isinstance(experiment, Mapping):
        return Settings()
    replicas = int(experiment.get("replicas") or 1)
    if isinstance(autoscale := experiment.get("autoscale"), str):
        replicas = load_autoscaler(autoscale).most
    slots, slo = experiment.get("slots"), (experiment.get("workload") or {}).get("slo")
    return Settings(
        slots * replicas if isinstance(slots, int) else None,
        replicas,
        experiment.get("warmup"),
        None if slo is None else parse_targets("slo", slo),
    )


def rounded(value: Any) -> Any:
    """Round all numbers in a summary to :data:`DIGITS`."""
    if isinstance(value, float):
        return round(value, DIGITS) + 0.0  # no "-0.0"
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return value


def flatten(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | int | None]:
    """Return the numbers of a summary by dotted names, such as "ttft_seconds.p99"; counts by reason or by
    adapter, whose names differ from run to run, are left out."""
    found: dict[str, float | int | None] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            if not key.endswith(("_by_reason", "_by_adapter")):
                found |= flatten(value, f"{prefix}{key}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[prefix + key] = value
    return found
