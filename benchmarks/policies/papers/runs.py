"""Runs of experiments for the papers, in several processes, and what their figures look like in a table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.lab import Experiment, run
from aioengine.lab.costs.model import CostModel

Run = Callable[[Sequence[Experiment]], list[dict[str, Any]]]
"""Summaries of experiments, in their order."""


class Lab(NamedTuple):
    """Arguments of a paper's function."""

    run: Run
    quick: bool
    """Whether a small part is enough."""
    folder: Path
    """For cost models, which runs in other processes read."""

    def preset(self, name: str, costs: CostModel) -> str:
        """Write a cost model. Returns what ``Experiment.preset`` calls it."""
        path = self.folder / f"{name}.json"
        costs.write(path)
        return str(path)


def summary_of(experiment: Experiment) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run(experiment, folder).summary


def in_processes(jobs: int) -> Run:
    """Return a function that runs ``jobs`` experiments at a time."""

    def run_all(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
        if jobs == 1:
            return list(map(summary_of, experiments))
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            return list(pool.map(summary_of, experiments))

    return run_all


def figure(summary: dict[str, Any], name: str) -> float:
    """Return a figure of a summary by its name with dots, such as "ttft_seconds.p99"."""
    value: Any = summary
    for part in name.split("."):
        value = value[part]
    return float(value)


def figures(runs: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [figure(summary, name) for summary in runs]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Return the ratios by seed: both sides have the same arrivals."""
    return [value / base for value, base in zip(values, bases, strict=True)]
