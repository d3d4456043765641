"""The figures of a summary that reports show and comparisons rank by, and numbers and names as people read
them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError


class Scale(NamedTuple):
    """A way to write numbers: their unit and decimals, which a mean and its interval share."""

    factor: float
    decimals: int
    unit: str

    def text(self, value: float) -> str:
        return f"{value * self.factor:,.{self.decimals}f}{self.unit}"


def digits_scale(value: float, digits: int, factor: float = 1, unit: str = "") -> Scale:
    """Return the scale that writes this many digits, or all digits before the decimal point."""
    exponent = int(f"{value * factor:.{digits - 1}e}".partition("e")[2])
    return Scale(factor, max(digits - 1 - exponent, 0) if value else 0, unit)


def seconds_scale(seconds: float) -> Scale:
    return digits_scale(seconds, 2, 1000, " ms") if seconds < 0.0995 else digits_scale(seconds, 2, 1, " s")


def share_scale(share: float) -> Scale:
    return Scale(100, int(0 < share < 0.0995 or 0.9905 <= share < 0.9995), "%")


def seconds_text(seconds: float | None) -> str:
    """ "12 ms", "0.34 s", "5.1 s", "98 s"; "-" for None."""
    return "–" if seconds is None else seconds_scale(seconds).text(seconds)


def share_text(share: float | None) -> str:
    """Return a share in percent: "84%", "0.4%"; "-" for None."""
    return "–" if share is None else share_scale(share).text(share)


def change_text(change: float) -> str:
    """Format a relative change: "+84%", "−0.4%", "±0%"."""
    text = share_text(abs(change))
    return "±0%" if text in ("0%", "0.0%") else f"{'+' if change > 0 else '−'}{text}"


def shorten(name: str, width: int = 18) -> str:
    """Shorten a name in its middle, because names often differ only at the end, as "adapter-012" does from
    others."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= width:
        return name
    return f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"


def policy_label(policy: str) -> str:
    """Shorten a policy's name so that it fits; a path loses its folders."""
    return shorten(policy.rpartition("/")[2], 26)


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
    Measure("inter_token_seconds.mean", "time per output token, mean", "seconds", "lower"),
    Measure("queue_seconds.mean", "in the queue, mean", "seconds", "lower"),
    Measure("slo.in_time_share", "SLO attainment", "share", "higher"),
    Measure("attainment.ttft_share", "SLO attainment, TTFT", "share", "higher"),
    Measure("attainment.tpot_share", "SLO attainment, TPOT", "share", "higher"),
    Measure("goodput_requests_per_second", "goodput, requests a second", "number", "higher"),
    Measure("hits.slot_share", "slot hit rate", "share", "higher"),
    Measure("hits.disk_share", "on disk at arrival", "share", "lower"),
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
