"""The live board and the tables at the end."""

from __future__ import annotations

import re

import msgspec
from rich.console import Console

from aioengine.cli.demo.board import Board
from aioengine.cli.demo.jobs import Job
from aioengine.cli.demo.view import live_board, print_summary
from aioengine.info import EngineStats, SlotInfo


def job(key: str, adapter: str | None) -> Job:
    return Job(key, adapter, f"question of {key}", [], None)


def stats() -> EngineStats:
    names = [n for n in EngineStats.__struct_fields__ if n != "slots"]
    held = SlotInfo(index=0, state="READY", adapter="sql", version=1, running=1, pinned=False)
    free = SlotInfo(index=1, state="FREE", adapter=None, version=None, running=0, pinned=False)
    values = {**dict.fromkeys(names, 0), "slot_loads": 3, "slot_hits": 1, "slot_misses": 3}
    return EngineStats(slots=(held, free), **values)


def fleet_stats() -> EngineStats:
    """The slots of two replicas, of which each counts its own; the second has "sql"."""
    found = stats()
    held, free = (msgspec.structs.replace(slot, index=0) for slot in found.slots)
    slots = (msgspec.structs.replace(free, replica="r0"), msgspec.structs.replace(held, replica="r1"))
    return msgspec.structs.replace(found, slots=slots)


def drawn(board: Board, now: EngineStats) -> str:
    console = Console(width=80)
    board.look(now)
    with console.capture() as capture:
        console.print(live_board(board, now))
    return capture.get()


def summary(board: Board, now: EngineStats) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        print_summary(console, board, now)
    return capture.get()


def test_board_and_summary() -> None:
    board = Board([job("base-1", None), job("sql-1", "sql"), job("sql-2", "sql")], lambda line: None)
    base, one, two = board.rows.values()
    one.state, one.ttft, one.text = "running", 0.25, "SELECT the tail of a long answer " * 4
    text = drawn(board, stats())
    assert re.search(r"▶ sql-1 +slot 0", text) and "long answer" in text
    assert "? question of base-1" in text
    assert "slot 1  free" in text and "3 loads" in text
    assert "sql: into slot 0" in text
    assert not board.all_finished

    one.state, one.tokens, one.seconds = "done", 20, 2.0
    base.state, two.state, two.error = "done", "failed", "it broke"
    text = drawn(board, stats())
    assert "✘ sql-2" in text and "it broke" in text
    assert not board.all_finished
    table = summary(board, stats())
    sql = next(line for line in table.splitlines() if "sql" in line)
    assert "250 ms" in sql and "10.0" in sql
    assert "25% of 4" in table


def test_a_fleet_shows_replicas_and_their_slots() -> None:
    board = Board([job("q1", "sql"), job("q2", None)], lambda line: None)
    row = board.rows["q1"]
    row.state, row.replica, row.tokens = "running", "r1", 7
    text = drawn(board, fleet_stats())
    assert "r0 slot 0  free" in text and "r1 slot 0  sql" in text
    assert re.search(r"▶ q1 +r1 slot 0", text)
    row.state = "done"
    assert re.search(r"r1\W+1\W+7\W+sql", summary(board, fleet_stats())), "one request, of seven tokens"


def test_each_move_is_said_once() -> None:
    """However often one looks, and although each replica counts its own slots."""
    said: list[str] = []
    board = Board([], said.append)
    for _ in range(3):
        board.look(fleet_stats())
    assert said == ["sql: into r1 slot 0"]
