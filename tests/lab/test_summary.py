"""The figures of a run, worked out by hand; fairness by its definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lab_files import request, sample, write_files

from aioengine.errors import ConfigError
from aioengine.lab.analysis.fairness import by_client, jain, max_min, service_gap
from aioengine.lab.analysis.summary import summarize
from aioengine.lab.runs.rows import BASE, load_frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "run")


def test_requests_and_times(folder: Path) -> None:
    found = summarize(folder)
    assert found["requests_offered"] == 6
    assert found["requests_by_reason"] == {"error": 1, "length": 4, "refused": 1}
    assert found["requests_by_error"] == {"DeadlineExceeded": 1, "EngineOverloaded": 1}
    counts = [found[f"requests_{name}"] for name in ("finished", "failed", "aborted", "refused")]
    assert counts == [4, 1, 0, 1]
    assert found["duration_seconds"] == 10.0
    assert found["output_tokens"] == 20 and found["output_tokens_per_second"] == 2.0
    assert found["ttft_seconds"] == {"mean": 2.5, "p50": 2.0, "p90": 3.4, "p95": 3.7, "p99": 3.94, "max": 4.0}
    assert found["latency_seconds"]["mean"] == 5.0 and found["latency_seconds"]["max"] == 8.0
    # 2 s for 4 intervals, twice, and 6 s for 8; one token has none
    assert found["inter_token_seconds"]["mean"] == pytest.approx((0.5 + 0.5 + 0.75) / 3, abs=1e-6)
    assert found["queue_seconds"]["mean"] == 1.0
    assert (found["preemptions"], found["preempted_requests"]) == (2, 1)


def test_deadlines_are_met_by_the_end_of_the_answer(folder: Path) -> None:
    found = summarize(folder)["slo"]
    assert found == {"requests_with_deadline": 3, "requests_in_time": 1, "in_time_share": 0.333333}


def test_hits_and_swaps(folder: Path) -> None:
    found = summarize(folder)
    shares = [found["hits"][f"{level}_share"] for level in ("slot", "cpu", "loading", "disk")]
    assert shares == [0.5, 0.25, 0.0, 0.25]
    swaps = found["swaps"]
    assert (swaps["slot_copies"], swaps["disk_loads"], swaps["failed_moves"]) == (1, 2, 1)
    assert (swaps["slot_copy_bytes"], swaps["disk_load_bytes"]) == (1000, 5000)
    assert swaps["slot_copies_per_request"] == 0.25
    assert swaps["disk_loads_ahead"] == 1  # "idle": nobody waited for it
    slots = found["slots"]
    assert slots["ready_share"] == pytest.approx((7.5 + 7.0) / 20)
    assert slots["writing_share"] == pytest.approx(1.5 / 20)
    assert slots["busy_share"] == 20 / (2 * 20)


def test_the_engine_over_time(tmp_path: Path) -> None:
    samples = [sample(2.0, {}, waiting=4), sample(10.0, {}, waiting=1)]
    found = summarize(write_files(tmp_path, samples=samples))["engine"]
    assert found["mean_waiting"] == pytest.approx((4 * 2 + 1 * 8) / 10)
    assert (found["steps"], found["max_waiting"], found["stepping_share"]) == (20, 4, 0.1)
    assert (found["tokens_per_step"], found["adapters_per_step"]) == (3.0, 1.5)


def test_starvation_counts_those_that_got_nothing(folder: Path) -> None:
    found = summarize(folder)["starvation"]
    assert found["worst_wait_seconds"] == 5.0 and found["ended_without_token"] == 1
    assert found["worst_wait_seconds_by_adapter"] == {"a": 5.0, BASE: 4.0, "<script>": 2.0}


def test_clients(folder: Path) -> None:
    table = by_client(load_frames(folder).requests, "adapter")
    assert table["client"].to_list() == ["a", BASE, "<script>"]
    a = table.row(0, named=True)
    assert (a["offered"], a["finished"], a["tokens"]) == (4, 2, 30)
    assert a["tokens_per_second"] == pytest.approx(30 / (4 + 4 + 5))  # the refused one takes no time


def test_an_empty_run_has_figures_too(tmp_path: Path) -> None:
    found = summarize(write_files(tmp_path, [], [], [], []))
    assert found["requests_finished"] == 0 and found["ttft_seconds"]["p99"] is None
    assert found["fairness"]["adapters"]["jain_latency"] is None
    json.dumps(found, allow_nan=False)


def test_files_that_are_none_of_a_run(folder: Path) -> None:
    (folder / "slots.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"slots\.csv: no file of a run"):
        summarize(folder)
    (folder / "slots.csv").unlink()
    with pytest.raises(ConfigError, match=r"slots\.csv: no such file"):
        load_frames(folder)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_jain_is_between_one_share_and_even(values: list[float]) -> None:
    index = jain(values)
    assert index is not None and 1 / len(values) - 1e-9 <= index <= 1 + 1e-9
    assert jain([value * 3 for value in values]) == pytest.approx(index)


def test_jain_and_max_min_at_their_ends() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) is None and jain([0.0]) is None
    assert max_min([1.0, 4.0]) == 4.0 and max_min([0.0, 1.0]) is None and max_min([]) is None


def test_service_differs_only_while_both_wait(tmp_path: Path) -> None:
    """ "a" waits throughout, "b" from 2 to 6: what "a" gets before and after that is nobody's loss."""
    requests = [
        request("r0", "a", 0.0, admitted=10.0, first_token=11.0, ended=12.0),
        request("r1", "b", 2.0, admitted=6.0, first_token=7.0, ended=8.0),
    ]
    samples = [
        sample(2.0, {"a": 1000}),
        sample(4.0, {"a": 70, "b": 10}),
        sample(6.0, {"a": 50, "b": 20}),
        sample(8.0, {"a": 500}),
    ]
    frames = load_frames(write_files(tmp_path, requests, samples=samples))
    gap = service_gap(frames.requests, frames.samples)
    assert (gap.tokens, gap.clients) == (90, ("a", "b"))
    assert gap.series == [(2.0, 0), (4.0, 60), (6.0, 90), (8.0, 0)]


def test_one_client_has_nobody_to_differ_from(tmp_path: Path) -> None:
    frames = load_frames(write_files(tmp_path, [request("r", "a", 0.0)], samples=[sample(1.0, {"a": 5})]))
    assert service_gap(frames.requests, frames.samples) == (0, None, [])
