"""Traces: both formats, exact times, and errors that name the file and the line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import ConfigError
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.lab.workload.traces import CSV_HEADER, JsonRow, TraceRow, read_trace, scan_trace

ROWS = """\
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0319601,110,27
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be written anew by each example."""
    return tmp_path_factory.mktemp("traces") / "trace"


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def azure(tmp_path: Path, rows: str = ROWS, name: str = "trace.csv") -> Path:
    return write(tmp_path, f"{CSV_HEADER}\n{rows}", name)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_azure_rows(tmp_path: Path, newline: str) -> None:
    """Times are exact to the 7th digit, before and after midnight, with a zone or without."""
    last = f"{ROWS}2023-11-17T00:00:00Z,5,6\n\n2023-11-17 00:00:00.000000001+00:00,7,8"
    path = azure(tmp_path, last)
    content = path.read_bytes().replace(b"\n", newline.encode())
    path.write_bytes(b"\xef\xbb\xbf" + content)
    rows = list(read_trace(path))
    first = rows[0].time
    midnight = (((24 - 18) * 60 - 17) * 60 - 3) * 10**9 - 979_960_000
    assert [row.time - first for row in rows] == [0, 52_000_000, 52_000_100, midnight, midnight + 1]
    assert [row[1:3] for row in rows] == [(4808, 10), (3180, 8), (110, 27), (5, 6), (7, 8)]
    assert scan_trace(path) == (5, first, rows[-1].time, ())
    assert scan_trace(path, limit=2).rows == 2
    assert scan_trace(path, seconds=0.052).rows == 2


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ("2023-11-16 18:17:03,1\n", 2, "has 2 fields; there must be 3"),
        (f"{ROWS}2023-11-16 18:17:04,1,2\n", 5, "earlier than the line before it"),
        ("2023-11-16 18:17:03,nan,2\n", 2, "$.ContextTokens"),
        ("2023-11-16 18:17:03,-1,2\n", 2, "`int` >= 1 - at `$.ContextTokens`"),
        ("2023-11-16 18:17:03,1,99999999999\n", 2, "$.GeneratedTokens"),
        ("2023-13-16 18:17:03,1,2\n", 2, "month must be in 1..12"),
        ("2023-11-16 18:17:03+02:00,1,2\n", 2, "'+02:00' is not a fraction of a second in UTC"),
        ("\nnull,1,2\n", 3, "TIMESTAMP='null'"),
        ("2023-11-16 18:17:03,\xff,2\n", 2, "$.ContextTokens"),
    ],
)
def test_wrong_azure_rows(tmp_path: Path, rows: str, line: int, message: str) -> None:
    path = azure(tmp_path, rows)
    with pytest.raises(ConfigError) as raised:
        list(read_trace(path))
    assert str(raised.value).startswith(f"trace {path}, line {line}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"time": 0, "prompt_tokens": 1}', "missing required field `output_tokens`"),
        ('{"time": NaN, "prompt_tokens": 1, "output_tokens": 1}', "malformed"),
        ('{"time": -1, "prompt_tokens": 1, "output_tokens": 1}', "`float` >= 0.0 - at `$.time`"),
        ('{"time": 0, "prompt_tokens": 1, "output_tokens": -1}', "`int` >= 0 - at `$.output_tokens`"),
        ('{"time": 0, "prompt_tokens": 1.5, "output_tokens": 1}', "Expected `int`"),
        ('{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "tenant": ""}', "length >= 1 - at `$.tenant`"),
        ('{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "adaptr": "x"}', "unknown field `adaptr`"),
        ('[0, 1, 1]', "Expected `object`"),
    ],
)  # fmt: skip
def test_wrong_json_rows(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path, f'{{"time": 0, "prompt_tokens": 1, "output_tokens": 1}}\n{row}\n', "trace.jsonl")
    with pytest.raises(ConfigError) as raised:
        list(read_trace(path))
    assert str(raised.value).startswith(f"trace {path}, line 2: ")
    assert message in str(raised.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    for text in ("", "\n\n", f"{CSV_HEADER}\n"):
        with pytest.raises(ConfigError, match=r"trace\.csv: has no rows"):
            list(read_trace(write(tmp_path, text)))
    with pytest.raises(ConfigError, match="line 1: 'a,b,c' is neither the header TIMESTAMP,Con"):
        list(read_trace(write(tmp_path, "a,b,c\n1,2,3\n")))
    path = tmp_path / "bytes"
    path.write_bytes(b"\xfa\xfb\n")
    with pytest.raises(ConfigError, match="line 1: is not UTF-8 text"):
        list(read_trace(path))
    with pytest.raises(ConfigError, match="line 1: has more than 1048576 bytes"):
        list(read_trace(write(tmp_path, "x" * 2**21)))
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read: No such file"):
        list(read_trace(tmp_path / "nowhere.csv"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        list(read_trace(tmp_path))


names = st.none() | st.text(min_size=1, max_size=8)
tokens = st.integers(1, 10**6)
json_rows = st.builds(
    JsonRow,
    time=st.integers(0, 10**12).map(lambda micro: micro / 1e6),
    prompt_tokens=tokens,
    output_tokens=tokens,
    adapter=st.just(msgspec.UNSET) | names,
    tenant=names,
    priority=st.none() | st.integers(-5, 5),
    deadline=st.none() | st.floats(1e-3, 1e6),
    max_tokens=st.none() | tokens,
    expected_tokens=st.none() | tokens,
)


@given(st.lists(json_rows, min_size=1, max_size=20))
@pytest.mark.slow
def test_json_rows_read_back(scratch: Path, rows: list[JsonRow]) -> None:
    rows.sort(key=lambda row: row.time)
    scratch.write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    assert list(read_trace(scratch)) == [
        TraceRow(
            round(row.time * 1e6) * 1000,
            row.prompt_tokens,
            row.output_tokens,
            row.adapter,
            row.tenant,
            row.priority,
            row.deadline,
            row.max_tokens,
            row.expected_tokens,
        )
        for row in rows
    ]
    summary = scan_trace(scratch)
    assert summary.adapters == tuple(sorted({row.adapter for row in rows if isinstance(row.adapter, str)}))
    played = list(OfferedWorkload(WorkloadSpec(trace=str(scratch)), 0))
    assert [arrival.time for arrival in played] == pytest.approx(
        [r.time - rows[0].time for r in rows], abs=1e-6
    )


@given(st.binary(max_size=200))
def test_any_file_is_read_or_refused(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    rows, said = [], ""
    try:
        rows = list(read_trace(scratch))
    except ConfigError as error:
        said = str(error)
    assert rows or said.startswith(f"trace {scratch}")
