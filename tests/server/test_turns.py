"""Turns on the loop: bounded in a pass, and with rests where connections wait on and on; in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from aioengine.lab.simulation.clock import VirtualTimeLoop, run_in_virtual_time
from aioengine.server.transport.protocol import PATIENCE, PER_PASS, Turns

COST = 0.0005
"""Seconds that a turn takes, with the answer that it leads to."""


def turns_of(is_busy: bool) -> tuple[VirtualTimeLoop, Turns]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop, Turns(lambda: is_busy, loop, loop.time)


class Client:
    """Has ``left`` requests to be parsed, one after the other."""

    def __init__(self, turns: Turns, left: int, owner: str = "a") -> None:
        self.owner = owner
        self.left = left
        self._turns = turns
        self.ask()

    def ask(self) -> None:
        self._turns.ask(self.owner, self.take_turn)

    def take_turn(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.go_to(loop.time() + COST)
        self.left -= 1
        if self.left:
            self.ask()


def taken(is_busy: bool, clients: int, requests: int, seconds: float) -> list[int]:
    """The numbers of turns that clients have had after so many seconds."""

    async def main() -> list[int]:
        _, turns = turns_of(is_busy)
        all_of_them = [Client(turns, requests) for _ in range(clients)]
        await asyncio.sleep(seconds)
        return [requests - client.left for client in all_of_them]

    return run_in_virtual_time(main())


def test_half_of_the_time_is_left_to_the_steps_while_connections_flood() -> None:
    done = taken(True, 30, 10_000, seconds=10.0)
    assert 10.0 - sum(done) * COST > 0.45 * (10.0 - PATIENCE)
    assert max(done) - min(done) <= 2
    assert sum(done) > 0.4 * 10.0 / COST


@pytest.mark.parametrize(("is_busy", "clients", "requests"), [(False, 30, 10_000), (True, 150, 1)])
def test_nobody_rests_in_a_burst_or_while_nothing_is_answered(
    is_busy: bool, clients: int, requests: int
) -> None:
    seconds = min(clients * requests * COST, 1.0)
    assert sum(taken(is_busy, clients, requests, seconds)) == pytest.approx(seconds / COST, abs=PER_PASS)


def test_one_connection_of_another_owner_waits_for_few_of_a_flood() -> None:
    async def main() -> None:
        loop, turns = turns_of(True)
        flooders = [Client(turns, 3) for _ in range(3000)]
        await asyncio.sleep(0.2)
        began, before = loop.time(), sum(client.left for client in flooders)
        other = Client(turns, 1, owner="b")
        while other.left:
            await asyncio.sleep(COST)
        assert before - sum(client.left for client in flooders) <= 2 * PER_PASS
        assert loop.time() - began < 0.1

    run_in_virtual_time(main())


def test_a_turn_that_fails_keeps_nobody_from_theirs() -> None:
    async def main() -> None:
        loop, turns = turns_of(False)
        loop.set_exception_handler(lambda _, told: failed.append(told["exception"]))
        failed: list[BaseException] = []
        turns.ask("a", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        for _ in range(2):
            client = Client(turns, 1)
            await asyncio.sleep(1.0)
            assert not client.left
        assert [type(error) for error in failed] == [ZeroDivisionError]

    run_in_virtual_time(main())
