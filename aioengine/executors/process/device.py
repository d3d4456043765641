"""The process device: the model in separate processes, one for each tensor-parallel rank.

The application and the model do not share a GIL, and the engine survives a loss of the model: lost workers
can be started again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aioengine.adapters.loader import BaseLoader
from aioengine.adapters.peft.folder import failed
from aioengine.adapters.read_threads import Progress
from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError, EngineDead
from aioengine.executors.base import Device, Ended
from aioengine.executors.process.wire import (
    Drop,
    Finish,
    Masks,
    Place,
    Read,
    ReadDone,
    Step,
    StepEncoder,
)
from aioengine.executors.process.workers import Workers
from aioengine.memory_plan import MemoryPlan
from aioengine.model import constraints
from aioengine.step import LoadedAdapter, ReadOrder, SequenceWork, StepBatch, StepResult

logger = logging.getLogger("aioengine")

WINDOW_SECONDS = 600.0
MAX_RESTARTS = 5
"""Maximum number of restarts within ``WINDOW_SECONDS``. The first is at once, the others after growing
waits."""
FIRST_WAIT_SECONDS = 0.5


class ProcessDevice(BaseLoader, Device):
    """Steps, reads and copies in worker processes. ``config.model`` is a path; ``kind`` says how the workers
    are started. ``vocab``: number of the model's logits."""

    def __init__(self, config: EngineConfig, kind: type[Workers] = Workers, *, vocab: int) -> None:
        super().__init__(config.lora, config.seed)
        self._kind = kind
        self.restart = self._restart if config.restart == "on-failure" else None
        self.workers: Workers
        """The workers that run now; set from the first start on."""
        self._config = config
        self._vocab = vocab
        self._restarts: list[float] = []
        """Times of the last ones."""
        self._steps = StepEncoder()
        self._num_blocks = 0
        self._guided: asyncio.Task[None] | None = None
        """The last step with constraints."""
        self._guides = ThreadPoolExecutor(1, thread_name_prefix="aioengine-guide")

    async def start(self) -> MemoryPlan:
        """Start the workers; returns rank 0's memory plan, whose KV blocks are what all ranks have room for.

        Raises ConfigError if the model is not available or does not fit, and EngineDead if a worker ends.
        """
        self.workers = self._kind(self._config, self._report)
        plan, self.kernels, self.variance = await self.workers.start()
        self._num_blocks = plan.num_blocks
        return plan

    def forget(self, request_id: str) -> None:
        self._steps.forget(request_id)

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        loop = asyncio.get_running_loop()
        try:
            step = self._steps.encode(batch)  # before one of its requests may be forgotten
            if any(row.sample and row.params.constraint is not None for row in batch.sequences):
                self._guided = loop.create_task(self._run_guided(batch, step, ended), name="aioengine-step")
            else:
                self.workers.call(step, StepResult, lambda results: ended(_of_all_ranks(results)))
        except Exception as error:
            loop.call_soon(ended, error)

    async def _run_guided(self, batch: StepBatch, step: Step, ended: Ended) -> None:
        """Run a batch in which some sequences have constraints. These are objects of this process, so one of
        its threads asks them while the workers compute."""
        loop, rows = asyncio.get_running_loop(), batch.sequences
        try:
            workers = self.workers
            results = workers.ask(step, StepResult)
            masks = await loop.run_in_executor(self._guides, _ask_constraints, rows, self._vocab)
            workers.tell(Masks(masks.found | dict.fromkeys(masks.failed, b"")))
            result = _of_all_ranks(await results)
        except Exception as error:
            result = error
        if isinstance(result, StepResult):
            errors = {**result.errors, **{index: (why, "request") for index, why in masks.failed.items()}}
            forced = {index: after for index, after in masks.forced.items() if index not in errors}
            result = result._replace(errors=errors, forced=forced)
        ended(result)

    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        """Let each rank read its share; either all ranks hold an adapter, or none does."""

        def ended(_: object) -> None:
            progress.running = False

        workers = self.workers
        read = Read(order.uid, order.name, order.path, order.files)
        reading = workers.ask(read, ReadDone, progress.moved)
        last: asyncio.Future[Any] = reading
        try:
            answers = await asyncio.shield(reading)
            shares: list[LoadedAdapter] = [answer.adapter for answer in answers]
            if len({(answer.adapter.rank, answer.version) for answer in answers}) > 1:
                failed("its files changed while the ranks read them", transient=True)
            if answers[0].squares:
                last = workers.ask(Finish(order.uid, [answer.squares for answer in answers]), type(None))
                await asyncio.shield(last)
        except BaseException:
            workers.tell(Drop(order.uid))
            raise
        finally:
            last.add_done_callback(ended)  # one that was given up goes on in a worker
            progress.running = not last.done()
        return shares[0]._replace(
            nbytes=sum(share.nbytes for share in shares),
            slot_nbytes=max(share.slot_nbytes for share in shares),
            scalable=all(share.scalable for share in shares),
        )

    async def place(self, uid: int, slot: int, offset: int) -> float:
        """Copy an adapter into a slot of every rank; returns the seconds that the slowest copy took."""
        seconds: list[float] = await self.workers.ask(Place(uid, slot, offset), float)
        return max(seconds)

    def drop(self, uid: int) -> None:
        self.workers.tell(Drop(uid))

    async def _restart(self) -> None:
        """Start the workers again with only the model. Raises EngineDead if that fails too often."""
        cause: AioEngineError | None = self.workers.dead
        while True:
            await self.workers.close()
            now = asyncio.get_running_loop().time()
            self._restarts = [time for time in self._restarts if time > now - WINDOW_SECONDS]
            wait = FIRST_WAIT_SECONDS * (2 ** len(self._restarts) - 1)
            if len(self._restarts) >= MAX_RESTARTS:
                raise EngineDead(
                    f"the workers were lost more than {MAX_RESTARTS} times within "
                    f"{WINDOW_SECONDS:g} seconds, the last time because {cause}"
                ) from cause
            self._restarts.append(now)
            logger.warning("%s; the workers are started again in %.1f s", cause, wait)
            await asyncio.sleep(wait)
            self._steps = StepEncoder()
            self.workers = self._kind(self._config, self._report)
            try:
                await self.workers.start(self._num_blocks)
            except AioEngineError as error:
                cause = error
            else:
                return

    async def close(self) -> None:
        await self.workers.close()
        self._guides.shutdown(wait=True)

    def _report(self, error: EngineDead) -> None:
        if self.on_loss is not None:
            self.on_loss(error)


def _of_all_ranks(results: list[StepResult] | Exception) -> StepResult | Exception:
    """Return what rank 0 has sampled, with the time that the slowest rank took."""
    if isinstance(results, Exception) or len(results) == 1:
        return results if isinstance(results, Exception) else results[0]
    return results[0]._replace(seconds=(max(result.seconds[0] for result in results),))


def _ask_constraints(rows: Sequence[SequenceWork], vocab: int) -> constraints.Masks:
    constraints.begin(rows)
    return constraints.collect(rows, alone=True, vocab=vocab)
