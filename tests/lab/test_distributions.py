"""Arrivals, popularity, lengths, and what policies are told: statistics with fixed seeds."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice, pairwise
from statistics import mean, median, pstdev

import pytest

from aioengine.errors import ConfigError
from aioengine.lab.workload.arrivals import parse_arrivals
from aioengine.lab.workload.lengths import (
    draw_shape,
    parse_deadline,
    parse_lengths,
    parse_ranks,
    parse_view,
)
from aioengine.lab.workload.popularity import Choose, parse_popularity, zipf
from aioengine.lab.workload.random_streams import stream

PROCESSES = ("poisson:rate=2", "gamma:rate=2,cv=4", "onoff:rate=8,on=2,off=6", "diurnal:rate=2,period=600")
DRAWS = 40_000


def times(text: str, count: int, *, seed: int = 0) -> list[float]:
    """Seconds."""
    process = parse_arrivals("arrivals", text).times(stream(seed, "arrivals"))
    return [time / 1e6 for time in islice(process, count)]


def gaps(text: str, count: int = 50_000) -> list[float]:
    return [after - before for before, after in pairwise(times(text, count))]


def chooser(text: str, adapters: int, seed: int = 0) -> Choose:
    return parse_popularity("popularity", text).chooser(adapters, seed)


def counts(text: str, adapters: int) -> list[float]:
    """Share of each."""
    choose = chooser(text, adapters)
    found = Counter(choose(0.0) for _ in range(DRAWS))
    return [found[index] / DRAWS for index in range(adapters)]


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
    whole = int(found[-1] / period) * period
    quarters = Counter(int(time % period / period * 4) for time in found if time < whole)
    swing = depth * 2 / math.pi
    expected = [(1 + swing) / 4, (1 + swing) / 4, (1 - swing) / 4, (1 - swing) / 4]
    assert [quarters[part] / quarters.total() for part in range(4)] == pytest.approx(expected, abs=0.01)


def test_they_are_the_same_for_ever() -> None:
    """Literal numbers: no Python version and no machine may change them."""
    assert {text: times(text, 3) for text in PROCESSES} == {
        "poisson:rate=2": [1.608679, 1.892011, 2.162987],
        "gamma:rate=2,cv=4": [1.551123, 1.551195, 1.551195],
        "onoff:rate=8,on=2,off=6": [0.070833, 0.138577, 0.321602],
        "diurnal:rate=2,period=600": [0.893711, 1.144689, 1.154744],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison:rate=2", "there is no 'poison' (did you mean 'poisson'?)"),
        ("poisson", "rate is missing; write poisson:rate=..."),
        ("poisson:rate=nan", "'nan' is not a number"),
        ("poisson:rate=-1", "rate=-1.0: must be"),
        ("poisson:2,3", "does not take '3'"),
        ("gamma:rate=1,rate=2", "rate is given twice"),
        ("gamma:rat=1,cv=2", "does not take 'rat=1' (did you mean 'rate'?)"),
        ("diurnal:rate=1,depth=1.5", "depth=1.5: must be <= 1"),
        ("onoff:rate=1,on=1", "off is missing"),
    ],
)
def test_what_is_wrong_with_a_text(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_arrivals("arrivals", text)
    assert str(raised.value).startswith(f"arrivals={text!r}: ")
    assert message in str(raised.value)


def test_shares_are_those_of_their_laws() -> None:
    """The power law is S-LoRA's: the first k of n have (k/n)^alpha of the requests."""
    assert counts("uniform", 10) == pytest.approx([0.1] * 10, abs=0.01)
    assert counts("zipf:1.0", 10) == pytest.approx(zipf(10, 1.0), abs=0.01)
    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    power = parse_popularity("popularity", "power:0.5").shares(100)
    assert counts("power:0.5", 100) == pytest.approx(power, abs=0.01)
    assert (sum(power[:25]), sum(power)) == pytest.approx((0.5, 1.0))


def test_shifts_deal_the_ranks_anew() -> None:
    """Within a spell the shares are Zipf's; spells last exponential times; over many all are equal."""
    choose = chooser("shift:alpha=2.0,every=60", 20, seed=5)
    favourites: list[int] = []
    total: Counter[int] = Counter()
    for second in range(60 * 400):
        drawn = Counter(choose(float(second)) for _ in range(15))
        favourites.append(drawn.most_common(1)[0][0])
        total.update(drawn)
    # 19 of 20 shifts put another first, and now and then the second has a lucky second.
    assert 300 < sum(a != b for a, b in pairwise(favourites)) < 1000
    assert max(total.values()) / total.total() < 0.12
    still = chooser("shift:alpha=2.0,every=60", 20, seed=5)
    spell = Counter(still(0.0) for _ in range(DRAWS))
    assert [count / DRAWS for _, count in spell.most_common(3)] == pytest.approx(zipf(20, 2.0)[:3], abs=0.01)


def test_ranks_have_their_shares_and_depend_on_the_name_alone() -> None:
    ranks = parse_ranks("ranks", "8:5,16:3,64:2")
    shapes = [draw_shape(f"adapter-{i:03}", ranks, 0) for i in range(4000)]
    found = Counter(shape.rank for shape in shapes)
    assert [found[rank] / 4000 for rank in (8, 16, 64)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert draw_shape("adapter-007", ranks, 0) == shapes[7]


def test_lengths_have_their_distributions() -> None:
    rng = stream(0, "lengths")
    drawn = [parse_lengths("x", "lognormal:median=200,sigma=0.8,max=1000")(rng) for _ in range(9001)]
    assert median(drawn) == pytest.approx(200, rel=0.05)
    assert max(drawn) == 1000 and min(drawn) >= 1
    uniform = Counter(parse_lengths("x", "uniform:3..5")(rng) for _ in range(3000))
    assert set(uniform) == {3, 4, 5} and min(uniform.values()) > 900
    assert {parse_lengths("x", 128)(rng), parse_lengths("x", "128")(rng)} == {128}


def test_what_is_told_of_lengths() -> None:
    rng = stream(0, "told")
    assert parse_view("lengths", "known").tell(10, rng) == (10, None, None)
    assert parse_view("lengths", "hidden:max=8").tell(10, rng) == (8, 8, None)
    assert parse_view("lengths", "predicted:error=0").tell(10, rng) == (10, 4096, 10)
    view = parse_view("lengths", "predicted:error=0.5,max=9000")
    guesses = [view.tell(1000, rng)[2] or 0 for _ in range(9001)]
    assert median(guesses) == pytest.approx(1000, rel=0.03)
    within = sum(1000 / 1.6487 <= guess <= 1000 * 1.6487 for guess in guesses)
    assert within / len(guesses) == pytest.approx(0.683, abs=0.02)


def test_deadlines() -> None:
    assert parse_deadline("deadline", 10)(7) == parse_deadline("deadline", "10")(1) == 10.0
    assert parse_deadline("deadline", "proportional:0.5+0.05")(100) == pytest.approx(5.5)
    for wrong in ("0", "-1", "soon", "proportional:1", "proportional:-1+2", "proportional:1+x", "inf"):
        with pytest.raises(ConfigError, match=r"^deadline="):
            parse_deadline("deadline", wrong)
