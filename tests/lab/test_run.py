"""Whole runs: the same experiment leaves the same files, in memory that does not grow with the trace."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.lab_sim import config, costs

from aioengine.errors import AioEngineError, ConfigError, PolicyError
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.replay import replay
from aioengine.lab.runs.rows import CsvFiles
from aioengine.lab.runs.simulate import lab_policy, run
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.spec import WorkloadSpec

FILES = {
    "experiment.json",
    "summary.json",
    "requests.csv",
    "slots.csv",
    "moves.csv",
    "samples.csv",
}


def workload(**fields: Any) -> WorkloadSpec:
    defaults: dict[str, Any] = {
        "arrivals": "gamma:rate=40,cv=3",
        "limit": 150,
        "adapters": 12,
        "popularity": "zipf:1.0",
        "tenants": 3,
        "ranks": "8:0.5,64:0.5",
        "output_tokens": "uniform:4..60",
        "lengths": "predicted:error=0.5",
    }
    return WorkloadSpec(**{**defaults, **fields})


def experiment(**fields: Any) -> Experiment:
    return Experiment(**{"workload": workload(), "slots": 3, "cpu_loras": 6, **fields})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_SCRIPT = """
import sys
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.simulate import run
run(Experiment.read(sys.argv[1]), sys.argv[2])
"""


MANY_SLOTS = {"slots": 16, "cpu_loras": 64, "max_num_seqs": 4}


@pytest.mark.parametrize(("policy", "fields"), [("chameleon", {}), ("fcfs+gdsf", MANY_SLOTS)])
@pytest.mark.slow
def test_the_order_of_hashes_does_not_matter(policy: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """And an experiment is repeated from what a run has left, in a process of its own."""
    crowd = workload(adapters=20, limit=300, popularity="uniform") if fields else workload()
    run(experiment(policy=policy, workload=crowd, **fields), tmp_path / "0")
    assert set(contents(tmp_path / "0")) == FILES
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(tmp_path / "0" / "experiment.json"), str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            check=True,
            timeout=60,
        )
        assert contents(tmp_path / seed) == contents(tmp_path / "0")


MY_POLICY = '''
from aioengine.schedulers.policies.fcfs import FCFS

class Mine(FCFS):
    """Mine."""
    def __init__(self, future=None, max_wait: float = 1.0) -> None:
        super().__init__(max_wait=max_wait)
        assert future is not None and all(adapter.startswith("adapter-") for _, adapter in future)
'''


def test_a_policy_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policy.py").write_text(MY_POLICY)
    monkeypatch.chdir(tmp_path)
    done = run(experiment(policy="my_policy.py:Mine:max_wait=2"), tmp_path / "out")
    assert done.summary["requests_finished"] == 150


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int | None, float]] = []
    run(experiment(), tmp_path, lambda *args: told.append(args))
    assert told == sorted(told)
    assert told[-1][:2] == (150, 150)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"policy": "fcsf"}, PolicyError, "did you mean 'fcfs'"),
        ({"policy": "gone.py:Mine"}, PolicyError, "No such file"),
        ({"preset": "llama3-8b-h10"}, ConfigError, "did you mean 'llama3-8b-h100'"),
        ({"slots": 5000, "cpu_loras": 5000}, ConfigError, "lower"),
        ({"max_lora_rank": 8}, ConfigError, "has rank 64 .*raise max_lora_rank"),
    ],
)
def test_errors_before_the_run(
    fields: dict[str, Any], error: type[AioEngineError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(experiment(**fields), tmp_path)
    assert not any(tmp_path.iterdir()), "an earlier run's files would have been lost"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": 9, "cpu_loras": 8}, "cpu_loras=8: must be >= slots=9"),
        ({"seed": -1}, "seed=-1"),
        ({"sample_seconds": 0.0}, "sample_seconds=0.0"),
        ({"max_lora_rank": 17}, "max_lora_rank=17"),
    ],
)
def test_experiments_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        experiment(**fields)


def test_experiments_from_plain_data(tmp_path: Path) -> None:
    one = experiment(policy={"order": "edf", "replace": "gdsf"})
    assert Experiment.from_dict(json.loads(json.dumps(msgspec.to_builtins(one)))) == one
    with pytest.raises(ConfigError, match=r"unknown field 'slot' \(did you mean 'slots'\?\)"):
        Experiment.from_dict({"slot": 3})
    with pytest.raises(ConfigError, match="adaptors"):
        Experiment.from_dict({"workload": {"arrivals": "poisson:rate=1", "limit": 1, "adaptors": 3}})
    with pytest.raises(ConfigError, match="cannot read"):
        Experiment.read(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Experiment.read(tmp_path / "bad.json")


def most_held(requests: int, folder: Path) -> int:
    """Bytes of Python's memory that a run with so many requests holds at any of its samples, without the
    garbage that just has not been collected yet."""
    trace = folder / "trace.jsonl"
    rows = (f'{{"time": {row / 40}, "prompt_tokens": 8, "output_tokens": 3}}\n' for row in range(requests))
    trace.write_text("".join(rows))
    offered = OfferedWorkload(WorkloadSpec(trace=str(trace), adapters=6), 0)
    held: list[int] = []

    def look(_ended: int, _total: int | None, _seconds: float) -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    async def main() -> None:
        policy = lab_policy("chameleon", offered)
        setup = config(max_loras=4, max_cpu_loras=8, max_lora_rank=64)
        async with SimulatedEngine(setup, costs(), policy) as engine:
            with CsvFiles(folder) as files:
                await replay(engine, offered, files, sample_seconds=10, progress=look)

    tracemalloc.start()
    try:
        run_in_virtual_time(main())
    finally:
        tracemalloc.stop()
    return max(held)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    most_held(100, tmp_path)  # what is imported and cached once
    small, large = (most_held(requests, tmp_path) for requests in (250, 1000))
    assert large < small * 1.1
