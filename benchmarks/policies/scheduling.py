"""Cost of a scheduling decision: view, policy and the core's validation, without a model.

    python -m benchmarks.policies.scheduling               # all policies, 100 .. 100,000 waiting
    python -m benchmarks.policies.scheduling --policies fcfs vtc --waiting 10000
    python -m benchmarks.policies.scheduling --policies vtc drr --waiting 10000 --slots 256 --tenants 1000
    python -m benchmarks.policies.scheduling --waiting 10000 --slots 256 --by-bytes

A core with 1,000 registered adapters, 8 slots, 20 tenants and 256 running requests, all in steady decode.
Every step a few requests end, as many are admitted, and as many arrive, so that the queue keeps its length.
Prints medians over the steps, in microseconds of processor time: ``policy`` is the policy's call, ``decide``
adds the view and the core's validation of the decision, and ``schedule`` adds the forming of the batch, which
grows with the number of running requests but not of waiting ones. ``finish`` processes a step's tokens. With
``--by-bytes`` the slots share a memory, which has room for half as many adapters as there are slots: ranks
are 8, 16 and 64, for 70%, 20% and 10% of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import track

from aioengine.core import CopyMove, Core, CoreLimits, LoadMove
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView, available_policies, load_policy
from aioengine.step import Sampled, StepResult
from benchmarks.shared.report import arguments, new_table

RUNNING, ADAPTERS = 256, 1000
RANK_BYTES = 600_000
RANKS, WEIGHTS = (8, 16, 64), (0.7, 0.2, 0.1)


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


class TimedCore(Core):
    """A core that measures the forming of the batch apart from the rest."""

    batch_seconds = 0.0

    def _form_batch(self, admit):  # type: ignore[no-untyped-def]
        start = time.thread_time()
        batch = super()._form_batch(admit)
        self.batch_seconds = time.thread_time() - start
        return batch


def measure(
    make: Callable[[], SchedulerPolicy],
    waiting: int,
    steps: int,
    slots: int = 8,
    tenants: int = 20,
    by_bytes: bool = False,
) -> tuple[float, float, float, float]:
    """Return medians in seconds of (policy, policy + view + validation, all of ``schedule``,
    ``step_finished``)."""
    limits = CoreLimits(
        num_slots=slots,
        cpu_capacity=slots + 56,
        max_loads=4,
        num_blocks=RUNNING * 40,
        block_size=16,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=2048,
        max_model_len=512,
        slot_memory=int(slots / 2 * RANK_BYTES * statistics.fmean(RANKS, WEIGHTS)) if by_bytes else None,
    )
    policy = Timed(make())
    core = TimedCore(limits, policy)
    rng = random.Random(0)
    entries = [core.residency.declare(f"adapter-{i}", "/nowhere") for i in range(ADAPTERS)]
    for entry in entries:
        core.residency.publish(entry, 0.0)
    now, count = 0.0, 0
    ranks = {entry.uid: rng.choices(RANKS, WEIGHTS)[0] if by_bytes else 16 for entry in entries}

    def arrive() -> None:
        nonlocal count
        count += 1
        # Half of the requests are for a few popular adapters, the others for any.
        popular = rng.random() < 0.5
        entry = entries[rng.randrange(slots if popular else ADAPTERS)]
        params = SamplingParams(max_tokens=rng.randint(64, 256))
        core.add_request(
            f"r{count}",
            [7] * rng.randint(8, 32),
            params,
            RequestOptions(tenant=f"t{count % tenants}"),
            now,
            adapter=entry,
        )

    results: list[tuple[float, float, float, float]] = []
    for step in range(steps + 40):
        while len(core.queues) < waiting:
            arrive()
        now += 0.02
        start = time.thread_time()
        batch, moves = core.schedule(now)
        total = time.thread_time() - start
        for move in moves:
            if isinstance(move, LoadMove):
                rank, name = ranks[move.entry.uid], move.entry.name
                core.adapter_loaded(
                    move.entry, now, rank=rank, nbytes=rank * RANK_BYTES, digest=name, seconds=0.01
                )
            elif isinstance(move, CopyMove):
                core.adapter_placed(move.entry, now, 0.005)
        if batch is not None:
            sampled = [Sampled(5) if work.sample else None for work in batch.sequences]
            start = time.thread_time()
            core.step_finished(batch, StepResult(sampled, 0.02), now)
            finish = time.thread_time() - start
            if step >= 40:
                results.append((policy.seconds, total - core.batch_seconds, total, finish))
        core.outbox.clear()
    policy_alone, decide, schedule, finish = map(statistics.median, zip(*results, strict=True))
    return policy_alone, decide, schedule, finish


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policies", nargs="*", help="default: all that need no known future")
    parser.add_argument("--waiting", nargs="*", type=int, default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--by-bytes", action="store_true", help="the slots share a memory")
    args = parser.parse_args()
    names = args.policies or [n for n in available_policies() if n not in ("oracle", "belady")]

    title = f"{ADAPTERS} adapters, {args.slots} slots, {RUNNING} running, {args.tenants} tenants: in us"
    table = new_table(title, "policy", "waiting", "policy alone", "decide", "schedule", "finish")
    console = Console(stderr=True)
    cases = [(name, waiting) for name in names for waiting in args.waiting]
    for name, waiting in track(cases, console=console, disable=not console.is_terminal):
        steps = args.steps if waiting <= 10_000 else max(args.steps // 4, 20)
        make: Callable[[], SchedulerPolicy] = lambda name=name: load_policy(name)  # type: ignore[misc] # noqa: E731
        medians = measure(make, waiting, steps, args.slots, args.tenants, args.by_bytes)
        table.add_row(name, f"{waiting:,}", *(f"{seconds * 1e6:,.0f}" for seconds in medians))
    Console().print(table)


if __name__ == "__main__":
    main()
