"""From a probe to what is fitted, and a calibration and a validation of a tiny model from end to end."""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path

import msgspec
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from support.made_costs import costs_of
from support.tiny_models import build_model

from aioengine import events
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.calibration.calibrate import calibrate, calibrate_async
from aioengine.lab.calibration.design import Design
from aioengine.lab.calibration.fit import Intervals, fit_overhead, move_points, serving_level, slowdown
from aioengine.lab.calibration.probe import Probe, ProbedEngine, ProbedMove, ProbedStep, Waits
from aioengine.lab.calibration.validate import METRICS, validate, validation_experiment
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepCosts, StepShape
from aioengine.lab.runs.experiment import Experiment
from aioengine.request import SamplingParams
from aioengine.step import StepBatch

# From a probe to points

SMALL = StepShape(4, 400, 0, 0, 4)


def step(start: float, wall: float, shape: StepShape = SMALL) -> ProbedStep:
    return ProbedStep(shape, start, start + wall, wall / 2)


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


def test_overhead_has_a_part_for_each_sequence() -> None:
    steps = [
        ProbedStep(SMALL._replace(sequences=rows), 0.0, 1.0 + 0.002 + 0.0001 * rows, 1.0)
        for rows in (1, 2, 8, 64)
    ]
    assert fit_overhead(steps) == (pytest.approx(0.002, rel=1e-3), pytest.approx(0.0001, rel=1e-3))


@given(st.floats(0.0003, 0.002), st.floats(0.00001, 0.0001), st.floats(-0.001, 0.0), st.floats(0.01, 0.1))
def test_a_step_that_seems_to_be_followed_at_once_does_not_decide(
    constant: float, each: float, short: float, long: float
) -> None:
    steps = [
        ProbedStep(SMALL._replace(sequences=rows), 0.0, 0.01 + gap, 0.01)
        for rows in (1, 4, 16, 64)
        for gap in (*(constant + each * rows,) * 20, short, long)
    ]
    found, slope = fit_overhead(steps)
    for rows in (1, 16, 64):
        assert found + slope * rows == pytest.approx(constant + each * rows, rel=0.1)


def test_steps_are_timed_finer_than_uvloop_tells_the_time(model: Path) -> None:
    async def serve() -> list[float]:
        async with ProbedEngine(EngineConfig(model=str(model), kv_cache_memory="8MiB")) as engine:
            await engine.complete([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
            return [step.wall - step.seconds for step in engine.probe.steps]

    gaps = uvloop.run(serve())
    assert len(gaps) > 10 and min(gaps) > 0, "a step's own time is within the time to the next"


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    st.floats(0.5, 2.0),
    st.lists(st.sampled_from([1.0, 1.0, 1.0, 5.0]), min_size=5, max_size=5).filter(
        lambda x: x.count(5.0) < 3
    ),
)
def test_what_serving_does_to_steps_is_recovered(rows: list[int], level: float, noise: list[float]) -> None:
    """Also where single steps are disturbed, and whatever prompts take."""
    costs = StepCosts(step=0.01, sequence=0.001)
    steps = [
        ProbedStep(StepShape(n, 0, 0, 0, n), 0.0, 1.0, level * factor * (0.01 + 0.001 * n))
        for n in rows
        for factor in noise
    ]
    prompt = ProbedStep(StepShape(0, 0, 100, 5000, 1), 0.0, 1.0, 0.9)
    assert serving_level(costs, [prompt, *steps, prompt]) == pytest.approx(level)
    assert serving_level(costs, [prompt]) == 1.0


def test_move_points_are_medians_by_size() -> None:
    moves = [ProbedMove("disk", 1.0, 1.0 + s, 10) for s in (0.5, 0.1, 0.2)]
    moves += [ProbedMove("slot", 0.0, 9.0, 10), ProbedMove("disk", 0.0, 2.0, 20)]
    assert move_points(moves, "disk") == [(10, pytest.approx(0.2)), (20, 2.0)]


@given(st.floats(1.0, 4.0), st.floats(1.0, 4.0), st.floats(0.8, 1.2))
def test_slowdowns_are_recovered(disk: float, slot: float, level: float) -> None:
    """Work stands still for a part of the time that is shared, whatever the fit is off by."""
    costs = costs_of(steps=StepCosts(step=0.09), step_overhead=0.01)
    steps = [step(t, 0.1 * level) for t in range(3)]
    moves = []
    for at, (stage, slow) in enumerate((("disk", disk), ("slot", slot))):
        for start in range(10 + 10 * at, 13 + 10 * at):
            moves.append(ProbedMove(stage, start, start + 0.05, 1))
            steps.append(step(start, 0.1 * level + 0.05 * (1 - 1 / slow)))
    assert slowdown(costs, steps, moves, "disk") == pytest.approx(disk, rel=1e-6)
    assert slowdown(costs, steps, moves, "slot") == pytest.approx(slot, rel=1e-6)


def test_without_moves_nothing_is_slowed_down() -> None:
    assert slowdown(costs_of(steps=StepCosts(step=1.0)), [step(0, 2.0)], [], "disk") == 1.0


def test_probe_keeps_steps_that_another_follows() -> None:
    probe, batch = Probe(), StepBatch(0, [], [])
    probe.begins(1.0)
    probe.ended(batch, 1.0, 0.4)
    probe.begins(1.5)
    probe.ended(batch, 1.5, 0.4)
    probe.pause()
    probe.begins(9.0)
    assert [(s.start, s.until, s.wall, s.seconds) for s in probe.steps] == [(1.0, 1.5, 0.5, 0.4)]


class Told(Waits):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def pause(self) -> None:
        self.told.append("pause")

    def go_on(self) -> None:
        self.told.append("go_on")


def test_probe_keeps_moves_that_succeed_and_counts_waits_between_moves() -> None:
    probe = Probe()
    probe.waits = told = Told()
    a, b = {"adapter": "a", "version": 1}, {"adapter": "b", "version": 1}
    probe.handle(events.AdapterLoading(time=1.0, **a))
    probe.handle(events.AdapterLoading(time=2.0, **b))
    probe.handle(events.AdapterFailed(time=2.5, reason="io", error=OSError(), **b))
    probe.handle(events.AdapterLoaded(time=3.0, rank=8, nbytes=100, seconds=1.9, **a))
    probe.handle(events.AdapterPlacing(time=4.0, slot=0, **a))
    probe.handle(events.AdapterPlaced(time=4.5, slot=0, rank=8, nbytes=100, seconds=0.4, **a))
    assert told.told == ["pause", "pause", "pause", "go_on", "pause", "go_on"]
    assert probe.moves == [ProbedMove("disk", 1.0, 3.0, 100), ProbedMove("slot", 4.0, 4.5, 100)]


@pytest.mark.parametrize(
    "end",
    [
        events.AdapterUnloaded(time=2.0, adapter="a", version=1),
        events.EngineRestarted(time=2.0, seconds=1.0, error=OSError()),
    ],
    ids=lambda end: type(end).__name__,
)
@pytest.mark.parametrize("placing", [False, True])
def test_probe_counts_waits_after_a_move_that_was_given_up(end: events.Event, placing: bool) -> None:
    probe = Probe()
    probe.waits = told = Told()
    begun = events.AdapterPlacing(time=1.0, slot=0, adapter="a", version=1)
    probe.handle(begun if placing else events.AdapterLoading(time=1.0, adapter="a", version=1))
    probe.handle(end)
    assert told.told == ["pause", "go_on"] and probe.moves == []


# From end to end

TINY = Design(
    rows=(1, 4),
    contexts=(8, 600),  # the second is longer than the model
    tokens=400,
    prompts=(8, 32),
    chunks=(16,),
    adapters=(1, 2),
    adapter_rows=(4,),
    adapter_prompts=(16,),
    ranks=(4, 8),
    mixtures=8,
    mixed_rows=(0, 2),
    mixed_prompts=(4, 16),
    repeats=2,
    live_rows=(1, 4),
    live_steps=4,
    loads=2,
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
    assert done == sorted(done) and done[0] == 0 and done[-1] == total == told[-1][1]
    assert len(told) > 20, "every part is told of"
    return path


def test_calibration_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    costs = CostModel.read(calibrated)
    assert costs.name == "tiny" and not costs.estimate
    assert "aioengine" in costs.source and "thread" in costs.source
    assert costs.model.num_layers == 3 and costs.model.dtype == "float32"
    assert costs.fit is not None and costs.fit.steps > 10
    assert 0 < costs.fit.median_error <= costs.fit.p90_error
    assert costs.disk.slowdown >= 1 and costs.slot.slowdown >= 1
    assert [rank for rank, _ in costs.steps.adapter] == [4, 8]
    seconds = {  # on a machine with much else to do any of them may take long
        "between steps": costs.step_overhead + costs.steps.sequence,
        "decodes": costs.step_seconds(SMALL),
        "a prompt": costs.step_seconds(StepShape(0, 0, 400, 80_000, 1)),
        "into a slot": costs.slot.seconds(10_000),
        "from the disk": costs.disk.seconds(10_000),
    }
    assert all(0 < each < math.inf for each in seconds.values()), seconds


@pytest.mark.slow
def test_a_cost_model_says_how_its_weights_were_quantized(model: Path, tmp_path: Path) -> None:
    """Simulated engines have the memory, and validations the live engine, that it was calibrated with."""
    costs = calibrate(str(model), tmp_path / "int8.json", design=TINY, quantization="int8")
    assert (costs.quantization, costs.tensor_parallel_size) == ("int8", 1)
    assert CostModel.read(tmp_path / "int8.json") == costs
    found = validate(experiment_of(tmp_path / "int8.json"), str(model), loads=(), repeats=1)
    assert found.comparisons[0].live.median_ttft > 0
    config = experiment_of(tmp_path / "int8.json").engine_config()
    plain = msgspec.structs.replace(costs, quantization="none")
    assert costs.plan(config).weights_bytes < plain.plan(config).weights_bytes


def test_calibration_refuses_what_it_cannot_write(model: Path, tmp_path: Path) -> None:
    for out, why in ((tmp_path / "no" / "costs.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=why):
            calibrate(str(model), out, design=TINY)
        with pytest.raises(ConfigError, match=why):
            validate(validation_experiment(), str(model), calibrate=out, design=TINY)


async def test_a_calibration_that_is_cancelled_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = asyncio.Event()
    running = asyncio.create_task(calibrate_async(str(model), design=TINY, progress=lambda *_: told.set()))
    await told.wait()
    assert [name[:20] for name in os.listdir(tmp_path)] == ["aioengine-calibrate-"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ()}, "design.rows"),
        ({"contexts": (0,)}, "design.contexts"),
        ({"repeats": 0}, "design.repeats"),
        ({"ranks": (1024,)}, "at most rank 512"),
        ({"mixed_rows": (-1,)}, "nothing below 0"),
    ],
)
def test_designs_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Design(**fields)  # type: ignore[arg-type]


def experiment_of(costs: Path) -> Experiment:
    """A short one."""
    experiment = validation_experiment(str(costs))
    workload = msgspec.structs.replace(
        experiment.workload, arrivals="poisson:rate=200", limit=12, output_tokens=8, prompt_tokens=6
    )
    return msgspec.structs.replace(experiment, workload=workload, kv_cache_memory="8MiB")


def test_validation_is_refused_what_cannot_be_compared(model: Path, calibrated: Path) -> None:
    costs_of(name="other", device_memory=2**36).write(calibrated.with_name("other.json"))
    with pytest.raises(ConfigError, match=r"'other' is of a model with 3 layers .* bfloat16, .* float32"):
        validate(experiment_of(calibrated.with_name("other.json")), str(model), loads=(), repeats=1)
    with pytest.raises(ConfigError, match=r"loads=0\.5, 0: each must be more than 0"):
        validate(experiment_of(calibrated), str(model), loads=(0.5, 0.0))


@pytest.mark.slow
def test_validation_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    experiment = experiment_of(calibrated)
    as_given = validate(experiment, str(model), loads=(), repeats=2)
    (one,) = as_given.comparisons
    assert one.load == "as given" and len(one.waited) == 2
    for metric in METRICS:
        live, simulated = getattr(one.live, metric), getattr(one.simulated, metric)
        assert live > 0 and simulated > 0
        assert one.error[metric] == pytest.approx(simulated / live - 1)
    assert one.step_error > -1 and min(one.waited) >= 0
    assert set(one.error_as_live) == set(METRICS) and min(one.error_as_live.values()) > -1
    assert as_given.worst == max(abs(error) for error in one.error.values())
    assert [row[:2] for row in as_given.rows()] == [("as given", metric) for metric in METRICS]
    loaded = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert [c.load for c in loaded.comparisons] == ["50%"]
    again = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert again.comparisons[0].simulated == loaded.comparisons[0].simulated


@pytest.mark.slow
def test_a_calibration_in_turns_with_the_live_runs(model: Path, tmp_path: Path) -> None:
    """Every step is timed before, between and after the runs; the simulation has that cost model."""
    path, told = tmp_path / "turns.json", []
    experiment = experiment_of(tmp_path / "no such preset.json")
    found = validate(
        experiment,
        str(model),
        loads=(0.3, 0.6),
        repeats=1,
        calibrate=path,
        design=TINY,
        progress=lambda done, total, what: told.append((done, total)),
    )
    assert found.preset == str(path) and [one.load for one in found.comparisons] == ["30%", "60%"]
    assert told == [(0, 2), (0, 2), (1, 2), (2, 2)]
    costs = CostModel.read(path)
    assert found.rounds == costs.sources["rounds"] and "as long as their mean" in found.rounds
    again = validate(experiment_of(path), str(model), loads=(), repeats=1)
    assert again.preset == str(path) and not again.rounds
    with pytest.raises(ConfigError, match="there is no folder"):
        validate(experiment, str(model), calibrate=tmp_path / "no" / "costs.json", design=TINY)
