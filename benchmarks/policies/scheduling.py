"""Cost of a scheduling decision, without a model."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from statistics import fmean

from aioengine.core import CopyMove, Core, CoreLimits, LoadMove
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView, available_policies, load_policy
from aioengine.step import LoadedAdapter, StepResult
from benchmarks.report import median
from benchmarks.runner import Calls

RUNNING, ADAPTERS, WARM_UP = 256, 1000, 40
RANK_BYTES = 600_000
RANKS, WEIGHTS = (8, 16, 64), (0.7, 0.2, 0.1)
POLICIES = tuple(name for name in available_policies() if name not in ("oracle", "belady"))
"""All that need no known future."""


class Timed(SchedulerPolicy):
    """Policy that measures another one, to which it passes everything on."""

    def __init__(self, inner: SchedulerPolicy) -> None:
        self.inner = inner
        self.seconds = 0.0

    def schedule(self, view: SchedulerView) -> Decision:
        start = time.thread_time()
        decision = self.inner.schedule(view)
        self.seconds = time.thread_time() - start
        return decision

    def on_event(self, event: object) -> None:
        self.inner.on_event(event)  # type: ignore[arg-type]


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
    limits = CoreLimits(
        num_slots=slots,
        cpu_capacity=slots + 56,
        max_loads=4,
        num_blocks=RUNNING * 40,
        block_size=16,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=2048,
        max_model_len=512,
        slot_memory=int(slots / 2 * RANK_BYTES * fmean(RANKS, WEIGHTS)) if by_bytes else None,
    )
    policy = Timed(load_policy(name))
    core = Core(limits, policy)
    rng = random.Random(0)
    entries = [core.residency.declare(f"adapter-{i}", "/nowhere") for i in range(ADAPTERS)]
    for entry in entries:
        core.residency.publish(entry, 0.0)
    ranks = {entry.uid: rng.choices(RANKS, WEIGHTS)[0] if by_bytes else 16 for entry in entries}
    now, count = 0.0, 0

    def arrive() -> None:
        nonlocal count
        count += 1
        # Half of the requests are for a few popular adapters, the others for any.
        entry = entries[rng.randrange(slots if rng.random() < 0.5 else ADAPTERS)]
        prompt, params = [7] * rng.randint(8, 32), SamplingParams(max_tokens=rng.randint(64, 256))
        options = RequestOptions(tenant=f"t{count % tenants}")
        core.add_request(f"r{count}", prompt, params, options, now, adapter=entry)

    found: dict[str, list[float]] = {"schedule, us": [], "policy, us": [], "finish, us": []}
    for step in range(steps + WARM_UP):
        while len(core.queues) < waiting:
            arrive()
        now += 0.02
        began = time.thread_time()
        batch, moves = core.schedule(now)
        scheduled = time.thread_time()
        for move in moves:
            if isinstance(move, LoadMove):
                rank, name = ranks[move.entry.uid], move.entry.name
                core.adapter_loaded(move.entry, now, LoadedAdapter(rank, rank * RANK_BYTES, name, 0.01))
            elif isinstance(move, CopyMove):
                core.adapter_placed(move.entry, now, 0.005)
        if batch is not None:
            counts = [int(work.sample) for work in batch.sequences]
            result = StepResult([5] * sum(counts), counts, (0.02,))
            finishing = time.thread_time()
            core.step_finished(batch, result, now)
            seconds = scheduled - began, policy.seconds, time.thread_time() - finishing
            if step >= WARM_UP:
                for values, value in zip(found.values(), seconds, strict=True):
                    values.append(1e6 * value)
        core.outbox.clear()
    return {what: median(values) for what, values in found.items()}


CASES = (scheduling,)
