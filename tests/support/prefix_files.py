"""Engines with a folder of prefixes, and what they report about it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_fixtures import MakeEngine, Tiny, prompt_of

from aioengine import AsyncEngine, CachePin, SamplingParams
from aioengine.events import Event, PrefixMoved
from aioengine.runtime.prefixes.files import PrefixFiles

PREFIX = prompt_of(1, 41)
PIN = CachePin(tokens=40, seconds=3600, save=True)
SCORED = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3)


class Moves:
    """The moves of prefixes that an engine has reported."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.all: list[PrefixMoved] = []
        self._new = asyncio.Event()
        engine.add_listener(self._handle)

    def _handle(self, event: Event) -> None:
        if isinstance(event, PrefixMoved):
            self.all.append(event)
            self._new.set()

    def count(self, action: str) -> int:
        return sum(move.action == action for move in self.all)

    async def saved(self, count: int = 1) -> None:
        """Wait until so many have been written."""
        while self.count("saved") < count:
            self._new.clear()
            await self._new.wait()


@contextlib.asynccontextmanager
async def running(make: MakeEngine, tiny: Tiny, folder: Path, **fields: Any) -> AsyncIterator[Moves]:
    async with make(tiny, kv_cache_dir=str(folder), **fields) as engine:
        yield Moves(engine)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("kv-*"))


@contextlib.contextmanager
def stuck_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[asyncio.Event, threading.Event]]:
    """Let reads of files wait: (set when one has begun, set it to let them go on)."""
    loop, begun, go_on, read = (
        asyncio.get_running_loop(),
        asyncio.Event(),
        threading.Event(),
        PrefixFiles.read,
    )

    def stuck(self: PrefixFiles, name: str, about: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        return read(self, name, about)

    monkeypatch.setattr(PrefixFiles, "read", stuck)
    try:
        yield begun, go_on
    finally:
        go_on.set()
