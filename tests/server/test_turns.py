"""Turns on the loop: bounded in a pass, and with rests where connections wait on and on."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from aioengine.server.transport.turns import FEWEST, PATIENCE, PER_PASS, Starts, Turns

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

    is_closing = False

    def answered(self) -> None:
        """What the loop has to do for a turn afterwards."""

    def __init__(self, loop: Loop, turns: Turns, left: int, owner: str = "a") -> None:
        self.owner = owner
        self.loop = cast(asyncio.AbstractEventLoop, loop)
        self.has_asked = False
        self.left = left
        self._loop, self._turns = loop, turns

    def take_turn(self) -> None:
        self._loop.now += COST
        self.left -= 1
        self._loop.call_soon(self.answered)
        if self.left:
            self._turns.ask_later(self)


def flood(is_busy: bool, clients: int, requests: int) -> tuple[Loop, list[Client]]:
    loop = Loop()
    turns = Turns(lambda: is_busy, lambda: loop.now)
    all_of_them = [Client(loop, turns, requests) for _ in range(clients)]
    for client in all_of_them:
        turns.ask(client)
    return loop, all_of_them


def test_half_of_the_time_is_left_to_the_steps_while_connections_flood() -> None:
    loop, clients = flood(True, 30, 10_000)
    loop.run(until=10.0)
    assert loop.idle > 0.45 * (10.0 - PATIENCE)
    done = [10_000 - client.left for client in clients]
    assert max(done) - min(done) <= 2
    assert sum(done) > 0.4 * 10.0 / COST


def test_nobody_rests_while_nothing_is_being_answered() -> None:
    loop, _ = flood(False, 30, 10_000)
    loop.run(until=10.0)
    assert loop.idle == pytest.approx(0.0)


def test_a_burst_is_served_without_a_rest() -> None:
    loop, clients = flood(True, 150, 1)
    loop.run(until=1.0)
    assert loop.idle == pytest.approx(0.0)
    assert all(client.left == 0 for client in clients)


def test_a_pass_gives_each_connection_one_turn_and_no_more_than_so_many() -> None:
    loop, clients = flood(True, 40, 3)
    loop.run(until=COST)  # the pass that begins then, and no other
    assert [3 - client.left for client in clients].count(1) == sum(3 - client.left for client in clients)
    assert 1 <= sum(3 - client.left for client in clients) <= PER_PASS + 1


def test_one_connection_of_another_owner_waits_for_few_of_a_flood() -> None:
    loop, flooders = flood(True, 3000, 3)
    loop.run(until=0.2)
    other = Client(loop, flooders[0]._turns, 1, owner="b")
    began, before = loop.now, sum(client.left for client in flooders)
    flooders[0]._turns.ask(other)
    while other.left:
        loop.run(until=loop.now + COST)
    assert before - sum(client.left for client in flooders) <= 2 * PER_PASS
    assert loop.now - began < 0.1


def test_connections_that_were_closed_take_nobodys_turn() -> None:
    loop, clients = flood(True, 500, 1)
    for client in clients[PER_PASS:-1]:
        client.is_closing = True
    loop.run(until=(PER_PASS + 2) * COST)
    assert clients[-1].left == 0


def test_passes_whose_answers_take_long_have_fewer_turns() -> None:
    loop, clients = flood(False, 400, 1)
    seen: list[float] = []

    def answer() -> None:
        loop.now += 0.02

    def other_work() -> None:
        seen.append(loop.now)
        loop.call_soon(other_work)

    for client in clients:
        client.answered = answer  # type: ignore[method-assign]
    loop.call_soon(other_work)
    loop.run(until=5.0)
    waits = [after - before for before, after in itertools.pairwise(seen)]
    assert max(waits[:5]) > 10 * 0.02
    assert max(waits[10:]) < (FEWEST + 1) * 0.02


class RestCounter(asyncio.SelectorEventLoop):
    """A loop that skips rests and counts them."""

    rests = 0

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        self.rests += 1
        return self.call_soon(callback, *args, context=context)


@pytest.mark.parametrize(("requests", "others", "rests"), [(1, 0, False), (3, 0, False), (1, 1, True)])
def test_starts_rest_for_other_requests_only(requests: int, others: int, rests: bool) -> None:
    """Not for those that wait to begin, which a rest would only delay."""
    now, begun = 0.0, 0
    loop = RestCounter()
    starts = Starts(lambda: requests + others, lambda: now)

    async def begin(request: int) -> None:
        nonlocal now, begun
        await starts.turn(f"owner {request}", request)
        now += COST
        begun += 1

    async def begin_all() -> None:
        await asyncio.gather(*(begin(index % requests) for index in range(1500)))

    try:
        loop.run_until_complete(begin_all())
    finally:
        loop.close()
    assert begun == 1500
    assert (loop.rests > 0) is rests
