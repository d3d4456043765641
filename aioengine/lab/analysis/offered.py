"""Description of a workload before it is run: rates, lengths, popularity, and shared beginnings of
prompts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

from aioengine.lab.workload.requests import PREFIX_BLOCK, Workload

MOST = 200_000
"""Maximum number of requests that are read."""
PEAK_SECONDS = 10.0


class OfferedRequests(NamedTuple):
    """The requests of a workload, by column. Those of a session have the time at which the session begins."""

    times: list[float]
    prompts: list[int]
    outputs: list[int]
    adapters: list[str | None]
    tenants: list[str | None]
    known_tokens: int
    """Prompt tokens in leading blocks that an earlier prompt has, too."""
    sessions: int
    """Number of sessions; a request without a session counts as one."""
    adapters_of: int
    """Adapters that may be asked for."""
    concurrency: int | None


def read_offered(workload: Workload, most: int = MOST) -> OfferedRequests:
    """Read a workload's requests, at most ``most`` of them."""
    found = OfferedRequests([], [], [], [], [], 0, 0, len(workload.adapters), workload.concurrency)
    seen: set[tuple[str | None, int]] = set()
    known = sessions = 0
    for arrival in islice(workload, most):
        found.times.append(arrival.time)
        found.prompts.append(arrival.prompt_tokens)
        found.outputs.append(arrival.output_tokens)
        found.adapters.append(arrival.adapter)
        found.tenants.append(arrival.tenant)
        sessions += arrival.first
        for block in arrival.prefix:
            if (arrival.adapter, block) in seen:
                known += PREFIX_BLOCK
            seen.add((arrival.adapter, block))
    return found._replace(known_tokens=min(known, sum(found.prompts)), sessions=sessions)


def describe_offered(offered: OfferedRequests) -> dict[str, Any]:
    """Return the figures of a workload, by name; units are in the names."""
    count = len(offered.times)
    seconds = offered.times[-1] if count else 0.0
    gaps = [b - a for a, b in zip(offered.times, offered.times[1:], strict=False)]
    asked = Counter(name for name in offered.adapters if name is not None)
    tenants = Counter(name for name in offered.tenants if name is not None)
    top = asked.most_common()
    return {
        "requests": count,
        "concurrency": offered.concurrency,
        "seconds": seconds,
        "requests_per_second": count / seconds if seconds else None,
        "peak_requests_per_second": _peak(offered.times),
        "gap_variation": _variation(gaps),
        "prompt_tokens": _spread(offered.prompts),
        "output_tokens": _spread(offered.outputs),
        "adapters": offered.adapters_of,
        "adapters_asked_for": len(asked),
        "base_model_share": offered.adapters.count(None) / count if count else None,
        "favourite_share": top[0][1] / count if top else None,
        "adapters_for_half": _for_half([number for _, number in top]),
        "tenants": len(tenants),
        "favourite_tenant_share": tenants.most_common(1)[0][1] / count if tenants else None,
        "requests_per_session": count / offered.sessions if offered.sessions else None,
        "cacheable_prompt_share": offered.known_tokens / sum(offered.prompts) if offered.prompts else None,
    }


def _peak(times: Sequence[float]) -> float | None:
    """Return the highest rate of all intervals of :data:`PEAK_SECONDS` from 0 on."""
    if not times or times[-1] <= PEAK_SECONDS:
        return None
    return max(Counter(int(time / PEAK_SECONDS) for time in times).values()) / PEAK_SECONDS


def _variation(gaps: Sequence[float]) -> float | None:
    """Return the standard deviation divided by the mean; 1 for a Poisson process."""
    mean = statistics.fmean(gaps) if len(gaps) > 1 else 0.0
    return statistics.stdev(gaps) / mean if mean else None


def _spread(values: Sequence[int]) -> dict[str, float | None]:
    ordered, last = sorted(values), len(values) - 1
    if not ordered:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    ranks = {f"p{p}": float(ordered[round(last * p / 100)]) for p in (50, 90, 99)}
    return {"mean": statistics.fmean(ordered), **ranks, "max": float(ordered[-1])}


def _for_half(counts: Sequence[int]) -> int | None:
    """Return how many of the most popular adapters get half of the requests for adapters."""
    totals = enumerate(accumulate(counts), 1)
    return next((index for index, total in totals if total * 2 >= sum(counts)), None)
