"""Cost of a scheduling decision, without a model."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from statistics import fmean

from aioengine.core import CoreLimits
from aioengine.schedulers import available_policies, load_policy
from aioengine.testing import Sim
from benchmarks.report import median
from benchmarks.runner import Calls
from benchmarks.shared.stopwatch import Stopwatch

RUNNING, ADAPTERS, WARM_UP = 256, 1000, 40
RANK_BYTES = 600_000
RANKS, WEIGHTS = (8, 16, 64), (0.7, 0.2, 0.1)
POLICIES = tuple(name for name in available_policies() if name != "oracle")
"""All that need no known future."""


def scheduling(
    *, policies: tuple[str, ...] = POLICIES, waiting: tuple[int, ...] = (100, 10_000), steps: int = 200,
    slots: int = 8, tenants: int = 20, by_bytes: bool = False,
) -> Iterator[Calls]:  # fmt: skip
    """Microseconds of processor time of a step's scheduling: the policy, all of schedule, and the results.

    A core with 1,000 registered adapters and 256 running requests. Every step a few end, as many are
    admitted, and as many arrive. "schedule" is the view, the policy, the checks of its decision, and the
    forming of the batch. With ``--by-bytes`` the slots share a memory for half as many adapters of ranks 8,
    16 and 64.
    """
    for count in waiting:
        calls = {name: partial(measure, name, count, steps, slots, tenants, by_bytes) for name in policies}
        title = (
            f"{count:,} waiting, {RUNNING} running, {ADAPTERS:,} adapters, {slots} slots, {tenants} tenants"
        )
        yield Calls(title, calls, rounds=1, warm_up=0)


def measure(
    name: str, waiting: int, steps: int, slots: int, tenants: int, by_bytes: bool
) -> dict[str, float]:
    """Return medians over the steps, in microseconds."""
    memory = int(slots / 2 * RANK_BYTES * fmean(RANKS, WEIGHTS))
    limits = CoreLimits(
        num_slots=slots, cpu_capacity=slots + 56, max_loads=4, num_blocks=RUNNING * 40, block_size=16,
        max_num_seqs=RUNNING, max_num_batched_tokens=2048, max_model_len=512,
        slot_memory=memory if by_bytes else None, slot_bytes=16 * RANK_BYTES,
    )  # fmt: skip
    policy = load_policy(name)
    decides = Stopwatch(policy, "schedule", time.thread_time)  # before the core keeps the method
    sim = Sim(limits, policy, lambda history: 5)
    rng = random.Random(0)
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    for adapter in names:
        sim.register(adapter)
        rank = rng.choices(RANKS, WEIGHTS)[0] if by_bytes else 16
        sim.ranks[adapter], sim.sizes[adapter] = rank, rank * RANK_BYTES
    watches = {
        "schedule, us": Stopwatch(sim.core, "schedule", time.thread_time),
        "policy, us": decides,
        "finish, us": Stopwatch(sim.core, "step_finished", time.thread_time),
    }
    found: dict[str, list[float]] = {what: [] for what in watches}
    for step in range(steps + WARM_UP):
        while len(sim.core.queues) < waiting:
            # Half of the requests are for a few popular adapters, the others for any.
            adapter = names[rng.randrange(slots if rng.random() < 0.5 else ADAPTERS)]
            prompt, tenant = [7] * rng.randint(8, 32), f"t{rng.randrange(tenants)}"
            sim.add(adapter, prompt=prompt, max_tokens=rng.randint(64, 256), tenant=tenant)
        for watch in watches.values():
            watch.seconds = 0.0
        sim.settle(step_seconds=0.02, check=False)
        sim.events.clear()
        if step >= WARM_UP:
            for what, watch in watches.items():
                found[what].append(1e6 * watch.seconds)
    return {what: median(values) for what, values in found.items()}


CASES = (scheduling,)
