"""The terminal board of ``demo`` and ``top``: tables of slots and requests, drawn again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from aioengine.tasks import end_tasks

NARROW = 104
"""Columns of a terminal; on a smaller one tables are drawn closer."""


@asynccontextmanager
async def redrawn(console: Console, draw: Callable[[], RenderableType], every: float) -> AsyncIterator[None]:
    """Context in which what ``draw`` returns is drawn at intervals, and once at the end. If there is no
    terminal, it is only called.

    The loop draws it, not rich's thread: an engine's state may only be read on the loop.
    """
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def look() -> None:
        drawn = draw()
        if live is not None:
            live.update(drawn, refresh=True)

    async def always() -> None:
        while True:
            look()
            await asyncio.sleep(every)

    with live or nullcontext():
        task = asyncio.create_task(always())
        try:
            yield
        finally:
            await end_tasks([task])
            look()


def slots_table(slots: Sequence[Mapping[str, Any]], most: int, width: int) -> Table:
    """Return a table of the slots; if there are more than ``most``, of those in which most requests run."""
    shown = list(slots)
    if len(slots) > most:
        shown.sort(key=lambda slot: (slot["running"], slot["adapter"] is not None), reverse=True)
        shown = shown[:most]
    columns = ["slot", "state", "adapter", "running", "pinned"]
    if any(slot.get("replica") is not None for slot in slots):
        columns.insert(0, "replica")
    rows = [
        {
            "replica": str(slot.get("replica") or ""),
            "slot": str(slot["index"]),
            "state": slot["state"].lower(),
            "adapter": "" if slot["adapter"] is None else f"{slot['adapter']} (v{slot['version']})",
            "running": str(slot["running"]),
            "pinned": "pinned" if slot["pinned"] else "",
        }
        for slot in shown
    ]
    return cut_table(columns, rows, len(slots) - len(shown), width)


def cut_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]], more: int, width: int) -> Table:
    """Return a table of ``rows``, with a last line for the number of ``more``. What clients and tenants name
    is cut where the terminal is narrow, so that the numbers are seen."""
    gap = 1 if width < NARROW else 3
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    given = [column for column in columns if column in ("tenant", "adapter")]
    others = [max(len(name), *(len(row[name]) for row in rows), 0) for name in columns if name not in given]
    room = max(7, (width - sum(others) - gap * len(columns)) // len(given))
    for row in rows:
        table.add_row(*(_cut(row[name], room) if name in given else row[name] for name in columns))
    if more > 0:
        table.add_row(*("" for _ in columns[: columns.index(given[0])]), _cut(f"and {more} more", room))
    return table


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
