"""Who asks for which adapter: shares, shifts, tenants, ranks and sizes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import ConfigError
from aioengine.lab.workload.distributions import draw_shape, parse_lengths, parse_ranks, parse_sizes
from aioengine.lab.workload.popularity import FORMS, make_popularity, parse_popularity, power, zipf
from aioengine.lab.workload.predictions import parse_deadline, parse_view
from aioengine.lab.workload.random_streams import stream
from aioengine.lab.workload.spec_text import Form, parse_form

DRAWS = 40_000


def counts(text: str, adapters: int, *, tenants: int = 0, seed: int = 0) -> list[float]:
    """Share of each."""
    popularity = make_popularity(parse_popularity("popularity", text), adapters, tenants, seed)
    found = Counter(popularity(0.0, index % max(tenants, 1)) for index in range(DRAWS))
    return [found[index] / DRAWS for index in range(adapters)]


def test_uniform_and_zipf() -> None:
    assert counts("uniform", 10) == pytest.approx([0.1] * 10, abs=0.01)
    assert counts("zipf:1.0", 10) == pytest.approx(zipf(10, 1.0), abs=0.01)
    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf(4, 0.0) == [0.25] * 4


def test_the_power_law_is_that_of_s_lora() -> None:
    """The first k of n have (k/n)^alpha of the requests."""
    assert counts("power:0.5", 100) == pytest.approx(power(100, 0.5), abs=0.01)
    assert sum(power(100, 0.5)[:25]) == pytest.approx(0.5)
    assert power(7, 1.0) == pytest.approx([1 / 7] * 7)
    assert sum(power(1000, 0.1)) == pytest.approx(1.0)


def test_shifts_deal_the_ranks_anew() -> None:
    """Within a spell the shares are Zipf's; spells last exponential times; over many all are equal."""
    popularity = make_popularity(parse_popularity("popularity", "shift:alpha=2.0,every=60"), 20, 0, 5)
    favourites: list[int] = []
    total: Counter[int] = Counter()
    for second in range(60 * 400):
        drawn = Counter(popularity(float(second), 0) for _ in range(15))
        favourites.append(drawn.most_common(1)[0][0])
        total.update(drawn)
    changes = sum(a != b for a, b in pairwise(favourites))
    # 19 of 20 shifts put another first, and now and then the second has a lucky second.
    assert 300 < changes < 1000
    assert max(total.values()) / sum(total.values()) < 0.12
    still = make_popularity(parse_popularity("popularity", "shift:alpha=2.0,every=60"), 20, 0, 5)
    spell = Counter(still(0.0, 0) for _ in range(DRAWS))
    assert [count / DRAWS for _, count in spell.most_common(3)] == pytest.approx(zipf(20, 2.0)[:3], abs=0.01)


def test_tenants_have_adapters_of_their_own() -> None:
    popularity = make_popularity(parse_popularity("popularity", "tenant"), 10, 3, 0)
    for tenant in range(3):
        found = {popularity(0.0, tenant) for _ in range(500)}
        assert found == set(range(tenant, 10, 3))
    skewed = counts("tenant:1.0", 6, tenants=3)
    assert skewed == pytest.approx([2 / 9] * 3 + [1 / 9] * 3, abs=0.01)
    with pytest.raises(ConfigError, match="an adapter of its own"):
        make_popularity(parse_popularity("popularity", "tenant"), 2, 3, 0)


@given(st.data())
def test_texts_read_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FORMS)))
    options = FORMS[name].items()
    form = Form(
        name,
        {
            key: data.draw(st.floats(option.low, min(option.high, 1e9), exclude_min=option.above))
            for key, option in options
        },
    )
    assert parse_popularity("popularity", str(form)) == form == parse_form("popularity", str(form), FORMS)


def test_ranks_have_their_shares_and_depend_on_the_name_alone() -> None:
    ranks = parse_ranks("ranks", "8:5,16:3,64:2")
    shapes = [draw_shape(f"adapter-{i:03}", ranks, None, 0) for i in range(4000)]
    found = Counter(shape.rank for shape in shapes)
    assert [found[rank] / 4000 for rank in (8, 16, 64)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert draw_shape("adapter-007", ranks, None, 0) == shapes[7]
    sized = [draw_shape(f"adapter-{i:03}", ranks, parse_sizes("adapter_bytes", "64MiB"), 0) for i in range(9)]
    assert {shape.nbytes for shape in sized} == {2**26}
    assert [shape.rank for shape in sized] == [shape.rank for shape in shapes[:9]]


def test_lengths_have_their_distributions() -> None:
    rng = stream(0, "lengths")
    drawn = [parse_lengths("x", "lognormal:median=200,sigma=0.8,max=1000")(rng) for _ in range(9001)]
    assert median(drawn) == pytest.approx(200, rel=0.05)
    assert max(drawn) == 1000 and min(drawn) >= 1
    uniform = Counter(parse_lengths("x", "uniform:3..5")(rng) for _ in range(3000))
    assert set(uniform) == {3, 4, 5} and min(uniform.values()) > 900
    assert {parse_lengths("x", 128)(rng), parse_lengths("x", "128")(rng)} == {128}
    sizes = {parse_sizes("x", "uniform:1MiB..2MiB")(rng) for _ in range(100)}
    assert 2**20 <= min(sizes) < max(sizes) <= 2**21


def test_what_is_told_of_lengths() -> None:
    rng = stream(0, "told")
    assert parse_view("lengths", "known")(10, rng) == (10, None, None)
    assert parse_view("lengths", "hidden:max=8")(10, rng) == (8, 8, None)
    assert parse_view("lengths", "predicted:error=0")(10, rng) == (10, 4096, 10)
    view = parse_view("lengths", "predicted:error=0.5,max=9000")
    guesses = [view(1000, rng).expected_tokens or 0 for _ in range(9001)]
    assert median(guesses) == pytest.approx(1000, rel=0.03)
    within = sum(1000 / 1.6487 <= guess <= 1000 * 1.6487 for guess in guesses)
    assert within / len(guesses) == pytest.approx(0.683, abs=0.02)


def test_deadlines() -> None:
    assert parse_deadline("deadline", 10)(7) == parse_deadline("deadline", "10")(1) == 10.0
    assert parse_deadline("deadline", "proportional:0.5+0.05")(100) == pytest.approx(5.5)
    for wrong in ("0", "-1", "soon", "proportional:1", "proportional:-1+2", "proportional:1+x", "inf"):
        with pytest.raises(ConfigError, match=r"^deadline="):
            parse_deadline("deadline", wrong)
