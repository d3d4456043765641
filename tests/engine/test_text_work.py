"""Whose text is worked on when."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from aioengine.errors import EngineStopped
from aioengine.runtime.text_work import LONG, SHORT, TextWork


@contextlib.asynccontextmanager
async def held(work: TextWork, done: list[object] | None = None) -> AsyncIterator[asyncio.Task[str]]:
    """A text that is worked on until the context ends."""
    go, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def first() -> str:
        loop.call_soon_threadsafe(begun.set)
        go.wait(20)
        if done is not None:
            done.append("first")
        return "done"

    task = asyncio.create_task(work.run(SHORT + 1, first))
    await begun.wait()
    yield task
    go.set()
    await asyncio.wait([task])


async def test_short_texts_are_done_at_once_and_long_ones_in_order() -> None:
    work, done = TextWork(threads=1), list[object]()
    async with held(work, done):
        assert await work.run(SHORT, threading.get_ident) == threading.get_ident()
        waiting = [
            asyncio.create_task(work.run(size, lambda size=size: done.append(size)))  # type: ignore[misc]
            for size in (60_000, 20_000, 40_000)
        ]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert done == ["first", 60_000, 40_000]
    assert await work.run(SHORT + 1, lambda: "again") == "again"
    await work.close()


async def test_who_is_cancelled_keeps_the_thread_until_it_is_done() -> None:
    work, done = TextWork(threads=1), list[object]()
    async with held(work, done) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        second = asyncio.create_task(work.run(SHORT + 1, lambda: done.append("second")))
        third = asyncio.create_task(work.run(SHORT + 2, lambda: done.append("third")))
        await asyncio.sleep(0.01)
        assert not done
    await second
    third.cancel()  # it may have been given its turn already
    await asyncio.gather(third, return_exceptions=True)
    assert done[:2] == ["first", "second"]
    assert await work.run(SHORT + 1, lambda: "free") == "free"
    await work.close()


async def test_errors_and_the_end() -> None:
    work = TextWork(threads=1)
    with pytest.raises(ZeroDivisionError):
        await work.run(SHORT + 1, lambda: 1 / 0)
    async with held(work) as running:
        waiting = asyncio.create_task(work.run(SHORT + 1, lambda: "never"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(work.close())
        with pytest.raises(EngineStopped):
            await waiting
    assert await running == "done"
    await closing
    with pytest.raises(EngineStopped):
        await work.run(SHORT + 1, lambda: "late")


async def order_of(jobs: list[tuple[str, str, int]], *, threads: int) -> list[str]:
    """(name, owner, size) each, asked for while all threads are busy: in which order they begin."""
    work = TextWork(threads=threads)
    go = threading.Event()
    begun: list[str] = []
    busy = [asyncio.create_task(work.run(SHORT + 1, lambda: go.wait(20), "x")) for _ in range(threads)]
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(work.run(size, lambda name=name: begun.append(name), owner))  # type: ignore[misc]
        for name, owner, size in jobs
    ]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*busy, *tasks)
    await work.close()
    return begun


async def test_a_flood_of_one_owner_delays_no_other() -> None:
    flood = [(f"a{i}", "a", 1_000_000) for i in range(50)]
    order = await order_of([*flood, ("b", "b", 900_000), ("c", "c", 3000)], threads=1)
    assert set(order[:3]) == {"a0", "b", "c"}
    short = [(f"a{i}", "a", 5000) for i in range(400)]
    order = await order_of([*short, ("b", "b", 1_000_000)], threads=1)
    assert order.index("b") <= 1


async def test_long_texts_leave_a_thread_to_others() -> None:
    work = TextWork(threads=2)
    go = threading.Event()
    begun: list[int] = []
    long = [
        asyncio.create_task(work.run(LONG + 1, lambda i=i: (begun.append(i), go.wait(20)), f"owner-{i}"))  # type: ignore[misc]
        for i in range(4)
    ]
    await asyncio.sleep(0)
    for _ in range(3):
        assert await work.run(LONG, lambda: "done", "owner-0") == "done"
    assert begun == [0]
    go.set()
    await asyncio.gather(*long)
    assert begun == [0, 1, 2, 3]
    await work.close()
