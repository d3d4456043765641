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
from aioengine.engine import AsyncEngine
from aioengine.errors import ConfigError
from aioengine.lab.analysis.summary import times_of
from aioengine.lab.calibration.calibrate import Calibration, Design, LiveSettings, Progress, check_can_write
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import MemorySink, RequestRecord
from aioengine.lab.runs.simulate import simulate
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.request import SamplingParams
from aioengine.tasks import run_to_completion

ALL_AT_ONCE = "poisson:rate=100000"


def validation_experiment(preset: str = "smollm2-135m-cpu") -> Experiment:
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
    )


class Measured(NamedTuple):
    """Figures of a run that are compared. A mean over no requests is 0."""

    output_tokens_per_second: float
    """From the start to the end of the last request."""
    median_ttft: float
    """Seconds."""
    mean_inter_token: float
    """Seconds: the mean over requests of the time between the first token and the last, a token."""


class Comparison(NamedTuple):
    """One load, over the requests of all its runs."""

    load: str
    """"40%" of what the simulated engine can do, or "as given"."""
    live: Measured
    simulated: Measured

    @property
    def errors(self) -> dict[str, float]:
        """(simulated - live) / live of each figure; 0 where live is 0."""
        pairs = zip(Measured._fields, self.live, self.simulated, strict=True)
        return {name: (found - live) / live if live else 0.0 for name, live, found in pairs}


def validate(experiment: Experiment, model: str, **options: Any) -> list[Comparison]:
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
) -> list[Comparison]:
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
        design: What ``calibrate`` serves; the default is that of ``lab calibrate``.

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
            calibration = Calibration(model, calibrate.stem, design or Design(), **settings)
            await stack.enter_async_context(calibration)
            await calibration.turn()
            costs = calibration.costs()
        offered = await _loads(experiment, repeats, loads, costs)
        live: dict[str, list[MemorySink]] = {name: [] for name in offered}
        for done, (repeat, name) in enumerate(product(range(repeats), offered)):
            progress(done, total, f"load {name}, live run {repeat + 1}")
            live[name].append(await _live(offered[name][repeat], model, settings, costs))
            if calibration is not None:
                await calibration.turn()
        progress(total, total, "done")
        if calibration is not None and calibrate is not None:
            costs = calibration.costs()
            costs.write(calibrate)
    return [
        Comparison(name, measured(live[name]), measured(await _simulated(experiments, costs)))
        for name, experiments in offered.items()
    ]


async def _loads(
    experiment: Experiment, repeats: int, shares: Sequence[float], costs: CostModel
) -> dict[str, list[Experiment]]:
    """Return what each run of each load is offered."""
    seeds = [msgspec.structs.replace(experiment, seed=experiment.seed + i) for i in range(repeats)]
    if not shares:
        return {"as given": seeds}
    runs = await _simulated([_with_arrivals(one, ALL_AT_ONCE) for one in seeds], costs)
    capacity = statistics.fmean(len(run.finished) / run.seconds for run in runs)
    return {
        f"{share:.0%}": [_with_arrivals(one, f"poisson:rate={share * capacity:.6g}") for one in seeds]
        for share in shares
    }


def _with_arrivals(experiment: Experiment, arrivals: str) -> Experiment:
    workload = msgspec.structs.replace(experiment.workload, arrivals=arrivals)
    return msgspec.structs.replace(experiment, workload=workload)


async def _simulated(experiments: Sequence[Experiment], costs: CostModel) -> list[MemorySink]:
    def run(experiment: Experiment) -> MemorySink:
        kept = MemorySink()
        run_in_virtual_time(simulate(experiment, costs, experiment.open_workload(), kept))
        return kept

    return [await run_to_completion(asyncio.to_thread(run, one)) for one in experiments]


async def _live(experiment: Experiment, model: str, settings: LiveSettings, costs: CostModel) -> MemorySink:
    kept, workload = MemorySink(), experiment.open_workload()
    config: EngineConfig = msgspec.structs.replace(experiment.engine_config(), model=model, **settings)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aioengine-validate-"))
        engine = await stack.enter_async_context(AsyncEngine(costs.engine_config(config)))
        of_costs, of_model = (
            f"{spec.num_layers} layers of {spec.hidden_size} in {dtype}, {spec.num_parameters():,} numbers"
            for spec, dtype in ((costs.spec, costs.spec.dtype), (engine.model_spec, engine.plan.dtype))
        )
        if of_costs != of_model:
            raise ConfigError(
                f"cost model {costs.name!r} is of a model with {of_costs}, and {config.model!r} "
                f"has {of_model}; give the model that it was calibrated with"
            )
        paths = {}
        for i, shape in enumerate(workload.adapters):
            write = partial(write_random_adapter, Path(folder, str(i)), engine.model_spec, shape.rank, seed=i)
            paths[shape.name] = await run_to_completion(asyncio.to_thread(write))
        await engine.complete([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))  # warm-up
        await replay(engine, workload, kept, paths=paths, seed=experiment.seed)
    return kept


def measured(runs: Sequence[MemorySink]) -> Measured:
    """Compute the figures over the requests of all runs that have finished."""
    import polars as pl

    records = [record for run in runs for record in run.finished]
    times = times_of(pl.DataFrame(records, schema=list(RequestRecord._fields), orient="row"))
    seconds = sum(run.seconds for run in runs)
    return Measured(
        sum(record.output_tokens for record in records) / (seconds or 1.0),
        float(times["ttft_seconds"].median() or 0.0),  # type: ignore[arg-type] # a column of floats
        float(times["inter_token_seconds"].mean() or 0.0),  # type: ignore[arg-type] # a column of floats
    )
