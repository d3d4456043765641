"""Display of the demo: a live board while it runs, and the tables at its end."""

from __future__ import annotations

from statistics import median

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aioengine.cli.demo.board import Board, Row, place_of
from aioengine.cli.tables import box_for, new_table
from aioengine.info import EngineStats

_COLOURS = {
    "base": "white",
    "sql": "cyan",
    "json": "yellow",
    "sentiment": "magenta",
    "pirate": "green",
}
_MARKS = {"soon": "·", "waiting": "◌", "running": "▶", "done": "✔", "failed": "✘"}


def _colour(adapter: str | None) -> str:
    return _COLOURS.get(adapter or "base", "blue")


def live_board(board: Board, stats: EngineStats) -> RenderableType:
    """Draw the requests with the ends of their answers, the slots, and the latest adapter moves."""
    requests = Table.grid(padding=(0, 1), expand=True)
    requests.add_column(width=1)
    requests.add_column(width=12, no_wrap=True)
    requests.add_column(no_wrap=True)
    requests.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for row in board.rows.values():
        dim = "" if row.state in ("running", "failed") else "dim "
        text = Text(_tail(row), style="red" if row.error else dim.strip())
        place = row.place if row.state == "running" else ""
        name = Text(row.job.id, style=f"{dim}{_colour(row.job.adapter)}")
        requests.add_row(_MARKS[row.state], name, place, text)
    slots = Table.grid(padding=(0, 2))
    for slot in stats.slots:
        name = Text(slot.adapter or "free", style=_colour(slot.adapter) if slot.adapter else "dim")
        slots.add_row(place_of(slot), name, slot.state.lower(), f"{slot.running} running")
    swaps = f"slots: {stats.slot_loads} loads, {stats.slot_evictions} evictions"
    moves = Text("\n".join(board.moves), style="dim")
    return Group(
        _panel(requests, "requests"),
        _panel(slots, swaps),
        _panel(moves, "adapter moves", height=2 + (board.moves.maxlen or 0)),
    )


def _panel(content: RenderableType, title: str, height: int | None = None) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", height=height)


def _tail(row: Row) -> str:
    if row.error is not None:
        return row.error
    text = " ".join((row.text or row.job.question).split())
    if row.state in ("soon", "waiting"):
        return f"? {text}"
    return text if len(text) <= 60 else f"…{text[-59:]}"


def print_summary(console: Console, board: Board, stats: EngineStats) -> None:
    """Print the tables at the end: by adapter, by replica if there are several, and of the slots."""
    console.print(_by_adapter(board, box_for(console)))
    if replicas := dict.fromkeys(slot.replica for slot in stats.slots if slot.replica is not None):
        table = new_table(console, "replica", ">requests", ">tokens", "adapters", title="replicas")
        for name in replicas:
            rows = [row for row in board.rows.values() if row.replica == name]
            adapters = dict.fromkeys(row.job.adapter or "base" for row in rows)
            table.add_row(name, str(len(rows)), str(sum(row.tokens for row in rows)), ", ".join(adapters))
        console.print(table)
    arrivals = stats.slot_hits + stats.slot_misses
    figures = {
        "slot loads": stats.slot_loads,
        "slot evictions": stats.slot_evictions,
        "hit rate": f"{stats.slot_hits / arrivals:.0%} of {arrivals}" if arrivals else "-",
        "disk loads": stats.cpu_loads,
        "CPU evictions": stats.cpu_evictions,
        "steps": stats.steps,
    }
    title = f"{len(stats.slots)} slots, {stats.cpu_capacity} places in the CPU cache"
    table = new_table(console, *(f">{heading}" for heading in figures), title=title)
    table.caption = "hit rate: requests that found their adapter in a slot when they arrived"
    table.add_row(*map(str, figures.values()))
    console.print(table)


def _by_adapter(board: Board, box: Box | None) -> Table:
    total = sum(row.tokens for row in board.rows.values())
    table = Table(
        title=f"{len(board.rows)} requests, {total} tokens in {board.seconds:.1f} s",
        caption="tokens/s: of one request from its first token on",
        box=box,
    )
    table.add_column("adapter")
    for heading in ("requests", "finished", "TTFT median", "tokens", "tokens/s", "right answers"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row.job.adapter for row in board.rows.values()):
        rows = [row for row in board.rows.values() if row.job.adapter == name]
        ttfts = [row.ttft for row in rows if row.ttft is not None]
        tokens, running = sum(row.tokens for row in rows), sum(row.seconds for row in rows)
        checked = [row.passed for row in rows if row.passed is not None]
        table.add_row(
            Text(name or "base", style=_colour(name)),
            str(len(rows)),
            str(sum(row.state == "done" for row in rows)),
            f"{median(ttfts) * 1e3:.0f} ms" if ttfts else "-",
            str(tokens),
            f"{tokens / running:.1f}" if running > 0 else "-",
            f"{sum(checked)} of {len(checked)}" if checked else "-",
        )
    return table
