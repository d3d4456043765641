"""The terminal board of ``demo`` and ``top``: tables of slots and requests, drawn again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

NARROW = 104
"""Columns of a terminal; on a smaller one tables are drawn closer."""


@contextmanager
def board(console: Console, *, screen: bool = False) -> Iterator[Callable[[RenderableType], None] | None]:
    """Context with a function that draws a picture in place of the last one, on a screen of its own if
    ``screen``; None if there is no terminal.

    It draws when it is called, and not in rich's thread: an engine's state may only be read on the loop.
    """
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, screen=screen, auto_refresh=False) as live:
        yield lambda picture: live.update(picture, refresh=True)


def slots_table(slots: Sequence[Mapping[str, Any]], most: int, width: int) -> Table:
    """Return a table of the slots; if there are more than ``most``, of those in which most requests run."""
    if len(slots) > most:
        slots = sorted(slots, key=lambda slot: (-slot["running"], slot["adapter"] is None))
    of_fleet = any(slot.get("replica") is not None for slot in slots)
    rows = [
        {
            **({"replica": str(slot.get("replica") or "")} if of_fleet else {}),
            "slot": str(slot["index"]),
            "state": slot["state"].lower(),
            "adapter": "" if slot["adapter"] is None else f"{slot['adapter']} (v{slot['version']})",
            "running": str(slot["running"]),
            "pinned": "pinned" if slot["pinned"] else "",
        }
        for slot in slots
    ]
    return cut_table(rows, most, width)


def cut_table(rows: Sequence[Mapping[str, str]], most: int, width: int) -> Table:
    """Return a table of ``most`` rows, with a last line for the number of further ones. What clients and
    tenants name is cut where the terminal is narrow, so that the numbers are seen."""
    gap = 1 if width < NARROW else 3
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    if not rows:
        return table
    columns = list(rows[0])
    named = [column for column in columns if column in ("tenant", "adapter")]
    shown = [*rows[:most]]
    if len(rows) > most:
        shown.append(dict.fromkeys(columns, "") | {named[0]: f"and {len(rows) - most} more"})
    others = [max(map(len, (name, *(row[name] for row in shown)))) for name in columns if name not in named]
    room = max(7, (width - sum(others) - gap * len(columns)) // len(named))
    for column in columns:
        widest = room if column in named else None
        table.add_column(column, max_width=widest, overflow="ellipsis", no_wrap=True)
    for row in shown:
        table.add_row(*row.values())
    return table
