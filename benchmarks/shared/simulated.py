"""Systems beside each other in the lab: the same arrivals, over several seeds."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.costs.model import CostModel
from benchmarks.report import Table, interval

Fields = Mapping[str, Any]
"""Fields of an experiment; those of its workload under "workload"."""


def compared(
    title: str,
    systems: Mapping[str, Fields],
    figures: Mapping[str, str],
    *,
    common: Fields,
    seeds: int,
    jobs: int = 0,
) -> Table:
    """Run each system with each seed, and return the means of the figures with their 95% intervals.

    Args:
        figures: Names of figures in a run's summary, with dots, by their columns. Each is also compared with
            that of the first system, seed by seed.
        jobs: Runs at a time; 0: as many as there are cores.
    """
    grid = [merged(common, fields, seed) for fields in systems.values() for seed in range(seeds)]
    with ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        summaries = list(pool.map(summary_of, grid)) if jobs != 1 else list(map(summary_of, grid))
    found = [summaries[i : i + seeds] for i in range(0, len(summaries), seeds)]
    rows = []
    for name, runs in zip(systems, found, strict=True):
        cells = [name]
        for path in figures.values():
            own, first = ([figure(summary, path) for summary in each] for each in (runs, found[0]))
            ratios = [a / b for a, b in zip(own, first, strict=True) if b]
            cells += [interval(own), interval(ratios) if ratios else ""]
        rows.append(cells)
    first = next(iter(systems))
    columns = ["", *(column for figure in figures for column in (figure, f"of {first}"))]
    return Table(title, columns, rows, f"Means and 95% intervals, seeds: {seeds}.")


def merged(common: Fields, fields: Fields, seed: int) -> Experiment:
    """Return the experiment of a system."""
    workload = WorkloadSpec(**common.get("workload", {}) | fields.get("workload", {}))
    return Experiment(**{**common, **fields, "workload": workload, "seed": seed})


def summary_of(experiment: Experiment) -> dict[str, Any]:
    """Run an experiment; returns its summary."""
    with tempfile.TemporaryDirectory() as folder:
        return run(experiment, folder).summary


def figure(summary: dict[str, Any], name: str) -> float:
    """Return a figure of a summary by its name, such as "ttft_seconds.p99"."""
    value: Any = summary
    for part in name.split("."):
        value = value[part]
    return float(value)


@contextmanager
def presets(costs: Mapping[str, CostModel]) -> Iterator[dict[str, str]]:
    """Context with files of cost models, for other processes: what ``Experiment.preset`` calls them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{number}.json" for number, name in enumerate(costs)}
        for name, path in paths.items():
            costs[name].write(path)
        yield {name: str(path) for name, path in paths.items()}
