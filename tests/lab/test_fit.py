"""The fit, on made-up timings."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.lab.calibration.fit import TILES, fit_stage, fit_steps
from aioengine.lab.costs.model import Stage
from aioengine.lab.costs.steps import StepCosts, StepShape, StepTimes, curve_at


def shapes() -> list[StepShape]:
    """Decodes, prefills and mixtures, with and without adapters."""
    found = []
    for rows, context, adapters, rank in itertools.product(
        (1, 2, 4, 8, 16, 32, 64), (50, 400, 1500), (0, 1, 4), (8, 64)
    ):
        used = min(adapters, rows)
        of = ((rank, rows // used),) * used if used else ()
        found.append(StepShape(rows, rows * context, 0, 0, rows, of))
    prompts = (10, 33, 65, 100, 129, 170, 300, 700, 1100, 2000)
    for tokens, start, rows, adapters in itertools.product(prompts, (0, 900), (0, 8), (0, 1)):
        pairs = tokens * (2 * start + tokens) // 2
        found.append(StepShape(rows, rows * 60, tokens, pairs, rows + 1, ((8, tokens),) * adapters))
    return found


SHAPES = shapes()


def steps_of(draw: list[float], tile: int) -> StepCosts:
    """Costs of the magnitudes that models have, each up to its own factor of ``draw``."""
    magnitudes = (5e-3, 1e-3, 5e-4, 2e-4, 5e-7, 2e-7, 2e-3, 5e-4, 2e-3, 5e-5, 2e-6)
    least, early, late, sequence, kv, pair, lora, small, large, token8, token64 = (
        size * by for size, by in zip(magnitudes, draw, strict=True)
    )
    return StepCosts(
        linears=((1.0, least), (32.0, least + 31 * early), (1024.0, least + 31 * early + 992 * late)),
        tile=tile,
        sequence=sequence,
        decode_kv=kv,
        prefill_pair=pair,
        lora_step=lora,
        adapter=((8.0, small), (64.0, large)),
        lora_token=((8.0, token8), (64.0, token64)),
    )


def timed(steps: StepCosts) -> list[tuple[StepShape, float]]:
    step_seconds = StepTimes(steps)
    return [(shape, step_seconds(shape)) for shape in SHAPES]


factors = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=11, max_size=11)


@settings(max_examples=8, deadline=None)
@given(factors, st.sampled_from(TILES))
def test_fit_recovers_what_made_the_timings(draw: list[float], tile: int) -> None:
    draw[0] = 0.5  # no step takes no time
    points = timed(steps_of(draw, tile))
    costs, quality = fit_steps(points)
    found = StepTimes(costs)
    for shape, seconds in points:
        assert found(shape) == pytest.approx(seconds, rel=0.01)
    assert quality.steps == len(SHAPES)
    assert quality.p90_error < 0.01


def test_fit_names_the_coefficients() -> None:
    """Where the timings tell terms apart, the terms themselves come out, and not just their sum."""
    made = steps_of([1.0] * 11, 64)
    found, _ = fit_steps(timed(made))
    assert found.tile == 64
    for field in ("sequence", "decode_kv", "prefill_pair", "lora_step"):
        assert getattr(found, field) == pytest.approx(getattr(made, field), rel=0.05), field
    for tokens in (1, 64, 512, 2048):
        expected = curve_at(made.linears, tokens)
        assert curve_at(found.linears, tokens) == pytest.approx(expected, rel=0.02), tokens
    for curve in ("adapter", "lora_token"):
        for (_, seconds), (_, expected) in zip(getattr(found, curve), getattr(made, curve), strict=True):
            assert seconds == pytest.approx(expected, rel=0.05)


def test_what_is_between_two_timings_is_not_made_up() -> None:
    """With nothing timed from 2 to 63 tokens the curve is straight there."""
    steps = StepCosts(linears=((0.0, 0.01), (1000.0, 1.01)))
    shapes = [StepShape(0, 0, n, 0, 1) for n in (1, 64, 500, 1000)]
    found, _ = fit_steps([(shape, StepTimes(steps)(shape)) for shape in shapes])
    assert StepTimes(found)(StepShape(0, 0, 32, 0, 1)) == pytest.approx(0.042, rel=1e-3)
    assert StepTimes(found)(StepShape(0, 0, 4000, 0, 1)) == pytest.approx(4.01, rel=1e-2)
    assert found.tile == 1, "and no tile where none shows"


def test_fit_shrugs_off_outliers() -> None:
    """One step in ten took three times as long, because something else ran."""
    made = steps_of([1.0] * 11, 8)
    rng = random.Random(0)
    points = [
        (shape, seconds * rng.uniform(0.97, 1.03) * (3 if rng.random() < 0.1 else 1))
        for shape, seconds in timed(made)
    ]
    found = StepTimes(fit_steps(points)[0])
    errors = [found(shape) / seconds - 1 for shape, seconds in timed(made)]
    assert max(map(abs, errors)) < 0.08


def test_fit_needs_points() -> None:
    with pytest.raises(ValueError, match="a fit needs steps"):
        fit_steps([])
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit_steps([(SHAPES[0], 0.0)])
    with pytest.raises(ValueError, match="a stage needs moves"):
        fit_stage([])


@given(st.floats(1e-4, 1), st.floats(1e6, 1e11))
def test_stage_is_recovered(latency: float, bandwidth: float) -> None:
    sizes = (10**6, 10**7, 10**8, 10**9)
    stage = Stage(*fit_stage([(nbytes, latency + nbytes / bandwidth) for nbytes in sizes]))
    for nbytes in sizes:
        assert stage.seconds(nbytes) == pytest.approx(latency + nbytes / bandwidth, rel=1e-3)


def test_a_line_never_falls() -> None:
    latency, bandwidth = fit_stage([(1, 3.0), (2, 2.0), (3, 1.0)])
    assert latency > 0 and bandwidth == pytest.approx(300), "a hundred times the fastest"
