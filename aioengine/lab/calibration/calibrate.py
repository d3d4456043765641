"""Times the live engine, and fits a cost model to the times."""

from __future__ import annotations

import asyncio
import platform
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import msgspec

from aioengine.config import Device, DType, EngineConfig, ExecutorName, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.calibration.design import Design
from aioengine.lab.calibration.direct_steps import DirectSteps, Rounds
from aioengine.lab.calibration.fit import (
    fit_overhead,
    fit_stage,
    fit_steps,
    move_points,
    serving_level,
    slowdown,
)
from aioengine.lab.calibration.probe import ProbedEngine
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.lab.calibration.serving import Serving
from aioengine.lab.costs.model import CostModel, ModelShape
from aioengine.lab.costs.steps import significant
from aioengine.lab.workload.extra import needs_extra
from aioengine.model.spec import Quantization
from aioengine.tasks import run_to_completion

Progress = Callable[[int, int, str], None]
"""Callback with the number of timings or runs done, their total, and the next one."""


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
    name: str | None = None,
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
        name: Name of the cost model; by default that of the file.
        design: Steps and loads to time; the default suits a model with decode steps of about 10 ms.
        progress: Called with the number of timings done, their total, and the next one.

    Raises ConfigError if the model is not available or does not fit, or ``out`` cannot be written. It can be
    cancelled.
    """
    if out is not None:
        check_can_write(out)
    name = name or (Path(model).name if out is None else out.stem)
    async with Calibration(model, name=name, design=design, progress=progress, **settings) as calibration:
        while calibration.goes_on:
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
        *,
        name: str,
        design: Design | None = None,
        progress: Progress = lambda done, total, what: None,
        **settings: Unpack[LiveSettings],
    ) -> None:
        executor: ExecutorName = "process" if settings.get("tensor_parallel_size", 1) > 1 else "thread"
        self._config = EngineConfig(model=model, executor=executor, **settings)
        self._name = name
        self._design = Design() if design is None else design
        self._progress = progress
        self._turns = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            await self._start(opened)
            self._open = opened.pop_all()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._open.aclose()

    async def _start(self, opened: AsyncExitStack) -> None:
        with needs_extra():  # rather now than after minutes
            import scipy.optimize  # noqa: F401
        design = self._design
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="aioengine-calibrate-")))
        engine = await opened.enter_async_context(ProbedEngine(self._for_timing()))
        self._engine = engine
        parts = design.parts(engine.plan.max_model_len)
        paths = {
            rank: [folder / f"{rank}-{i}" for i in range(max(*design.adapters, design.loads))]
            for rank in sorted(design.ranks)
        }
        for rank, of_rank in paths.items():
            for i, path in enumerate(of_rank):
                await run_to_completion(
                    asyncio.to_thread(write_random_adapter, path, engine.model_spec, rank, seed=i)
                )
        # In this order none leaves something in a slot that has to be cleared for the next.
        loads = [path for of_rank in paths.values() for path in of_rank[: design.loads]]
        self._moved = len(loads)
        self._total = self._moved + design.repeats * (len(design.live_rows) + len(parts))
        self._serving = Serving(engine, design)
        await self._serving.move(loads, self._tell)
        self._steps = DirectSteps(engine, seed=design.seed)
        await self._steps.fill(design.tokens, design.max_num_batched_tokens)
        for rank in design.ranks:
            for adapter, path in zip(design.names(rank), paths[rank], strict=False):
                await self._steps.place(adapter, path)
        self._rounds = Rounds(parts, repeats=design.repeats, seconds=design.seconds, seed=design.seed)

    @property
    def goes_on(self) -> bool:
        """Whether the design needs another turn, and has time for it."""
        return self._rounds.goes_on

    async def turn(self) -> None:
        """Time every step that still needs it once, and then serve for some seconds: so steps alone and steps
        in serving are of the same minutes, in which the machine may be faster or slower than in others."""
        design = self._design
        served = self._moved + min(self._turns, design.repeats) * len(design.live_rows)
        await self._rounds.run(self._steps, lambda what: self._tell(served + self._rounds.done, what))
        if self._turns < design.repeats:
            done = served + self._rounds.done
            await self._serving.decode(lambda turn, what: self._tell(done + turn, what))
        self._turns += 1
        if not self.goes_on:
            self._tell(self._total, "done")

    def costs(self) -> CostModel:
        """Fit a cost model to what was timed up to now; a turn at least."""
        rounds, serving, plan = self._rounds, self._serving, self._engine.plan
        points, paces = rounds.points(), rounds.paces()
        found = fit_steps(points)
        overhead, each = fit_overhead(serving.alone)
        level = serving_level(found.costs, serving.calm)
        steps = found.costs.scaled(level)
        steps = msgspec.structs.replace(steps, sequence=steps.sequence + each)
        disk, slot = (fit_stage(move_points(serving.moves, stage)).rounded() for stage in ("disk", "slot"))
        costs = CostModel(
            name=self._name,
            source=f"measured: {machine()}; {versions()}",
            estimate=False,
            sources={
                "steps": f"{len(points)} kinds; {rounds.disturbed} timings were disturbed and do not count",
                "rounds": f"{len(paces)}, {min(paces, default=1):.3g} to {max(paces, default=1):.3g} times "
                "as long as their mean",
                "between steps": f"{len(serving.alone)} steps in serving",
                "in serving": f"{len(serving.calm)} undisturbed steps, {level:.3g} times as long as alone",
            },
            model=ModelShape.of(self._engine.model_spec, plan.dtype),
            steps=steps.rounded(),
            step_overhead=significant(overhead),
            disk=disk,
            slot=slot,
            device="cuda" if plan.device == "cuda" else "cpu",
            device_memory=plan.available_bytes * (plan.num_ranks if plan.device == "cpu" else 1),
            quantization=self._config.quantization,
            tensor_parallel_size=plan.num_ranks,
            fit=found.quality,
        )
        stages = {
            name: msgspec.structs.replace(
                stage, slowdown=significant(slowdown(costs, serving.beside, serving.moves, name))
            )
            for name, stage in (("disk", disk), ("slot", slot))
        }
        return msgspec.structs.replace(costs, **stages)

    def _for_timing(self) -> EngineConfig:
        design = self._design
        adapters = len(design.ranks) * max(design.adapters) + 1  # one is moved while the others are in slots
        return msgspec.structs.replace(
            self._config,
            max_num_seqs=design.max_rows,
            max_num_batched_tokens=max(design.max_num_batched_tokens, design.max_rows),
            enable_prefix_caching=False,  # every prompt is computed
            lora=LoRAConfig(
                max_loras=adapters,
                max_lora_rank=design.slot_rank,
                max_cpu_loras=adapters,
                max_concurrent_loads=1,
            ),
        )

    def _tell(self, done: int, what: str) -> None:
        self._progress(done, self._total, what)


def machine() -> str:
    """Return the GPU's name; without a GPU, the processor's name and the number of threads that compute."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the processor's name in the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> str:
    packages = ", ".join(f"{package} {version(package)}" for package in ("aioengine", "torch"))
    return f"{packages}, Python {platform.python_version()}"
