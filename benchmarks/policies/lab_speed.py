"""How fast the policy lab is, and which part of it takes how much of the processor time.

    python -m benchmarks.policies.lab_speed AzureLLMInferenceTrace_code.csv

Runs a part of the two workloads of docs/lab.md ("How fast it is") several times, with the garbage collector
set as ``aioengine lab run`` sets it, and prints the median and the fastest of these runs, since single ones
differ by a quarter. One more run gives shares of samples, which are taken every 2 ms of processor time: a
sample counts for the innermost function that belongs to one of the parts below.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from types import FrameType

from aioengine.cli.lab.run import fewer_collections
from aioengine.lab import Experiment, WorkloadSpec, run
from benchmarks.shared.report import arguments, console, new_table

SECONDS = 0.002
PARTS = {
    "the policy": ("schedulers/",),
    "batches: forming, taking in": (
        "core/batcher.py",
        "core/decodes/",
        "core/step_results.py",
        "core/blocks.py",
        "aioengine/step.py",
    ),
    "the rest of the core": ("aioengine/core/",),
    "accepting requests": ("runtime/submit.py", "runtime/sources/", "aioengine/request.py", "lab/workload/"),
    "the step loop, events": ("aioengine/runtime/", "aioengine/engine.py"),
    "simulated device": ("lab/simulation/", "lab/costs/"),
    "recording, figures": ("lab/runs/", "lab/analysis/", "polars/"),
    "asyncio": ("asyncio/",),
}


def workloads(trace: str, requests: int) -> dict[str, Experiment]:
    conversations = WorkloadSpec(
        arrivals="gamma:rate=5.5,cv=1.5",
        limit=requests,
        prompt_tokens="lognormal:median=1020,sigma=0.7",
        max_prompt=4096,
        output_tokens="lognormal:median=129,sigma=1.0",
        max_output=1000,
        adapters=200,
        popularity="zipf:1.0",
    )
    code = WorkloadSpec(
        trace=trace,
        repeat=True,
        limit=requests,
        scale=3.5,
        output_tokens="lognormal:median=128,sigma=0.56",
        adapters=200,
        popularity="zipf:1.0",
    )
    return {
        "conversations": Experiment(workload=conversations, slots=8, cpu_loras=64),
        "code": Experiment(workload=code, slots=32, cpu_loras=128),
    }


@contextmanager
def sampling(found: Counter[str]) -> Iterator[None]:
    """Count samples by part while the context lasts."""

    def sample(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            file = frame.f_code.co_filename
            part = next((name for name, paths in PARTS.items() if any(path in file for path in paths)), None)
            if part is not None:
                found[part] += 1
                return
            frame = frame.f_back
        found["other"] += 1

    before = signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    speeds = "steps a second, median", "steps a second, fastest"
    rows: dict[str, list[str]] = {name: [] for name in (*speeds, *PARTS, "other")}
    found = workloads(args.trace, args.requests)
    for name, experiment in found.items():
        samples: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder, fewer_collections():
            run(workloads(args.trace, 10)[name], folder)  # imports
            times = []
            for _ in range(args.runs):
                began = time.process_time()
                summary = run(experiment, folder).summary
                times.append(time.process_time() - began)
            with sampling(samples):
                run(experiment, folder)
        for speed, took in zip(speeds, (median(times), min(times)), strict=True):
            rows[speed].append(f"{summary['engine']['steps'] / took:,.0f}")
        for part in (*PARTS, "other"):
            rows[part].append(f"{samples[part] / max(samples.total(), 1):.0%}")
    title = f"{args.requests:,} requests of each workload, {args.runs} runs"
    table = new_table(title, "", *found)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console().print(table)


if __name__ == "__main__":
    main()
