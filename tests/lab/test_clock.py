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


def test_timers_go_off_in_order_and_at_their_time() -> None:
    async def wait(seconds: float, seen: list[tuple[float, float]]) -> None:
        await asyncio.sleep(seconds)
        seen.append((seconds, now()))

    async def main() -> list[tuple[float, float]]:
        seen: list[tuple[float, float]] = []
        await asyncio.gather(*(wait(seconds, seen) for seconds in (3.0, 1.0, 2.0, 1.0)))
        return seen

    assert run_in_virtual_time(main()) == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_timeouts_are_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return now()

    assert run_in_virtual_time(main()) == 5.0


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


def test_errors_come_out() -> None:
    async def main() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_in_virtual_time(main())
