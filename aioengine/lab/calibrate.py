"""Timing the live engine, and the cost model that fits what was timed."""

from __future__ import annotations

import asyncio
import platform
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from aioengine.config import Device, DType, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs import CostModel, FitQuality, ModelShape, Stage, significant
from aioengine.lab.design import Design, DesignRun, Progress
from aioengine.lab.extra import needs_extra
from aioengine.lab.fit import fit_stage, fit_steps
from aioengine.lab.probe import ProbedEngine, ProbedMove
from aioengine.lab.timings import Intervals, fit_overhead, load_slowdown, move_points, step_points
from aioengine.memory_plan import MemoryPlan
from aioengine.model.spec import ModelSpec


def calibrate(
    model: str,
    out: Path | None = None,
    *,
    name: str | None = None,
    dtype: DType = "auto",
    device: Device = "auto",
    design: Design | None = None,
    progress: Progress | None = None,
) -> CostModel:
    """Time the live engine with ``model`` for some minutes, and write the cost model to ``out``.

    Nothing else should run on the machine. What the cost model reproduces is the time from the beginning
    of a step to that of the next: ``step_seconds + step_overhead``. Adapters are read from a temporary
    folder that has just been written, so their files are in the system's cache.

    Args:
        model: As in :class:`~aioengine.config.EngineConfig`.
        name: The cost model's; by default that of the file.
        design: What is timed; the default is for a model that decodes in about 10 ms a step.
        progress: Told of: parts done, of how many, and what comes next.

    Raises ConfigError if the model cannot be had or does not fit, or ``out`` cannot be written.
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}")
    with needs_extra():  # rather now than after minutes
        import scipy.optimize  # noqa: F401
    design = Design() if design is None else design
    name = name or (Path(model).name if out is None else out.stem)
    costs = asyncio.run(_calibrate(model, name, dtype, device, design, progress))
    if out is not None:
        costs.write(out)
    return costs


async def _calibrate(
    model: str, name: str, dtype: DType, device: Device, design: Design, progress: Progress | None
) -> CostModel:
    config = EngineConfig(
        model=model,
        dtype=dtype,
        device=device,
        max_num_seqs=design.max_rows + 1,
        max_num_batched_tokens=max(design.max_num_batched_tokens, design.max_rows + 1),
        enable_prefix_caching=False,  # every prompt is computed
        lora=LoRAConfig(
            max_loras=design.slots,
            max_lora_rank=design.max_rank,
            max_cpu_loras=2 * design.slots,
            max_concurrent_loads=1,
        ),
    )
    with tempfile.TemporaryDirectory(prefix="aioengine-calibrate-") as folder:
        async with ProbedEngine(config) as engine:
            run = DesignRun(engine, design, Path(folder))
            await run.all(progress)
            return _fit(run, name, engine.model_spec, engine.plan)


def _fit(run: DesignRun, name: str, spec: ModelSpec, plan: MemoryPlan) -> CostModel:
    steps, moves = run.probe.steps, run.probe.moves
    moving = Intervals(moves)
    calm = [step for step in steps if not moving.overlap(step)]
    overhead = fit_overhead(calm)
    found = fit_steps(step_points(calm, overhead))
    alone = moves[run.loads_from.move :]
    costs = CostModel(
        name=name,
        source=f"measured: {machine()}; {versions()}",
        estimate=False,
        sources={
            "steps": f"{len(calm)} that no load disturbed, medians of {found.quality.steps} kinds",
            "other processes": f"took {statistics.fmean(run.neighbours):.0%} of the machine meanwhile",
        },
        model=ModelShape.of(spec, plan.dtype),
        steps=found.costs.rounded(),
        step_overhead=significant(overhead),
        disk=_stage(alone, "disk"),
        slot=_stage(alone, "slot"),
        device="cuda" if plan.device == "cuda" else "cpu",
        device_memory=plan.available_bytes,
        fit=FitQuality(
            steps=found.quality.steps,
            median_error=significant(found.quality.median_error),
            p90_error=significant(found.quality.p90_error),
        ),
    )
    slowdown = load_slowdown(costs, steps[run.loads_from.step :], moving)
    return msgspec.structs.replace(costs, load_slowdown=significant(slowdown))


def _stage(moves: Sequence[ProbedMove], stage: str) -> Stage:
    found = fit_stage(move_points(moves, stage))
    return Stage(significant(found.latency), significant(found.bandwidth))


def machine() -> str:
    """The GPU's name; where there is none the processor's, and how many threads compute."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> str:
    packages = ", ".join(f"{package} {version(package)}" for package in ("aioengine", "torch"))
    return f"{packages}, Python {platform.python_version()}"
