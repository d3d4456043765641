"""Streams that run while something goes wrong, and a count of everything that could be left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from support.engine_fixtures import Tiny, greedy, prompt_of
from support.waiting import until

from aioengine import AsyncEngine
from aioengine.adapters.read_threads import Progress
from aioengine.adapters.store import AdapterStore
from aioengine.step import AdapterSource

STREAMS: tuple[str | None, ...] = (None, "good", "other", "good")
LENGTH = 40


@asynccontextmanager
async def under_load(engine: AsyncEngine, tiny: Tiny) -> AsyncIterator[None]:
    """Streams on the base model and two adapters run before, during and after what happens inside; their
    tokens are exactly those of transformers and peft, and in the end nothing is left that was not there."""
    adapters = {"good": "rslora", "other": "patterns"}
    for name, source in adapters.items():
        engine.register_adapter(name, tiny.adapters[source])
    await asyncio.gather(*(engine.complete([7], greedy(1), adapter=name) for name in adapters))
    before = Held()
    streams = [engine.generate(prompt_of(i, 5 + i), greedy(LENGTH), adapter=a) for i, a in enumerate(STREAMS)]
    first = [await anext(stream) for stream in streams]
    assert not any(output.finished for output in first)
    rest = [asyncio.create_task(last_of(stream)) for stream in streams]
    try:
        yield
    finally:
        tokens = await asyncio.gather(*rest)
    for i, (adapter, found) in enumerate(zip(STREAMS, tokens, strict=True)):
        assert found == tiny.expected(prompt_of(i, 5 + i), LENGTH, adapter and adapters[adapter])
    await assert_nothing_left(engine)
    await before.check()


async def last_of(stream: AsyncIterator[object]) -> list[int]:
    async for output in stream:
        last = output
    return last.token_ids  # type: ignore[attr-defined, no-any-return]


async def assert_nothing_left(engine: AsyncEngine) -> None:
    """No request, no KV block, no slot in use; and the CPU memory is that of the adapters that are there."""
    await until(lambda: engine.stats().kv_blocks_free == engine.stats().kv_blocks)
    await until(lambda: all(a.location != "loading" for a in engine.adapters()))
    await until(lambda: all(slot.state != "LOADING" for slot in engine.stats().slots))
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert all(slot.running == 0 for slot in stats.slots)
    engine.check_invariants()
    there = [a for a in engine.adapters() if a.location in ("cpu", "slot")]
    await until(lambda: engine.stats().cpu_adapters == len(there))  # a version given up goes with its read
    images = engine._built.device.store.images
    assert len(images) == len(there)
    assert sum(image.nbytes for image in images.values()) == sum(a.bytes for a in there)


class Held:
    """Threads, tasks and open files at one time."""

    def __init__(self) -> None:
        self._before = self.now()

    def now(self) -> set[object]:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        return {*threading.enumerate(), *tasks, *open_files()}

    async def check(self) -> None:
        """What ends by itself is given the time to; then there is nothing more than there was."""
        if not self.now() <= self._before:
            gc.collect()  # an error may hold a frame that holds a file
        await until(lambda: self.now() <= self._before)


def open_files() -> set[tuple[str, str]]:
    folder = "/proc/self/fd"
    found = set()
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        try:
            found.add((name, os.readlink(f"{folder}/{name}")))
        except OSError:
            continue  # the listing's own
    return found


class Reads:
    """What the reads of an adapter do first, in their threads, by the adapter's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: dict[str, Callable[[], None]] = {}
        self.count: dict[str, int] = {}
        original = AdapterStore.begin

        def begin(
            store: AdapterStore, name: str, path: str, progress: Progress, files: AdapterSource | None
        ) -> object:
            self.count[name] = self.count.get(name, 0) + 1
            self.before.get(name, lambda: None)()
            return original(store, name, path, progress, files)

        monkeypatch.setattr(AdapterStore, "begin", begin)

    @contextmanager
    def hang(self, name: str) -> Iterator[Gate]:
        """The reads of ``name`` that begin inside do not return before the end, or before it is opened."""
        gate = self.before[name] = Gate()
        try:
            yield gate
        finally:
            self.before.pop(name, None)
            gate.open()


class Gate:
    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._opened.wait(30)

    async def reached(self) -> None:
        await until(self._reached.is_set)

    def open(self) -> None:
        self._opened.set()


async def error_of(work: Awaitable[object]) -> BaseException:
    """What it raises."""
    try:
        result = await work
    except Exception as error:
        return error
    raise AssertionError(f"it did not fail, but returned {result!r}")
