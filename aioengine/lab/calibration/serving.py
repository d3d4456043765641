"""Timings on an engine that serves: the gap between steps, and loads beside steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aioengine.lab.calibration.design import Design
from aioengine.lab.calibration.probe import DISTURBED, ProbedEngine, ProbedMove, ProbedStep, Waits
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Workload
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.request import SamplingParams

BESIDE_ROWS = 8
"""Number of sequences that decode while adapters are moved."""
CALM_STEPS = 3
"""Between one move and the next, to compare with those beside moves."""


class Serving:
    """Timings on an engine whose slots are free; they are collected in these lists."""

    def __init__(self, engine: ProbedEngine, design: Design) -> None:
        self.alone: list[ProbedStep] = []
        """Steps while nothing is moved."""
        self.calm: list[ProbedStep] = []
        """Those of them during which no other program ran."""
        self.beside: list[ProbedStep] = []
        """Steps some of which ``moves`` overlap."""
        self.moves: list[ProbedMove] = []
        self._engine = engine
        self._design = design
        self._random = random.Random(design.seed)

    async def move(self, paths: list[Path], tell: Callable[[int, str], None]) -> None:
        """Load and copy the adapters at ``paths`` beside decodes, and report each before."""
        probe = self._engine.probe
        await self._complete(self._design.live_steps)  # warm-up
        probe.pause()
        probe.steps.clear()
        async with self._decoding(BESIDE_ROWS):
            for turn, path in enumerate(paths):
                tell(turn, "an adapter that is loaded beside decodes")
                name = f"load-{turn}"
                await self._engine.load_adapter(name, path)
                await probe.grow(CALM_STEPS)
                await self._engine.pin_adapter(name, force=True)
                await probe.grow(CALM_STEPS)
                await self._engine.unload_adapter(name)
        self.beside, self.moves = [*probe.steps], [*probe.moves]

    async def decode(self, tell: Callable[[int, str], None]) -> None:
        """Serve ``live_rows`` requests at a time, and report each number before. They are sent and recorded
        as in any live run, because the loop's work for that is a part of the time between steps."""
        probe = self._engine.probe
        for turn, rows in enumerate(self._design.live_rows):
            tell(turn, f"{rows} rows, as in serving")
            probe.pause()
            probe.steps.clear()
            waits = Waits()
            await replay(self._engine, self._workload(rows), MemorySink(), seed=self._random.randrange(2**31))
            probe.pause()
            self.alone += probe.steps
            if waits.seconds() <= DISTURBED * sum(step.seconds for step in probe.steps):
                self.calm += probe.steps

    async def _complete(self, tokens: int) -> None:
        vocab = self._engine.model_spec.vocab_size
        prompt = [self._random.randrange(vocab) for _ in range(self._context)]
        await self._engine.complete(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))

    @property
    def _context(self) -> int:
        return min(self._design.contexts[0], self._engine.plan.max_model_len // 2)

    def _workload(self, rows: int) -> Workload:
        spec = WorkloadSpec(
            arrivals="poisson:rate=100000",
            limit=rows,
            prompt_tokens=self._context,
            output_tokens=self._design.live_steps,
        )
        return OfferedWorkload(spec, self._design.seed)

    @asynccontextmanager
    async def _decoding(self, rows: int) -> AsyncIterator[None]:
        """Context in which requests decode; those that end are sent again."""

        async def decode() -> None:
            while True:
                await self._complete(self._engine.plan.max_model_len - self._context)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(decode()) for _ in range(rows)]
            await self._engine.probe.grow(CALM_STEPS)
            yield
            for task in tasks:
                task.cancel()
