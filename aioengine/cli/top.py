"""``aioengine top``: shows a running server live in the terminal."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aioengine import __version__
from aioengine.adapters.read_threads import start_read
from aioengine.cli.flags import Switch
from aioengine.cli.loop import run
from aioengine.cli.tables import output_console
from aioengine.errors import ConfigError

KEY_VARIABLE = "AIOENGINE_KEY"
SHOWN_REQUESTS = 15
OTHER_LINES = 12
"""Lines of the screen that neither slots nor requests have: numbers, heads of tables, and gaps."""
SAME_START = 1.0
"""Seconds by which the time at which a process began may seem to change, because clocks are corrected."""
_CUT = ("request", "route", "tenant", "adapter")
"""Columns that are made narrow first."""
_COUNTED = (("requests/s", "requests_finished"), ("tokens/s", "output_tokens"), ("loads/s", "slot_loads"))


def top(
    *,
    url: str = "http://127.0.0.1:8000",
    key: str | None = None,
    every: Annotated[float, Parameter(validator=Number(gt=0))] = 1.0,
    once: Switch = False,
) -> int:
    """Show a running server live: slots, queues, rates, and the oldest requests.

    Args:
        url: URL of the server.
        key: A key with the scope admin; better set AIOENGINE_KEY, which other users cannot see.
        every: Seconds between two updates.
        once: Print once and exit.
    """
    key = key or os.environ.get(KEY_VARIABLE)
    console = output_console()
    if once:
        console.print(frame(look(url, key), None))
        return 0
    run(_watch(console, partial(look, url, key), every))
    return 0


async def _watch(console: Console, see: Callable[[], dict[str, Any]], every: float) -> None:
    """Show what ``see`` returns until cancelled. A server that goes away may come back, as in a restart."""
    # Ctrl-C ends this at once, although a server that stands still keeps a thread waiting.
    before, now = None, await start_read("aioengine-top", see)
    seen, error = time.monotonic(), None
    with ExitStack() as ending:
        screen = None
        if console.is_terminal:
            screen = ending.enter_context(Live(console=console, screen=True, auto_refresh=False))
        while True:
            picture = frame(now, before, console.height if screen else None)
            if error is not None:
                age = f"{error}; this is {time.monotonic() - seen:.0f} s old:"
                picture = Group(Text(age, style="bold red"), picture)
            if screen is None:
                console.print(picture, "")
            else:
                screen.update(picture, refresh=True)
            await asyncio.sleep(every)
            try:
                before, now, error = now, await start_read("aioengine-top", see), None
                seen = time.monotonic()
            except ConfigError as found:
                before, error = None, found


def look(url: str, key: str | None) -> dict[str, Any]:
    """Return the answer of ``/debug/requests``. Raises ConfigError if there is no good answer."""
    if "://" not in url:
        url = f"http://{url}"
    request = urllib.request.Request(f"{url.rstrip('/')}/debug/requests")
    request.add_header("user-agent", f"aioengine/{__version__}")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        why = f"no aioengine server answers there: {error}"
        if error.code in (401, 403):
            why = "a key with the scope admin is needed: --key, or AIOENGINE_KEY (`aioengine keys new`)"
        elif error.code in (429, 503):  # it says why: that it is starting, say
            with suppress(OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
                why = str(json.load(error)["error"]["message"])
        raise ConfigError(f"{url}: {why}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # what urllib has put into an error of its own
        raise ConfigError(f"{url}: no aioengine server answers there: {reason or repr(error)}") from error
    try:
        frame(found, found)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{url}: no aioengine server of this version answers there") from error
    return found  # type: ignore[no-any-return] # what can be drawn


def frame(now: dict[str, Any], before: dict[str, Any] | None, height: int | None = None) -> Group:
    """Draw the server's state, on a screen of ``height`` lines if it is given. Rates are counted from
    ``before``, the previous answer."""
    stats = now["stats"]
    used = stats["kv_blocks"] - stats["kv_blocks_free"]
    limit = stats["max_waiting"]
    lines = [
        f"{now['model']}: {now['state']}, up {timedelta(seconds=int(now['uptime']))}   {_rates(now, before)}",
        f"running {stats['running']} of {stats['max_running']}   waiting {stats['waiting']}"
        f"{'' if limit is None else f' of {limit}'} ({stats['waiting_for_adapter']} for an adapter, "
        f"{stats['waiting_preempted']} preempted)   step {now['step_age']:.2f} s",
        f"KV {used / max(1, stats['kv_blocks']):.0%} of {stats['kv_blocks']} blocks   "
        f"adapters {stats['adapters']}, {stats['cpu_adapters']} of {stats['cpu_capacity']} in memory",
    ]
    slots, requests = stats["slots"], now["requests"]
    most_slots, most_requests = len(slots), SHOWN_REQUESTS
    if height is not None:
        room = max(2, height - OTHER_LINES)
        most_slots = min(len(slots), max(room // 2, room - len(requests)))
        most_requests = room - most_slots
    tables = _slots(slots, most_slots), Text(), _requests(requests, most_requests)
    return Group(*map(Text, lines), Text(), *tables)


def _rates(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Return the rates since ``before``; nothing if that was another process, which began at another time."""
    if before is None:
        return ""
    seconds = now["uptime"] - before["uptime"]
    more = [(name, now["stats"][of] - before["stats"][of]) for name, of in _COUNTED]
    if seconds <= 0 or abs(now["time"] - before["time"] - seconds) > SAME_START:
        return ""
    return "   ".join(f"{count / seconds:.1f} {name}" for name, count in more)


def _requests(requests: list[dict[str, Any]], most: int) -> Table:
    rows = [
        {
            "seconds": f"{one['seconds']:.1f}",
            "request": str(one.get("request_id")),
            "route": str(one.get("route") or ""),
            "tenant": str(one.get("tenant") or ""),
            "adapter": str(one.get("adapter") or ""),
            "prompt": str(one.get("prompt_tokens", "")),
            "output": str(one.get("output_tokens", 0)),
        }
        for one in requests
    ]
    return _table(rows, most)


def _slots(slots: list[dict[str, Any]], most: int) -> Table:
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
    return _table(rows, most)


def _table(rows: list[dict[str, str]], most: int) -> Table:
    """Return a table of ``most`` rows, with a last line for the number of further ones. What clients and
    tenants name is cut where the terminal is narrow, so that the numbers are seen."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
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
