"""Comparison of a simulation with the live engine under the same workload."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.calibration.calibrate import Calibration, LiveSettings, Progress, check_can_write
from aioengine.lab.calibration.design import Design
from aioengine.lab.calibration.fit import Intervals
from aioengine.lab.calibration.probe import DISTURBED, ProbedEngine, ProbedStep, Waits
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.lab.costs.model import CostModel, ModelShape
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.costs.steps import StepTimes
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink, RequestRecord
from aioengine.lab.runs.simulate import simulate
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.request import SamplingParams
from aioengine.tasks import run_to_completion

ALL_AT_ONCE = "poisson:rate=100000"
IDLE_SECONDS = 0.02
"""A step that begins later after the one before does not follow it: the engine had nothing to do."""


def validation_experiment(preset: str = "smollm2-135m-cpu", *, seed: int = 0) -> Experiment:
    """Make an experiment that :func:`validate` suits: a small model, and half as many adapters again as
    slots.

    With far fewer slots, half of the requests would find their adapter in one, and half would wait for
    seconds: the median would lie between the two, and hang on every millisecond.
    """
    workload = WorkloadSpec(
        arrivals=ALL_AT_ONCE,
        limit=120,
        adapters=12,
        popularity="zipf:1.0",
        prompt_tokens="uniform:16..256",
        output_tokens="uniform:16..96",
    )
    return Experiment(
        workload=workload,
        preset=preset,
        slots=8,
        cpu_loras=10,
        max_lora_rank=16,
        max_num_seqs=32,
        max_model_len=512,
        kv_cache_memory="512MiB",
        seed=seed,
    )


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a run that are compared. A mean over no requests is 0."""

    output_tokens_per_second: float
    """From the start to the end of the last request."""
    median_ttft: float
    """Seconds."""
    mean_inter_token: float
    """Seconds: the mean over requests of the time between the first token and the last, a token."""


METRICS = Measured.__struct_fields__


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One load. ``error`` is (simulated - live) / live of each metric."""

    load: str
    """"40%" of what the simulated engine can do, or "as given"."""
    live: Measured
    """Over the requests of all runs."""
    waited: tuple[float, ...]
    """Time that threads waited for a processor in each live run while no adapter was moved, as a share of the
    time in those steps. It shows how much other processes took."""
    simulated: Measured
    error: dict[str, float]
    step_error: float
    """The error of the cost model alone, in the time of the live runs' steps, each to the beginning of the
    next, while no adapter was moved."""
    error_as_live: dict[str, float]
    """``error``, with all steps longer or shorter by one factor, so that they take as long as the live ones.
    What is left of ``error`` has other causes. Near saturation a small error of the steps is a large one of
    the figures, because sequences that take longer run beside more others."""


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    preset: str
    comparisons: tuple[Comparison, ...]
    rounds: str = ""
    """How much the machine's speed varied, if the calibration was made in turns with the live runs."""

    @property
    def worst(self) -> float:
        """Largest absolute error."""
        return max(abs(error) for one in self.comparisons for error in one.error.values())

    def rows(self) -> list[tuple[str, str, float, float, float]]:
        """(load, metric, live, simulated, error), for a table."""
        return [
            (one.load, metric, getattr(one.live, metric), getattr(one.simulated, metric), one.error[metric])
            for one in self.comparisons
            for metric in METRICS
        ]


def validate(experiment: Experiment, model: str, **options: Any) -> Validation:
    """Do what :func:`validate_async` does where no loop runs."""
    return asyncio.run(validate_async(experiment, model, **options))


async def validate_async(
    experiment: Experiment,
    model: str,
    *,
    loads: Sequence[float] = (0.4, 0.8),
    repeats: int = 3,
    calibrate: Path | None = None,
    design: Design | None = None,
    progress: Progress = lambda done, total, what: None,
    **settings: Unpack[LiveSettings],
) -> Validation:
    """Run the experiment's workload on the live engine and in simulation, and compare.

    Both run through the same :func:`~aioengine.lab.runs.replay.replay`; the live engine gets adapters with
    random weights. Nothing else should run on the machine. It can be cancelled.

    Args:
        experiment: Its preset should be the cost model of ``model`` on this machine. The live engine
            quantizes and divides the weights as it says.
        model: As in :class:`~aioengine.config.EngineConfig`, like the ``settings``.
        loads: Shares of what the simulated engine can do, which is measured by offering it everything at
            once; the requests then come as a Poisson process. Empty: the workload as it is given.
        repeats: Runs of each load, live on a fresh engine and simulated, each with a workload of its own (of
            the experiment's seed, the next, ...). What is compared is over the requests of all of them.
        calibrate: File for a cost model that is made meanwhile, in turns with the live runs, and takes the
            place of the experiment's preset: then both are of the same minutes, in which the machine may be
            faster or slower than in others. None of its timings is of the workload.
        design: What ``calibrate`` times; the default is that of ``lab calibrate``.

    Raises ConfigError if the preset, the model or the workload cannot be used.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: must be at least 1")
    if not all(load > 0 for load in loads):
        raise ConfigError(f"loads={', '.join(f'{load:g}' for load in loads)}: each must be more than 0")
    total = max(len(loads), 1) * repeats
    async with AsyncExitStack() as stack:
        calibration: Calibration | None = None
        if calibrate is None:
            costs = load_costs(experiment.preset)
        else:
            check_can_write(calibrate)
            progress(0, total, "calibrating")
            design = msgspec.structs.replace(design or Design(), repeats=total + 1, seconds=float("inf"))
            calibration = Calibration(model, name=calibrate.stem, design=design, **settings)
            await stack.enter_async_context(calibration)
            await calibration.turn()
            costs = calibration.costs()
        offered = await _loads(experiment, repeats, loads, costs)
        for done, (repeat, load) in enumerate(product(range(repeats), offered)):
            progress(done, total, f"load {load.name}, live run {repeat + 1}")
            load.live.append(await _live(load.experiments[repeat], model, settings, costs))
            if calibration is not None:
                await calibration.turn()
        progress(total, total, "done")
        if calibration is not None:
            costs = calibration.costs()
    found = tuple([await _compare(load, costs) for load in offered])
    if calibrate is None:
        return Validation(preset=experiment.preset, comparisons=found)
    costs.write(calibrate)
    return Validation(preset=str(calibrate), comparisons=found, rounds=costs.sources["rounds"])


class _Live(NamedTuple):
    """A live run."""

    kept: MemorySink
    waited: float
    steps: list[ProbedStep]
    """Steps that others followed, while no adapter was moved."""


class _Load(NamedTuple):
    name: str
    experiments: list[Experiment]
    """What each run is offered."""
    live: list[_Live]


async def _loads(
    experiment: Experiment, repeats: int, shares: Sequence[float], costs: CostModel
) -> list[_Load]:
    seeds = [msgspec.structs.replace(experiment, seed=experiment.seed + i) for i in range(repeats)]
    if not shares:
        return [_Load("as given", seeds, [])]
    capacities = []
    for run in await _simulated([_with_arrivals(one, ALL_AT_ONCE) for one in seeds], costs):
        if not run.finished:
            raise ConfigError("the workload has no requests: nothing can be compared")
        capacities.append(len(run.finished) / run.seconds)
    rates = {f"{share:.0%}": share * statistics.fmean(capacities) for share in shares}
    return [
        _Load(name, [_with_arrivals(one, f"poisson:rate={rate:.6g}") for one in seeds], [])
        for name, rate in rates.items()
    ]


def _with_arrivals(experiment: Experiment, arrivals: str) -> Experiment:
    workload = msgspec.structs.replace(experiment.workload, arrivals=arrivals)
    return msgspec.structs.replace(experiment, workload=workload)


async def _simulated(experiments: Sequence[Experiment], costs: CostModel) -> list[MemorySink]:
    def run(experiment: Experiment) -> MemorySink:
        kept = MemorySink()
        run_in_virtual_time(simulate(experiment, costs, experiment.open_workload(), kept))
        return kept

    return [await run_to_completion(asyncio.to_thread(run, one)) for one in experiments]


async def _live(experiment: Experiment, model: str, settings: LiveSettings, costs: CostModel) -> _Live:
    """Run an experiment live; once more if other programs disturbed it, and then the calmer run counts."""
    config = msgspec.structs.replace(experiment.engine_config(), model=model, **settings)
    config = costs.engine_config(config)
    run = await _live_run(experiment, config, costs)
    if run.waited > DISTURBED:
        run = min(run, await _live_run(experiment, config, costs), key=lambda run: run.waited)
    return run


async def _live_run(experiment: Experiment, config: EngineConfig, costs: CostModel) -> _Live:
    kept, workload = MemorySink(), experiment.open_workload()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aioengine-validate-"))
        engine = await stack.enter_async_context(ProbedEngine(config))
        found = ModelShape.of(engine.model_spec, engine.plan.dtype)
        if found != costs.model:
            of_costs, of_model = (
                f"{shape.num_layers} layers of {shape.hidden_size} in {shape.dtype}"
                for shape in (costs.model, found)
            )
            raise ConfigError(
                f"cost model {costs.name!r} is of a model with {of_costs}, and {config.model!r} "
                f"has {of_model}; give the model that it was calibrated with"
            )
        paths = {}
        for i, shape in enumerate(workload.adapters):
            write = partial(write_random_adapter, Path(folder, str(i)), engine.model_spec, shape.rank, seed=i)
            paths[shape.name] = await run_to_completion(asyncio.to_thread(write))
        await engine.complete([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))  # warm-up
        engine.probe.steps.clear()
        engine.probe.waits = Waits()
        await replay(engine, workload, kept, paths=paths, seed=experiment.seed)
        waited = engine.probe.waits.seconds()
    moving = Intervals(engine.probe.moves)
    following = [
        step
        for step in engine.probe.steps
        if step.wall - step.seconds < IDLE_SECONDS and not moving.overlap(step)
    ]
    computed = sum(step.seconds for step in following)
    return _Live(kept, waited / computed if computed else 0.0, following)


def measured(runs: Sequence[MemorySink]) -> Measured:
    """Compute the figures over the requests of all runs that have finished."""
    import polars as pl

    records = [record for run in runs for record in run.finished]
    times = times_of(pl.DataFrame(records, schema=list(RequestRecord._fields), orient="row"))
    seconds = sum(run.seconds for run in runs)
    return Measured(
        output_tokens_per_second=sum(record.output_tokens for record in records) / (seconds or 1.0),
        median_ttft=float(times["ttft_seconds"].median() or 0.0),  # type: ignore[arg-type] # a column of floats
        mean_inter_token=float(times["inter_token_seconds"].mean() or 0.0),  # type: ignore[arg-type] # floats
    )


def relative_error(found: float, truth: float) -> float:
    """Return the error as a share of the truth; 0 if that is 0."""
    return (found - truth) / truth if truth else 0.0


async def _compare(load: _Load, costs: CostModel) -> Comparison:
    """Simulate the same as was run live, and compare."""
    live = measured([run.kept for run in load.live])
    times = StepTimes(costs.steps)
    steps = [step for run in load.live for step in run.steps]
    expected = sum(times(step.shape) + costs.step_overhead for step in steps)
    step_error = relative_error(expected, sum(step.wall for step in steps))
    factor = 1 / (1 + step_error)
    as_live = msgspec.structs.replace(
        costs, steps=costs.steps.scaled(factor), step_overhead=costs.step_overhead * factor
    )
    simulated, with_other_steps = [
        measured(await _simulated(load.experiments, model)) for model in (costs, as_live)
    ]
    error, error_as_live = (
        {name: relative_error(getattr(one, name), getattr(live, name)) for name in METRICS}
        for one in (simulated, with_other_steps)
    )
    return Comparison(
        load=load.name,
        live=live,
        waited=tuple(run.waited for run in load.live),
        simulated=simulated,
        error=error,
        step_error=step_error,
        error_as_live=error_as_live,
    )
