"""A run that is not what was asked says so: conversations of a trace, adapters, popularity, slots, queues."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.cli.main import main
from aioengine.lab import Experiment, WorkloadSpec
from aioengine.lab.analysis.asked import warnings
from aioengine.lab.analysis.summary import summarize
from aioengine.lab.runs.rows import load_frames
from aioengine.lab.runs.simulate import run
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Offered, look_through

BLOCK = 512


class Request(NamedTuple):
    conversation: int
    blocks: tuple[int, ...]
    tokens: int


def conversations(rng: Random, beginnings: int, each: int, turns: int, branches: int) -> list[Request]:
    """Return requests of conversations that begin alike in groups; some turns are made several times over,
    and the order of the turns of different conversations is any."""
    numbers = iter(range(1, 10**9))
    found: list[list[Request]] = []
    for beginning in range(beginnings):
        common = tuple(next(numbers) for _ in range(rng.randint(0 if beginnings == 1 else 1, 3)))
        for _ in range(each):
            history, own = (*common, next(numbers)), list[Request]()
            for _ in range(rng.randint(1, turns)):
                asked = history
                for _ in range(rng.choice([1, 1, branches])):
                    own.append(Request(len(found), (*asked, next(numbers)), len(asked) * BLOCK + 7))
                    history = (*asked, next(numbers), next(numbers))
            found.append(own)
    waiting = [own[::-1] for own in found]
    order = []
    while any(waiting):
        order.append(rng.choice([own for own in waiting if own]).pop())
    return order


def write_mooncake(path: Path, requests: list[Request], every: float = 1000.0) -> Path:
    lines = [
        {"timestamp": number * every, "input_length": tokens, "output_length": 5, "hash_ids": blocks}
        for number, (_, blocks, tokens) in enumerate(requests)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@given(
    seed=st.integers(0, 10**6),
    beginnings=st.integers(1, 4),
    each=st.integers(2, 20),
    turns=st.integers(1, 5),
    branches=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_conversations_are_told_apart_where_their_beginnings_part(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    beginnings: int,
    each: int,
    turns: int,
    branches: int,
) -> None:
    requests = conversations(Random(seed), beginnings, each, turns, branches)
    # Hours lie between two requests.
    path = write_mooncake(tmp_path_factory.mktemp("trace") / "t.jsonl", requests, every=4e6)
    workload = OfferedWorkload(WorkloadSpec(trace=str(path), adapters=400, popularity="zipf:1.0"), seed)
    by_number, adapters = defaultdict[int, set[object]](set), defaultdict[int, set[object]](set)
    for request, arrival in zip(requests, workload, strict=True):
        by_number[request.conversation].add(arrival.conversation)
        adapters[request.conversation].add(arrival.adapter)
    assert all(len(names) == 1 for names in (*by_number.values(), *adapters.values()))
    assert len(set.union(*by_number.values())) == len(by_number)


def kinds(texts: list[str]) -> set[str]:
    return {text.partition(":")[0] for text in texts}


FIELDS: dict[str, Any] = {"slots": 3, "cpu_loras": 6}
CALM = {"arrivals": "poisson:rate=2", "limit": 150, "adapters": 12, "output_tokens": 20, "prompt_tokens": 64}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_a_run_that_is_what_was_asked_says_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    summary = run(
        Experiment(workload=WorkloadSpec(**CALM), seed=seed, **FIELDS), tmp_path_factory.mktemp("run")
    ).summary
    assert summary["warnings"] == []
    assert summary["workload"] == {"adapters_asked": 12, "adapters_used": 12, "conversations": 150}


@pytest.mark.parametrize(
    ("kind", "workload", "fields"),
    [
        ("refused", {"prompt_tokens": "uniform:10..600"}, {"max_model_len": 512}),
        ("slots", {"adapters": 3}, {}),
        ("overloaded", {"arrivals": "poisson:rate=100", "limit": 300}, {"max_num_seqs": 2}),
        ("drain", {"arrivals": "poisson:rate=100", "output_tokens": 400}, {}),
        ("warm-up", {"arrivals": "onoff:rate=60,on=3,off=3", "limit": 150}, {"max_num_seqs": 4}),
    ],
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=3, deadline=None)
def test_each_kind_of_difference_is_said(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    workload: dict[str, Any],
    fields: dict[str, Any],
    seed: int,
) -> None:
    if kind == "warm-up":  # a crowd at the beginning, and then calm
        path = tmp_path_factory.mktemp("trace") / "t.jsonl"
        times = [0.0] * 60 + [20.0 + number for number in range(90)]
        rows = [{"time": time, "prompt_tokens": 64, "output_tokens": 20} for time in times]
        path.write_text("\n".join(map(json.dumps, rows)))
        workload = {"trace": str(path), "adapters": 12}
        spec = WorkloadSpec(**workload)
    else:
        spec = WorkloadSpec(**{**CALM, **workload})
    experiment = Experiment(workload=spec, seed=seed, **{**FIELDS, **fields})
    out = tmp_path_factory.mktemp("run")
    assert kind in kinds(run(experiment, out).summary["warnings"])


def adapter_kinds(spec: WorkloadSpec, offered: Offered, folder: Path) -> set[str]:
    experiment = Experiment(workload=spec, **FIELDS)
    found = warnings(experiment, offered, load_frames(folder), summarize(folder))
    return kinds([*found]) & {"adapters", "popularity"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    run(Experiment(workload=WorkloadSpec(**CALM), **FIELDS), folder)
    return folder


@given(
    seed=st.integers(0, 10**6),
    adapters=st.integers(1, 300),
    requests=st.integers(1, 2000),
    popularity=st.sampled_from(["uniform", "zipf:1.0", "power:0.5", "shift:alpha=1"]),
    base=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_adapters_that_were_drawn_as_asked_are_not_called_others(
    calm: Path, seed: int, adapters: int, requests: int, popularity: str, base: float
) -> None:
    """The test is wrong once in a thousand times, so these examples are always the same."""
    spec = WorkloadSpec(
        arrivals="poisson:rate=1", limit=requests, adapters=adapters, popularity=popularity, base_share=base
    )
    assert adapter_kinds(spec, look_through(OfferedWorkload(spec, seed), 10**6), calm) == set()


@given(
    wrong=st.sampled_from(["popularity", "adapters"]), count=st.integers(50, 400), spread=st.integers(1, 9)
)
@settings(max_examples=30, deadline=None)
def test_adapters_of_another_distribution_are_said(calm: Path, wrong: str, count: int, spread: int) -> None:
    spec = WorkloadSpec(arrivals="poisson:rate=1", limit=1, adapters=count, popularity="zipf:1.0")
    requests = 6000
    used = count if wrong == "popularity" else count // (10 * spread)  # all alike, or few
    by_adapter = Counter[str | None](
        {f"adapter-{n:03}": requests // max(used, 1) for n in range(max(used, 1))}
    )
    sizes = range(requests) if wrong == "popularity" else range(max(used, 1))
    conversations = Counter({number: requests // len(sizes) for number in sizes})
    offered = Offered(10**6, requests, by_adapter=by_adapter, by_conversation=Counter(conversations))
    assert wrong in adapter_kinds(spec, offered, calm)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("command", [["run", "--no-report"], ["compare", "--policy", "fcfs", "--seeds", "1"]])
def test_strict_ends_with_status_3(
    tmp_path: Path, command: list[str], strict: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--arrivals", "poisson:rate=5", "--limit", "60", "--adapters", "2", "--slots", "2"]
    flags += ["--out", str(tmp_path / "out"), *["--strict"] * strict]
    assert main(["lab", *command, *flags]) == (3 if strict else 0)
    assert "slots: they were never contended" in capsys.readouterr().err


def test_the_beginning_and_the_end_are_left_out(tmp_path: Path) -> None:
    """Requests at regular times: what is measured is their rate, whatever the first ones found."""
    rows = [{"time": n / 4, "prompt_tokens": 64, "output_tokens": 40, "adapter": "a"} for n in range(120)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = WorkloadSpec(trace=str(tmp_path / "t.jsonl"), slo="ttft=0.5,tpot=0.1")
    found = run(Experiment(workload=spec, warmup=10.0, **FIELDS), tmp_path / "run").summary
    assert found["requests_offered"] == 80 and found["hits"]["slot_share"] == 1.0
    assert found["requests_per_second"] == pytest.approx(4.0, rel=0.05)
    assert found["goodput_requests_per_second"] == found["requests_per_second"]
    assert found["output_tokens_per_second"] == pytest.approx(160.0, rel=0.05)
    assert found["duration_seconds"] == pytest.approx(19.0, abs=1.0)
    assert found["attainment"] == {"ttft_share": 1.0, "tpot_share": 1.0}
    late = WorkloadSpec(trace=str(tmp_path / "t.jsonl"), slo="ttft=0.5,tpot=0.0001")
    found = run(Experiment(workload=late, **FIELDS), tmp_path / "late").summary
    assert found["attainment"] == {"ttft_share": 1.0, "tpot_share": 0.0}
    assert found["slo"]["in_time_share"] == found["goodput_requests_per_second"] == 0.0
