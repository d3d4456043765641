"""The live board, drawn from a scripted list of events."""

from __future__ import annotations

import re

import msgspec
from rich.console import Console

from aioengine import events
from aioengine.cli.demo.board import Board
from aioengine.cli.demo.jobs import Job
from aioengine.cli.demo.on_fleet import moved_since
from aioengine.cli.demo.view import live_board, print_fleet_summary, print_summary
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


def admitted(key: str, adapter: str | None, slot: int | None) -> events.RequestAdmitted:
    return events.RequestAdmitted(
        time=1.0,
        request_id=key,
        adapter=adapter,
        slot=slot,
        cached_tokens=0,
        queue_seconds=0.5,
        resumed=False,
    )


def ended(key: str, reason: events.EndReason, error: Exception | None = None) -> events.Event:
    return events.RequestEnded(
        time=3.0,
        request_id=key,
        adapter=None,
        reason=reason,
        error=error,
        prompt_tokens=4,
        output_tokens=10,
        seconds=2.5,
        tenant=None,
    )


def drawn(board: Board) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(live_board(board, stats()))
    return capture.get()


def test_board_and_summary() -> None:
    said: list[str] = []
    board = Board([job("base-1", None), job("sql-1", "sql"), job("sql-2", "sql")], said.append)
    board.handle(
        events.AdapterPlaced(time=0.0, adapter="sql", version=1, slot=0, rank=8, nbytes=9, seconds=0.002)
    )
    board.handle(admitted("sql-1", "sql", 0))
    board.handle(events.FirstToken(time=1.5, request_id="sql-1", adapter="sql", seconds=0.25))
    board.rows["sql-1"].text = "SELECT the tail of a long answer " * 4
    text = drawn(board)
    assert "▶ sql-1        slot 0" in text and "long answer" in text
    assert "? question of base-1" in text
    assert "slot 1  free" in text and "3 loads" in text
    assert "sql: CPU -> slot 0 (2.0 ms)" in text
    assert not board.all_finished

    board.handle(ended("sql-1", "stop"))
    board.handle(ended("base-1", "length"))
    board.handle(ended("sql-2", "error", ValueError("it broke")))
    assert "✘ sql-2" in drawn(board) and "it broke" in drawn(board)
    assert not board.all_finished
    console = Console(width=80)
    with console.capture() as capture:
        print_summary(console, board, stats(), 2.0)
    table = capture.get()
    sql = next(line for line in table.splitlines() if "sql" in line)
    assert "250 ms" in sql and "10.0" in sql  # 10 tokens of sql-1 in 2 s and 10 of sql-2, no time
    assert "25% of 4" in table
    assert len(said) == 2


def test_a_fleet_shows_replicas_and_their_slots() -> None:
    board = Board([job("q1", "sql"), job("q2", None)], lambda line: None)
    row = board.rows["q1"]
    row.state, row.replica, row.tokens = "running", 1, 7
    console = Console(width=80)
    with console.capture() as capture:
        console.print(live_board(board, fleet_stats(), ["r0", "r1"]))
        row.state = "done"
        print_fleet_summary(console, board, 2, 1.5)
    shown = capture.get()
    assert "replica 0, slot 0  free" in shown and "replica 1, slot 0  sql" in shown
    assert "r 1" in shown
    assert re.search(r"1\W+1\W+7\W+sql", shown), "replica 1 had one request, of seven tokens"


def test_each_move_is_said_once() -> None:
    """However often one looks, and although each replica counts its own slots."""
    before: dict[tuple[str | None, int], str | None] = {}
    said = [moved_since(before, fleet_stats().slots, ["r0", "r1"]) for _ in range(3)]
    assert said == [["sql: into replica 1, slot 0"], [], []]
    left = [slot for slot in fleet_stats().slots if slot.replica == "r1"]
    assert moved_since(before, left, ["r1"]) == [], "it has another number now, and the same adapter"
