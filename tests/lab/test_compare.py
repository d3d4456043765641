"""Comparisons: the statistics by hand, and small grids in processes of their own."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import msgspec
import polars as pl
import pytest

from aioengine.errors import ConfigError
from aioengine.lab import Comparison, Experiment, WorkloadSpec, compare, estimates, load_results, run
from aioengine.lab.analysis.measures import MEASURES, find_measure
from aioengine.lab.analysis.statistics import estimate
from aioengine.lab.analysis.summary import flatten
from aioengine.lab.report.compare_page import (
    Compare,
    load_compare,
    places,
    rankings,
    write_compare_report,
)
from aioengine.lab.runs.comparison import read_comparison
from aioengine.lab.runs.pool import Outcome

WORKLOAD = WorkloadSpec(
    arrivals="gamma:rate=20,cv=2", limit=30, adapters=6, popularity="zipf:1.0", output_tokens="uniform:4..16"
)
BASE = Experiment(workload=WORKLOAD, slots=2, cpu_loras=4)


def grid(**fields: object) -> Comparison:
    values = {"experiment": BASE, "policies": ["fcfs"], "slots": [2], "scales": [1.0], "seeds": [0]}
    return Comparison(**{**values, **fields})  # type: ignore[arg-type]


# Statistics


def test_the_interval_is_students() -> None:
    values = [3.1, 2.9, 3.4, 3.0, 2.6]
    found = estimate(values)
    half = 2.776445 * statistics.stdev(values) / math.sqrt(5)  # t of 4 degrees of freedom, 97.5%
    assert found.mean == pytest.approx(3.0)
    assert (found.low, found.high) == (pytest.approx(3.0 - half), pytest.approx(3.0 + half))
    assert estimate([2.0]) == (2.0, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_estimates_are_of_each_setting() -> None:
    rows = [
        ("fcfs", 1.0, [10.0, 20.0]),
        ("oracle", 1.0, [5.0, 10.0]),
        ("fcfs", 2.0, [30.0, 30.0]),
        ("oracle", 2.0, [30.0, 30.0]),
    ]
    results = pl.DataFrame(
        [
            {"policy": p, "slots": 4, "scale": s, "seed": seed, "folder": "", "error": None, "x": x}
            for p, s, values in rows
            for seed, x in enumerate(values)
        ]
    )
    found = {(row["policy"], row["scale"]): row for row in estimates(results).iter_rows(named=True)}
    assert found["fcfs", 1.0]["mean"] == 15.0 and found["oracle", 1.0]["difference"] == -7.5
    assert found["oracle", 2.0]["difference"] == 0.0


def made(values: dict[str, list[float | None]], name: str = "ttft_seconds.p99") -> Compare:
    """A comparison with these values, one for each seed."""
    results = pl.DataFrame(
        [
            {
                "policy": policy,
                "slots": 4,
                "scale": 1.0,
                "seed": seed,
                "folder": "",
                "error": None,
                name: value,
            }
            for policy, of_seeds in values.items()
            for seed, value in enumerate(of_seeds)
        ]
    )
    return Compare(Path(), results, estimates(results), find_measure(name))


def test_places_are_shared_by_those_that_seeds_do_not_tell_apart() -> None:
    found = made(
        {
            "worst": [9.0, 9.1, 9.2],
            "best": [1.0, 2.0, 3.0],
            "as good": [1.2, 1.9, 3.1],  # its differences: 0.2, -0.1, 0.1
            "a bit worse": [1.5, 2.5, 3.5],
            "failed": [None, None, None],
        }
    )
    assert places(found, 4, 1.0) == {
        "best": "1=",
        "as good": "1=",
        "a bit worse": "3",
        "worst": "4",
        "failed": "–",
    }
    assert not any(row.best for ranking in rankings(found) for row in ranking.rows)


def test_only_who_is_better_than_all_others_is_the_best() -> None:
    (ranking,) = rankings(made({"b": [2.0, 2.1], "a": [1.0, 1.1], "c": [2.0, 2.1]}))
    assert [(row.name, row.place, row.best) for row in ranking.rows] == [
        ("a", "1", True),
        ("b", "2=", False),
        ("c", "2=", False),
    ]
    (one_seed,) = rankings(made({"b": [2.0], "a": [1.0]}))
    assert [(row.name, row.place, row.best) for row in one_seed.rows] == [
        ("a", "1", False),
        ("b", "2", False),
    ]


def test_figures_that_reports_show_are_in_summaries(tmp_path: Path) -> None:
    flat = flatten(run(BASE, tmp_path).summary)
    assert {measure.name for measure in MEASURES} <= set(flat)
    with pytest.raises(ConfigError, match=r"did you mean 'ttft_seconds\.p99'"):
        find_measure("ttft_second.p99")


# Grids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    comparison = grid(policies=["vllm+lru", "oracle"], scales=[1.0, 2.0], seeds=[3, 4])
    outcomes: list[Outcome] = []
    found = compare(comparison, out, jobs=2, ended=lambda task, outcome: outcomes.append(outcome))
    assert found.failures == [] and found.results.height == 8
    assert sum(outcome.error is None for outcome in outcomes) == 8
    return out


@pytest.mark.slow
def test_a_run_of_a_grid_is_the_run_alone(folder: Path, tmp_path: Path) -> None:
    name = load_results(folder)["folder"][-1]
    again = run(Experiment.read(folder / "runs" / name / "experiment.json"), tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (folder / "runs" / name / file.name).read_bytes()
    row = load_results(folder).row(-1, named=True)
    assert row["ttft_seconds.p99"] == again.summary["ttft_seconds"]["p99"]
    assert (row["policy"], row["scale"], row["seed"]) == ("oracle", 2.0, 4)


@pytest.mark.slow
def test_a_comparison_is_repeated_from_its_file(folder: Path, tmp_path: Path) -> None:
    again = read_comparison(folder / "comparison.json")
    assert again == grid(policies=["vllm+lru", "oracle"], scales=[1.0, 2.0], seeds=[3, 4])
    compare(again, tmp_path)
    for name in ("results.csv", "results.parquet", "estimates.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_the_report_ranks(folder: Path) -> None:
    pytest.importorskip("vl_convert", reason="of the extra")
    found = load_compare(folder, "output_tokens_per_second")
    rows = sorted(
        found.of("output_tokens_per_second", slots=2, scale=2.0), key=lambda row: row["mean"], reverse=True
    )
    assert list(places(found, 2, 2.0)) == [row["policy"] for row in rows]
    first = write_compare_report(folder).read_bytes()
    assert write_compare_report(folder).read_bytes() == first
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "ranking.png",
        "throughput.png",
        "ttft.png",
    }
    assert b"aioengine lab compare --experiment FOLDER/comparison.json" in first


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom aioengine.schedulers.policies.fcfs import FCFS\n"
        "class Deadly(FCFS):\n    def schedule(self, view):\n        os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "out"
    many = msgspec.structs.replace(BASE, cpu_loras=5000)
    found = compare(
        grid(experiment=many, policies=[f"{tmp_path}/deadly.py:Deadly", "fcfs"], slots=[2, 5000]), out
    )
    assert [failure.error.split(":")[0] for failure in found.failures] == [
        "its process was killed by signal 9 (out of memory?)",
        "ConfigError",
        "ConfigError",
    ]
    assert found.results["requests_finished"].to_list() == [None, 30.0, None, None]
    pytest.importorskip("vl_convert", reason="of the extra")
    assert b"3 of 4 runs failed" in write_compare_report(out).read_bytes()


@pytest.mark.slow
def test_runs_of_an_earlier_comparison_are_removed_and_no_others(tmp_path: Path) -> None:
    run(BASE, tmp_path / "runs" / "0000-mine")
    compare(grid(seeds=[0, 1]), tmp_path)
    assert (tmp_path / "runs" / "0000-mine" / "requests.csv").exists(), "no comparison was here before"
    run(BASE, tmp_path / "runs" / "mine")
    compare(grid(policies=["vtc"]), tmp_path)
    left = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert left == ["0000-vtc-slots=2-scale=1-seed=0", "mine"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": []}, "seeds=.*at least one"),
        ({"policies": ["fcfs", "fcfs"]}, "fcfs is given twice"),
        ({"slots": [2, 8]}, "cpu_loras"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(grid(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_no_run_can_do_without_is_missed_before_anything_runs(tmp_path: Path) -> None:
    one = grid().experiment
    gone = msgspec.structs.replace(one.workload, arrivals=None, trace=str(tmp_path / "gone.csv"))
    for missing in ({"workload": gone}, {"preset": "gone.json"}):
        experiment = msgspec.structs.replace(one, **missing)
        with pytest.raises(ConfigError, match="gone"):
            compare(grid(experiment=experiment), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write the comparison into .*file"):
        compare(grid(), tmp_path / "file")


def test_a_file_that_is_no_comparison(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no comparison"):
        read_comparison(path)
    data = {"comparison": msgspec.to_builtins(grid()) | {"sots": [1]}}
    path.write_bytes(msgspec.json.encode(data))
    with pytest.raises(ConfigError, match="sots"):
        read_comparison(path)
