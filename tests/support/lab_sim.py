"""Small workloads, costs that are easy to reckon with, and a sink that keeps what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from aioengine import EngineConfig, LoRAConfig
from aioengine.lab.costs.model import CostModel, Stage
from aioengine.lab.costs.steps import StepCosts
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape, Arrival, Workload
from aioengine.schedulers import SchedulerPolicy

MB = 1_000_000
STEP = 0.01
DISK = Stage(latency=0.5, bandwidth=100 * MB)
SLOT = Stage(latency=0.25, bandwidth=1000 * MB)


def costs(**fields: Any) -> CostModel:
    """Every step takes 10 ms."""
    model = {
        "family": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position": 4096,
        "tie_embeddings": False,
        "dtype": "bfloat16",
    }
    defaults: dict[str, Any] = {
        "name": "test",
        "source": "made up",
        "estimate": True,
        "model": model,
        "steps": StepCosts(step=STEP),
        "disk": DISK,
        "slot": SLOT,
        "device": "cuda",
        "device_memory": 2**30,
    }
    return CostModel(**{**defaults, **fields})


class Fixed(Workload):
    """These arrivals."""

    def __init__(self, arrivals: Sequence[Arrival], adapters: Sequence[AdapterShape] = ()) -> None:
        self._arrivals = arrivals
        self.adapters = adapters

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self._arrivals)

    def __len__(self) -> int:
        return len(self._arrivals)


def config(**fields: Any) -> EngineConfig:
    lora = {"max_loras": 2, "max_cpu_loras": 4}
    lora |= {key: fields.pop(key) for key in list(fields) if key in LoRAConfig.__struct_fields__}
    return EngineConfig(
        **{"model": "simulated", "enable_prefix_caching": False, "lora": LoRAConfig(**lora), **fields}  # type: ignore[arg-type]
    )


class Played(NamedTuple):
    """What became of a workload."""

    requests: int
    finished: int
    refused: int
    failed: int
    seconds: float
    """Until the last sample, which is of the end."""


def played(kept: MemorySink) -> Played:
    """Count how the requests of a run ended."""
    refused = sum(row.reason == "refused" for row in kept.requests)
    finished = sum(row.error is None for row in kept.requests)
    total = len(kept.requests)
    return Played(total, finished, refused, total - finished - refused, kept.samples[-1].time)


def play(
    workload: Workload,
    policy: SchedulerPolicy | None = None,
    *,
    model: CostModel | None = None,
    sample_seconds: float = 1.0,
    **fields: Any,
) -> tuple[Played, MemorySink]:
    """Replay in virtual time on a simulated engine; ``fields`` are the configuration's."""
    kept = MemorySink()

    async def main() -> None:
        async with SimulatedEngine(config(**fields), model or costs(), policy) as engine:
            await replay(engine, workload, kept, sample_seconds=sample_seconds)
            engine.check_invariants()

    run_in_virtual_time(main())
    return played(kept), kept
