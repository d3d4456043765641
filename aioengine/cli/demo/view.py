"""Display of the demo: a live board while it runs, and the tables at its end."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aioengine.cli.demo.board import Board, Row
from aioengine.cli.tables import box_for
from aioengine.info import EngineStats, SlotInfo

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


def live_board(board: Board, stats: EngineStats, replicas: Sequence[str] | None = None) -> RenderableType:
    """Draw the requests with the ends of their answers, the slots, and the latest adapter moves.

    Args:
        replicas: The replicas of a fleet, in the order of their numbers; None: there is one engine.
    """
    requests = Table.grid(padding=(0, 1), expand=True)
    requests.add_column(width=1)
    requests.add_column(width=12, no_wrap=True)
    requests.add_column(width=7, no_wrap=True)
    requests.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for row in board.rows.values():
        dim = "dim " if row.state in ("soon", "waiting", "done") else ""
        where = ""
        if row.state == "running" and row.slot is not None:
            where = f"slot {row.slot}"
        elif row.state == "running" and row.replica is not None:
            where = f"r {row.replica}"
        style = f"{dim}{_colour(row.job.adapter)}"
        text = Text(_tail(row), style="red" if row.error else "" if dim == "" else "dim")
        requests.add_row(_MARKS[row.state], Text(row.job.id, style=style), where, text)
    slots = Table.grid(padding=(0, 2))
    for slot in stats.slots:
        name = slot.adapter or "free"
        text = Text(name, style=_colour(slot.adapter) if slot.adapter else "dim")
        slots.add_row(place_of(slot, replicas), text, slot.state.lower(), f"{slot.running} running")
    swaps = f": {stats.slot_loads} loads, {stats.slot_evictions} evictions" if replicas is None else ""
    return Group(
        Panel(requests, title="requests", title_align="left", border_style="dim"),
        Panel(slots, title=f"slots{swaps}", title_align="left", border_style="dim"),
        Panel(
            Text("\n".join(board.moves), style="dim"),
            title="adapter moves",
            title_align="left",
            border_style="dim",
            height=2 + (board.moves.maxlen or 0),
        ),
    )


def place_of(slot: SlotInfo, replicas: Sequence[str] | None) -> str:
    """Name a slot; see :func:`live_board`."""
    if replicas is None or slot.replica not in replicas:
        return f"slot {slot.index}"
    return f"replica {replicas.index(slot.replica)}, slot {slot.index}"


def _tail(row: Row) -> str:
    if row.error is not None:
        return row.error
    text = " ".join((row.text or row.job.question).split())
    if row.state in ("soon", "waiting"):
        return f"? {text}"
    return text if len(text) <= 60 else f"…{text[-59:]}"


def result_line(row: Row) -> str:
    """Describe a request's end in one line, for output that is no terminal."""
    if row.error is not None:
        return f"{row.job.id} failed: {row.error}"
    verdict = {True: " [right]", False: " [wrong]", None: ""}[row.passed]
    return f"{row.job.id} done{verdict}: {' '.join(row.text.split())}"


def print_summary(console: Console, board: Board, stats: EngineStats, seconds: float) -> None:
    """Print the tables at the end: by adapter, and by slot."""
    console.print(_by_adapter(board, seconds, box_for(console)))
    arrivals = stats.slot_hits + stats.slot_misses
    rate = f"{stats.slot_hits / arrivals:.0%} of {arrivals}" if arrivals else "-"
    title = f"{len(stats.slots)} slots, {stats.cpu_capacity} places in the CPU cache"
    table = Table(title=title, box=box_for(console))
    table.caption = "hit rate: requests that found their adapter in a slot when they arrived"
    for heading in (
        "slot loads",
        "slot evictions",
        "hit rate",
        "disk loads",
        "CPU evictions",
        "steps",
    ):
        table.add_column(heading, justify="right")
    table.add_row(
        str(stats.slot_loads),
        str(stats.slot_evictions),
        rate,
        str(stats.cpu_loads),
        str(stats.cpu_evictions),
        str(stats.steps),
    )
    console.print(table)


def print_fleet_summary(console: Console, board: Board, replicas: int, seconds: float) -> None:
    """Print the tables at the end: by adapter, and by replica."""
    console.print(_by_adapter(board, seconds, box_for(console)))
    table = Table(title=f"{replicas} replicas", box=box_for(console))
    for heading in ("replica", "requests", "tokens", "adapters"):
        table.add_column(heading, justify="left" if heading == "adapters" else "right")
    for number in range(replicas):
        rows = [row for row in board.rows.values() if row.replica == number]
        names = dict.fromkeys(row.job.adapter or "base" for row in rows)
        table.add_row(str(number), str(len(rows)), str(sum(row.tokens for row in rows)), ", ".join(names))
    console.print(table)


def _by_adapter(board: Board, seconds: float, box: Box | None) -> Table:
    total = sum(row.tokens for row in board.rows.values())
    table = Table(
        title=f"{len(board.rows)} requests, {total} tokens in {seconds:.1f} s",
        caption="tokens/s: of one request while it runs",
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
