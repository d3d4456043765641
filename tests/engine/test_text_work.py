"""Whose text is worked on when."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aioengine.errors import EngineStopped
from aioengine.runtime.text_work import SHORT, TextWork


async def test_short_texts_are_done_at_once_and_the_shortest_long_one_is_next() -> None:
    work = TextWork(threads=1)
    go, begun = threading.Event(), asyncio.Event()
    done: list[int] = []
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(20)
        done.append(0)

    running = asyncio.create_task(work.run(SHORT + 1, first))
    await begun.wait()
    assert await work.run(SHORT, threading.get_ident) == threading.get_ident()
    sizes = [300_000, 100_000, 200_000, 100_000]
    waiting = [
        asyncio.create_task(work.run(size, lambda i=i: done.append(i + 1)))  # type: ignore[misc]
        for i, size in enumerate(sizes)
    ]
    await asyncio.sleep(0)
    waiting[2].cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(running, *waiting, return_exceptions=True)
    assert done == [0, 2, 4, 1]
    assert await work.run(SHORT + 1, lambda: "again") == "again"
    await work.close()


async def test_a_long_text_is_not_overtaken_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioengine.runtime.text_work.RATE", 1e9)
    work = TextWork(threads=1)
    go, begun = threading.Event(), asyncio.Event()
    done: list[str] = []
    loop = asyncio.get_running_loop()
    running = asyncio.create_task(
        work.run(SHORT + 1, lambda: (loop.call_soon_threadsafe(begun.set), go.wait(20)))
    )
    await begun.wait()
    long = asyncio.create_task(work.run(1_000_000, lambda: done.append("long")))
    await asyncio.sleep(0.01)  # ten times as long as the long one takes alone
    short = asyncio.create_task(work.run(SHORT + 1, lambda: done.append("short")))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(running, long, short)
    assert done == ["long", "short"]
    await work.close()


async def test_who_is_cancelled_keeps_the_thread_until_it_is_done() -> None:
    work = TextWork(threads=1)
    go, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    order: list[str] = []

    def long() -> None:
        loop.call_soon_threadsafe(begun.set)
        go.wait(20)
        order.append("first")

    task = asyncio.create_task(work.run(SHORT + 1, long))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    second = asyncio.create_task(work.run(SHORT + 1, lambda: order.append("second")))
    third = asyncio.create_task(work.run(SHORT + 2, lambda: order.append("third")))
    await asyncio.sleep(0.01)
    assert not order
    go.set()
    await second
    third.cancel()  # it may have been given its turn already
    await asyncio.gather(third, return_exceptions=True)
    assert order[:2] == ["first", "second"]
    assert await work.run(SHORT + 1, lambda: "free") == "free"
    await work.close()


async def test_errors_and_the_end() -> None:
    work = TextWork(threads=1)
    with pytest.raises(ZeroDivisionError):
        await work.run(SHORT + 1, lambda: 1 / 0)
    go, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def long() -> str:
        loop.call_soon_threadsafe(begun.set)
        go.wait(20)
        return "done"

    running = asyncio.create_task(work.run(SHORT + 1, long))
    await begun.wait()
    waiting = asyncio.create_task(work.run(SHORT + 1, lambda: "never"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(work.close())
    with pytest.raises(EngineStopped):
        await waiting
    go.set()
    assert await running == "done"
    await closing
    with pytest.raises(EngineStopped):
        await work.run(SHORT + 1, lambda: "late")
