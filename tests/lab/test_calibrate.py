"""The fit on made-up timings, and a calibration and a validation of a tiny model from end to end."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_costs import costs_of
from tiny_models import build_model

from aioengine import events
from aioengine.errors import ConfigError
from aioengine.lab.calibrate import calibrate
from aioengine.lab.costs import CostModel, StepCosts, StepShape
from aioengine.lab.design import Design
from aioengine.lab.fit import KNEES, Timed, fit_line, fit_stage, fit_steps
from aioengine.lab.neighbours import Neighbours
from aioengine.lab.probe import Probe, ProbedMove, ProbedStep
from aioengine.lab.timings import Intervals, fit_overhead, load_slowdown, move_points, step_points
from aioengine.lab.validate import METRICS, validate, validation_experiment
from aioengine.step import StepBatch


def shapes() -> list[StepShape]:
    """Decodes, prefills and mixtures, with and without adapters."""
    found = []
    for rows, context, adapters, rank in itertools.product(
        (1, 2, 4, 8, 16, 32, 64), (50, 400, 1500), (0, 1, 4), (8, 64)
    ):
        used = min(adapters, rows)
        lora = rows if used else 0
        found.append(StepShape(rows, rows * context, 0, 0, rows, used, used * rank, lora, lora * rank))
    for tokens, start, rows, adapters in itertools.product((10, 100, 700, 2000), (0, 900), (0, 8), (0, 1)):
        pairs = tokens * (2 * start + tokens) // 2
        lora = tokens if adapters else 0
        found.append(
            StepShape(rows, rows * 60, tokens, pairs, rows + 1, adapters, adapters * 16, lora, lora * 16)
        )
    return found


SHAPES = shapes()


def steps_of(draw: list[float], knee: int) -> StepCosts:
    """Costs of the magnitudes that models have, each up to its own factor of ``draw``."""
    magnitudes = {
        "step": 5e-3,
        "token": 1e-3,
        "decode_row": 5e-4,
        "prefill_token": 3e-4,
        "sequence": 2e-4,
        "decode_kv": 5e-7,
        "prefill_pair": 2e-7,
        "lora_step": 2e-3,
        "adapter": 5e-4,
        "adapter_rank": 2e-5,
        "lora_token": 5e-5,
        "lora_token_rank": 2e-6,
    }
    values = {field: size * by for (field, size), by in zip(magnitudes.items(), draw, strict=True)}
    return StepCosts(**values, weights=values["token"] * knee)


factors = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=12, max_size=12)


@settings(max_examples=8, deadline=None)
@given(factors, st.sampled_from(KNEES[:12]))
def test_fit_recovers_what_made_the_timings(draw: list[float], knee: int) -> None:
    draw[0] = 0.5  # no step takes no time
    costs = costs_of(steps=steps_of(draw, knee))
    fit = fit_steps([Timed(shape, costs.step_seconds(shape)) for shape in SHAPES])
    found = costs_of(steps=fit.costs)
    for shape in SHAPES:
        assert found.step_seconds(shape) == pytest.approx(costs.step_seconds(shape), rel=0.01)
    assert fit.quality.steps == len(SHAPES)
    assert fit.quality.p90_error < 0.01


def test_fit_names_the_coefficients() -> None:
    """Where the timings tell terms apart, the terms themselves come out, and not just their sum."""
    made = StepCosts(step=0.004, weights=0.016, token=0.002, decode_kv=1e-6, prefill_pair=1e-7, adapter=1e-3)
    costs = costs_of(steps=made)
    found = fit_steps([Timed(shape, costs.step_seconds(shape)) for shape in SHAPES]).costs
    assert found.step + found.weights == pytest.approx(0.020, rel=0.02)
    for field in ("token", "decode_kv", "prefill_pair", "adapter"):
        assert getattr(found, field) == pytest.approx(getattr(made, field), rel=0.05), field


def test_fit_shrugs_off_outliers() -> None:
    """One step in ten took three times as long, because something else ran."""
    costs = costs_of(steps=steps_of([1.0] * 12, 8))
    rng = random.Random(0)
    timed = [
        Timed(s, costs.step_seconds(s) * rng.uniform(0.97, 1.03) * (3 if rng.random() < 0.1 else 1))
        for s in SHAPES
    ]
    found = costs_of(steps=fit_steps(timed).costs)
    errors = [found.step_seconds(s) / costs.step_seconds(s) - 1 for s in SHAPES]
    assert max(map(abs, errors)) < 0.08


def test_fit_needs_points() -> None:
    with pytest.raises(ValueError, match="a fit needs steps"):
        fit_steps([])
    with pytest.raises(ValueError, match="more than 0 seconds"):
        fit_steps([Timed(SHAPES[0], 0.0)])
    with pytest.raises(ValueError, match="a stage needs moves"):
        fit_stage([])


@given(st.floats(1e-4, 1), st.floats(1e6, 1e11))
def test_stage_is_recovered(latency: float, bandwidth: float) -> None:
    sizes = (10**6, 10**7, 10**8, 10**9)
    stage = fit_stage([(nbytes, latency + nbytes / bandwidth) for nbytes in sizes])
    for nbytes in sizes:
        assert stage.seconds(nbytes) == pytest.approx(latency + nbytes / bandwidth, rel=1e-3)


def test_a_line_never_falls() -> None:
    a, b = fit_line([(1, 3.0), (2, 2.0), (3, 1.0)])
    assert a > 0 and b == 0


# From a probe to points

SMALL = StepShape(4, 400, 0, 0, 4, 0, 0, 0, 0)


def step(start: float, wall: float, shape: StepShape = SMALL, share: float = 0.5) -> ProbedStep:
    return ProbedStep(shape, start, start + wall, wall * share)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=6),
    st.integers(0, 30),
    st.integers(1, 10),
)
def test_overlap_is_the_time_in_which_anything_moves(
    moves: list[tuple[int, int]], start: int, wall: int
) -> None:
    moving = Intervals(ProbedMove("disk", s, s + length, 1) for s, length in moves)
    moments = sum(any(s <= t < s + n for s, n in moves) for t in range(start, start + wall))
    assert moving.overlap(step(start, wall)) == moments


def test_steps_that_differ_only_in_context_are_one_point() -> None:
    steps = [step(t, wall, SMALL._replace(decode_kv=400 + t)) for t, wall in enumerate((3.0, 1.0, 2.0))]
    points = step_points([*steps, step(9, 5.0, SMALL._replace(decode_kv=9000))], overhead=0.5)
    assert points == [
        Timed(SMALL._replace(decode_kv=401), 1.5),
        Timed(SMALL._replace(decode_kv=9000), 4.5),
    ]


def test_overhead_is_what_sequences_do_not_explain() -> None:
    steps = [
        ProbedStep(SMALL._replace(sequences=rows), 0.0, 1.0 + 0.002 + 0.0001 * rows, 1.0)
        for rows in (1, 2, 8, 64)
    ]
    assert fit_overhead(steps) == pytest.approx(0.002, rel=1e-3)


def test_move_points_are_medians_by_size() -> None:
    moves = [ProbedMove("disk", 1.0, 1.0 + s, 10) for s in (0.5, 0.1, 0.2)]
    moves += [ProbedMove("slot", 0.0, 9.0, 10), ProbedMove("disk", 0.0, 2.0, 20)]
    assert move_points(moves, "disk") == [(10, pytest.approx(0.2)), (20, 2.0)]


@given(st.floats(1.0, 4.0), st.floats(0.8, 1.2))
def test_slowdown_is_recovered(slowdown: float, level: float) -> None:
    """Work stands still for a part of the time that is shared, whatever the fit is off by."""
    costs = costs_of(steps=StepCosts(step=0.09), step_overhead=0.01)
    calm = [step(t, 0.1 * level) for t in range(3)]
    overlap = 0.05
    disturbed = [step(10 + t, 0.1 * level + overlap * (1 - 1 / slowdown)) for t in range(3)]
    moves = Intervals(ProbedMove("disk", 10 + t, 10 + t + overlap, 1) for t in range(3))
    assert load_slowdown(costs, calm + disturbed, moves) == pytest.approx(slowdown, rel=1e-6)


def test_without_moves_nothing_is_slowed_down() -> None:
    assert load_slowdown(costs_of(steps=StepCosts(step=1.0)), [step(0, 2.0)], Intervals([])) == 1.0


def test_probe_keeps_steps_that_another_follows() -> None:
    probe, batch = Probe(), StepBatch(0, [], [])
    probe.begins(1.0)
    probe.ended(batch, 1.0, 0.4)
    probe.begins(1.5)
    probe.ended(batch, 1.5, 0.4)
    probe.pause()
    probe.begins(9.0)
    assert [(s.start, s.until, s.wall, s.seconds) for s in probe.steps] == [(1.0, 1.5, 0.5, 0.4)]


def test_probe_keeps_moves_that_succeed() -> None:
    probe = Probe()
    a, b = {"adapter": "a", "version": 1}, {"adapter": "b", "version": 1}
    probe.handle(events.AdapterLoading(time=1.0, **a))
    probe.handle(events.AdapterLoading(time=2.0, **b))
    probe.handle(events.AdapterFailed(time=2.5, reason="io", error=OSError(), **b))
    probe.handle(events.AdapterLoaded(time=3.0, rank=8, nbytes=100, seconds=1.9, **a))
    probe.handle(events.AdapterPlacing(time=4.0, slot=0, **a))
    probe.handle(events.AdapterPlaced(time=4.5, slot=0, rank=8, nbytes=100, seconds=0.4, **a))
    assert probe.moves == [ProbedMove("disk", 1.0, 3.0, 100), ProbedMove("slot", 4.0, 4.5, 100)]


def test_neighbours_are_what_is_busy_but_not_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(NamedTuple):
        user: float
        idle: float
        iowait: float
        guest: float

    system = iter([Times(100, 50, 5, 20), Times(108, 60, 7, 22)])
    own = iter([SimpleNamespace(user=1.0, system=1.0), SimpleNamespace(user=3.0, system=2.0)])
    monkeypatch.setattr("psutil.cpu_times", lambda: next(system))
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(cpu_times=lambda: next(own)))
    # 20 seconds of all processors: 8 busy, 3 of them with this process.
    assert Neighbours().share() == pytest.approx(5 / 20)


# From end to end

TINY = Design(
    rows=(1, 4),
    contexts=(8, 600),  # the second is longer than the model
    steps=4,
    adapters=(1, 2),
    adapter_rows=(4,),
    ranks=(4, 8),
    prompts=(8, 32),
    loads=2,
    repeats=1,
    max_num_batched_tokens=64,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("lab") / "model", "llama")


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("costs") / "tiny.json"
    told: list[tuple[int, int, str]] = []
    calibrate(str(model), path, design=TINY, progress=lambda *args: told.append(args))
    done, total = [part[0] for part in told], told[0][1]
    assert done == list(range(total + 1)), "every part is told of, in order, to the end"
    return path


def test_calibration_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    costs = CostModel.read(calibrated)
    assert costs.name == "tiny" and not costs.estimate
    assert "aioengine" in costs.source and "thread" in costs.source
    assert costs.model.num_layers == 3 and costs.model.dtype == "float32"
    assert costs.fit is not None and costs.fit.steps > 10
    assert costs.fit.median_error < 0.5
    assert 0 < costs.step_overhead < 0.1
    assert costs.load_slowdown >= 1
    seconds = costs.step_seconds(SMALL)
    assert 1e-5 < seconds < 1
    assert seconds < costs.step_seconds(StepShape(0, 0, 400, 80_000, 1, 0, 0, 0, 0))
    assert 0 < costs.slot.seconds(10_000) < 1 and 0 < costs.disk.seconds(10_000) < 1


def test_calibration_refuses_what_it_cannot_write(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        calibrate(str(model), tmp_path / "no" / "costs.json", design=TINY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ()}, "design.rows"),
        ({"contexts": (0,)}, "design.contexts"),
        ({"repeats": 0}, "design.repeats"),
        ({"ranks": (1024,)}, "at most rank 512"),
    ],
)
def test_designs_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Design(**fields)  # type: ignore[arg-type]


def test_validation_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    experiment = validation_experiment(str(calibrated))
    workload = msgspec.structs.replace(
        experiment.workload, arrivals="poisson:rate=200", limit=12, output_tokens=8, prompt_tokens=6
    )
    experiment = msgspec.structs.replace(experiment, workload=workload, kv_cache_memory="8MiB")
    as_given = validate(experiment, str(model), loads=(), repeats=2)
    (one,) = as_given.comparisons
    assert one.load == "as given" and len(one.runs) == len(one.neighbours) == 2
    for metric in METRICS:
        live, simulated = getattr(one.live, metric), getattr(one.simulated, metric)
        assert live > 0 and simulated > 0
        assert one.error[metric] == pytest.approx(simulated / live - 1)
    assert as_given.worst == max(abs(error) for error in one.error.values())
    assert [row[:2] for row in as_given.rows()] == [("as given", metric) for metric in METRICS]
    loaded = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert [c.load for c in loaded.comparisons] == ["50%"]
    assert loaded.comparisons[0].requests_per_second is not None
    again = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert again.comparisons[0].simulated == loaded.comparisons[0].simulated
