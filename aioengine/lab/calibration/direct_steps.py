"""Steps of any shape, which bypass a live engine's core and go directly to its device."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from aioengine.executors.base import run_step
from aioengine.lab.calibration.design import Row
from aioengine.lab.calibration.probe import ProbedEngine
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch


class Timed(NamedTuple):
    """A step and its time on the device."""

    shape: StepShape
    seconds: float


class DirectSteps:
    """Runs steps directly on an engine without requests. Its KV blocks and adapter slots are used as if all
    were free. Adapters must be placed before they are used.

    Prompts are random tokens. The KV blocks before a row are filled with random content, too (``fill``),
    because memory that was never written is read faster.
    """

    def __init__(self, engine: ProbedEngine, *, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._tokens = [self._random.randrange(engine.model_spec.vocab_size) for _ in range(4096)]
        self._slots: dict[str | None, int] = {None: -1}
        assert engine.config.lora is not None
        self._ranks = [0] * engine.config.lora.max_loras
        self._steps = 0

    async def fill(self, positions: int, at_once: int) -> None:
        """Write keys and values for this many positions, ``at_once`` of them in each step."""
        plan = self._engine.plan
        count = min(at_once, plan.max_model_len) // plan.block_size * plan.block_size
        room = plan.num_blocks * plan.block_size
        for first in range(0, min(positions, room) // count * count, count):
            await self._execute([Row(count, 0)], first // plan.block_size)

    async def place(self, name: str, path: Path) -> None:
        """Place an adapter in a slot and leave it there."""
        await self._engine.load_adapter(name, path)
        info = await self._engine.pin_adapter(name, force=True)
        assert info.slot is not None
        self._slots[name] = info.slot
        self._ranks[info.slot] = info.rank

    async def time(self, rows: Iterable[Row]) -> Timed:
        """Run a step with these rows and return its duration."""
        return await self._execute(sorted(rows, key=lambda row: self._slots[row.adapter]), 0)

    async def _execute(self, rows: Sequence[Row], block: int) -> Timed:
        self._steps += 1
        sequences = []
        for i, row in enumerate(rows):
            until = row.start + row.tokens
            blocks = range(block, block + -(-until // self._engine.plan.block_size))
            first = self._random.randrange(len(self._tokens))
            history = [self._tokens[(first + n) % len(self._tokens)] for n in range(until)]
            decodes = row.tokens == 1 and row.start > 0
            sequences.append(
                SequenceWork(
                    request_id=f"step {self._steps}, row {i}",
                    slot=self._slots[row.adapter],
                    tokens=history[row.start :],
                    start=row.start,
                    block_table=list(blocks),
                    sample=True,
                    params=SamplingParams(),
                    seed=i,
                    history=history,
                    prompt_len=row.start if decodes else until,
                )
            )
            block = blocks.stop
        batch = StepBatch(self._steps, sequences, self._ranks)
        result = await run_step(self._engine.device, batch)
        for work in batch.sequences:
            self._engine.device.forget(work.request_id)
        return Timed(step_shape(batch), result.seconds[0])
