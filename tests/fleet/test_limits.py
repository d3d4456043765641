"""Limits that hold for all gateways to a fleet together, within what a gateway can let in between two
exchanges."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from aioengine.fleet.gateway.limits import SHARE_SECONDS
from aioengine.fleet.usage import GATEWAY_SECONDS, SharedUsage
from aioengine.runtime.client import Usage
from aioengine.server.access.clients import Admission, Meter
from aioengine.server.access.keys import Limits
from aioengine.server.errors import ApiError


class Gateways:
    """Some gateways that exchange what they let in, on a clock that the test sets."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.now = 0.0
        self.shared = SharedUsage(lambda: self.now)
        self.meters = {f"d{index}": Meter("tenant 't'", limits) for index in range(count)}
        for gateway in self.meters:
            self.shared.join(gateway)

    def exchange(self) -> None:
        for gateway, meter in self.meters.items():
            used = meter.take_usage()
            found = self.shared.exchange(gateway, {} if used is None else {"t": used})
            assert found is not None
            meter.used_elsewhere(found.get("t", Usage()), self.now)

    def begin(self, gateway: str) -> Admission | None:
        try:
            return Admission([self.meters[gateway]], self.now)
        except ApiError:
            return None


class Let(NamedTuple):
    requests: int
    tokens: int


def flooded(gateways: Gateways, seconds: float, *, every: float, tokens: int) -> Let:
    """Clients ask all gateways for more than they may have, all the time."""
    requests, due = 0, 0.0
    while gateways.now < seconds:
        if gateways.now >= due:
            due += SHARE_SECONDS
            gateways.exchange()
        for gateway in gateways.meters:
            admission = gateways.begin(gateway)
            if admission is not None:
                admission.end(tokens, gateways.now)
                requests += 1
        gateways.now += every
    return Let(requests, requests * tokens)


@pytest.mark.slow
def test_rates_hold_for_all_gateways_together() -> None:
    per_minute = Limits(requests_per_minute=60)
    alone = flooded(Gateways(1, per_minute), 300.0, every=0.02, tokens=10)
    three = flooded(Gateways(3, per_minute), 300.0, every=0.02, tokens=10)
    assert alone.requests == pytest.approx(60 * 6, abs=1)
    assert three.requests <= 60 * 6 + 2 * 2, "what was too much at first is paid back"
    tokens = flooded(Gateways(3, Limits(tokens_per_minute=6000)), 300.0, every=0.02, tokens=100)
    assert tokens.tokens <= 6000 * 6 + 3 * 100


def test_a_first_burst_is_bounded_by_what_comes_in_a_second() -> None:
    """That is, in two exchanges: one until it is told, one until it is heard."""
    gateways, asked = Gateways(4, Limits(requests_per_minute=60)), 4 / 0.05
    first = flooded(gateways, 10.0, every=0.05, tokens=0)
    assert 60 <= first.requests <= 60 + 2 * SHARE_SECONDS * asked + 10 < 4 * 60
    assert all(gateways.begin(gateway) is None for gateway in gateways.meters)


def test_requests_at_once_hold_for_all_gateways() -> None:
    gateways = Gateways(2, Limits(max_concurrent=4))
    held = [gateways.begin("d0") for _ in range(4)]
    assert gateways.begin("d1") is not None, "it has not heard of the others yet"
    gateways.exchange()
    gateways.exchange()
    assert gateways.begin("d0") is None and gateways.begin("d1") is None
    for admission in held[:2]:
        assert admission is not None
        admission.end(0, gateways.now)
    gateways.exchange()
    gateways.exchange()
    assert gateways.begin("d1") is not None


def test_a_gateway_that_dies_takes_its_requests_with_it() -> None:
    gateways = Gateways(2, Limits(max_concurrent=2))
    assert gateways.begin("d0") and gateways.begin("d0")
    gateways.exchange()
    gateways.exchange()
    assert gateways.begin("d1") is None
    del gateways.meters["d0"]
    gateways.now += GATEWAY_SECONDS + 1
    gateways.exchange()
    assert gateways.begin("d1") is not None
    assert gateways.shared.exchange("d0", {}) is None, "it says that it is there again, if it is"
    gateways.shared.join("d0")
    assert gateways.shared.exchange("d0", {"t": Usage(1, 2, 0)}) is not None
    assert gateways.shared.leave("d0") == 1 and gateways.shared.leave("d1") == 0
