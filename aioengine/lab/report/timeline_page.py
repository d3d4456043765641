"""The slots over time as a page in which one can zoom: every stay, in one file that needs no network."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from aioengine.lab.report.style import DARK, LIGHT

if TYPE_CHECKING:
    import polars as pl
    from jinja2 import Template


def timeline_page(template: Template, spans: pl.DataFrame, slots: int, end: float, *, title: str) -> str:
    """Return the page.

    Adapters that were in slots for longest have a colour of their own, the others share one.

    Args:
        spans: The rows of slots.csv.
        slots: Number of slots.
        end: Seconds that the run took.
    """
    held: Counter[str] = Counter()
    stays: dict[int, list[tuple[str, float, float, float, int]]] = {slot: [] for slot in range(slots)}
    columns = ("slot", "adapter", "start", "ready", "end", "busy_steps")
    for slot, adapter, start, ready, until, steps in spans.select(*columns).sort("start").iter_rows():
        held[adapter] += until - start
        stays.setdefault(slot, []).append((adapter, start, until if ready is None else ready, until, steps))
    names = sorted(held, key=lambda name: (-held[name], name))
    index = {name: place for place, name in enumerate(names)}
    rows = [[[index[adapter], *times] for adapter, *times in stays[slot]] for slot in sorted(stays)]
    data = {
        "adapters": names,
        "held": [round(held[name], 3) for name in names],
        "slots": rows,
        "end": end,
        "palettes": {"light": [*LIGHT.palette, LIGHT.neutral], "dark": [*DARK.palette, DARK.neutral]},
    }
    return template.render(
        title=title, data=in_script(data), slots=slots, stays=len(spans), adapters=len(names)
    )


def in_script(data: Any) -> str:
    """Return JSON that can stand in a ``<script>`` element, whatever texts are in it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
