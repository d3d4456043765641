"""Many runs side by side: policies by slots by loads, each over the same seeds."""

from __future__ import annotations

import itertools
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from aioengine.checks import from_plain, read_json
from aioengine.errors import ConfigError
from aioengine.lab.analysis.statistics import estimate, paired
from aioengine.lab.analysis.summary import flatten
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.runs.experiment import Experiment, Policy, policy_label
from aioengine.lab.runs.pool import Outcome, Task, run_all
from aioengine.lab.runs.simulate import Say, check_policy, fitting

KEYS = ("policy", "slots", "scale")
"""Fields that distinguish settings, beside the seed."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a comparison depends on. Every run is ``experiment`` with four of its fields replaced:
    all combinations of these."""

    experiment: Experiment
    policies: list[Policy]
    """Differences are to the first."""
    slots: list[int]
    scales: list[float]
    """Factors of the arrival rate: WorkloadSpec.scale."""
    seeds: list[int]
    """The same seeds for every policy, so that all are offered the same arrivals."""
    routers: list[str] = []
    """Routers of a fleet, each combined with each policy. []: the experiment's."""

    def __post_init__(self) -> None:
        for name in ("policies", "slots", "scales", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"Comparison.{name}=[]: must have at least one value")
            _refuse_twice(name, [policy_label(v) if name == "policies" else str(v) for v in values])
        _refuse_twice("routers", self.routers)
        if self.routers and self.experiment.replicas is None:
            raise ConfigError("Comparison.routers: there is no fleet to route in; give replicas")

    def tasks(self, out: Path) -> list[Task]:
        """Return the runs, each with a folder below ``out``; the seeds of a setting follow each other.

        Raises ConfigError if one of them is not possible.
        """
        routers = self.routers or [self.experiment.router]
        grid = itertools.product(self.scales, self.slots, self.policies, routers, self.seeds)
        tasks = []
        for number, (scale, slots, policy, router, seed) in enumerate(grid):
            workload = msgspec.structs.replace(self.experiment.workload, scale=scale)
            experiment = msgspec.structs.replace(
                self.experiment, workload=workload, slots=slots, policy=policy, router=router, seed=seed
            )
            plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", self.label(experiment)).strip("_.")[:40]
            name = f"{number:04d}-{plain}-slots={slots}-scale={scale:g}-seed={seed}"
            tasks.append(Task(experiment, out / "runs" / name))
        return tasks

    def label(self, experiment: Experiment) -> str:
        """Return the name of a run's policy in results. Where routers are compared it is the router's, with
        the policy's name only if there are several."""
        policy = policy_label(experiment.policy)
        if not self.routers:
            return policy
        return experiment.router if len(self.policies) == 1 else f"{policy} @ {experiment.router}"


def _refuse_twice(name: str, labels: list[str]) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"Comparison.{name}: {', '.join(twice)} is given twice")


class Failure(NamedTuple):
    folder: str
    error: str
    invalid: bool = False
    """Whether the run ended, but the policy did not make all of its decisions."""


class Compared(NamedTuple):
    results: pl.DataFrame
    """A row for each run: policy, slots, scale, seed, folder, error, and the figures of its summary."""
    failures: list[Failure]
    warnings: dict[str, list[str]]
    """Where runs are not what was asked, by kind: a text for each run; see
    :mod:`aioengine.lab.analysis.asked`."""


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    jobs: int = 1,
    allow_fallback: bool = False,
    ended: Callable[[Task, Outcome], None] = lambda task, outcome: None,
    say: Say = lambda text: None,
) -> Compared:
    """Run all settings in separate processes, ``jobs`` at a time, and write their results to ``out``.

    Files: ``comparison.json``, ``results.csv``, ``results.parquet``, ``estimates.csv``, and a folder for each
    run below ``runs``, where those of an earlier comparison are removed. A run that fails leaves its error in
    the results, and the others go on. A run in which the policy did not make every decision is invalid: it
    leaves an error, too, and no figures, because they would be those of another policy.

    Args:
        allow_fallback: Take the figures of invalid runs as well.
        ended: Told of each run that has ended.
        say: Called with warnings about the comparison before any run begins.

    Raises ConfigError or PolicyError before anything runs if a setting is impossible or the preset, the
    trace, a policy or the folder cannot be used.
    """
    out = Path(out)
    tasks = comparison.tasks(out)
    # What all runs need is checked before any of them begins.
    experiment = comparison.experiment
    fitting(experiment, load_costs(experiment.preset).plan(experiment.engine_config()), say)
    for policy in comparison.policies:
        check_policy(policy)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "comparison.json").exists():  # else what is below "runs" is somebody else's
            for earlier in (out / "runs").glob("[0-9][0-9][0-9][0-9]-*/experiment.json"):
                shutil.rmtree(earlier.parent)
        data = {
            "aioengine": version("aioengine"),
            "python": platform.python_version(),
            "comparison": msgspec.to_builtins(comparison),
        }
        text = msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"
        (out / "comparison.json").write_bytes(text)
    except OSError as error:
        raise ConfigError(f"cannot write the comparison into {out}: {error.strerror or error}") from error
    outcomes = run_all(tasks, jobs, ended=ended)
    rows, failures, warnings = [], list[Failure](), defaultdict[str, list[str]](list)
    for task, (summary, fault) in zip(tasks, outcomes, strict=True):
        invalid = summary is not None and not (allow_fallback or summary["policy"]["valid"])
        if invalid and summary is not None:
            fault = invalid_text(summary["policy"])
            summary = None
        if fault is not None:
            failures.append(Failure(task.out.name, fault, invalid))
        for text in (summary or {}).get("warnings", ()):
            warnings[text.partition(":")[0]].append(text)
        row = {
            "policy": comparison.label(task.experiment),
            "slots": task.experiment.slots,
            "scale": float(task.experiment.workload.scale),
            "seed": task.experiment.seed,
            "folder": task.out.name,
            "error": fault,
        }
        figures = flatten(summary or {}).items()
        rows.append(row | {name: None if value is None else float(value) for name, value in figures})
    # Counts are floats, too: a column has one type, even if a run has no value for it.
    texts, numbers = ("policy", "folder", "error"), ("slots", "seed")
    names = dict.fromkeys(name for row in rows for name in row)
    schema = {
        name: pl.String if name in texts else pl.Int64 if name in numbers else pl.Float64 for name in names
    }
    results = pl.DataFrame(rows, schema=schema)
    results.write_csv(out / "results.csv")
    results.write_parquet(out / "results.parquet")
    estimates(results).write_csv(out / "estimates.csv")
    return Compared(results, failures, warnings)


def invalid_text(policy: Mapping[str, Any]) -> str:
    """Return why a run is not valid, from the part ``policy`` of its summary."""
    return (
        f"not valid: {policy['name']} failed {policy['failures']:,} times, and the built-in safe policy made "
        f"{policy['fallback_steps']:,} decisions in its place; first: {policy['reason']}"
    )


def read_comparison(path: str | Path) -> Comparison:
    """Read a comparison. Raises ConfigError, which names the file and the fault."""
    data = read_json(path)
    if "comparison" not in data:
        raise ConfigError(f"{path}: is no comparison; 'aioengine lab compare' writes comparison.json")
    return from_plain(Comparison, data["comparison"], str(path))


def load_results(folder: str | Path) -> pl.DataFrame:
    """Return the results of a comparison as a frame. Raises ConfigError if there are none."""
    path = Path(folder) / "results.parquet"
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def estimates(results: pl.DataFrame) -> pl.DataFrame:
    """Means over the seeds with their 95% intervals: a row for each setting and figure.

    Columns: ``policy``, ``slots``, ``scale``, ``figure``, ``runs``; ``mean``, ``low``, ``high``;
    ``difference`` (and ``_low``, ``_high``) to the first policy with the same slots and scale, by seed.
    """
    numbers = ("mean", "low", "high", "difference", "difference_low", "difference_high")
    schema: dict[str, Any] = {"policy": pl.String, "slots": pl.Int64, "scale": pl.Float64}
    schema |= {"figure": pl.String, "runs": pl.Int64, **dict.fromkeys(numbers, pl.Float64)}
    figures = [name for name in results.columns if name not in (*KEYS, "seed", "folder", "error")]
    by_setting = {key: frame.sort("seed") for key, frame in results.group_by(KEYS, maintain_order=True)}
    rows = []
    for (policy, slots, scale), frame in by_setting.items():
        base = by_setting.get((results["policy"][0], slots, scale))
        for figure in figures:
            values = frame[figure].to_list()
            known = [value for value in values if value is not None]
            if known:
                found = estimate(known)
                compared = None if base is None else paired(values, base[figure].to_list())
                difference = [None] * 3 if compared is None else compared[:3]
                rows.append((policy, slots, scale, figure, found.runs, *found[:3], *difference))
    return pl.DataFrame(rows, schema=schema, orient="row")
