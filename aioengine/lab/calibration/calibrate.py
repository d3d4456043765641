"""Times the live engine, alone and as it serves, and fits a cost model to the times."""

from __future__ import annotations

import asyncio
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import msgspec

from aioengine.config import Device, DType, EngineConfig, ExecutorName, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.calibration.design import Design
from aioengine.lab.calibration.direct_steps import DirectSteps, Timed
from aioengine.lab.calibration.fit import fit_moves, fit_overhead, fit_steps, serving_level
from aioengine.lab.calibration.probe import ProbedEngine, ProbedStep
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.lab.costs.model import CostModel, ModelShape
from aioengine.lab.costs.steps import significant
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.extra import needs_extra
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.model.spec import Quantization
from aioengine.request import SamplingParams
from aioengine.tasks import run_to_completion

BESIDE_ROWS = 8
"""Number of sequences that decode while adapters are moved."""
CALM_STEPS = 3
"""Between one move and the next, to compare with those beside moves."""
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
        design: Steps and loads to time; the default suits a model with decode steps of about 10 ms.
        progress: Called with the number of timings done, their total, and the next one.

    Raises ConfigError if the model is not available or does not fit, or ``out`` cannot be written. It can be
    cancelled.
    """
    if out is not None:
        check_can_write(out)
    name, design = Path(model).name if out is None else out.stem, design or Design()
    async with Calibration(model, name, design, progress, **settings) as calibration:
        until = time.monotonic() + design.seconds
        for turn in range(design.repeats):
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
        adapters = len(design.ranks) * max(design.adapters) + 1  # one is moved while the others are in slots
        self._config = EngineConfig(
            model=model,
            executor=executor,
            max_num_seqs=design.max_rows,
            max_num_batched_tokens=max(design.max_num_batched_tokens, design.max_rows),
            enable_prefix_caching=False,  # every prompt is computed
            lora=LoRAConfig(
                max_loras=adapters,
                max_lora_rank=design.slot_rank,
                max_cpu_loras=adapters,
                max_concurrent_loads=1,
            ),
            **settings,
        )
        self._name = name
        self._design = design
        self._progress = progress
        self._done = 0
        self._random = random.Random(design.seed)
        self._timed: list[list[Timed]] = []
        """The timings of each part."""
        self._serving: list[ProbedStep] = []
        """Steps of requests, while no adapter is moved."""

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
        self._engine = engine = await opened.enter_async_context(ProbedEngine(self._config))
        self._context = min(design.contexts[0], engine.plan.max_model_len // 2)
        self._parts = design.parts(engine.plan.max_model_len)
        self._timed = [[] for _ in self._parts]
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
        self._total = len(loads) + design.repeats * (len(design.live_rows) + len(self._parts))
        await self._move(loads)
        self._steps = DirectSteps(engine, seed=design.seed)
        await self._steps.fill(design.tokens, design.max_num_batched_tokens)
        for rank in design.ranks:
            for adapter, path in zip(design.names(rank), paths[rank], strict=False):
                await self._steps.place(adapter, path)

    async def _move(self, paths: list[Path]) -> None:
        """Load and copy the adapters at ``paths`` beside decodes."""
        probe = self._engine.probe
        await self._complete(self._design.live_steps)  # warm-up
        probe.pause()
        probe.steps.clear()
        async with self._decoding():
            for turn, path in enumerate(paths):
                self._tell("an adapter that is loaded beside decodes")
                name = f"load-{turn}"
                await self._engine.load_adapter(name, path)
                await probe.grow(CALM_STEPS)
                await self._engine.pin_adapter(name, force=True)
                await probe.grow(CALM_STEPS)
                await self._engine.unload_adapter(name)
        self._beside, self._moves = [*probe.steps], [*probe.moves]

    async def turn(self) -> None:
        """Time every step once, in an order that is drawn, so that neither a drift of the machine's speed nor
        cache contents of another step look like an effect; then serve for some seconds. So steps alone and
        steps in serving are of the same minutes, in which the machine may be faster or slower than in
        others."""
        for index in self._random.sample(range(len(self._parts)), len(self._parts)):
            self._tell(self._parts[index].what)
            self._timed[index].append(await self._steps.time(self._parts[index].rows))
        probe, design = self._engine.probe, self._design
        for rows in design.live_rows:
            self._tell(f"{rows} rows, as in serving")
            probe.pause()
            probe.steps.clear()
            # Sent and recorded as in any live run, because the loop's work for that is between steps, too.
            spec = WorkloadSpec(
                arrivals="poisson:rate=100000",
                limit=rows,
                prompt_tokens=self._context,
                output_tokens=design.live_steps,
            )
            workload = OfferedWorkload(spec, design.seed)
            await replay(self._engine, workload, MemorySink(), seed=self._random.randrange(2**31))
            probe.pause()
            self._serving += probe.steps

    def costs(self) -> CostModel:
        """Fit a cost model to what was timed up to now; a turn at least. A step counts with the median of its
        timings, which other programs may have disturbed."""
        points = [
            Timed(timings[0].shape, statistics.median([timing.seconds for timing in timings]))
            for timings in self._timed
        ]
        found, plan = fit_steps(points), self._engine.plan
        overhead, each = fit_overhead(self._serving)
        level = serving_level(found.costs, self._serving)
        steps = found.costs.scaled(level)
        disk, slot = (fit_moves(self._beside, self._moves, stage) for stage in ("disk", "slot"))
        return CostModel(
            name=self._name,
            source=f"measured: {machine()}; {versions()}",
            estimate=False,
            sources={
                "steps": f"{len(points)} kinds, each timed {len(self._timed[0])} times",
                "in serving": f"{len(self._serving)} steps, {level:.3g} times as long as alone",
            },
            model=ModelShape.of(self._engine.model_spec, plan.dtype),
            steps=msgspec.structs.replace(steps, sequence=steps.sequence + each).rounded(),
            step_overhead=significant(overhead),
            disk=disk,
            slot=slot,
            device="cuda" if plan.device == "cuda" else "cpu",
            device_memory=plan.available_bytes * (plan.num_ranks if plan.device == "cpu" else 1),
            quantization=self._config.quantization,
            tensor_parallel_size=plan.num_ranks,
            fit=found.quality,
        )

    async def _complete(self, tokens: int) -> None:
        vocab = self._engine.model_spec.vocab_size
        prompt = [self._random.randrange(vocab) for _ in range(self._context)]
        await self._engine.complete(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))

    @asynccontextmanager
    async def _decoding(self) -> AsyncIterator[None]:
        """Context in which requests decode; those that end are sent again."""

        async def decode() -> None:
            while True:
                await self._complete(self._engine.plan.max_model_len - self._context)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(decode()) for _ in range(BESIDE_ROWS)]
            await self._engine.probe.grow(CALM_STEPS)
            yield
            for task in tasks:
                task.cancel()

    def _tell(self, what: str) -> None:
        self._progress(min(self._done, self._total), self._total, what)
        self._done += 1


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
