"""Sessions, closed loops, and shared beginnings."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from aioengine.lab import Experiment, WorkloadSpec, load_frames, run
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
    session = next(s for s in of_sessions(arrivals(sessions="chat:turns=6,branch=3")) if len(s) >= 6)
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
