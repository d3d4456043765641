"""The order of vLLM's V1 scheduler, for comparison."""

from __future__ import annotations

from aioengine.schedulers.policies.fcfs import Arrival


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
    by_events = by_oldest = True
    take_after = 0.0
    close_after = float("inf")
    default_prefetch = "none"
