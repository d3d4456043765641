"""Sizing: objectives as text, verdicts by intervals, and the fewest replicas that hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.analysis.statistics import Estimate
from aioengine.lab.runs.sizing import Objective, Sizing, parse_objectives

SUMMARY: dict[str, Any] = {
    "requests_offered": 10,
    "requests_finished": 9,
    "ttft_seconds": {"p99": 1.5, "mean": None},
    "slo": {"in_time_share": 0.75},
}


def test_objectives_are_figures_with_bounds() -> None:
    served, ttft, share = parse_objectives(["ttft_p99=2.0,goodput=0.9"])
    assert (ttft.of(SUMMARY), share.of(SUMMARY), served.of(SUMMARY)) == (1.5, 0.75, 0.9)
    assert (ttft.bound, share.bound, served.bound) == (2.0, 0.9, 0.99)
    assert parse_objectives(["ttft_p99=2", "served=0.5"])[0] == Objective("served", 0.5)


def test_whoever_serves_nobody_keeps_no_objective() -> None:
    nothing = {**SUMMARY, "requests_finished": 0, "ttft_seconds": {"p99": None}}
    assert Objective("ttft_p99", 2.0).of(nothing) == math.inf


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft_p98=2", "no 'ttft_p98' (did you mean 'ttft_p9"),
        ("ttft_p99", "ttft_p99=2.0"),
        ("ttft_p99=0", "seconds > 0"),
        ("ttft_p99=x", "seconds > 0"),
        ("goodput=1.5", "a share"),
    ],
)
def test_what_is_no_objective_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="slo") as caught:
        parse_objectives([text])
    assert says in str(caught.value)


def test_a_bound_holds_or_not_by_the_whole_interval() -> None:
    ttft, goodput = Objective("ttft_p99", 2.0), Objective("goodput", 0.9)
    assert ttft.verdict(Estimate(1.5, 1.2, 1.8, 3)) is True
    assert ttft.verdict(Estimate(1.9, 1.5, 2.3, 3)) is None
    assert ttft.verdict(Estimate(2.5, 2.2, 2.8, 3)) is False
    assert ttft.verdict(Estimate(1.9, None, None, 1)) is True
    assert goodput.verdict(Estimate(0.95, 0.91, 0.99, 3)) is True
    assert goodput.verdict(Estimate(0.91, 0.85, 0.97, 3)) is None


def experiment(rate: float, **fields: Any) -> Experiment:
    workload = WorkloadSpec(
        arrivals=f"poisson:rate={rate}",
        limit=40,
        adapters=4,
        prompt_tokens=200,
        output_tokens=20,
        slo=2.0,
    )
    return Experiment(workload=workload, cpu_loras=4, **{"slots": 4, **fields})


def test_replicas_are_added_until_it_holds_and_no_more_than_may_be(tmp_path: Path) -> None:
    objectives = parse_objectives(["ttft_p99=0.5"])
    sizing = Sizing(experiment(25, slots=1), objectives, tmp_path, seeds=1)
    assert sizing.find(1, 1) is None
    assert [trial.holds is True for trial in sizing.trials.values()] == [False]
    found = sizing.find(1, 4)
    assert found is not None and found > 1
    assert sizing.trials[found].holds is True and sizing.trials[found - 1].holds is not True
    assert Sizing(experiment(1.0), objectives[1:], tmp_path, seeds=1).find(1, 3) == 1


def test_what_changes_the_number_of_replicas_has_no_size(tmp_path: Path) -> None:
    scaled = experiment(1.0, replicas=3, autoscale="waiting_work:most=3")
    with pytest.raises(ConfigError, match=r"autoscale=.* leave it out"):
        Sizing(scaled, parse_objectives(["ttft_p99=0.5"]), tmp_path)


def test_what_is_of_a_fleet_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    fleet = experiment(1.0, replicas=3, router="least_loaded")
    sizing = Sizing(fleet, parse_objectives(["served=0.9"]), tmp_path, seeds=1)
    assert sizing.find(1, 3) == 1


def test_goodput_needs_to_be_told_by_when(tmp_path: Path) -> None:
    spec = WorkloadSpec(arrivals="poisson:rate=1", limit=5)
    with pytest.raises(ConfigError, match="goodput"):
        Sizing(Experiment(workload=spec), parse_objectives(["goodput=0.9"]), tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.toml"
    file.write_text('[workload]\narrivals = "poisson:rate=4"\nlimit = 30\nadapters = 3\noutput_tokens = 20\n')
    out = tmp_path / "out"
    flags = ["--out", str(out), "--seeds", "1", "--jobs", "1", "--replicas", "1"]
    assert main(["lab", "size", "--workload", str(file), "--slo", "ttft_p99=5.0", *flags]) == 0
    said = capsys.readouterr().out
    assert "1 replicas: served = 100%, at least 99%; ttft_p99" in said
    assert json.loads((out / "size.json").read_text())["replicas"] == 1
    assert main(["lab", "size", "--workload", str(file), "--slo", "ttft_p99=0.0001", *flags]) == 1
    assert "no number of replicas that was tried keeps the objectives" in capsys.readouterr().out
    assert main(["lab", "size", "--workload", str(tmp_path / "no.toml"), "--slo", "ttft_p99=1"]) == 2
