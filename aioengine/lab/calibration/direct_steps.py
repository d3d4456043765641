"""Steps of any shape, which bypass a live engine's core and go directly to its device."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from aioengine.executors.base import run_step
from aioengine.lab.calibration.probe import ProbedEngine
from aioengine.lab.calibration.processor_waits import Waits
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch


class Row(NamedTuple):
    """A sequence's share of a step."""

    tokens: int
    """Tokens to compute: 1 with ``start`` > 0 is a decode, anything else is a part of a prompt."""
    start: int
    """Earlier positions, whose keys and values are read."""
    adapter: str | None = None


class Timing(NamedTuple):
    shape: StepShape
    seconds: float
    """Seconds on the device."""
    waited: float
    """Seconds that this process's threads waited for a processor meanwhile, in sum."""


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
        self._slots: dict[str, int] = {}
        assert engine.config.lora is not None
        self._ranks = [0] * engine.config.lora.max_loras
        self._steps = 0

    @property
    def room(self) -> int:
        """Count the positions of all rows of a step, each row rounded up to whole KV blocks."""
        plan = self._engine.plan
        return plan.num_blocks * plan.block_size

    async def fill(self, positions: int, at_once: int) -> None:
        """Write keys and values for this many positions, ``at_once`` of them in each step."""
        block_size = self._engine.plan.block_size
        count = min(at_once, self._engine.plan.max_model_len) // block_size * block_size
        for first in range(0, min(positions, self.room) // count * count, count):
            await self._execute([Row(count, 0)], first // block_size)

    async def place(self, name: str, path: Path) -> None:
        """Place an adapter in a slot and leave it there."""
        await self._engine.load_adapter(name, path)
        info = await self._engine.pin_adapter(name, force=True)
        assert info.slot is not None
        self._slots[name] = info.slot
        self._ranks[info.slot] = info.rank

    async def time(self, rows: Iterable[Row]) -> Timing:
        """Run a step with these rows and return its duration."""
        return await self._execute(sorted(rows, key=self._slot), 0)

    def _slot(self, row: Row) -> int:
        return -1 if row.adapter is None else self._slots[row.adapter]

    async def _execute(self, rows: Sequence[Row], block: int) -> Timing:
        batch = self._batch(rows, block)
        waits = Waits()
        result = await run_step(self._engine.device, batch)
        waited = waits.seconds()
        for work in batch.sequences:
            self._engine.device.forget(work.request_id)
        return Timing(step_shape(batch), result.seconds[0], waited)

    def _batch(self, rows: Sequence[Row], block: int) -> StepBatch:
        self._steps += 1
        sequences = []
        for i, row in enumerate(rows):
            until = row.start + row.tokens
            blocks = -(-until // self._engine.plan.block_size)
            first = self._random.randrange(len(self._tokens))
            history = [self._tokens[(first + n) % len(self._tokens)] for n in range(until)]
            decodes = row.tokens == 1 and row.start > 0
            sequences.append(
                SequenceWork(
                    request_id=f"step {self._steps}, row {i}",
                    slot=self._slot(row),
                    tokens=history[row.start :],
                    start=row.start,
                    block_table=list(range(block, block + blocks)),
                    sample=True,
                    params=SamplingParams(),
                    seed=i,
                    history=history,
                    prompt_len=row.start if decodes else until,
                )
            )
            block += blocks
        return StepBatch(self._steps, sequences, self._ranks)
