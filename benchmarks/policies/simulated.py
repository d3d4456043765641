"""Kinds of slots beside each other in the lab, and how fast the lab is."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from functools import partial

from aioengine.cli.lab.run import COLLECT_AFTER
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.costs.presets import load_costs
from benchmarks.report import Table
from benchmarks.runner import Calls
from benchmarks.shared.simulated import compared, merged


def slot_memory(
    *, trace: str, policies: tuple[str, ...] = ("fcfs", "chameleon"), slots: tuple[int, ...] = (8,),
    most: int = 200, ranks: str = "8:0.7,16:0.2,64:0.1", scale: float = 0.5, limit: int = 1500,
    seeds: int = 5, preset: str = "llama3-8b-h100", jobs: int = 0,
) -> Iterator[Table]:  # fmt: skip
    """Slots of one size and slots by bytes in the same memory: adapters of mixed ranks on a trace."""
    workload = {
        "trace": trace, "limit": limit, "scale": scale, "adapters": most, "popularity": "zipf:1.0",
        "ranks": ranks,
    }  # fmt: skip
    costs = load_costs(preset)
    common = {
        "workload": workload, "preset": preset, "cpu_loras": most, "max_lora_rank": 64,
        "max_cpu_lora_bytes": most * costs.adapter_nbytes(64), "kv_cache_memory": "16GiB",
    }  # fmt: skip
    figures = {
        "copies a request": "swaps.slot_copies_per_request",
        "mean TTFT, s": "ttft_seconds.mean",
        "p99": "ttft_seconds.p99",
    }
    for policy in policies:
        for count in slots:
            plan = costs.plan(merged(common, {"slots": count}, 0).engine_config())
            memory = plan.bytes_of("slot pool")
            systems = {
                "of one size": {"policy": policy, "slots": count},
                "by bytes": {"policy": policy, "slots": most, "slot_memory": memory},
            }
            title = f"{policy}, {count} slots, {memory / 2**30:.2f} GiB"
            yield compared(title, systems, figures, common=common, seeds=seeds, jobs=jobs)


def lab_speed(*, trace: str, requests: int = 1500, rounds: int = 5) -> Iterator[Calls]:
    """Steps a second of the lab, on the two workloads of docs/lab.md."""
    conversations = WorkloadSpec(
        arrivals="gamma:rate=5.5,cv=1.5", limit=requests, prompt_tokens="lognormal:median=1020,sigma=0.7",
        max_prompt=4096, output_tokens="lognormal:median=129,sigma=1.0", max_output=1000, adapters=200,
        popularity="zipf:1.0",
    )  # fmt: skip
    code = WorkloadSpec(
        trace=trace, limit=requests, scale=3.5, output_tokens="lognormal:median=128,sigma=0.56",
        adapters=200, popularity="zipf:1.0",
    )  # fmt: skip
    experiments = {
        "conversations": Experiment(workload=conversations, slots=8, cpu_loras=64),
        "code": Experiment(workload=code, slots=32, cpu_loras=128),
    }

    def simulate(experiment: Experiment) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return float(run(experiment, folder).summary["engine"]["steps"])

    gc.set_threshold(COLLECT_AFTER)
    calls = {name: partial(simulate, experiment) for name, experiment in experiments.items()}
    yield Calls(f"{requests:,} requests of each workload", calls, rounds, "steps", "s")


CASES = (slot_memory, lab_speed)
