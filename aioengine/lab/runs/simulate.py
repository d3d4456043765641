"""One simulated run, from an experiment to its files."""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.errors import ConfigError, PolicyError
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.fleet.replay import replay_on_fleet
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.files import CsvFiles
from aioengine.lab.runs.open_loop import Progress, Replayed
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.extra import needs_extra
from aioengine.lab.workload.requests import Workload
from aioengine.schedulers import SchedulerPolicy, load_policy
from aioengine.schedulers.routing import load_placement, load_router


class RunResult(NamedTuple):
    out: Path
    """The folder with the files."""
    replayed: Replayed
    summary: dict[str, Any]
    """What summary.json holds."""


def run(experiment: Experiment, out: str | Path, progress: Progress | None = None) -> RunResult:
    """Simulate an experiment, and write what happened into the folder ``out``.

    The files are experiment.json (all parameters, the cost model, and the versions: enough to repeat the
    run), requests.csv, slots.csv, moves.csv, samples.csv (the fields of
    :mod:`aioengine.lab.runs.rows`), and summary.json. They depend on the experiment alone.

    Args:
        progress: Told every ``sample_seconds`` of simulated time: requests ended, of how many (None:
            not known), simulated seconds.

    Raises:
        ConfigError: The preset, the trace or the output folder cannot be used, or the plan does not fit.
        PolicyError: There is no such policy.
        RunStalled: The policy lets requests wait for ever.
    """
    with needs_extra():  # before the run, and not after it
        import polars  # noqa: F401 - the summary's
    from aioengine.lab.analysis.summary import summarize

    out = Path(out)
    costs = load_costs(experiment.preset)
    workload = experiment.open_workload()
    run_in_virtual_time(_start(experiment, costs))  # what cannot run leaves an earlier run's files alone
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / "experiment.json", _description(experiment, workload, costs))
        with CsvFiles(out) as files:
            replayed, fleet = run_in_virtual_time(simulate(experiment, costs, workload, files, progress))
    except OSError as error:
        raise ConfigError(f"cannot write the run's files into {out}: {error.strerror or error}") from error
    summary = summarize(out)
    if fleet is not None:
        summary["fleet"] = fleet
    _write_json(out / "summary.json", summary)
    return RunResult(out, replayed, summary)


async def simulate(
    experiment: Experiment,
    costs: CostModel,
    workload: Workload,
    sink: Sink,
    progress: Progress | None = None,
) -> tuple[Replayed, dict[str, Any] | None]:
    """The run itself, on a loop in virtual time; and what summary.json says of the fleet, if there is one."""
    if experiment.replicas is not None:
        return await _simulate_fleet(experiment, costs, workload, sink, progress)
    policy = lab_policy(experiment.policy, workload, start=asyncio.get_running_loop().time())
    async with SimulatedEngine(experiment.engine_config(), costs, policy) as engine:
        replayed = await replay(
            engine,
            workload,
            sink,
            sample_seconds=experiment.sample_seconds,
            progress=progress,
            total=experiment.workload.limit,
        )
        engine.check_invariants()
        return replayed, None


async def _simulate_fleet(
    experiment: Experiment, costs: CostModel, workload: Workload, sink: Sink, progress: Progress | None
) -> tuple[Replayed, dict[str, Any]]:
    assert experiment.replicas is not None
    start = asyncio.get_running_loop().time()

    def make_engine() -> SimulatedEngine:
        policy = lab_policy(experiment.policy, workload, start=start)
        return SimulatedEngine(experiment.engine_config(), costs, policy)

    found = await replay_on_fleet(
        workload,
        sink,
        replicas=experiment.replicas,
        make_engine=make_engine,
        router=load_router(experiment.router),
        placement=load_placement(experiment.placement),
        sample_seconds=experiment.sample_seconds,
        progress=progress,
        total=experiment.workload.limit,
    )
    fleet = {
        "replicas": experiment.replicas,
        "router": experiment.router,
        "placement": experiment.placement,
        "requests_by_replica": found.requests_by_replica,
        "migrations": found.migrations,
        "rejected": found.rejected,
        "failures": found.failures,
        "moves": found.moves,
    }
    return found.replayed, fleet


async def _start(experiment: Experiment, costs: CostModel) -> None:
    """Start the engine, and end it again: raises what keeps it from running."""
    async with SimulatedEngine(experiment.engine_config(), costs, check_policy(experiment.policy)):
        pass


def check_policy(spec: str | dict[str, Any]) -> SchedulerPolicy:
    """The policy that ``spec`` names, knowing of no arrivals. Raises PolicyError if there is none."""
    return _load_policy(spec, list)


def lab_policy(spec: str | dict[str, Any], workload: Workload, *, start: float = 0.0) -> SchedulerPolicy:
    """The policy that ``spec`` names; the clairvoyant ones are told of the workload's arrivals.

    Args:
        start: What the engine's clock reads when the workload begins.

    Raises:
        PolicyError: There is none.
    """

    def future() -> list[tuple[float, str]]:
        return [(arrival.time, arrival.adapter) for arrival in workload if arrival.adapter is not None]

    return _load_policy(spec, future, start)


def _load_policy(
    spec: str | dict[str, Any], future: Callable[[], list[tuple[float, str]]], start: float = 0.0
) -> SchedulerPolicy:
    try:
        return load_policy(spec, supply={"future": future, "start": lambda: start})
    except ValueError as error:
        raise PolicyError(str(error)) from error


def _description(experiment: Experiment, workload: Workload, costs: CostModel) -> dict[str, Any]:
    return {
        "aioengine": version("aioengine"),
        "python": platform.python_version(),
        "experiment": experiment.to_dict(),
        "workload": workload.describe(),
        "costs": msgspec.to_builtins(costs),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
