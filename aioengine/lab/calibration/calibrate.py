"""Times the live engine while it serves, and fits a cost model to the times."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict, Unpack

import msgspec

from aioengine.config import Device, DType, EngineConfig, ExecutorName, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.calibration.fit import fit_moves, fit_steps
from aioengine.lab.calibration.probe import ProbedEngine
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.lab.costs.model import CostModel, sizes_of
from aioengine.lab.costs.steps import significant
from aioengine.lab.runs.provenance import machine, versions
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.model.spec import Quantization
from aioengine.tasks import run_to_completion

RANKS = (8, 16, 64)
"""Ranks of the adapters, in turn."""
SLOTS, CPU_LORAS, ADAPTERS = 8, 10, 14
Progress = Callable[[int, int, str], None]
"""Callback with the number of parts or runs done, their total, and the next one."""


class Served(NamedTuple):
    """Requests of one part of a turn."""

    callers: int
    requests: int
    adapters: int


PARTS = (
    *(Served(callers, max(2 * callers, 4), SLOTS) for callers in (1, 2, 4, 8, 16, 32, 64)),
    Served(8, 40, ADAPTERS),  # of more adapters than slots, so that some are moved beside steps
)


class Design(NamedTuple):
    """What is served in each turn."""

    parts: tuple[Served, ...] = PARTS
    longest: int = 1024
    """Tokens of the longest prompt; lengths are lognormal."""
    output_tokens: str = "uniform:8..32"
    turns: int = 5
    seconds: float = 120.0
    """Seconds after which no other turn begins."""


class LiveSettings(TypedDict, total=False):
    """The live engine beside its model: fields of :class:`~aioengine.config.EngineConfig`; those that are not
    given have their defaults."""

    dtype: DType
    device: Device
    quantization: Quantization
    tensor_parallel_size: int


def calibrate(model: str, out: Path | None = None, **options: Any) -> CostModel:
    """Do what :func:`calibrate_async` does where no loop runs."""
    return asyncio.run(calibrate_async(model, out, **options))


async def calibrate_async(
    model: str,
    out: Path | None = None,
    *,
    design: Design | None = None,
    progress: Progress = lambda done, total, what: None,
    **settings: Unpack[LiveSettings],
) -> CostModel:
    """Time the live engine with ``model`` for some minutes, and write the cost model to ``out``.

    Nothing else should run on the machine. The cost model predicts the time from the beginning of a step to
    the beginning of the next: ``step_seconds + step_overhead``. Adapters are read from a temporary folder
    that has just been written, so their files are in the system's cache.

    Args:
        model: As in :class:`~aioengine.config.EngineConfig`, like the ``settings``.
        design: What is served meanwhile.
        progress: Called with the number of parts done, their total, and the next one.

    Raises ConfigError if the model is not available or does not fit, or ``out`` cannot be written. It can be
    cancelled.
    """
    if out is not None:
        check_can_write(out)
    name, design = Path(model).name if out is None else out.stem, design or Design()
    until = time.monotonic() + design.seconds
    async with Calibration(model, name, design, progress, **settings) as calibration:
        for turn in range(design.turns):
            if not turn or time.monotonic() < until:
                await calibration.turn()
        costs = calibration.costs()
    if out is not None:
        costs.write(out)
    return costs


def check_can_write(out: Path) -> None:
    """Raise ConfigError if there is no folder for this file, or one in its place: rather now than after
    minutes."""
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file in it")


class Calibration:
    """A live engine that is timed in turns, and the cost model that follows from all of them. It is an async
    context; other things may be done between two turns.

    Raises ConfigError if the model is not available or does not fit.
    """

    def __init__(
        self,
        model: str,
        name: str,
        design: Design,
        progress: Progress = lambda done, total, what: None,
        **settings: Unpack[LiveSettings],
    ) -> None:
        executor: ExecutorName = "process" if settings.get("tensor_parallel_size", 1) > 1 else "thread"
        self._config = EngineConfig(
            model=model,
            executor=executor,
            enable_prefix_caching=False,  # every prompt is computed
            lora=LoRAConfig(
                max_loras=SLOTS,
                max_lora_rank=max(RANKS),
                max_cpu_loras=CPU_LORAS,
                max_concurrent_loads=1,
            ),
            **settings,
        )
        self._name = name
        self._design = design
        self._progress = progress
        self._turns = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="aioengine-calibrate-")))
            self._engine = await opened.enter_async_context(ProbedEngine(self._config))
            for i in range(ADAPTERS):
                path, rank, spec = folder / str(i), RANKS[i % len(RANKS)], self._engine.model_spec
                await run_to_completion(asyncio.to_thread(write_random_adapter, path, spec, rank, seed=i))
                self._engine.register_adapter(f"adapter-{i:03}", path)
            self._open = opened.pop_all()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._open.aclose()

    async def turn(self) -> None:
        """Serve each part once. In every turn the requests are others."""
        design, probe = self._design, self._engine.probe
        longest = min(design.longest, self._engine.plan.max_model_len // 2)
        for index, part in enumerate(design.parts):
            done, total = self._turns * len(design.parts) + index, design.turns * len(design.parts)
            self._progress(min(done, total), total, f"{part.callers} requests at a time")
            spec = WorkloadSpec(
                concurrency=part.callers,
                limit=part.requests,
                adapters=part.adapters,
                base_share=0.25,
                prompt_tokens=f"lognormal:median={min(64, longest)},sigma=1.2,max={longest}",
                output_tokens=design.output_tokens,
            )
            workload = OfferedWorkload(spec, self._turns)
            probe.pause()
            await replay(self._engine, workload, MemorySink(), seed=self._turns)
        self._turns += 1

    def costs(self) -> CostModel:
        """Fit a cost model to what was timed up to now; a turn at least."""
        probe, plan = self._engine.probe, self._engine.plan
        calm = [step for step in probe.following() if not any(probe.overlaps(step).values())]
        fewest = min(step.shape.sequences for step in calm)
        gaps = [step.wall - step.seconds for step in calm if step.shape.sequences == fewest]
        overhead = statistics.median(gaps)  # what is more with more sequences is theirs
        steps, quality = fit_steps(
            [(step.shape, max(step.wall - overhead, step.seconds / 2)) for step in calm]
        )
        disk, slot = (fit_moves(steps, overhead, probe, stage) for stage in ("disk", "slot"))
        return CostModel(
            name=self._name,
            source=f"measured: {machine()}; {versions()}",
            estimate=False,
            sources={"steps": f"{len(calm)} steps in serving, in {self._turns} turns"},
            model=sizes_of(msgspec.structs.replace(self._engine.model_spec, dtype=plan.dtype)),
            steps=steps.rounded(),
            step_overhead=significant(overhead),
            disk=disk,
            slot=slot,
            device="cuda" if plan.device == "cuda" else "cpu",
            device_memory=plan.available_bytes * (plan.num_ranks if plan.device == "cpu" else 1),
            quantization=self._config.quantization,
            tensor_parallel_size=plan.num_ranks,
            fit=quality,
        )
