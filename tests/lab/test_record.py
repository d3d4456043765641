"""Recording a live engine: what is in the file, its order, and that a bad disk harms nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cli_programs import run_program
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, tiny, tiny_of

from aioengine.errors import ConfigError, EngineStopped
from aioengine.events import RequestAdded, RequestEnded
from aioengine.lab.runs.trace_writer import TraceWriter
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.lab.workload.traces import read_trace

__all__ = ["make_engine", "tiny", "tiny_of"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_recording_is_a_trace(tiny: Tiny, make_engine: MakeEngine, tmp_path: Path) -> None:
    path, due = tmp_path / "trace.jsonl", np.float64(60.0)
    before = time.time()
    async with TraceWriter(path) as writer, make_engine(tiny, max_loras=2) as engine:
        engine.register_adapter("sql", tiny.adapters["rank-3"])
        early = asyncio.ensure_future(engine.complete([9, 9], greedy(2)))
        await asyncio.sleep(0)  # accepted before the recording begins: not in it
        writer.attach(engine)
        await asyncio.gather(
            engine.complete([4, 5, 6], greedy(9), adapter="sql", tenant="alice", priority=3, deadline=due),
            engine.complete([7, 8], greedy(2)),
            early,
        )
    assert time.time() - before < 50
    first, second = lines(path)
    assert before - 0.001 <= first.pop("time") <= second.pop("time") <= time.time()
    assert list(first) == ["adapter", "prompt_tokens", "output_tokens", "tenant", "priority", "deadline"]
    assert list(first.values()) == ["sql", 3, 9, "alice", 3, pytest.approx(60.0, abs=1.0)]
    assert list(second.values()) == [None, 2, 2, None, 0, None]
    workload = OfferedWorkload(WorkloadSpec(trace=str(path), adapters=4, ranks=3), 0)
    assert [shape.name for shape in workload.adapters][-1] == "sql"
    played = list(workload)
    assert [arrival[1:4] for arrival in played] == [("sql", 3, 9), (None, 2, 2)]
    arrival = played[0]
    assert (arrival.tenant, arrival.priority, arrival.deadline) == ("alice", 3, first["deadline"])


async def test_what_the_engines_stop_ends_is_recorded(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    async with TraceWriter(path) as writer:
        async with make_engine(tiny) as engine:
            writer.attach(engine)
            added = asyncio.Event()
            engine.add_listener(lambda _: added.set(), RequestAdded)
            task = asyncio.ensure_future(engine.complete([4, 5], greedy(100), request_id="long"))
            await added.wait()
        with pytest.raises(EngineStopped):
            await task
    (row,) = lines(path)
    assert row["prompt_tokens"] == 2 and row["output_tokens"] < 100
    (read,) = read_trace(path)
    assert read.output_tokens >= 1


class Engine:
    """What a TraceWriter needs of an engine: its events, and nothing runs."""

    class _Core:
        requests: dict[str, Any] = {}  # noqa: RUF012 # nothing is ever put into it

    def __init__(self) -> None:
        self._core = self._Core()
        self.listeners: list[Any] = []
        self.now = 0.0

    def add_listener(self, listener: Any) -> Any:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def say(self, event: Any) -> None:
        for listener in list(self.listeners):
            listener(event)

    def add(self, name: str, prompt_tokens: int = 5) -> None:
        self.now += 1.0
        self.say(
            RequestAdded(
                time=self.now, request_id=name, adapter=name, prompt_tokens=prompt_tokens, tenant=None
            )
        )

    def end(self, name: str, output_tokens: int = 2) -> None:
        self.now += 1.0
        self.say(
            RequestEnded(
                time=self.now,
                request_id=name,
                adapter=name,
                reason="stop",
                error=None,
                prompt_tokens=5,
                output_tokens=output_tokens,
                seconds=1.0,
                tenant=None,
            )
        )


def writer_on(engine: Engine, path: Path, **options: int) -> TraceWriter:
    writer = TraceWriter(path, **options)
    writer.attach(engine)  # type: ignore[arg-type] # all of an engine that it uses
    return writer


async def test_rows_wait_for_those_that_arrived_before(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    engine = Engine()
    async with writer_on(engine, path) as writer:
        for name in "abcd":
            engine.add(name)
        for name in "dbc":
            engine.end(name)
        assert writer.rows == 0
        engine.end("a")
        assert writer.rows == 4
        engine.add("a")  # ids may come again
        engine.end("a", 7)
        engine.add("e")
        engine.end("unknown")
        engine.add("f")
        engine.end("f")
    assert [row["adapter"] for row in lines(path)] == ["a", "b", "c", "d", "a", "f"], "e has not ended"
    assert [row.output_tokens for row in read_trace(path)] == [2, 2, 2, 2, 7, 2]
    assert engine.listeners == []


@given(st.data())
@pytest.mark.slow
def test_any_order_of_ends_gives_the_order_of_arrival(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is left out: the file is a trace, and nothing else is missing."""
    path = tmp_path_factory.mktemp("recording") / "trace.jsonl"
    count = data.draw(st.integers(1, 12))
    held = data.draw(st.integers(1, 12))
    ends = data.draw(st.permutations(range(count)))
    parallel = data.draw(st.integers(1, 6))

    def moves() -> Iterator[tuple[str, int]]:
        """At most ``parallel`` at a time; of those that run, the one that ``ends`` names first ends."""
        running: list[int] = []
        for request in range(count):
            running.append(request)
            yield "add", request
            if len(running) == parallel:
                over = min(running, key=ends.index)
                running.remove(over)
                yield "end", over
        for request in sorted(running, key=ends.index):
            yield "end", request

    async def record() -> int:
        engine = Engine()
        async with writer_on(engine, path, held=held) as writer:
            for what, request in moves():
                engine.add(str(request)) if what == "add" else engine.end(str(request))
            return writer.left_out

    left_out = asyncio.run(record())
    found = [int(row["adapter"]) for row in lines(path)]
    assert found == sorted(set(found)) and len(found) == count - left_out
    assert len(list(read_trace(path)) if found else []) == len(found)
    assert left_out == 0 or held < count


async def test_rows_reach_the_file_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioengine.lab.runs.trace_writer.FLUSH_SECONDS", 0.01)
    path = tmp_path / "trace.jsonl"
    engine = Engine()
    async with writer_on(engine, path):
        engine.add("a")
        engine.end("a")
        while not path.read_bytes():
            await asyncio.sleep(0.005)
        assert [row["adapter"] for row in lines(path)] == ["a"]


async def test_a_recording_is_gone_on_with(tmp_path: Path) -> None:
    """Also after a crash that has left half a line."""
    path = tmp_path / "trace.jsonl"
    for name, half in (("a", b""), ("b", b'{"time":17'), ("c", b"")):
        with path.open("ab") as file:
            file.write(half)
        engine = Engine()
        async with writer_on(engine, path):
            engine.add(name)
            engine.end(name)
    assert [row["adapter"] for row in lines(path)] == ["a", "b", "c"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(ConfigError, match="it is there, and is no recording"):
        TraceWriter(path)
    assert path.read_bytes() == b"weights"
    with pytest.raises(ConfigError, match=r"cannot record to .*nowhere.*: No such file"):
        TraceWriter(tmp_path / "nowhere" / "trace.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        TraceWriter(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
async def test_a_full_disk_ends_the_recording_only(
    tiny: Tiny, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with TraceWriter("/dev/full") as writer, make_engine(tiny) as engine:
        writer.attach(engine)
        for count in range(3):
            out = await engine.complete([4, 5], greedy(2))
            assert out.token_ids == tiny.expected([4, 5], 2)
            if count == 0:
                writer.flush()
                while not writer.failed:
                    await asyncio.sleep(0.001)
    assert caplog.text.count("recording to /dev/full has ended, and serving goes on: No space left") == 1
    assert writer.rows == 1


@contextmanager
def full_pipe(path: Path) -> Iterator[FileIO]:
    """Who writes to it next waits until it is read from."""
    os.mkfifo(path)
    with open(path, "r+b", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), False)
        while pipe.write(b"x" * 4096):
            pass
        yield pipe


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
async def test_a_disk_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the loop nor the end waits for it, and what it has not taken is bounded."""
    monkeypatch.setattr("aioengine.lab.runs.trace_writer.MAX_PENDING", 1000)
    monkeypatch.setattr("aioengine.lab.runs.trace_writer.CLOSE_SECONDS", 0.05)
    engine = Engine()
    with full_pipe(tmp_path / "pipe") as pipe:
        writer = writer_on(engine, tmp_path / "pipe")
        for index in range(40):
            engine.add(str(index))
            engine.end(str(index))
            writer.flush()
        assert writer.failed and engine.listeners == []
        await writer.close()
        pipe.read(2**20)  # lets the thread go
        await writer.close()
    assert caplog.text.count("bytes behind") == 1
    assert caplog.text.count("has ended") == 1


@pytest.mark.slow
def test_the_flag(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    flags = f"--model {tiny.model} --device cpu --kv-cache-memory 8MiB --record {path}".split()
    requests = "".join(
        json.dumps({"prompt": [4, 5, 6], "max_tokens": n, "tenant": "t"}) + "\n" for n in (2, 3)
    )
    done = run_program("generate", *flags, input=requests)
    assert done.returncode == 0, done.stderr
    assert [(row["prompt_tokens"], row["tenant"]) for row in lines(path)] == [(3, "t"), (3, "t")]
    assert [row.output_tokens for row in read_trace(path)] == [
        len(json.loads(line)["token_ids"]) for line in done.stdout.splitlines()
    ]
    refused = run_program("serve", *flags[:-1], str(tmp_path / "nowhere" / "x"), "--port", "0")
    assert refused.returncode == 2
    assert "cannot record to" in refused.stderr.splitlines()[-1]


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "aioengine.lab")
