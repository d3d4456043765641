"""Virtual time: the loop's clock jumps from timer to timer, and nothing can hang."""

from __future__ import annotations

import asyncio

import pytest

from aioengine.lab.simulation.clock import NothingToWaitFor, VirtualTimeLoop, run_in_virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_year_takes_no_time() -> None:
    async def main() -> tuple[float, float]:
        start = now()
        await asyncio.sleep(365 * 86400)
        return start, now()

    assert run_in_virtual_time(main()) == (0.0, 365 * 86400)


def test_an_error_when_everything_waits() -> None:
    ended = []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(now())

    async def main() -> None:
        await asyncio.sleep(7)
        await asyncio.create_task(wait_for_ever(), name="the one that hangs")

    with pytest.raises(NothingToWaitFor, match=r"at 7 s .*the one that hangs"):
        run_in_virtual_time(main())
    assert ended == [7.0]  # it was cancelled, as asyncio.run does


async def test_inside_a_running_loop() -> None:
    """As in a notebook; and the loop around it is not touched."""

    async def main() -> tuple[bool, float]:
        await asyncio.sleep(100)
        return isinstance(asyncio.get_running_loop(), VirtualTimeLoop), now()

    assert run_in_virtual_time(main()) == (True, 100.0)
    assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
