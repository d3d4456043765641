"""Options that change nothing are refused, and no others: over combinations of options."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.runs.effects import check_effect, check_workload_effect
from aioengine.lab.runs.experiment import OF_A_FLEET
from aioengine.lab.workload.draw import OfferedWorkload

ROWS = 12
LIMIT = 40
CHANGES: dict[str, Any] = {
    "arrivals": "poisson:rate=5",
    "seconds": 0.4,
    "limit": 5,
    "scale": 3.0,
    "repeat": True,
    "adapters": 7,
    "sessions": "chat:turns=3,think=1",
    "shared_prefix": "tokens:64",
    "concurrency": 4,
    "think": 1.0,
    "popularity": "shift:alpha=0,every=0.01",
    "base_share": 0.5,
    "tenants": 5,
    "tenant_shares": "zipf:3",
    "tenant_bursts": "bursts:factor=1000,on=0.1,off=0.05",
    "priority": "0:0.5,5:0.5",
    "ranks": 8,
    "adapter_bytes": "64MiB",
    "prompt_tokens": 7,
    "output_tokens": 7,
    "max_prompt": 3,
    "max_output": 3,
    "lengths": "hidden:max=4096",
    "deadline": 2.0,
    "timeout": 2.0,
    "slo": 2.0,
}
"""A value for each field of a workload, such that nearly any workload shows it."""


def combinations(trace: str) -> Iterator[dict[str, Any]]:
    """Workloads of all kinds: sources, with and without what other fields are about."""
    sources: list[dict[str, Any]] = [
        {"arrivals": "gamma:rate=20,cv=2"},
        {"trace": trace},
        {"trace": trace, "arrivals": "gamma:rate=20,cv=2"},
        {"concurrency": 3},
        {"concurrency": 3, "arrivals": "gamma:rate=20,cv=2"},
        {"concurrency": 3, "trace": trace},
        {"concurrency": 3, "trace": trace, "arrivals": "gamma:rate=20,cv=2"},
    ]
    parts: list[list[dict[str, Any]]] = [
        [{}, {"sessions": "chat:turns=2,think=1"}],
        [{}, {"adapters": 5}, {"adapters": 5, "popularity": "shift:alpha=1,every=0.2"}],
        [{}, {"tenants": 3}],
        [{}, {"seconds": 0.6}],
    ]
    for source, *rest in itertools.product(sources, *parts):
        yield {"limit": LIMIT, **source, **dict(itertools.chain.from_iterable(map(dict.items, rest)))}


def offered(spec: WorkloadSpec) -> object:
    """Everything that a run sees of a workload."""
    workload = OfferedWorkload(spec, 3)
    found = list(workload)
    if workload.concurrency is not None:  # callers do not look at times
        found = [arrival._replace(time=0.0) for arrival in found]
    goal = workload.objective
    return found, workload.adapters, workload.concurrency, workload.think, None if goal is None else goal(9)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    rows = [{"time": i / 10, "prompt_tokens": 40 + i, "output_tokens": 9 + i} for i in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def refusal(spec: WorkloadSpec, field: str) -> str:
    try:
        check_workload_effect(spec, {field})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_each_field_changes_the_workload_or_is_refused(trace: str) -> None:
    assert {*CHANGES, "trace"} == set(WorkloadSpec.__struct_fields__)
    kept, refused = 0, 0
    for base in combinations(trace):
        try:
            before = offered(WorkloadSpec(**base))
        except ConfigError:
            continue
        for field, value in CHANGES.items():
            if (field in base and field != "limit") or (field == "repeat" and "seconds" in base):
                continue  # the second: the trace has more seconds than that
            try:
                spec = WorkloadSpec(**{**base, field: value})
            except ConfigError:
                continue
            same = offered(spec) == before
            said = refusal(spec, field)
            assert same is bool(said), f"{field}={value!r} in {base}: {said or 'changes nothing'}"
            assert not said or said.startswith(f"{field}={value!r}: ")
            kept, refused = kept + (not said), refused + bool(said)
    assert kept > 1000 and refused > 100


FLEET: dict[str, Any] = {
    "router": "affinity",
    "placement": "none",
    "autoscale": "waiting_work:least=1,most=4",
    "start_seconds": 30.0,
    "report_delay": 0.0,
    "faults": "kill:0@1",
}
"""Also values that are the defaults: they are refused where they are given."""


@pytest.mark.parametrize("field", FLEET)
@pytest.mark.parametrize("replicas", [None, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_conditions_of_a_fleet_need_one(field: str, replicas: int | None, scaled: bool) -> None:
    fields: dict[str, Any] = {"replicas": replicas}
    if scaled and replicas is not None:
        fields["autoscale"] = FLEET["autoscale"]
    useless = replicas is None or (field == "start_seconds" and not scaled)
    with pytest.raises(ConfigError, match=f"^{field}=.*give ") if useless else nullcontext():
        spec = WorkloadSpec(arrivals="poisson:rate=1", limit=2)
        check_effect(Experiment(workload=spec, **{**fields, field: FLEET[field]}), {field})


def test_a_fleet_that_says_nothing_has_the_documented_conditions() -> None:
    spec = WorkloadSpec(arrivals="poisson:rate=1", limit=2)
    alone, fleet = Experiment(workload=spec), Experiment(workload=spec, replicas=2)
    assert {name: getattr(fleet, name) for name in OF_A_FLEET} == OF_A_FLEET
    assert not any(getattr(alone, name) is not None for name in OF_A_FLEET)
    for experiment in (alone, fleet):
        assert Experiment.from_dict(experiment.to_dict()) == experiment


SMALL = "--arrivals poisson:rate=20 --limit 5"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"run {SMALL} --router affinity", "router='affinity': is for a fleet"),
        (f"run {SMALL} --replicas 2 --start-seconds 3", "give autoscale"),
        (f"run {SMALL} --popularity uniform", "popularity='uniform': there are no adapters"),
        ("compare --concurrency 2 --limit 5 --scale 1,2", "scale=1.0: "),
        ("size --workload w.toml --slo ttft_p99=1 --replicas 2 --max-replicas 3", "leave one"),
        ("size --workload w.toml --slo ttft_p99=1 --replicas 1 --router p2c", "--router"),
        ("size --workload u.toml --slo ttft_p99=1", "base_share=0.5: there are no adapters"),
        ("workload w.toml --out x", "--out x: is for the files of --plot"),
        ("report run --rank-by latency_seconds.mean", "has no ranking"),
    ],
)
@pytest.mark.slow
def test_commands_refuse_what_changes_nothing(
    command: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.toml").write_text('arrivals = "poisson:rate=20"\nlimit = 5\n')
    Path("u.toml").write_text('arrivals = "poisson:rate=20"\nlimit = 5\nbase_share = 0.5\n')
    Path("run").mkdir()
    Path("run/experiment.json").write_text("{}")
    assert main(["lab", *command.split()]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"w.toml", "u.toml", "run"}
