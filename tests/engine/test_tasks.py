"""Waiting for tasks: nothing is left behind, whenever and however often the caller is cancelled."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import EngineOverloaded
from aioengine.tasks import SharedWork, run_to_completion, together


class Failed(Exception):
    pass


async def work(turns: int, log: list[str], *, fails: bool = False) -> int:
    """Take some turns of the loop."""
    try:
        for _ in range(turns):
            await asyncio.sleep(0)
        if fails:
            raise Failed
        return turns
    finally:
        log.append("ended")


@given(turns=st.integers(0, 9), cancels=st.lists(st.integers(0, 9), max_size=4), fails=st.booleans())
def test_work_runs_to_completion(turns: int, cancels: list[int], fails: bool) -> None:
    async def run() -> None:
        log: list[str] = []
        task = asyncio.create_task(run_to_completion(work(turns, log, fails=fails)))
        await asyncio.sleep(0)
        cancelled = False
        for wait in cancels:
            for _ in range(wait):
                await asyncio.sleep(0)
            cancelled |= task.cancel()
        await asyncio.wait([task])
        assert log == ["ended"]
        if cancelled:
            assert task.cancelled()
        elif fails:
            assert isinstance(task.exception(), Failed)
        else:
            assert task.result() == turns

    asyncio.run(run())


@given(
    turns=st.lists(st.integers(0, 5), max_size=5),
    failing=st.none() | st.integers(0, 4),
    cancel_after=st.none() | st.integers(1, 5),
)
def test_together_leaves_none_behind(turns: list[int], failing: int | None, cancel_after: int | None) -> None:
    async def run() -> None:
        log: list[str] = []
        works = [work(count, log, fails=index == failing) for index, count in enumerate(turns)]
        task = asyncio.create_task(together(works))
        if cancel_after is not None:
            for _ in range(cancel_after):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(log) <= len(turns)
        if not task.cancelled() and task.exception() is None:
            assert task.result() == turns and len(log) == len(turns)
        elif not task.cancelled():
            assert isinstance(task.exception(), Failed) and failing is not None and failing < len(turns)
        else:
            assert cancel_after is not None

    asyncio.run(run())


async def test_what_ignores_its_cancellation_holds_up_nobody() -> None:
    shared, go = SharedWork[str, None](), asyncio.Event()

    async def stubborn() -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    callers = [asyncio.create_task(shared.result("a", stubborn)) for _ in range(2)]
    for _ in range(2):
        await asyncio.sleep(0)
    tasks = shared.close(Failed())
    ends = await asyncio.gather(*callers, shared.result("b", stubborn), return_exceptions=True)
    assert [type(end) for end in ends] == [Failed] * 3 and not shared.jobs
    assert [task.done() for task in tasks] == [False]
    go.set()
    await asyncio.wait(tasks)


async def test_each_that_waits_raises_an_error_of_its_own() -> None:
    shared = SharedWork[str, None]()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise EngineOverloaded("later", bound="server") from Failed()

    first, second = await asyncio.gather(
        *(shared.result("a", fails) for _ in range(2)), return_exceptions=True
    )
    assert isinstance(first, EngineOverloaded) and isinstance(second, EngineOverloaded)
    assert first is not second and first.__traceback__ is not second.__traceback__
    assert (str(first), first.bound, type(first.__cause__)) == (str(second), second.bound, Failed)
