"""The demo's requests and its board, on an engine that is scripted."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from aioengine import SamplingParams
from aioengine.cli.demo.command import Demo
from aioengine.cli.demo.jobs import Job
from aioengine.errors import RequestInvalid
from aioengine.info import EngineStats, SlotInfo


class Scripted:
    """An engine, or a fleet, whose slot 0 of the second replica has "sql"."""

    def stats(self) -> EngineStats:
        names = [name for name in EngineStats.__struct_fields__ if name != "slots"]
        free = SlotInfo(
            index=0, state="FREE", adapter=None, version=None, running=0, pinned=False, replica="r0"
        )
        held = SlotInfo(
            index=0, state="READY", adapter="sql", version=1, running=1, pinned=False, replica="r1"
        )
        values = {**dict.fromkeys(names, 0), "slot_loads": 3, "slot_hits": 1, "slot_misses": 3}
        return EngineStats(slots=(free, held), **values)

    async def generate(self, prompt: Any, params: SamplingParams, **keywords: Any) -> AsyncIterator[Any]:
        if keywords["request_id"] == "sql-2":
            raise RequestInvalid("it broke")
        for count in (1, 10):
            yield SimpleNamespace(text="SELECT the tail of a long answer " * count, output_tokens=count)


def demo(console: Console) -> Demo:
    jobs = [
        Job("base-1", None, "question of base-1", [], None),
        Job("sql-1", "sql", "question of sql-1", [], lambda text: "tail" in text),
        Job("sql-2", "sql", "question of sql-2", [], None),
    ]
    return Demo(jobs, SamplingParams(max_tokens=10), console)


async def test_lines_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    shown = demo(Console(file=io.StringIO(), width=120))
    engine: Any = Scripted()
    assert await shown.run(engine) == 1
    said = capsys.readouterr().out
    assert said.count("sql: into slot 0 of r1") == 1, "it is said once, however often one looks"
    assert "sql-1 done [right]: SELECT" in said and "sql-2 failed: it broke" in said
    assert "2 slots: 3 loads, 0 evictions; 1 of 4 requests found their adapter in one" in said
    table = shown._console.file.getvalue()  # type: ignore[attr-defined] # a StringIO
    sql = next(line for line in table.splitlines() if line.strip().startswith("sql"))
    assert sql.split()[:3] == ["sql", "2", "1"] and sql.rstrip().endswith("1 of 1")


def test_board() -> None:
    console = Console(width=80)
    shown = demo(console)
    shown.rows[1].state, shown.rows[1].text = "running", "SELECT the tail of a long answer " * 4
    shown.rows[2].state, shown.rows[2].text = "failed", "it broke"
    engine: Any = Scripted()
    with console.capture() as capture:
        console.print(shown.draw(engine))
    text = capture.get()
    assert "▶ sql-1" in text and "long answer" in text
    assert "? question of base-1" in text and "✘ sql-2" in text and "it broke" in text
    assert "r1" in text and "sql (v1)" in text and "sql: into slot 0 of r1" in text
