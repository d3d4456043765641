"""The orders of other engines, for comparison: vLLM and SGLang."""

from __future__ import annotations

from aioengine.schedulers.checks import at_least
from aioengine.schedulers.parts.base import Arrival


class VLLMOrder(Arrival):
    """Arrival order as in vLLM V1: a busy slot is never closed for a cold adapter, however long that waits.

    vLLM walks its waiting queue in arrival order. A request whose adapter is among those scheduled in
    this step (running, or admitted earlier in the walk) is admitted; one that would need a further
    adapter is skipped when ``max_loras`` distinct ones are scheduled, and keeps its place. So an idle
    slot is taken at once by the first request that needs one, although later requests wait for the
    adapter in it (``take_after = 0``), and a busy slot goes on admitting (``close_after = inf``).

    What differs here: vLLM loads an adapter inside the step that admits its request, and all others wait
    for that. Here reads and copies take time beside the steps, and no slot is reserved meanwhile: a slot that
    is idle while another adapter is read may be busy again after the read. No adapter is read ahead
    (``default_prefetch = "none"``), and the engine's cache decides which adapters stay on the CPU.
    """

    source = "vLLM V1, vllm/v1/core/sched/scheduler.py (the loop over waiting requests, max_loras)"
    starvation_bound = "none"
    take_after = 0.0
    close_after = float("inf")
    default_prefetch = "none"


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
    take_after = 0.0
    stay = 0.0

    def __init__(self, patience: float = 3.0, tolerance: float = 1.2) -> None:
        at_least(0, "seconds", patience=patience)
        at_least(0, tolerance=tolerance)
        self.close_after = patience
        self.fill_within = tolerance
