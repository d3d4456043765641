"""Steps of any shape, which bypass a live engine's core and go directly to its device, timed in rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from aioengine.executors.base import run_step
from aioengine.lab.calibration.design import Part, Row
from aioengine.lab.calibration.fit import Timed, usual_mean
from aioengine.lab.calibration.probe import CALM, ProbedEngine, Waits
from aioengine.lab.costs.steps import StepShape, step_shape
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

TRIES = 3
"""Maximum rounds, as a multiple of the needed ones, because other programs may disturb some."""


class Timing(NamedTuple):
    shape: StepShape
    seconds: float
    """Seconds on the device."""
    waited: float
    """Seconds that this process's threads waited for a processor meanwhile, in sum."""

    @property
    def share(self) -> float:
        return self.waited / max(self.seconds, 1e-9)

    @property
    def is_calm(self) -> bool:
        """Whether it counts."""
        return self.share <= CALM


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

    async def time(self, rows: Iterable[Row]) -> Timing:
        """Run a step with these rows and return its duration."""
        return await self._execute(sorted(rows, key=self._slot), 0)

    def _slot(self, row: Row) -> int:
        return -1 if row.adapter is None else self._slots[row.adapter]

    async def _execute(self, rows: Sequence[Row], block: int) -> Timing:
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
                    slot=self._slot(row),
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
        waits = Waits()
        result = await run_step(self._engine.device, batch)
        waited = waits.seconds()
        for work in batch.sequences:
            self._engine.device.forget(work.request_id)
        return Timing(step_shape(batch), result.seconds[0], waited)


class Rounds:
    """Rounds of timings. Each round times every part that still needs it once, in another order, so that
    neither a drift of the machine's speed nor cache contents of another step look like an effect."""

    def __init__(self, parts: Sequence[Part], *, repeats: int, seconds: float, seed: int) -> None:
        self.disturbed = 0
        """Number of timings that do not count."""
        self._parts = parts
        self._repeats = repeats
        self._seconds = seconds
        self._random = random.Random(seed)
        self._rounds: list[dict[int, Timing]] = []
        """The timing of each part in each round."""
        self._until = float("inf")

    @property
    def done(self) -> int:
        """Number of timings that count, of ``len(parts) * repeats``."""
        return sum(min(self._calm(i), self._repeats) for i in range(len(self._parts)))

    @property
    def goes_on(self) -> bool:
        """Whether another round is needed, and there is time for it."""
        in_time = len(self._rounds) < self._repeats * TRIES and time.monotonic() <= self._until
        return in_time and self.done < len(self._parts) * self._repeats

    async def run(self, steps: DirectSteps, tell: Callable[[str], None]) -> None:
        """Run one round. ``tell`` is called before each timing, with what is timed."""
        if not self._rounds:
            self._until = time.monotonic() + self._seconds
        order = [i for i in range(len(self._parts)) if self._calm(i) < self._repeats]
        self._random.shuffle(order)
        found: dict[int, Timing] = {}
        self._rounds.append(found)
        for i in order:
            tell(self._parts[i].what)
            found[i] = await steps.time(self._parts[i].rows)
            self.disturbed += not found[i].is_calm

    def points(self) -> list[Timed]:
        """Return one point for each part: the mean of its timings that count or, if none does, the one that
        was disturbed the least."""
        points = []
        for i in range(len(self._parts)):
            timings = [found[i] for found in self._rounds if i in found]
            counting = [timing for timing in timings if timing.is_calm]
            counting = counting or [min(timings, key=lambda timing: timing.share)]
            points.append(Timed(counting[0].shape, usual_mean([timing.seconds for timing in counting])))
        return points

    def paces(self) -> list[float]:
        """Return how many times as long the steps of each round took as in all rounds, which tells how much
        the machine's speed varied. Rounds that only made a few timings again are left out."""
        usual = [point.seconds for point in self.points()]
        ratios = [
            [timing.seconds / usual[i] for i, timing in found.items() if timing.is_calm]
            for found in self._rounds
        ]
        return [statistics.fmean(found) for found in ratios if found and 2 * len(found) >= len(usual)]

    def _calm(self, i: int) -> int:
        return sum(i in found and found[i].is_calm for found in self._rounds)
