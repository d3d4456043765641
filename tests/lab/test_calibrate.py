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
from support.lab_sim import costs as costs_of
from support.tiny_models import build_model

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.calibration.calibrate import Design, Served, calibrate, calibrate_async
from aioengine.lab.calibration.fit import fit_moves
from aioengine.lab.calibration.probe import Probe, ProbedEngine, ProbedMove, ProbedStep
from aioengine.lab.calibration.validate import Measured, validate, validation_experiment
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepCosts, StepShape
from aioengine.lab.runs.experiment import Experiment
from aioengine.request import SamplingParams

# From a probe to points

SMALL = StepShape(4, 400, 0, 0, 4)


def test_steps_are_timed_finer_than_uvloop_tells_the_time(model: Path) -> None:
    async def serve() -> list[float]:
        async with ProbedEngine(EngineConfig(model=str(model), kv_cache_memory="8MiB")) as engine:
            await engine.complete([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
            return [step.wall - step.seconds for step in engine.probe.steps]

    gaps = uvloop.run(serve())
    assert len(gaps) > 10 and min(gaps) > 0, "a step's own time is within the time to the next"


@given(st.floats(1.0, 4.0), st.floats(1.0, 4.0))
def test_stages_and_their_slowdowns_are_recovered(disk: float, slot: float) -> None:
    """Work stands still for a part of the time that is shared; a move counts with the median of its size."""
    costs, probe = StepCosts(step=0.09), Probe()
    for at, (stage, slow) in enumerate((("disk", disk), ("slot", slot))):
        for start, extra in zip(range(10 + 10 * at, 13 + 10 * at), (0.0, 0.0, 0.002), strict=True):
            took = 0.05 + extra
            probe.moves.append(ProbedMove(stage, start, start + took, 1000))
            wall = 0.1 + took * (1 - 1 / slow)
            probe.steps.append(ProbedStep(SMALL, start, start + wall, wall - 0.01))
    for stage, slow in (("disk", disk), ("slot", slot)):
        found = fit_moves(costs, 0.01, probe, stage)
        assert found.seconds(1000) == pytest.approx(0.05, rel=0.02)
        assert found.slowdown == pytest.approx(slow, rel=1e-3)


# From end to end

TINY = Design(
    parts=(Served(1, 3, 8), Served(4, 12, 8), Served(4, 24, 14)),
    longest=24,
    output_tokens="uniform:2..8",
    turns=2,
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
    assert done == sorted(done) and done[0] == 0 and done[-1] == total - 1
    assert len(told) == 6, "every part is told of"
    return path


def test_calibration_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    costs = CostModel.read(calibrated)
    assert costs.name == "tiny" and not costs.estimate
    assert "aioengine" in costs.source and "thread" in costs.source
    assert costs.spec.num_layers == 3 and costs.spec.dtype == "float32"
    assert costs.fit is not None and costs.fit.steps > 10
    assert 0 < costs.fit.median_error <= costs.fit.p90_error
    assert costs.disk.slowdown >= 1 and costs.slot.slowdown >= 1
    assert [rank for rank, _ in costs.steps.adapter] == [8.0, 16.0, 64.0]
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
    assert found[0].live.median_ttft > 0
    config = experiment_of(tmp_path / "int8.json").engine_config()
    plain = msgspec.structs.replace(costs, quantization="none")
    assert costs.plan(config).bytes_of("base weights") < plain.plan(config).bytes_of("base weights")


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


def experiment_of(costs: Path) -> Experiment:
    """A short one."""
    experiment = validation_experiment(str(costs))
    workload = msgspec.structs.replace(
        experiment.workload, arrivals="poisson:rate=200", limit=12, output_tokens=8, prompt_tokens=6
    )
    return msgspec.structs.replace(experiment, workload=workload, kv_cache_memory="8MiB")


def test_validation_is_refused_what_cannot_be_compared(model: Path, calibrated: Path) -> None:
    costs_of(name="other", device_memory=2**36).write(calibrated.with_name("other.json"))
    with pytest.raises(ConfigError, match=r"'other' is of a model with 2 layers .* bfloat16, .* float32"):
        validate(experiment_of(calibrated.with_name("other.json")), str(model), loads=(), repeats=1)
    with pytest.raises(ConfigError, match=r"loads=0\.5, 0: each must be more than 0"):
        validate(experiment_of(calibrated), str(model), loads=(0.5, 0.0))


@pytest.mark.slow
def test_validation_of_a_tiny_model(model: Path, calibrated: Path) -> None:
    experiment = experiment_of(calibrated)
    (one,) = validate(experiment, str(model), loads=(), repeats=2)
    assert one.load == "as given" and set(one.errors) == set(Measured._fields)
    for live, simulated, error in zip(one.live, one.simulated, one.errors.values(), strict=True):
        assert live > 0 and simulated > 0
        assert error == pytest.approx(simulated / live - 1)
    (loaded,) = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert loaded.load == "50%"
    (again,) = validate(experiment, str(model), loads=(0.5,), repeats=1)
    assert again.simulated == loaded.simulated


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
    assert [one.load for one in found] == ["30%", "60%"]
    assert told == [(0, 2), (0, 2), (1, 2), (2, 2)]
    assert CostModel.read(path).sources["steps"].endswith("in 3 turns")
    with pytest.raises(ConfigError, match="there is no folder"):
        validate(experiment, str(model), calibrate=tmp_path / "no" / "costs.json", design=TINY)
