"""What a calibration times on the live engine, and how it is carried out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from aioengine.config import ALLOWED_RANKS
from aioengine.errors import ConfigError
from aioengine.lab.neighbours import Neighbours
from aioengine.lab.probe import Probe, ProbedEngine, ProbedStep
from aioengine.lab.random_adapters import write_random_adapter
from aioengine.request import SamplingParams

Progress = Callable[[int, int, str], None]
"""Told of: parts done, of how many, and what comes next."""

TRIES = 3
CALM = 0.1
"""A part is timed again, up to so many times in all, while other processes take more of the machine."""
CALM_STEPS = 3
"""Between one load and the next, to compare with those beside loads."""


class Design(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is timed. Every step counts, those that compute the prompts of a decode included."""

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sequences that decode together..."""
    contexts: tuple[int, ...] = (64, 384, 1536)
    """...after prompts of so many tokens, as far as ``tokens`` allows."""
    tokens: int = 12_288
    """At most so many prompt tokens at once."""
    steps: int = 12
    """That each of them decodes."""
    adapters: tuple[int, ...] = (1, 2, 4, 8)
    """Distinct ones in a batch of..."""
    adapter_rows: tuple[int, ...] = (8, 32)
    ranks: tuple[int, ...] = (8, 16, 64)
    """...adapters of one rank."""
    prompts: tuple[int, ...] = (16, 64, 256, 1024)
    """Computed while others decode."""
    loads: int = 6
    """Adapters of each rank that are read and copied while others decode."""
    repeats: int = 2
    max_num_batched_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if field != "seed" and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ConfigError(f"design.{field}={value!r}: must not be empty, and nothing below 1")
        if max(self.ranks) > max(ALLOWED_RANKS):
            raise ConfigError(f"design.ranks={self.ranks!r}: slots hold at most rank {max(ALLOWED_RANKS)}")

    @property
    def max_rows(self) -> int:
        return max(*self.rows, *self.adapter_rows)

    @property
    def slots(self) -> int:
        return max(*self.adapters, 2)  # the last free one cannot be pinned

    @property
    def max_rank(self) -> int:
        """The smallest size of slots that has room for all."""
        return min(rank for rank in ALLOWED_RANKS if rank >= max(self.ranks))


class Part(NamedTuple):
    """``rows`` requests of ``context`` prompt tokens, request i with adapter i modulo ``adapters``.

    "decode": each decodes ``Design.steps`` tokens; "mixed": until ``Design.prompts`` are computed too.
    """

    kind: Literal["decode", "mixed"]
    rows: int
    context: int
    adapters: int = 0
    rank: int = 0

    def __str__(self) -> str:
        what = f"{self.rows} rows, {self.context} tokens"
        what += f", {self.adapters} adapters of rank {self.rank}" if self.adapters else ""
        return f"{what}, prompts beside them" if self.kind == "mixed" else what


class LoadsFrom(NamedTuple):
    """Where the loads begin, in the probe's lists."""

    step: int
    move: int


class DesignRun:
    """Carries a design out. What was timed is in ``probe``."""

    def __init__(self, engine: ProbedEngine, design: Design, folder: Path) -> None:
        self.probe: Probe = engine.probe
        self.loads_from = LoadsFrom(0, 0)
        self.neighbours: list[float] = []
        """Of each part: what other processes took of the machine, 0 to 1."""
        self._engine = engine
        self._design = design
        self._random = random.Random(design.seed)
        self._folder = folder

    def parts(self) -> Iterator[Part]:
        """Of one repeat; contexts that the model has no positions for are left out."""
        design, longest = self._design, self._engine.plan.max_model_len - self._design.steps
        contexts = [context for context in design.contexts if context <= longest] or [longest]
        for context in contexts:
            for rows in design.rows:
                if rows * context <= design.tokens or rows == min(design.rows):
                    yield Part("decode", rows, context)
        for rank in design.ranks:
            for rows in design.adapter_rows:
                for count in design.adapters:
                    if count <= rows:
                        yield Part("decode", rows, contexts[0], count, rank)
        for rows in design.adapter_rows:
            yield Part("mixed", rows, contexts[0])
            yield Part("mixed", rows, contexts[0], min(rows, max(design.adapters)), design.ranks[0])

    async def all(self, progress: Progress | None) -> None:
        await asyncio.to_thread(self._write_adapters)
        for rank in self._design.ranks:
            for i in range(max(self._design.adapters)):
                self._engine.register_adapter(f"rank-{rank}-{i}", self._path(rank, i))
        parts = [*self.parts()]
        total = len(parts) * self._design.repeats + 1
        await self._decode(min(parts, key=lambda part: part.rows * part.context))  # warm-up
        self.probe.pause()
        self.probe.steps.clear()
        for repeat in range(self._design.repeats):
            self._random.shuffle(parts)  # a drift of the machine's speed shall not look like an effect
            for i, part in enumerate(parts):
                if progress is not None:
                    progress(repeat * len(parts) + i, total, str(part))
                await self._calmly(part)
        if progress is not None:
            progress(total - 1, total, "loads")
        self.loads_from = LoadsFrom(len(self.probe.steps), len(self.probe.moves))
        await self._loads()
        if progress is not None:
            progress(total, total, "done")

    async def _calmly(self, part: Part) -> None:
        """Keeps the steps of the try that others disturbed the least."""
        steps = self.probe.steps
        tries: list[tuple[float, list[ProbedStep]]] = []
        while not tries or (len(tries) < TRIES and tries[-1][0] > CALM):
            first, neighbours = len(steps), Neighbours()
            await (self._decode(part) if part.kind == "decode" else self._mixed(part))
            self.probe.pause()
            tries.append((neighbours.share(), steps[first:]))
            del steps[first:]
        share, kept = min(tries, key=lambda one: one[0])
        steps += kept
        self.neighbours.append(share)

    def _write_adapters(self) -> None:
        for rank in self._design.ranks:
            for i in range(max(*self._design.adapters, self._design.loads)):
                write_random_adapter(self._path(rank, i), self._engine.model_spec, rank, seed=i)

    def _path(self, rank: int, i: int) -> Path:
        return self._folder / f"{rank}-{i}"

    async def _complete(self, context: int, tokens: int, adapter: str | None) -> None:
        vocab = self._engine.model_spec.vocab_size
        prompt = [self._random.randrange(vocab) for _ in range(context)]
        await self._engine.complete(
            prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), adapter=adapter
        )

    async def _decode(self, part: Part) -> None:
        async with asyncio.TaskGroup() as group:
            for adapter in _adapters(part):
                group.create_task(self._complete(part.context, self._design.steps, adapter))

    async def _mixed(self, part: Part) -> None:
        """Prompts one after the other, while others decode."""
        room = self._engine.plan.max_model_len - 2
        async with self._decoding(part):
            for context in self._design.prompts:
                await self._complete(min(context, room), 2, _adapters(part)[0])

    async def _loads(self) -> None:
        """Adapters are read and copied one after the other, while others decode."""
        part = Part("mixed", min(self._design.adapter_rows), min(c.context for c in self.parts()))
        async with self._decoding(part):
            for rank in self._design.ranks:
                for i in range(self._design.loads):
                    name = f"load-{rank}-{i}"
                    await self.probe.grow(CALM_STEPS)
                    await self._engine.load_adapter(name, self._path(rank, i))
                    await self.probe.grow(CALM_STEPS)
                    await self._engine.pin_adapter(name)
                    await self._engine.unload_adapter(name)

    @asynccontextmanager
    async def _decoding(self, part: Part) -> AsyncIterator[None]:
        """Its requests decode as long as the body runs: one that has ended begins anew."""

        async def decode(adapter: str | None) -> None:
            while True:
                left = self._engine.plan.max_model_len - part.context
                await self._complete(part.context, left, adapter)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(decode(adapter)) for adapter in _adapters(part)]
            await self.probe.grow(CALM_STEPS)
            yield
            for task in tasks:
                task.cancel()


def _adapters(part: Part) -> list[str | None]:
    """Of its requests."""
    if not part.adapters:
        return [None] * part.rows
    return [f"rank-{part.rank}-{row % part.adapters}" for row in range(part.rows)]
