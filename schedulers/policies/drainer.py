"""The draining of adapters in SGLang, for comparison."""

from __future__ import annotations

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.policies.fcfs import Arrival


class Drainer(Arrival):
    """Arrival order as in SGLang with ``--enable-lora`` and its drainer. An idle slot is taken at once. When
    every slot is busy and an adapter's oldest request has waited for ``patience`` seconds, the slot with the
    fewest tokens left to generate is drained for it.

    A draining slot admits requests that generate at most ``tolerance`` times the remaining tokens of its
    longest running request. Such requests can keep it busy, so the wait has no bound. Adapters may be drained
    as soon as they have come in. What differs here: reading and copying take time beside the steps, and the
    core's CPU cache is the engine's.

    Args:
        patience: Seconds after which an adapter counts as starving.
        tolerance: Factor on the remaining tokens.
    """

    source = "SGLang, python/sglang/srt/lora/lora_drainer.py (3 s, tolerance 1.2)"
    starvation_bound = "none: requests within the tolerance keep a draining slot busy"
    by_events = by_oldest = True
    take_after = 0.0
    stay = 0.0

    def __init__(self, patience: float = 3.0, tolerance: float = 1.2) -> None:
        at_least(0, "seconds", patience=patience)
        at_least(0, tolerance=tolerance)
        self.close_after = patience
        self.fill_within = tolerance
