"""The figures of a summary that reports show and comparisons rank by, and which way is better."""

from __future__ import annotations

from typing import Literal, NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.lab.analysis.numbers import Scale, digits_scale, seconds_scale, share_scale


class Measure(NamedTuple):
    name: str
    """Name in a summary, as :func:`~aioengine.lab.analysis.summary.flatten` gives it."""
    label: str
    unit: Literal["seconds", "share", "number", "index"]
    better: Literal["lower", "higher"]

    def text(self, value: float | None) -> str:
        """Format a value for people: "0.34 s", "84%", "1,204"."""
        return "–" if value is None else self.scale(value).text(value)

    def interval_text(self, mean: float, half: float) -> str:
        """Format half of an interval in the mean's unit: "± 0.02 s"; of a share in percentage points."""
        scale = self.scale(mean)
        return f"± {(scale._replace(unit=' pp') if self.unit == 'share' else scale).text(half)}"

    def scale(self, value: float) -> Scale:
        if self.unit == "seconds":
            return seconds_scale(value)
        if self.unit == "share":
            return share_scale(value)
        if self.unit == "index":
            return Scale(1, 3, "")
        return Scale(1, 0, "") if value == round(value) else digits_scale(value, 3)


MEASURES = (
    Measure("requests_finished", "requests finished", "number", "higher"),
    Measure("output_tokens_per_second", "output tokens a second", "number", "higher"),
    Measure("ttft_seconds.mean", "time to first token, mean", "seconds", "lower"),
    Measure("ttft_seconds.p50", "time to first token, p50", "seconds", "lower"),
    Measure("ttft_seconds.p99", "time to first token, p99", "seconds", "lower"),
    Measure("latency_seconds.mean", "whole answer, mean", "seconds", "lower"),
    Measure("latency_seconds.p99", "whole answer, p99", "seconds", "lower"),
    Measure("inter_token_seconds.mean", "between tokens, mean", "seconds", "lower"),
    Measure("queue_seconds.mean", "in the queue, mean", "seconds", "lower"),
    Measure("slo.in_time_share", "deadlines met", "share", "higher"),
    Measure("hits.slot_share", "adapter was in a slot", "share", "higher"),
    Measure("hits.disk_share", "adapter was on disk", "share", "lower"),
    Measure("swaps.slot_copies_per_request", "copies into slots, per request", "number", "lower"),
    Measure("swaps.disk_loads_per_request", "loads from disk, per request", "number", "lower"),
    Measure("slots.busy_share", "share of slots in use, over steps", "share", "higher"),
    Measure("fairness.adapters.jain_latency", "Jain's index, latency of adapters", "index", "higher"),
    Measure(
        "fairness.max_service_difference_tokens", "largest service difference, tokens", "number", "lower"
    ),
    Measure("starvation.worst_wait_seconds", "longest wait for a first token", "seconds", "lower"),
    Measure("preemptions", "preemptions", "number", "lower"),
)

DEFAULT_RANKING = "ttft_seconds.p99"


def find_measure(name: str) -> Measure:
    """Return the measure with this name. Raises ConfigError, which suggests the nearest name."""
    by_name = {measure.name: measure for measure in MEASURES}
    if name in by_name:
        return by_name[name]
    hint = nearest(name, by_name)
    raise ConfigError(f"rank_by={name!r}: there is no such figure{hint}; there are {', '.join(by_name)}")
