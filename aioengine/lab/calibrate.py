"""Timing the live engine, and the cost model that fits what was timed."""

from __future__ import annotations

import asyncio
import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from aioengine.config import Device, DType, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs import CostModel, FitQuality, ModelShape, Stage
from aioengine.lab.design import Design, Part
from aioengine.lab.direct import DirectSteps
from aioengine.lab.extra import needs_extra
from aioengine.lab.fit import Timed, fit_stage, fit_steps
from aioengine.lab.probe import ProbedEngine, ProbedMove
from aioengine.lab.random_adapters import write_random_adapter
from aioengine.lab.rounds import Rounds
from aioengine.lab.serving import Serving
from aioengine.lab.step_costs import significant
from aioengine.lab.timings import fit_overhead, move_points, slowdown
from aioengine.memory_plan import MemoryPlan
from aioengine.model.spec import ModelSpec

Progress = Callable[[int, int, str], None]
"""Told of: timings done, of how many, and what comes next."""


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
    config = EngineConfig(model=model, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory(prefix="aioengine-calibrate-") as folder:
        costs = asyncio.run(_Calibration(config, design, Path(folder), progress).run(name))
    if out is not None:
        costs.write(out)
    return costs


class _Calibration:
    """Carries a design out: one engine after the other, those with the largest slots first."""

    def __init__(self, config: EngineConfig, design: Design, folder: Path, progress: Progress | None) -> None:
        self._config = config
        self._design = design
        self._folder = folder
        self._progress = progress
        self._done = self._total = 0
        self._points: list[Timed] = []
        self._disturbed = 0

    async def run(self, name: str) -> CostModel:
        sizes = sorted(set(self._design.slot_ranks), reverse=True)
        serving: Serving | None = None
        for slot_rank in sizes:
            async with ProbedEngine(self._engine_config(slot_rank)) as engine:
                if serving is None:
                    longest = engine.plan.max_model_len
                    parts = {size: self._parts(size, longest) for size in sizes}
                    await asyncio.to_thread(self._write_adapters, engine.model_spec)
                    loads = self._loads()
                    turns = len(self._design.live_rows) + len(loads)
                    self._total = turns + self._design.repeats * sum(map(len, parts.values()))
                    serving = Serving(engine, self._design)
                    await serving.run(loads, self._tell)
                    self._done = turns
                    spec, plan = engine.model_spec, engine.plan
                await self._time(engine, slot_rank, parts[slot_rank])
        assert serving is not None, "a design has slots of some size"
        self._tell(self._total - self._done, "done")
        return self._fit(serving, name, spec, plan)

    def _engine_config(self, slot_rank: int) -> EngineConfig:
        design = self._design
        adapters = len(design.ranks_in(slot_rank)) * max(design.adapters)
        return msgspec.structs.replace(
            self._config,
            max_num_seqs=design.max_rows,
            max_num_batched_tokens=max(design.max_num_batched_tokens, design.max_rows),
            enable_prefix_caching=False,  # every prompt is computed
            lora=LoRAConfig(
                max_loras=adapters + 1,
                max_lora_rank=slot_rank,
                max_cpu_loras=adapters + 1,
                max_concurrent_loads=1,
            ),
        )

    def _parts(self, slot_rank: int, longest: int) -> list[Part]:
        return self._design.parts(slot_rank, whole=slot_rank == max(self._design.slot_ranks), longest=longest)

    def _write_adapters(self, spec: ModelSpec) -> None:
        for rank in self._design.ranks:
            for i in range(max(*self._design.adapters, self._design.loads)):
                write_random_adapter(self._path(rank, i), spec, rank, seed=i)

    def _path(self, rank: int, i: int) -> Path:
        return self._folder / f"{rank}-{i}"

    def _loads(self) -> list[Path]:
        """The adapters that are loaded beside steps."""
        return [self._path(rank, i) for i in range(self._design.loads) for rank in self._design.ranks]

    async def _time(self, engine: ProbedEngine, slot_rank: int, parts: list[Part]) -> None:
        design = self._design
        steps = DirectSteps(engine, seed=design.seed)
        await steps.fill(design.tokens, design.max_num_batched_tokens)
        for rank in design.ranks_in(slot_rank):
            for i, name in enumerate(design.names(rank)):
                await steps.place(name, self._path(rank, i))
        rounds = Rounds(parts, repeats=design.repeats, seconds=design.seconds, seed=design.seed)
        self._points += await rounds.run(steps, self._tell)
        self._disturbed += rounds.disturbed
        self._done += design.repeats * len(parts)

    def _tell(self, turn: int, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done + turn, self._total, what)

    def _fit(self, serving: Serving, name: str, spec: ModelSpec, plan: MemoryPlan) -> CostModel:
        found = fit_steps(self._points)
        overhead, each = fit_overhead(serving.alone)
        steps = msgspec.structs.replace(found.costs, sequence=found.costs.sequence + each)
        costs = CostModel(
            name=name,
            source=f"measured: {machine()}; {versions()}",
            estimate=False,
            sources={
                "steps": f"{len(self._points)} kinds; other programs disturbed {self._disturbed} timings",
                "between steps": f"{len(serving.alone)} steps in serving",
            },
            model=ModelShape.of(spec, plan.dtype),
            steps=steps.rounded(),
            step_overhead=significant(overhead),
            disk=_stage(serving.moves, "disk"),
            slot=_stage(serving.moves, "slot"),
            device="cuda" if plan.device == "cuda" else "cpu",
            device_memory=plan.available_bytes,
            fit=FitQuality(
                steps=found.quality.steps,
                median_error=significant(found.quality.median_error),
                p90_error=significant(found.quality.p90_error),
            ),
        )
        slow = {stage: slowdown(costs, serving.beside, serving.moves, stage) for stage in ("disk", "slot")}
        return msgspec.structs.replace(
            costs,
            disk=msgspec.structs.replace(costs.disk, slowdown=significant(slow["disk"])),
            slot=msgspec.structs.replace(costs.slot, slowdown=significant(slow["slot"])),
        )


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
