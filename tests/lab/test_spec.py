"""Workloads out of plain values: checks, determinism, and that one aspect does not move another."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.errors import ConfigError
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Arrival
from aioengine.lab.workload.spec import WorkloadSpec, read_workload
from aioengine.lab.workload.traces import CSV_HEADER

FULL: dict[str, Any] = {
    "arrivals": "gamma:rate=20,cv=2",
    "limit": 300,
    "adapters": 12,
    "popularity": "zipf:1.0",
    "base_share": 0.1,
    "tenants": 3,
    "tenant_shares": "3,1,1",
    "priority": "0:0.8,5:0.2",
    "ranks": "8:0.5,64:0.5",
    "prompt_tokens": "lognormal:median=200,sigma=0.8",
    "output_tokens": "uniform:1..50",
    "lengths": "predicted:error=0.5",
    "deadline": "proportional:0.5+0.05",
}


def arrivals(seed: int = 0, **fields: Any) -> list[Arrival]:
    return list(OfferedWorkload(WorkloadSpec(**fields), seed))


def column(found: list[Arrival], name: str) -> list[Any]:
    return [getattr(arrival, name) for arrival in found]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Four rows, at 0, 1, 3 and 6 s."""
    path = tmp_path / "trace.csv"
    rows = [(0, 4000, 10), (1, 20, 30), (3, 50, 900), (6, 1, 0)]
    lines = [f"2023-11-16 18:17:0{second}.5,{prompt},{output}" for second, prompt, output in rows]
    path.write_text("\n".join([CSV_HEADER, *lines]))
    return str(path)


def test_a_workload_is_the_same_each_time() -> None:
    workload = OfferedWorkload(WorkloadSpec(**FULL), 7)
    first = list(workload)
    assert first == list(workload) == arrivals(7, **FULL)
    assert first != arrivals(8, **FULL)
    assert len(first) == 300
    assert all(a.time <= b.time for a, b in pairwise(first))
    assert {name for name in column(first, "adapter") if name} <= {a.name for a in workload.adapters}
    assert [a.name for a in workload.adapters][:2] == ["adapter-000", "adapter-001"]
    assert Counter(column(first, "tenant"))["tenant-0"] == pytest.approx(180, abs=30)
    assert Counter(column(first, "priority"))[5] == pytest.approx(60, abs=25)
    assert Counter(column(first, "adapter"))[None] == pytest.approx(30, abs=18)
    assert all(a.deadline == pytest.approx(0.5 + 0.05 * a.output_tokens) for a in first)


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"popularity": "shift:alpha=2,every=5"}, {"adapter"}),
        ({"base_share": 0.5}, {"adapter"}),
        ({"adapters": 40}, {"adapter"}),
        ({"tenant_shares": "uniform"}, {"tenant"}),
        ({"priority": None}, {"priority"}),
        ({"ranks": "16"}, set()),
        ({"prompt_tokens": 7}, {"prompt_tokens"}),
        ({"output_tokens": 7}, {"output_tokens", "expected_tokens", "deadline"}),
        ({"lengths": "known"}, {"max_tokens", "expected_tokens"}),
        ({"deadline": None}, {"deadline"}),
        ({"arrivals": "poisson:rate=20"}, {"time"}),
    ],
)
def test_aspects_are_independent(change: dict[str, Any], moves: set[str]) -> None:
    """Changing one leaves the others' draws as they were."""
    before, after = arrivals(3, **FULL), arrivals(3, **{**FULL, **change})
    assert {name for name in Arrival._fields if column(before, name) != column(after, name)} == moves


def test_a_trace_as_it_is(trace: str) -> None:
    found = arrivals(trace=trace)
    assert found == [
        Arrival(0.0, None, 4000, 10),
        Arrival(1.0, None, 20, 30),
        Arrival(3.0, None, 50, 900),
        Arrival(6.0, None, 1, 1),
    ]
    assert OfferedWorkload(WorkloadSpec(trace=trace), 0).adapters == ()
    cut = arrivals(trace=trace, max_prompt=100, max_output=100)
    assert column(cut, "prompt_tokens") == [100, 20, 50, 1]
    assert column(cut, "output_tokens") == [10, 30, 100, 1]


def test_scale_limit_and_seconds(trace: str) -> None:
    assert column(arrivals(trace=trace, scale=2.0), "time") == [0.0, 0.5, 1.5, 3.0]
    assert column(arrivals(trace=trace, limit=2), "time") == [0.0, 1.0]
    assert column(arrivals(trace=trace, limit=9), "time") == [0.0, 1.0, 3.0, 6.0]
    assert column(arrivals(trace=trace, seconds=3.0), "time") == [0.0, 1.0, 3.0]
    assert column(arrivals(trace=trace, seconds=1.5, scale=2.0), "time") == [0.0, 0.5, 1.5]


def test_what_a_row_says_wins(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows: list[dict[str, Any]] = [
        {"adapter": "sql", "tenant": "alice", "priority": 9, "deadline": 2.5},
        {"adapter": None, "max_tokens": 7, "expected_tokens": 3},
        {},
        {"adapter": "adapter-001", "tenant": "tenant-1"},
    ]
    for index, row in enumerate(rows):
        row.update(time=index, prompt_tokens=5, output_tokens=10)
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = WorkloadSpec(
        trace=str(path), adapters=2, tenants=2, priority="1", deadline=8, lengths="predicted:error=0"
    )
    workload = OfferedWorkload(spec, 0)
    found = list(workload)
    assert [a.name for a in workload.adapters] == ["adapter-000", "adapter-001", "sql"]
    assert found[0] == Arrival(0.0, "sql", 5, 10, 4096, 10, "alice", 9, 2.5)
    assert found[1][1:6] == (None, 5, 7, 7, 3)
    assert found[2].adapter in ("adapter-000", "adapter-001") and found[2].tenant in ("tenant-0", "tenant-1")
    assert (found[2].priority, found[2].deadline) == (1, 8.0)
    assert found[3].adapter == "adapter-001" and found[3].tenant == "tenant-1"


def test_it_is_read_as_it_is_drawn() -> None:
    spec = WorkloadSpec(arrivals="poisson:rate=2", limit=10**12, adapters=3)
    assert len(list(islice(OfferedWorkload(spec, 0), 5))) == 5


def test_a_trace_is_checked_when_it_is_opened(trace: str) -> None:
    with open(trace, "a") as file:
        file.write("\noops")
    with pytest.raises(ConfigError, match="line 6: has 1 fields"):
        OfferedWorkload(WorkloadSpec(trace=trace), 0)
    assert len(list(OfferedWorkload(WorkloadSpec(trace=trace, limit=4), 0))) == 4
    with pytest.raises(ConfigError, match=r"^trace nowhere: cannot be read"):
        OfferedWorkload(WorkloadSpec(trace="nowhere"), 0)
    with pytest.raises(ConfigError, match=r"^seed=1\.5"):
        OfferedWorkload(WorkloadSpec(arrivals="poisson:2", limit=1), 1.5)  # type: ignore[arg-type]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"arrivals": None}, "give trace (a path), arrivals (such as"),
    ({"limit": None}, "give limit, or seconds"),
    ({"limit": 0}, "limit=0: must be >= 1"),
    ({"seconds": float("nan")}, "seconds=nan: must be a finite number"),
    ({"scale": 0}, "scale=0: must be >="),
    ({"trace": "x"}, "the requests are those of trace"),
    ({"base_share": 1.5}, "base_share=1.5: must be <= 1"),
    ({"tenants": 2, "tenant_shares": "1,2,3"}, "has 3 weights for tenants=2"),
    ({"tenants": 2, "tenant_shares": "shift"}, "write uniform, zipf:ALPHA or weights"),
    ({"priority": "1:0.5,2"}, "'2' has no share"),
    ({"ranks": "8:-1,16:2"}, "shares must be >= 0"),
    ({"output_tokens": "uniform:9"}, "write uniform:LOW..HIGH"),
    ({"output_tokens": "uniform:9..3"}, "9 is more than 3"),
    ({"sessions": "chat", "trace": "t.csv", "arrivals": None}, "give arrivals or concurrency"),
    ({"sessions": "talk"}, "there is no 'talk'"),
    ({"shared_prefix": "tokens:0"}, "tokens"),
    ({"concurrency": 2, "arrivals": None, "limit": None}, "never end"),
    ({"concurrency": 0}, "concurrency"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        WorkloadSpec(**{"arrivals": "poisson:rate=2", "limit": 1, **fields})
    assert message in str(raised.value)


def test_from_plain_data(trace: str) -> None:
    for fields in (FULL, {"trace": trace}):
        spec = WorkloadSpec(**fields)
        assert WorkloadSpec.from_dict(msgspec.to_builtins(spec)) == spec
    with pytest.raises(
        ConfigError, match=r"^run\.toml: unknown field 'adapter' \(did you mean 'adapters'\?\)"
    ):
        WorkloadSpec.from_dict({"adapter": 3}, source="run.toml")
    with pytest.raises(ConfigError, match=r"^workload: limit=0"):
        WorkloadSpec.from_dict({"arrivals": "poisson:2", "limit": 0})
    with pytest.raises(ConfigError, match=r"^workload: .*adapters"):
        WorkloadSpec.from_dict({"arrivals": "poisson:2", "limit": 1, "adapters": "many"})


def one_of(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(texts)


specs = st.fixed_dictionaries(
    {
        "arrivals": one_of("poisson:2", "gamma:2,cv=3", "onoff:5,on=1,off=1", "diurnal:2"),
        "limit": st.integers(1, 30),
    },
    optional={
        "seconds": st.floats(0, 1e3),
        "scale": st.floats(0.01, 100),
        "adapters": st.integers(3, 20),
        "popularity": one_of("uniform", "zipf:0.9", "power:0.3", "shift"),
        "base_share": st.floats(0, 1),
        "tenant_shares": one_of("uniform", "zipf:1", "0,0,1"),
        "priority": one_of("3", "-1:1,1:1"),
        "prompt_tokens": st.integers(1, 9) | one_of("uniform:1..9", "lognormal:median=5,sigma=2,max=50"),
        "max_prompt": st.integers(1, 9),
        "lengths": one_of("known", "hidden:max=5", "predicted:error=2,max=20"),
        "deadline": st.none() | st.floats(1e-3, 1e3) | one_of("proportional:0+0.1"),
    },
)


@settings(max_examples=50)
@given(specs, st.integers(0, 2**64))
def test_every_arrival_can_be_played(fields: dict[str, Any], seed: int) -> None:
    spec = WorkloadSpec(tenants=3, **fields)
    workload = OfferedWorkload(WorkloadSpec.from_dict(json.loads(msgspec.json.encode(spec))), seed)
    found = list(workload)
    assert found == list(OfferedWorkload(spec, seed)) and len(found) <= fields["limit"]
    names = {shape.name for shape in workload.adapters}
    last = 0.0
    for arrival in found:
        assert arrival.time >= last
        last = arrival.time
        assert arrival.adapter is None or arrival.adapter in names
        assert 1 <= arrival.prompt_tokens <= fields.get("max_prompt", 512)
        assert 1 <= arrival.output_tokens <= (arrival.max_tokens or 512)
        assert arrival.expected_tokens is None or 1 <= arrival.expected_tokens <= 20
        assert arrival.deadline is None or arrival.deadline > 0


def test_a_workload_in_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"time": 0, "prompt_tokens": 3, "output_tokens": 2}\n')
    file = tmp_path / "w.toml"
    file.write_text('trace = "t.jsonl"\nadapters = 3\n')
    assert read_workload(file) == WorkloadSpec(trace=str(trace), adapters=3)
    file.write_text('[workload]\ntrace = "t.jsonl"\nadapters = 3\n')
    assert read_workload(file) == WorkloadSpec(trace=str(trace), adapters=3), "beside the file"
    other = tmp_path / "w.json"
    other.write_text('{"experiment": {"workload": {"arrivals": "poisson:rate=1", "limit": 3}}}')
    assert read_workload(other) == WorkloadSpec(arrivals="poisson:rate=1", limit=3)
    assert read_workload(trace) == WorkloadSpec(trace=str(trace))
    with pytest.raises(ConfigError, match=r"nothing\.csv: there is no such file"):
        read_workload(tmp_path / "nothing.csv")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_workload("/dev/null")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("w.toml", "x = ", "not valid TOML"),
        ("w.json", "[1]", "expected a JSON object"),
        ("w.toml", 'arrivals = "poisson:rate=1"\nlimit = 3\nadapter = 3\n', "did you mean 'adapters'"),
        ("no.jsonl", None, "no such file"),
        ("no.toml", None, "cannot read"),
    ],
)
def test_a_file_that_is_no_workload_is_refused(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_workload(file)
    assert name in str(caught.value) and says in str(caught.value)
