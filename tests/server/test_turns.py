"""Turns on the loop: bounded in a pass, and with rests where connections wait on and on."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from aioengine.server.bounds import PATIENCE, PER_PASS, Turns

COST = 0.0005
"""Seconds that a turn takes, with the answer that it leads to."""


class Loop:
    """Just what Turns asks of a loop, in virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.idle = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.call_later(0.0, callback, *args)

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._due, (self.now + delay, next(self._order), callback, args))

    def run(self, until: float) -> None:
        while self._due and self.now < until:
            due, _, callback, args = heapq.heappop(self._due)
            self.idle += max(due - self.now, 0.0)
            self.now = max(due, self.now)
            callback(*args)


class Client:
    """Has ``left`` requests to be parsed, one after the other."""

    def __init__(self, loop: Loop, turns: Turns, left: int, owner: str = "a") -> None:
        self.owner = owner
        self.left = left
        self._loop, self._turns = loop, turns

    def take_turn(self) -> None:
        self._loop.now += COST
        self.left -= 1
        if self.left:
            self.ask()

    def ask(self) -> None:
        self._turns.ask(self.owner, self.take_turn)


def turns_on(loop: Loop, is_busy: bool) -> Turns:
    return Turns(lambda: is_busy, cast(asyncio.AbstractEventLoop, loop), lambda: loop.now)


def flood(is_busy: bool, clients: int, requests: int) -> tuple[Loop, list[Client], Turns]:
    loop = Loop()
    turns = turns_on(loop, is_busy)
    all_of_them = [Client(loop, turns, requests) for _ in range(clients)]
    for client in all_of_them:
        client.ask()
    return loop, all_of_them, turns


def test_half_of_the_time_is_left_to_the_steps_while_connections_flood() -> None:
    loop, clients, _ = flood(True, 30, 10_000)
    loop.run(until=10.0)
    assert loop.idle > 0.45 * (10.0 - PATIENCE)
    done = [10_000 - client.left for client in clients]
    assert max(done) - min(done) <= 2
    assert sum(done) > 0.4 * 10.0 / COST


@pytest.mark.parametrize(("is_busy", "clients", "requests"), [(False, 30, 10_000), (True, 150, 1)])
def test_nobody_rests_in_a_burst_or_while_nothing_is_answered(
    is_busy: bool, clients: int, requests: int
) -> None:
    loop, _, _ = flood(is_busy, clients, requests)
    loop.run(until=1.0)
    assert loop.idle == pytest.approx(0.0)


def test_one_connection_of_another_owner_waits_for_few_of_a_flood() -> None:
    loop, flooders, turns = flood(True, 3000, 3)
    loop.run(until=0.2)
    other = Client(loop, turns, 1, owner="b")
    began, before = loop.now, sum(client.left for client in flooders)
    other.ask()
    while other.left:
        loop.run(until=loop.now + COST)
    assert before - sum(client.left for client in flooders) <= 2 * PER_PASS
    assert loop.now - began < 0.1


def test_a_turn_that_fails_keeps_nobody_from_theirs() -> None:
    class Broken(Client):
        def take_turn(self) -> None:
            raise RuntimeError("for this test")

    loop = Loop()
    turns = turns_on(loop, False)
    Broken(loop, turns, 1).ask()
    with pytest.raises(RuntimeError, match="for this test"):
        loop.run(until=1.0)
    before = Client(loop, turns, 1)
    before.ask()
    loop.run(until=1.0)
    assert not before.left
