"""What would make a run's figures wrong in silence: each is said, counted, or cannot happen."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.analysis.statistics import estimate, paired
from aioengine.lab.runs.replay import RunStalled
from aioengine.lab.runs.simulate import run

POLICIES = '''
from aioengine.schedulers import Decision, Place, SchedulerPolicy

class Raises(SchedulerPolicy):
    def schedule(self, view):
        raise ZeroDivisionError("on every step")

class Deaf(SchedulerPolicy):
    """Decides as it should, and fails on what it is told."""
    def __init__(self):
        from aioengine.schedulers import load_policy
        self.inner = load_policy("fcfs")
    def schedule(self, view):
        return self.inner.schedule(view)
    def on_event(self, event):
        self.inner.on_event(event)
        if event.kind == "request_finished":
            raise KeyError("what is that?")

class Spins(SchedulerPolicy):
    """Swaps adapters for ever, and lets nobody in."""
    def schedule(self, view):
        names = sorted(view.adapters)
        self.turn = getattr(self, "turn", 0) + 1
        return Decision(place=[Place(names[self.turn % len(names)])])
'''

FLAGS = ["--arrivals", "poisson:rate=20", "--limit", "12", "--adapters", "5", "--output-tokens", "8"]
FLAGS += ["--cpu-loras", "4", "--slots", "2", "--no-report"]


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(POLICIES)
    monkeypatch.chdir(tmp_path)
    return "mine.py"


def experiment(**fields: object) -> Experiment:
    spec = {"arrivals": "poisson:rate=20", "limit": 20, "adapters": 4, "output_tokens": 4}
    fields.setdefault("slots", 2)
    spec |= {name: fields.pop(name) for name in list(fields) if name in WorkloadSpec.__struct_fields__}
    return Experiment(workload=WorkloadSpec(**spec), cpu_loras=4, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "decided"), [("Raises", True), ("Deaf", False)])
@pytest.mark.slow
def test_a_run_of_a_policy_that_fails_is_not_valid(
    policies: str, name: str, decided: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["lab", "run", *FLAGS, "--policy", f"{policies}:{name}", "--out", str(tmp_path / "out")]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "not valid" in said and "Traceback" in said and "--allow-fallback" in said
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["policy"]
    assert found["name"] == f"{policies}:{name}" and found["valid"] is False
    assert (found["fallback_steps"] >= found["steps"] > 0) if decided else found["fallback_steps"] == 0
    assert main([*command, "--allow-fallback"]) == 0


def test_a_run_of_a_policy_that_does_not_fail_is_valid(tmp_path: Path) -> None:
    found = run(experiment(), tmp_path).summary["policy"]
    assert found["valid"] is True and found["name"] == "fcfs" and found["steps"] > 0
    assert found["fallback_steps"] == found["failures"] == 0


@pytest.mark.slow
def test_a_comparison_ranks_no_policy_that_failed(
    policies: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["lab", "compare", *FLAGS[:-1], "--policy", f"fcfs,{policies}:Raises", "--seeds", "1"]
    command += ["--jobs", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 3
    said = capsys.readouterr()
    assert "not valid" in said.err and "ZeroDivisionError" in said.err
    assert [line.split()[0] for line in said.out.splitlines() if "Raises" in line] == ["–"]
    assert main([*command, "--allow-fallback"]) == 0


@pytest.mark.slow
def test_a_policy_that_only_swaps_is_stopped(policies: str, tmp_path: Path) -> None:
    with pytest.raises(RunStalled, match=r"no request had a token in the last .* moves.*slots: adapter-"):
        run(experiment(policy=f"{policies}:Spins"), tmp_path / "out")


def test_prompts_have_no_prefix_in_common(tmp_path: Path) -> None:
    run(experiment(enable_prefix_caching=True, prompt_tokens=100, limit=60), tmp_path)
    with open(tmp_path / "requests.csv") as file:
        assert {row["cached_tokens"] for row in csv.DictReader(file)} == {"0"}


def test_an_objective_is_measured_and_a_deadline_enforced(tmp_path: Path) -> None:
    measured = run(experiment(slo=1e-3), tmp_path / "slo").summary
    assert measured["requests_finished"] == 20
    assert measured["slo"] == {"requests_with_deadline": 20, "requests_in_time": 0, "in_time_share": 0.0}
    enforced = run(experiment(deadline=1e-3), tmp_path / "deadline").summary
    assert enforced["requests_finished"] == 0
    assert enforced["requests_by_error"] == {"DeadlineExceeded": 20}


def test_requests_longer_than_the_context(tmp_path: Path) -> None:
    fields = {"prompt_tokens": "uniform:100..400", "max_model_len": 256}
    said: list[str] = []
    rejected = run(experiment(**fields), tmp_path / "reject", say=said.append).summary
    found = rejected["too_long"]
    assert 0 < rejected["requests_refused"] <= found["requests"] < 20 and found["limit"] == 256
    assert said == [
        f"{found['requests']} of 20 requests are longer than the model's context of 256 tokens (the longest "
        f"has {found['longest']}): prompts that do not fit are refused, other outputs end where the context "
        "ends (--on-too-long reject|truncate|fail)"
    ]
    cut = run(experiment(**fields, on_too_long="truncate"), tmp_path / "truncate").summary
    assert cut["requests_finished"] == 20 and cut["output_tokens"] == 80
    with pytest.raises(ConfigError, match=r"on_too_long='fail': \d+ of 20 requests"):
        run(experiment(**fields, on_too_long="fail"), tmp_path / "fail")
    assert not (tmp_path / "fail").exists()


def test_intervals_of_differences() -> None:
    values, others = [1.0, 2.0, 3.0, 4.0, 9.0], [0.5, 1.6, 2.4, 3.7, 5.0]
    found, again = paired(values, others), paired(values, others)
    assert found is not None and found == again and found.low is not None and found.high is not None
    assert found.low < found.mean < found.high and found.low > 0
    few = paired(values[:4], others[:4])
    assert few == estimate([a - b for a, b in zip(values[:4], others[:4], strict=True)])
    same = paired([1.0] * 6, [0.1] * 6)
    assert same is not None and same.low == same.mean == same.high
