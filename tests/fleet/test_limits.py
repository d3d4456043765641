"""Limits that hold for all doors to a fleet together, within what a door can let in between two exchanges."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from aioengine.fleet.door.limits import SHARE_SECONDS
from aioengine.fleet.usage import DOOR_SECONDS, SharedUsage
from aioengine.runtime.client import Usage
from aioengine.server.access.keys import Limits
from aioengine.server.access.limits import Admission, Meter
from aioengine.server.errors import ApiError


class Doors:
    """Some doors that exchange what they let in, on a clock that the test sets."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.now = 0.0
        self.shared = SharedUsage(lambda: self.now)
        self.meters = {f"d{index}": Meter("tenant 't'", limits) for index in range(count)}
        for door in self.meters:
            self.shared.join(door)

    def exchange(self) -> None:
        for door, meter in self.meters.items():
            used = meter.take_usage()
            found = self.shared.exchange(door, {} if used is None else {"t": used})
            assert found is not None
            if "t" in found:
                meter.used_elsewhere(found["t"], self.now)

    def begin(self, door: str) -> Admission | None:
        try:
            return Admission([self.meters[door]], self.now)
        except ApiError:
            return None


class Let(NamedTuple):
    requests: int
    tokens: int


def flooded(doors: Doors, seconds: float, *, every: float, tokens: int) -> Let:
    """Clients ask all doors for more than they may have, all the time."""
    requests, due = 0, 0.0
    while doors.now < seconds:
        if doors.now >= due:
            due += SHARE_SECONDS
            doors.exchange()
        for door in doors.meters:
            admission = doors.begin(door)
            if admission is not None:
                admission.end(tokens, doors.now)
                requests += 1
        doors.now += every
    return Let(requests, requests * tokens)


@pytest.mark.slow
def test_rates_hold_for_all_doors_together() -> None:
    per_minute = Limits(requests_per_minute=60)
    alone = flooded(Doors(1, per_minute), 300.0, every=0.02, tokens=10)
    three = flooded(Doors(3, per_minute), 300.0, every=0.02, tokens=10)
    assert alone.requests == pytest.approx(60 * 6, abs=1)
    assert three.requests <= 60 * 6 + 2 * 2, "what was too much at first is paid back"
    tokens = flooded(Doors(3, Limits(tokens_per_minute=6000)), 300.0, every=0.02, tokens=100)
    assert tokens.tokens <= 6000 * 6 + 3 * 100


def test_a_first_burst_is_bounded_by_what_comes_in_a_second() -> None:
    """That is, in two exchanges: one until it is told, one until it is heard."""
    doors, asked = Doors(4, Limits(requests_per_minute=60)), 4 / 0.05
    first = flooded(doors, 10.0, every=0.05, tokens=0)
    assert 60 <= first.requests <= 60 + 2 * SHARE_SECONDS * asked + 10 < 4 * 60
    assert all(doors.begin(door) is None for door in doors.meters)


def test_requests_at_once_hold_for_all_doors() -> None:
    doors = Doors(2, Limits(max_concurrent=4))
    held = [doors.begin("d0") for _ in range(4)]
    assert doors.begin("d1") is not None, "it has not heard of the others yet"
    doors.exchange()
    doors.exchange()
    assert doors.begin("d0") is None and doors.begin("d1") is None
    for admission in held[:2]:
        assert admission is not None
        admission.end(0, doors.now)
    doors.exchange()
    doors.exchange()
    assert doors.begin("d1") is not None


def test_a_door_that_dies_takes_its_requests_with_it() -> None:
    doors = Doors(2, Limits(max_concurrent=2))
    assert doors.begin("d0") and doors.begin("d0")
    doors.exchange()
    doors.exchange()
    assert doors.begin("d1") is None
    del doors.meters["d0"]
    doors.now += DOOR_SECONDS + 1
    doors.exchange()
    assert doors.begin("d1") is not None
    assert doors.shared.exchange("d0", {}) is None, "it says that it is there again, if it is"
    doors.shared.join("d0")
    assert doors.shared.exchange("d0", {"t": Usage(1, 2, 0)}) is not None
    assert doors.shared.leave("d0") == 1 and doors.shared.leave("d1") == 0
