"""A simulated device and disk that fail by seed, and notice what must never be asked of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from support.step_tokens import tokens_of

from aioengine.adapters.loader import BaseLoader
from aioengine.adapters.read_threads import Progress
from aioengine.config import LoRAConfig
from aioengine.errors import AdapterInvalid, AdapterLoadError, AdapterTooLarge, EngineDead
from aioengine.executors.base import Ended
from aioengine.lab.costs.model import CostModel
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.simulation.transfers import SharedStage
from aioengine.step import (
    Fault,
    LoadedAdapter,
    ReadOrder,
    Sampled,
    SequenceWork,
    StepBatch,
    StepResult,
)

MAX_RANK = 16
VOCABULARY = 997
"""Tokens that are sampled; the end token is not among them."""


class Rates(NamedTuple):
    """How often things go wrong: the part of all reads, copies, rows or steps."""

    slow_read: float = 0.0
    hanging_read: float = 0.0
    passing_read: float = 0.0
    """Errors that a retry may cure."""
    failed_read: float = 0.0
    bad_adapter: float = 0.0
    """Of the adapters, those that can never be loaded."""
    slow_copy: float = 0.0
    failed_copy: float = 0.0
    failed_row: float = 0.0
    slow_step: float = 0.0
    lethal_step: float = 0.0
    """It raises, and with it the engine dies."""


class Memory:
    """What the device and the CPU cache really hold, as against what the core believes.

    ``problem`` is told of whatever must never happen.
    """

    def __init__(
        self,
        slots: int,
        block_size: int,
        problem: Callable[[str], None],
    ) -> None:
        self.problem = problem
        self.block_size = block_size
        self.regions: dict[int, tuple[int, int]] = {}
        """Where slots share a memory: beginning and end, in bytes, of what each slot holds."""
        self.sizes: dict[int, int] = {}
        """Bytes in a slot of what was read, by uid."""
        self.slots: list[int | None] = [None] * slots
        """The uid of the adapter in each slot; None if there is none, or half of one."""
        self.writing: set[int] = set()
        self.reading: set[int] = set()
        """The slots that the step in flight reads."""
        self.cpu: dict[int, str] = {}
        """What was read, by uid: its contents' digest."""
        self.blocks: dict[int, tuple[str, tuple[int, ...]]] = {}
        """What KV blocks were computed from: the adapter's digest, and all tokens up to their end."""
        self.lost = False
        self.losses = 0

    def lose(self) -> None:
        self.lost = True
        self.losses += 1
        self.slots = [None] * len(self.slots)
        self.writing.clear()
        self.regions.clear()
        self.cpu.clear()
        self.blocks.clear()

    def generation(self) -> int:
        """How often it was lost; raises EngineDead while it is."""
        if self.lost:
            raise EngineDead("planned: the device was lost")
        return self.losses

    def write(self, begin: int, end: int, slot: int) -> None:
        """Bytes are written for ``slot``: what was there is gone."""
        for other, (first, last) in list(self.regions.items()):
            if other != slot and first < end and begin < last:
                if other in self.reading or other in self.writing:
                    self.problem(f"slot {other} is overwritten while it is read or written")
                self.slots[other] = None
                del self.regions[other]

    def digest(self, row: SequenceWork) -> str:
        uid = self.slots[row.slot] if row.slot >= 0 else None
        return "" if uid is None else self.cpu.get(uid, "")


class Row(NamedTuple):
    """A row of a step as it was when the step began; the core's own lists may change meanwhile."""

    work: SequenceWork
    uid: int | None
    digest: str
    known: tuple[int, ...]
    blocks: tuple[int, ...]


class FaultyDevice(SimulatedDevice):
    """Samples tokens that depend on the request and the position alone, after checking that the step may
    run: its slots hold the versions that its requests were accepted for, and are not being written; the
    KV that it reads was computed from the same tokens with the same adapter."""

    repeats = False

    def __init__(
        self,
        costs: CostModel,
        *,
        end_token: int,
        memory: Memory,
        rates: Rates,
        rng: random.Random,
        restarts: bool,
        version_of: Callable[[str], int | None],
        lora: LoRAConfig,
        seed: int,
    ) -> None:
        super().__init__(costs, token=0, end_token=end_token, max_rank=MAX_RANK)
        self.loader = FaultyLoader(costs, memory, rates=rates, rng=rng, lora=lora, seed=seed)
        self.memory = memory
        self.restart = self._restart if restarts else None
        self.failed_rows: dict[str, str] = {}
        """By request: what its error comes from."""
        self.killed = False
        """The engine may be dead now."""
        self._end_token = end_token
        self._rates = rates
        self._rng = rng
        self._version_of = version_of

    def lose(self) -> None:
        """The device is gone, with all that it holds."""
        if not self.memory.lost:
            self.killed = self.killed or self.restart is None
            self.memory.lose()
            assert self.on_loss is not None
            self.on_loss(self._lost())

    async def _restart(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.0, 2.0))
        if self._rng.random() < 0.1:
            self.killed = True
            raise EngineDead("planned: it does not start again")
        self.memory.lost = False

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        memory = self.memory
        rows: list[Row] | None = None
        if not memory.lost:
            rows = [self._begin_row(work) for work in batch.sequences]
            self._check_whole(batch)
            memory.reading = {row.work.slot for row in rows if row.work.slot >= 0}
        self._step = asyncio.get_running_loop().create_task(self._run(batch, rows, ended))

    async def _run(self, batch: StepBatch, rows: list[Row] | None, ended: Ended) -> None:
        try:
            result = await self._execute(batch, rows)
        except Exception as error:
            ended(error)
        else:
            ended(result)

    async def _execute(self, batch: StepBatch, rows: list[Row] | None) -> StepResult:
        memory, rng = self.memory, self._rng
        if rows is None:
            raise self._lost()
        try:
            if rng.random() < self._rates.slow_step:
                await asyncio.sleep(rng.uniform(0.1, 3.0))
            done: asyncio.Future[StepResult | Exception] = asyncio.get_running_loop().create_future()
            super().begin(batch, done.set_result)
            result = await done
            assert not isinstance(result, Exception)
        finally:
            memory.reading = set()
        if memory.lost:
            raise self._lost()
        if rng.random() < self._rates.lethal_step:
            self.killed = True
            raise RuntimeError("planned: the step failed")
        return StepResult.of(map(self._finish_row, rows, tokens_of(result)))

    def _lost(self) -> EngineDead:
        return EngineDead("planned: the device was lost")

    def _begin_row(self, work: SequenceWork) -> Row:
        memory = self.memory
        expected = self._version_of(work.request_id)
        if work.slot >= 0 and work.slot in memory.writing:
            memory.problem(f"a step reads slot {work.slot} while it is written")
        found = memory.slots[work.slot] if work.slot >= 0 else None
        if found != expected:
            memory.problem(
                f"{work.request_id} runs on slot {work.slot} with version {found}, not on {expected}"
            )
        row = Row(work, found, memory.digest(work), tuple(work.history), tuple(work.block_table))
        self._check_blocks(row)
        return row

    def _check_blocks(self, row: Row) -> None:
        """That all KV before the row's own tokens is there, and is its own."""
        size, start = self.memory.block_size, row.work.start
        if len(row.blocks) * size < start + len(row.work.tokens):
            self.memory.problem(f"{row.work.request_id} has too few blocks")
        if tuple(row.work.tokens) != row.known[start : start + len(row.work.tokens)]:
            self.memory.problem(f"{row.work.request_id} computes other tokens than it has")
        for index in range(-(-start // size)):
            until = min((index + 1) * size, start)
            digest, tokens = self.memory.blocks.get(row.blocks[index], ("nothing", ()))
            if digest != row.digest or tokens[:until] != row.known[:until]:
                self.memory.problem(
                    f"{row.work.request_id} reads KV that is not its own from block {row.blocks[index]}: "
                    f"of adapter {digest!r}, not {row.digest!r}, or of other tokens"
                )
                return

    def _check_whole(self, batch: StepBatch) -> None:
        size, problem = self.memory.block_size, self.memory.problem
        slots = [work.slot for work in batch.sequences]
        if slots != sorted(slots) or len({slot for slot in slots if slot >= 0}) > len(self.memory.slots):
            problem(f"a batch with the slots {slots}")
        written = [
            block
            for work in batch.sequences
            for block in work.block_table[work.start // size : -(-(work.start + len(work.tokens)) // size)]
        ]
        if len(written) != len(set(written)):
            problem("two rows of a step write one KV block")

    def _finish_row(self, row: Row, tokens: Sequence[int]) -> list[Sampled]:
        work, memory = row.work, self.memory
        if work.slot >= 0 and memory.slots[work.slot] != row.uid:
            memory.problem(f"slot {work.slot} was changed while a step read it")
        size, until = memory.block_size, work.start + len(work.tokens)
        for index in range(work.start // size, -(-until // size)):
            content = row.digest, row.known[: min((index + 1) * size, until)]
            memory.blocks[row.blocks[index]] = content
        if not tokens:
            return []
        if self._rng.random() < self._rates.failed_row:
            fault: Fault = self._rng.choice(["model", "request"])
            self.failed_rows[work.request_id] = fault
            return [Sampled(-1, error="planned", fault=fault)]
        if tokens[0] == self._end_token:
            return [Sampled(self._end_token)]
        return [Sampled(token_at(work.request_id, until - work.prompt_len))]

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        return await self.loader.load(order)

    async def place(self, uid: int, slot: int, offset: int) -> float:
        memory, rng = self.memory, self._rng
        losses = memory.generation()
        if uid not in memory.cpu:
            memory.problem(f"version {uid} is copied to a slot and is not on the CPU")
        if slot in memory.writing:
            memory.problem(f"slot {slot} is written twice at once")
        self._check_unread(slot)
        memory.regions[slot] = offset, offset + memory.sizes[uid]
        memory.write(*memory.regions[slot], slot)
        memory.writing.add(slot)
        memory.slots[slot] = None
        start = asyncio.get_running_loop().time()
        try:
            if rng.random() < self._rates.slow_copy:
                await asyncio.sleep(rng.uniform(0.1, 3.0))
            with self.disturbed(self._costs.slot.slowdown):
                await self._slot.transfer(self._costs.adapter_nbytes(MAX_RANK))
            if memory.generation() != losses:
                raise EngineDead("planned: the device was lost")
            if rng.random() < self._rates.failed_copy:
                raise OSError("planned: the copy failed")
        finally:
            if memory.losses == losses:
                memory.writing.discard(slot)
        if uid not in memory.cpu:
            memory.problem(f"version {uid} left the CPU while it was copied to a slot")
        self._check_unread(slot)
        memory.slots[slot] = uid
        return asyncio.get_running_loop().time() - start

    def _check_unread(self, slot: int) -> None:
        if slot in self.memory.reading:
            self.memory.problem(f"slot {slot} is written while a step reads it")

    def drop(self, uid: int) -> None:
        if uid not in self.memory.cpu and not self.memory.losses:
            self.memory.problem(f"version {uid} is dropped, and is not there")
        self.memory.cpu.pop(uid, None)

    async def close(self) -> None:
        await self.loader.close()


def token_at(request_id: str, index: int) -> int:
    """The request's ``index``-th output token, from 0, wherever and however often it is computed."""
    return (int(request_id[1:]) * 131 + index * 7) % VOCABULARY


class FaultyLoader(BaseLoader):
    """Retries, time limits and giving up are the real loader's; only the reads are made up, in tasks of their
    own that go on when nobody waits for them any more, as a thread does."""

    def __init__(
        self,
        costs: CostModel,
        memory: Memory,
        *,
        rates: Rates,
        rng: random.Random,
        lora: LoRAConfig,
        seed: int,
    ) -> None:
        super().__init__(lora, seed)
        self._costs = costs
        self._memory = memory
        self._rates = rates
        self._rng = rng
        self._seed = seed
        self._disk = SharedStage(costs.disk)
        self._left_behind: dict[asyncio.Task[LoadedAdapter], str] = {}
        """Reads that were given up."""

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        loop = asyncio.get_running_loop()
        start = loop.time()
        done = await super().load(order)
        return done._replace(seconds=loop.time() - start)  # the real one looks at the real clock

    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        losses, path = self._memory.generation(), order.path
        reading = asyncio.get_running_loop().create_task(self._thread(order.name, path), name=f"read {path}")
        reading.add_done_callback(lambda _: setattr(progress, "running", False))
        try:
            await asyncio.wait([reading])
        except asyncio.CancelledError:
            self._left_behind[reading] = path
            reading.add_done_callback(self._forget)
            raise
        found = reading.result()
        if self._memory.generation() != losses:
            raise EngineDead("planned: the device was lost")
        if order.uid in self._memory.cpu:
            self._memory.problem(f"version {order.uid} was read twice")
        self._memory.cpu[order.uid] = found.digest
        self._memory.sizes[order.uid] = found.nbytes
        return found

    def _forget(self, reading: asyncio.Task[LoadedAdapter]) -> None:
        del self._left_behind[reading]
        if not reading.cancelled():
            reading.exception()

    async def _thread(self, name: str, path: str) -> LoadedAdapter:
        """What a thread would do that reads the adapter."""
        rng, rates = self._rng, self._rates
        own = random.Random(f"{self._seed} {path}")  # what the adapter itself is like
        rank = own.choice([2, 8, MAX_RANK])
        draw = rng.random()
        if (draw := draw - rates.hanging_read) < 0:
            await asyncio.sleep(rng.uniform(3.0, 40.0))
        elif (draw := draw - rates.slow_read) < 0:
            await asyncio.sleep(rng.uniform(0.5, 3.0))
        await self._disk.transfer(self._costs.adapter_nbytes(rank))
        if own.random() < rates.bad_adapter:
            if own.random() < 0.3:
                raise AdapterTooLarge("planned: its rank", name=name, path=path)
            raise AdapterInvalid("planned: malformed", name=name, path=path)
        if 0 <= draw < rates.passing_read:
            raise AdapterLoadError("planned: EIO", name=name, path=path, transient=True)
        if 0 <= draw - rates.passing_read < rates.failed_read:
            raise rng.choice(
                [
                    AdapterLoadError("planned: EACCES", name=name, path=path),
                    RuntimeError("planned: unexpected"),
                    MemoryError(),
                ]
            )
        nbytes = self._costs.adapter_nbytes(rank)
        return LoadedAdapter(rank, nbytes, nbytes, path)

    async def close(self) -> None:
        left = list(self._left_behind)
        for reading in left:
            reading.cancel()
        if left:
            await asyncio.wait(left)
