"""The terminal board of ``demo`` and ``top``: tables of slots and requests, drawn again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

Show = Callable[[RenderableType], None]
NARROW = 104
"""Columns of a terminal; on a smaller one tables are drawn closer."""
_CUT = ("tenant", "adapter", "answer")


@contextmanager
def board(console: Console, *, screen: bool = False) -> Iterator[Show | None]:
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
    table = Table(box=None, pad_edge=False, padding=(0, 1 if width < NARROW else 3, 0, 0))
    columns = list(rows[0]) if rows else []
    for column in columns:
        table.add_column(Text(column, no_wrap=True), no_wrap=column not in _CUT)  # such are made narrow last
    shown = [*rows[:most]]
    if len(rows) > most:
        first = next(column for column in columns if column in _CUT)
        shown.append(dict.fromkeys(columns, "") | {first: f"and {len(rows) - most} more"})
    for row in shown:
        table.add_row(*(Text(text, no_wrap=True, overflow="ellipsis") for text in row.values()))
    return table
