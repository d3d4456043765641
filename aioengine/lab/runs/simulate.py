"""One simulated run, from an experiment to its files."""

from __future__ import annotations

import asyncio
import json
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.errors import ConfigError, PolicyError
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.fleet.fleet import START_SECONDS, SimulatedFleet, Watch
from aioengine.lab.runs.experiment import Experiment, Policy, policy_label
from aioengine.lab.runs.provenance import provenance
from aioengine.lab.runs.recorder import PolicyWatch
from aioengine.lab.runs.replay import Progress, Watching, replay, replay_on_fleet
from aioengine.lab.runs.rows import CsvFiles, Sink, load_frames
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.extra import needs_extra
from aioengine.lab.workload.requests import Arrival, Offered, Workload, look_through
from aioengine.memory_plan import MemoryPlan
from aioengine.schedulers import SchedulerPolicy, load_policy

Say = Callable[[str], None]
"""Callback with a warning, before anything runs."""


class RunResult(NamedTuple):
    out: Path
    """The folder with the files."""
    summary: dict[str, Any]
    """Content of summary.json."""


def run(
    experiment: Experiment,
    out: str | Path,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> RunResult:
    """Simulate an experiment, and write what happened into the folder ``out``.

    The files are experiment.json (all parameters, the cost model, and the versions: enough to repeat the
    run), requests.csv, slots.csv, moves.csv, samples.csv (the fields of
    :mod:`aioengine.lab.runs.rows`), and summary.json. They depend on the experiment alone.

    Args:
        progress: Called every ``sample_seconds`` of simulated time with the requests that have ended, their
            total (None: not known), and the simulated seconds.
        say: Called with warnings about the workload.

    Raises:
        ConfigError: The preset, the trace or the output folder cannot be used, or the plan does not fit.
        PolicyError: There is no such policy.
        RunStalled: The policy lets requests wait for ever.
    """
    with needs_extra():  # before the run, and not after it
        from aioengine.lab.analysis.asked import warnings
        from aioengine.lab.analysis.summary import summarize

    # A run that is not possible overwrites no earlier files.
    out, watch = Path(out), PolicyWatch()
    costs = load_costs(experiment.preset)
    plan = costs.plan(experiment.engine_config())
    check_policy(experiment.policy)
    workload, offered = fitting(experiment, plan, say)
    try:
        out.mkdir(parents=True, exist_ok=True)
        description = {
            "aioengine": version("aioengine"),
            "python": platform.python_version(),
            "experiment": msgspec.to_builtins(experiment),
            "costs": msgspec.to_builtins(costs),
            "provenance": provenance(experiment),
        }
        _write_json(out / "experiment.json", description)
        with CsvFiles(out) as files:
            simulation = simulate(experiment, costs, workload, files, progress, watch, plan=plan)
            fleet = run_in_virtual_time(simulation)
    except OSError as error:
        raise ConfigError(f"cannot write the run's files into {out}: {error.strerror or error}") from error
    summary = {**summarize(out), "policy": watch.summary(policy_label(experiment.policy))}
    summary["workload"] = {
        "adapters_asked": experiment.workload.adapters,
        "adapters_used": len(offered.by_adapter.keys() - {None}),
        "conversations": offered.sizes.total(),
    }
    summary["warnings"] = [*warnings(experiment, offered, load_frames(out), summary)]
    summary["too_long"] = {**offered.summary(), "on_too_long": experiment.on_too_long}
    if fleet is not None:
        summary["fleet"] = fleet
    _write_json(out / "summary.json", summary)
    return RunResult(out, summary)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fitting(experiment: Experiment, plan: MemoryPlan, say: Say) -> tuple[Workload, Offered]:
    """Return the workload as the experiment wants it, and what it offers; if requests are longer than the
    model's context, which is in the ``plan`` of its engine, say so.

    Raises ConfigError if they are and ``on_too_long`` is "fail", and what
    :meth:`Experiment.open_workload` raises.
    """
    workload, treatment = experiment.open_workload(), experiment.on_too_long
    found = look_through(workload, plan.max_model_len)
    if not found.too_long:
        return workload, found
    if treatment == "fail":
        raise ConfigError(f"on_too_long='fail': {found}")
    done = "prompts that do not fit are refused, other outputs end where the context ends"
    if treatment == "truncate":
        workload, done = experiment.open_workload(found.limit), "their prompts are cut"
    say(f"{found}: {done} (--on-too-long reject|truncate|fail)")
    return workload, found


async def simulate(
    experiment: Experiment,
    costs: CostModel,
    workload: Workload,
    sink: Sink,
    progress: Progress | None = None,
    watch: PolicyWatch | None = None,
    *,
    plan: MemoryPlan | None = None,
) -> dict[str, Any] | None:
    """Run an experiment on a loop in virtual time. Returns the part ``fleet`` of summary.json if there is a
    fleet.

    ``watch`` is told of the policy's failures and of its replacement, on all replicas. ``plan`` is the memory
    of an engine, if it is known already.
    """
    config, replicas = experiment.engine_config(), experiment.replicas
    known_plan = plan or costs.plan(config)
    start = asyncio.get_running_loop().time() + (0.0 if replicas is None else START_SECONDS)
    total = experiment.workload.limit
    watching = Watching(sample_seconds=experiment.sample_seconds, progress=progress, total=total)

    def make_engine() -> SimulatedEngine:
        policy = lab_policy(experiment.policy, workload, start=start)
        return SimulatedEngine(config, costs, policy, metrics=False, plan=known_plan)

    if replicas is None:
        async with make_engine() as engine:
            await replay(engine, workload, sink, listener=watch, **watching)
            engine.check_invariants()
            return None
    fleet_config, start_seconds = experiment.fleet_config(replicas), experiment.start_seconds

    def open_fleet(told: Watch) -> SimulatedFleet:
        return SimulatedFleet(fleet_config, make_engine, start_seconds=start_seconds, watch=told)

    fleet = await replay_on_fleet(workload, sink, open_fleet=open_fleet, listener=watch, **watching)
    return fleet.summary()


def check_policy(spec: Policy) -> SchedulerPolicy:
    """Return the policy that ``spec`` names, which knows no arrivals. Raises PolicyError if there is none."""
    return lab_policy(spec, ())


def lab_policy(spec: Policy, workload: Iterable[Arrival], *, start: float = 0.0) -> SchedulerPolicy:
    """Return the policy that ``spec`` names. One that takes ``future`` gets the workload's arrivals; when the
    workload begins, the engine's clock shows ``start``. Raises PolicyError if there is none."""

    def future() -> list[tuple[float, str]]:
        return [(arrival.time, arrival.adapter) for arrival in workload if arrival.adapter is not None]

    try:
        return load_policy(spec, supply={"future": future, "start": lambda: start})
    except ValueError as error:
        raise PolicyError(str(error)) from error
