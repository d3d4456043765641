"""The order of vLLM's V1 scheduler, for comparison."""

from __future__ import annotations

from aioengine.schedulers.policies.fcfs import Arrival


class VLLMOrder(Arrival):
    """Arrival order as in vLLM V1: never hold a busy slot back for a cold adapter, however long it waits.

    vLLM walks its waiting queue in arrival order. A request whose adapter is among those scheduled in
    this step (running, or admitted earlier in the walk) is admitted; one that would need a further
    adapter is skipped when ``max_loras`` distinct ones are scheduled, and keeps its place. So an idle
    slot is taken at once by the first request that needs one, although later requests wait for the
    adapter in it (``take_after = 0``), and a busy slot goes on admitting (``close_after = inf``).

    What differs here: vLLM loads an adapter inside the step that admits its request, and all others wait
    for that. Here reading and copying take time beside the steps, and nothing is held back meanwhile:
    the slot of an adapter that is idle while another is read may be busy again when that is done.
    Nothing is read ahead (``default_prefetch = "none"``), and what is on the CPU stays as the engine's
    cache decides.
    """

    source = "vLLM V1, vllm/v1/core/sched/scheduler.py (the loop over waiting requests, max_loras)"
    starvation_bound = "none"
    by_events = True
    take_after = 0.0
    close_after = float("inf")
    default_prefetch = "none"
