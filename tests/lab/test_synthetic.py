"""Arrival processes: their statistics with fixed seeds, and that they are the same everywhere."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import ConfigError
from aioengine.lab.workload.arrivals import FORMS, parse_arrivals
from aioengine.lab.workload.random_streams import Weighted, gamma, normal, shuffle, stream
from aioengine.lab.workload.spec_text import Form, parse_form

PROCESSES = ("poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=8,on=2,off=6", "diurnal:rate=2,period=600")


def times(text: str, count: int, *, seed: int = 0, scale: float = 1.0) -> list[float]:
    """Seconds."""
    process = parse_arrivals("arrivals", text, scale=scale)
    return [time / 1e6 for time in islice(process(stream(seed, "arrivals")), count)]


def gaps(text: str, count: int = 50_000) -> list[float]:
    return [after - before for before, after in pairwise(times(text, count))]


@pytest.mark.parametrize("text", PROCESSES)
def test_the_rate_is_kept(text: str) -> None:
    found = times(text, 50_000)
    assert found == sorted(found)
    assert len(found) / found[-1] == pytest.approx(2.0, rel=0.05)
    assert times(text, 100, seed=1) != found[:100]


@pytest.mark.parametrize("cv", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.slow
def test_gamma_has_its_coefficient_of_variation(cv: float) -> None:
    found = gaps(f"gamma:rate=2,cv={cv}")
    assert pstdev(found) / mean(found) == pytest.approx(cv, rel=0.05)


def test_poisson_gaps_are_exponential() -> None:
    found = gaps("poisson:rate=2")
    assert pstdev(found) / mean(found) == pytest.approx(1.0, rel=0.02)
    for x in (0.1, 0.5, 1.0, 2.0):
        share = sum(gap > x for gap in found) / len(found)
        assert share == pytest.approx(math.exp(-2 * x), abs=0.01)


def test_bursts_are_as_dense_and_as_far_apart_as_they_should_be() -> None:
    """A gap of more than 2 s at 20 a second is a pause (chance: e^-40)."""
    found = gaps("onoff:rate=20,on=10,off=30")
    pauses = [gap for gap in found if gap > 2.0]
    within = [gap for gap in found if gap <= 2.0]
    # Pauses are exponential, of mean 30: those longer than 2 s are 2 s and another such.
    assert mean(pauses) == pytest.approx(32.0, rel=0.2)
    assert len(within) / sum(within) == pytest.approx(20.0, rel=0.05)
    assert sum(within) / len(pauses) == pytest.approx(10.0, rel=0.2)


def test_the_day_swings() -> None:
    """Thinned arrivals by quarter of the period: shares are the integrals of 1 + depth sin."""
    period, depth = 1000.0, 0.8
    found = times(f"diurnal:rate=10,period={period},depth={depth}", 100_000)
    quarters = [0] * 4
    whole = int(found[-1] / period) * period
    for time in found:
        if time < whole:
            quarters[int(time % period / period * 4)] += 1
    swing = depth * 2 / math.pi
    expected = [(1 + swing) / 4, (1 + swing) / 4, (1 - swing) / 4, (1 - swing) / 4]
    assert [count / sum(quarters) for count in quarters] == pytest.approx(expected, abs=0.01)


def test_they_are_the_same_for_ever() -> None:
    """Literal numbers: no Python version and no machine may change them."""
    assert {text: times(text, 3) for text in PROCESSES} == {
        "poisson:rate=2": [1.608679, 1.892011, 2.162987],
        "gamma:rate=2,cv=4": [1.551123, 1.551195, 1.551195],
        "onoff:rate=8,on=2,off=6": [0.070833, 0.138577, 0.321602],
        "diurnal:rate=2,period=600": [0.893711, 1.144689, 1.154744],
    }


@pytest.mark.slow
def test_normal_and_gamma_have_their_moments() -> None:
    rng = stream(3, "moments")
    drawn = [normal(rng) for _ in range(50_000)]
    assert (mean(drawn), pstdev(drawn)) == pytest.approx((0.0, 1.0), abs=0.02)
    for shape in (0.0625, 0.5, 1.0, 7.0):
        drawn = [gamma(rng, shape) for _ in range(50_000)]
        assert mean(drawn) == pytest.approx(shape, rel=0.05)
        assert pstdev(drawn) ** 2 == pytest.approx(shape, rel=0.1)


def test_shuffles_are_fair() -> None:
    rng = stream(4, "shuffles")
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        items = [0, 1, 2]
        shuffle(rng, items)
        seen[tuple(items)] = seen.get(tuple(items), 0) + 1
    assert len(seen) == 6
    assert all(900 < count < 1100 for count in seen.values())


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=50).filter(any), st.integers())
def test_nothing_of_weight_0_is_drawn(weights: list[float], seed: int) -> None:
    table, rng = Weighted(weights), stream(seed, "x")
    assert all(weights[table.draw(rng)] > 0 for _ in range(20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison:rate=2", "there is no 'poison' (did you mean 'poisson'?)"),
        ("poisson", "rate is missing; write poisson:rate=..."),
        ("poisson:rate=nan", "'nan' is not a number"),
        ("poisson:rate=-1", "rate=-1 must be > 0"),
        ("poisson:2,3", "does not take '3'"),
        ("gamma:rate=1,rate=2", "rate is given twice"),
        ("gamma:rat=1,cv=2", "does not take 'rat=1' (did you mean 'rate'?)"),
        ("diurnal:rate=1,depth=1.5", "depth=1.5 must be in 0..1"),
        ("onoff:rate=1,on=1", "off is missing"),
    ],
)
def test_what_is_wrong_with_a_text(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_arrivals("arrivals", text)
    assert str(raised.value).startswith(f"arrivals={text!r}: ")
    assert message in str(raised.value)


@given(st.data())
def test_texts_read_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMS)))
    form = Form(
        name,
        {
            key: data.draw(st.floats(option.low, min(option.high, 1e9), exclude_min=option.above))
            for key, option in FORMS[name].items()
        },
    )
    assert parse_form("arrivals", str(form), FORMS) == form
