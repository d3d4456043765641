"""Sessions, closed loops, shared beginnings, popularity and tenants that change; and what a workload says of
itself."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.lab import Experiment, WorkloadSpec, load_frames, run
from aioengine.lab.analysis.offered import describe_offered, read_offered
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Arrival


def arrivals(seed: int = 0, **fields: Any) -> list[Arrival]:
    given = {"arrivals": "poisson:rate=2", "limit": 200, **fields}
    return list(OfferedWorkload(WorkloadSpec(**given), seed))


def of_sessions(found: list[Arrival]) -> list[list[Arrival]]:
    starts = 0
    numbered = []
    for arrival in found:
        starts += arrival.first
        numbered.append((starts, arrival))
    return [[arrival for _, arrival in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


def test_each_turn_begins_with_all_that_was_said_before() -> None:
    sessions = of_sessions(arrivals(sessions="chat:turns=4,think=3", adapters=5))[:-1]
    assert 3 < sum(map(len, sessions)) / len(sessions) < 5
    for session in sessions:
        assert [turn.after for turn in session] == [0] + [1] * (len(session) - 1)
        assert [turn.more for turn in session] == [True] * (len(session) - 1) + [False]
        assert (session[0].first, session[-1].last) == (True, True)
        assert len({turn.adapter for turn in session}) == 1
        for before, turn in pairwise(session):
            assert turn.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert turn.prefix[: len(before.prefix)] == before.prefix
            assert len(before.prefix) == before.prompt_tokens // 512


def test_agents_fork_from_one_history() -> None:
    session = next(s for s in of_sessions(arrivals(sessions="agents:turns=6,branch=3")) if len(s) >= 6)
    first, second = session[:3], session[3:6]
    assert [turn.after for turn in second] == [3, 4, 5], "all wait for the first of the turn before"
    assert len({turn.prefix for turn in second[1:]}) == 1
    history = first[0].prompt_tokens + first[0].output_tokens
    assert all(turn.prompt_tokens > history for turn in second)


def test_groups_share_their_beginning_and_nothing_else() -> None:
    found = arrivals(shared_prefix="tokens:1024,groups=3,alpha=1", prompt_tokens=100)
    assert {arrival.prompt_tokens for arrival in found} == {1124}
    groups = Counter(arrival.prefix for arrival in found)
    assert len(groups) == 3 and {len(prefix) for prefix in groups} == {2}
    (most, _), *_, (least, _) = groups.most_common()
    assert not set(most) & set(least)


def test_the_next_turn_is_sent_after_the_answer_and_a_thought(tmp_path: Path) -> None:
    spec = WorkloadSpec(
        arrivals="poisson:rate=1",
        limit=24,
        sessions="chat:turns=4,think=2",
        prompt_tokens=700,
        output_tokens=30,
    )
    found = list(OfferedWorkload(spec, 0))
    result = run(Experiment(workload=spec, enable_prefix_caching=True), tmp_path)
    rows = {row["request_id"]: row for row in load_frames(tmp_path).requests.to_dicts()}
    assert result.summary["requests_finished"] == 24
    cached = 0
    for index, arrival in enumerate(found):
        if arrival.after:
            before, own = rows[f"r{index - arrival.after}"], rows[f"r{index}"]
            assert own["arrival"] == pytest.approx(before["ended"] + arrival.think, abs=1e-5)
            cached += own["cached_tokens"] >= 512
    assert cached > 5, "histories are found in the prefix cache"


@pytest.mark.parametrize("sessions", [None, "chat:turns=3,think=0.5"])
def test_a_closed_loop_has_so_many_callers(tmp_path: Path, sessions: str | None) -> None:
    spec = WorkloadSpec(concurrency=3, limit=40, think=0.2, sessions=sessions, output_tokens=20)
    run(Experiment(workload=spec, sample_seconds=0.1), tmp_path)
    frames = load_frames(tmp_path)
    assert frames.requests.height == 40
    rows = frames.requests.to_dicts()
    changes = sorted([(row["arrival"], 1) for row in rows] + [(row["ended"], -1) for row in rows])
    under_way = most = 0
    for _, change in changes:
        under_way += change
        most = max(most, under_way)
    assert most == 3


def test_a_tenant_bursts_at_a_time_of_its_own() -> None:
    fields = {"tenants": 4, "limit": 4000, "arrivals": "poisson:rate=20"}
    found = arrivals(tenant_bursts="bursts:factor=20,on=10,off=30", **fields)
    even = arrivals(**fields)
    assert [a.time for a in found] == [a.time for a in even], "times are as without"

    def most(of: list[Arrival]) -> float:
        windows = [Counter(a.tenant for a in of if a.time // 10 == w) for w in range(15)]
        return max(max(w.values()) / sum(w.values()) for w in windows)

    assert most(found) > 0.6 > 0.4 > most(even)


def test_traces_as_burst_gpt_has_them(tmp_path: Path) -> None:
    trace = tmp_path / "burst.csv"
    header = "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace.write_text(f"{header}5,,ChatGPT,472,18,490,Conversation log\n45.5,,GPT-4,1087,0,1087,API log\n")
    found = list(OfferedWorkload(WorkloadSpec(trace=str(trace)), 0))
    assert [(a.time, a.prompt_tokens, a.output_tokens) for a in found] == [(0.0, 472, 18), (40.5, 1087, 1)]
    trace.write_text(f"{header}5,,ChatGPT,x,18,490,log\n")
    with pytest.raises(ConfigError, match=r"line 2: .*Request tokens"):
        OfferedWorkload(WorkloadSpec(trace=str(trace)), 0)


def test_lengths_as_share_gpt_has_them(tmp_path: Path) -> None:
    trace = tmp_path / "share.json"
    said = [("human", "x" * 40), ("gpt", "y" * 9), ("human", "z"), ("human", "w"), ("gpt", "v")]
    turns = [{"from": who, "value": value} for who, value in said]
    trace.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    spec = WorkloadSpec(trace=str(trace), arrivals="poisson:rate=1", limit=50)
    lengths = {(a.prompt_tokens, a.output_tokens) for a in OfferedWorkload(spec, 0)}
    assert lengths == {(10, 3), (1, 1)}
    with pytest.raises(ConfigError, match="has no times"):
        OfferedWorkload(WorkloadSpec(trace=str(trace)), 0)


@pytest.mark.slow
def test_a_workload_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = WorkloadSpec(
        arrivals="poisson:rate=5", limit=500, adapters=10, popularity="zipf:1.5", base_share=0.2
    )
    found = describe_offered(read_offered(OfferedWorkload(spec, 0)))
    assert found["requests"] == 500
    assert found["gap_variation"] == pytest.approx(1.0, abs=0.2)
    assert found["base_model_share"] == pytest.approx(0.2, abs=0.06)
    assert found["adapters_for_half"] <= 3
    pytest.importorskip("vl_convert", reason="of the extra")
    file = tmp_path / "w.toml"
    file.write_text('arrivals = "poisson:rate=5"\nlimit = 50\nadapters = 3\nshared_prefix = "tokens:512"\n')
    out = tmp_path / "out"
    assert main(["lab", "workload", str(file), "--plot", "--out", str(out)]) == 0
    assert "cacheable prompt share" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == {"workload.png", "workload.pdf", "workload.svg", "workload.json"}
    assert b"/FontFile" in first.pop("workload.pdf"), "the fonts are in it"
    assert main(["lab", "workload", str(file), "--plot", "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in first} == first
    assert main(["lab", "workload", str(tmp_path / "no.toml")]) == 2
