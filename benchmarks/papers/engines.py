"""Claims of papers about one engine, run again in simulation. Setups and results: docs/lab-papers.md."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from aioengine.lab.costs.model import CostModel, Stage, spec_of_sizes
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.costs.roofline import DEVICES, estimate
from benchmarks.report import Table
from benchmarks.shared.simulated import compared, presets

STALLS = 1e6
"""Slowdown of a step while an adapter is copied: the step does not advance."""
LLAMA_7B = {
    "family": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_layers": 32, "num_heads": 32,
    "num_kv_heads": 32, "head_dim": 128, "intermediate_size": 11008, "max_position": 4096,
    "tie_embeddings": False, "dtype": "float16",
}  # fmt: skip


def slora(
    *, counts: tuple[int, ...] = (5, 20, 100, 200, 1000, 2000), requests: int = 600, jobs: int = 0
) -> Iterator[Table]:
    """S-LoRA, arXiv 2311.03285: throughput hardly falls from 5 to 1,000 adapters and more.

    Arrivals and lengths are its synthetic ones, at a rate above what the engine can do.
    """
    workload = {
        "arrivals": "gamma:rate=8,cv=1", "limit": requests, "popularity": "power:1.0", "ranks": 8,
        "prompt_tokens": "uniform:8..512", "output_tokens": "uniform:8..512",
    }  # fmt: skip
    common = {"workload": workload, "preset": "llama3-8b-a10g", "max_lora_rank": 8, "max_num_seqs": 32}
    for name, policy, slots, memory_for_all in (
        ("slora, 32 slots, memory for all", "slora", 32, True),
        ("on demand, 32 slots", "vllm+lru", 32, False),
        ("on demand, 8 slots", "vllm+lru", 8, False),
    ):
        systems = {
            f"{count:,} adapters": {
                "workload": {"adapters": count}, "policy": policy, "slots": slots,
                "cpu_loras": max(count, slots) if memory_for_all else slots,
            }
            for count in counts
        }  # fmt: skip
        figures = {"requests/s": "requests_per_second"}
        yield compared(f"S-LoRA: {name}", systems, figures, common=common, seeds=1, jobs=jobs)


def llama_on_a40(link: float) -> CostModel:
    """Return the cost model of Chameleon's machine: an A40 (NVIDIA's data sheet: 48 GB, 696 GB/s, 149.7
    TFLOPS in float16), over a link of so many bytes a second. The batch waits while an adapter is copied."""
    a40 = msgspec.structs.replace(
        DEVICES["a10g"], name="one A40 48 GB", memory=45 * 2**30, bandwidth=696e9, flops=149.7e12,
        host_to_device=link,
    )  # fmt: skip
    costs = estimate("llama-7b-a40", spec_of_sizes(LLAMA_7B), a40)
    return msgspec.structs.replace(costs, slot=Stage(costs.slot.latency, link, slowdown=STALLS))


def chameleon(
    *, links: tuple[float, ...] = (24.8e9, 6e9), rates: tuple[float, ...] = (2.2, 3.0),
    requests: int = 500, seeds: int = 3, jobs: int = 0,
) -> Iterator[Table]:  # fmt: skip
    """Chameleon, arXiv 2411.17741: p99 time to first token 80.7% below S-LoRA's at high load.

    The baseline serves in order of arrival, copies adapters on demand and ahead for queued requests, and
    drops them when no request uses them any more. Between it and Chameleon are Chameleon's two parts alone.
    """
    systems = {
        "S-LoRA: arrival, discard": {"policy": "vllm:max_wait=600+discard+lookahead"},
        "Chameleon's cache alone": {"policy": "vllm:max_wait=600+chameleon+lookahead"},
        "Chameleon's order alone": {"policy": "chameleon:age=600,max_wait=600+discard+lookahead"},
        "Chameleon": {"policy": "chameleon:age=600,max_wait=600"},
    }
    workload = {
        "limit": requests, "adapters": 100, "popularity": "zipf:1.0",
        "ranks": "8:0.2,16:0.2,32:0.2,64:0.2,128:0.2",
        "prompt_tokens": "lognormal:median=200,sigma=1.0,max=3000",
        "output_tokens": "lognormal:median=128,sigma=1.0,max=1000",
    }  # fmt: skip
    memory = {"slots": 100, "slot_memory": "16GiB", "cpu_loras": 100, "max_lora_rank": 128}
    figures = {
        "p99 TTFT, s": "ttft_seconds.p99",
        "p50": "ttft_seconds.p50",
        "copies a request": "swaps.slot_copies_per_request",
    }
    with presets({f"{link:g}": llama_on_a40(link) for link in links}) as files:
        for link, preset in files.items():
            for rate in rates:
                fields = {"workload": workload | {"arrivals": f"poisson:rate={rate:g}"}, "preset": preset}
                title = f"Chameleon: {float(link) / 1e9:g} GB/s, {rate:g} requests a second"
                common = {**fields, **memory, "max_num_seqs": 128}
                yield compared(title, systems, figures, common=common, seeds=seeds, jobs=jobs)


def toppings(
    *, rates: tuple[float, ...] = (1.5, 2.0, 2.5), requests: int = 500, seeds: int = 3, jobs: int = 0
) -> Iterator[Table]:
    """Toppings, ATC'25: latency up to 1.7 times lower than where loads interrupt decoding.

    The lab has no computation of adapters on the CPU. Its upper bound is a copy that costs the batch nothing.
    """
    base = load_costs("llama3-8b-a10g")
    padded = msgspec.structs.replace(base.steps, padded=True)
    costs = {
        name: msgspec.structs.replace(
            base,
            slot=msgspec.structs.replace(base.slot, bandwidth=6e9, slowdown=slowdown),
            steps=padded,
        )
        for name, slowdown in (("stalls", STALLS), ("beside", 1.0))
    }
    workload = {
        "limit": requests, "adapters": 200, "popularity": "zipf:1.0",
        "ranks": "8:0.25,16:0.25,32:0.25,64:0.25",
        "prompt_tokens": "lognormal:median=200,sigma=0.8,max=2000",
        "output_tokens": "lognormal:median=128,sigma=0.8,max=1000", "slo": "proportional:2+0.06",
    }  # fmt: skip
    system = {"slots": 14, "cpu_loras": 200, "max_lora_rank": 64, "max_num_seqs": 32}
    with presets(costs) as files:
        systems = {
            "loads stall the batch": {"preset": files["stalls"], "policy": "vllm+discard+lookahead"},
            "loads beside the batch": {"preset": files["beside"], "policy": "vllm+discard+lookahead"},
            "the same, adapters stay": {"preset": files["beside"], "policy": "vllm+lru+lookahead"},
        }
        figures = {"latency, s": "latency_seconds.mean", "in time": "slo.in_time_share"}
        for rate in rates:
            common = {"workload": workload | {"arrivals": f"poisson:rate={rate:g}"}, **system}
            title = f"Toppings: {rate:g} requests a second"
            yield compared(title, systems, figures, common=common, seeds=seeds, jobs=jobs)


def vtc(
    *, requests: tuple[int, ...] = (250, 500, 1000, 2000), settings: int = 3, jobs: int = 0
) -> Iterator[Table]:
    """VTC, OSDI 2024: the service of two backlogged clients differs by a bound, however long they wait.

    The bound is 2 max(longest prompt, M) where M is the number of tokens that fit in a batch. One client asks
    for twice as much as the other, and both for more than the engine can serve.
    """
    sequences, prompt, output = 16, 256, 128
    policies = {"fcfs": "fcfs", "vtc": "vtc:input_weight=1,output_weight=1"}
    bound = 2 * max(prompt, sequences * (prompt + output))
    for adapters, slots in ((4, 4), (40, 40), (40, 4))[:settings]:
        workload = {
            "arrivals": "poisson:rate=60", "adapters": adapters, "tenants": 2, "tenant_shares": "1,2",
            "prompt_tokens": f"uniform:8..{prompt}", "output_tokens": f"uniform:8..{output}",
        }  # fmt: skip
        system = {"slots": slots, "cpu_loras": max(adapters, slots), "max_lora_rank": 16}
        systems = {
            f"{name}, {limit:,} requests": {"policy": policy, "workload": {"limit": limit}}
            for name, policy in policies.items()
            for limit in requests
        }
        figures = {"largest difference, tokens": "fairness.max_service_difference_tokens"}
        common = {"workload": workload, **system, "max_num_seqs": sequences}
        title = f"VTC: {adapters} adapters, {slots} slots; bound {bound:,} tokens"
        yield compared(title, systems, figures, common=common, seeds=1, jobs=jobs)


CASES = (slora, chameleon, toppings, vtc)
