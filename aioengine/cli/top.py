"""``aioengine top``: shows a running server live in the terminal."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from aioengine import __version__
from aioengine.adapters.read_threads import ReadThreads
from aioengine.cli.common import CommonFlags
from aioengine.cli.loop import run
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, Group

KEY_VARIABLE = "AIOENGINE_KEY"
SHOWN_REQUESTS = 15
OTHER_LINES = 12
"""Lines of the screen that neither slots nor requests have: numbers, heads of tables, and gaps."""
_COUNTED = (("requests/s", "requests_finished"), ("tokens/s", "output_tokens"), ("loads/s", "slot_loads"))


def top(
    *,
    url: str = "http://127.0.0.1:8000",
    key: str | None = None,
    every: float = 1.0,
    once: bool = False,
    common: CommonFlags | None = None,
) -> int:
    """Show a running server live: slots, queues, rates, and the oldest requests.

    Args:
        url: URL of the server.
        key: A key with the scope admin; better set AIOENGINE_KEY, which other users cannot see.
        every: Seconds between two updates.
        once: Print once and exit.
    """
    if not every > 0:
        raise ConfigError(f"--every {every}: must be more than 0")
    from aioengine.cli.tables import output_console

    key = key or os.environ.get(KEY_VARIABLE)
    console = output_console()
    if once:
        console.print(frame(look(url, key), None))
        return 0
    run(_watch(console, partial(look, url, key), every))
    return 0


async def _watch(console: Console, see: Callable[[], dict[str, Any]], every: float) -> None:
    """Show what ``see`` returns until cancelled. A server that goes away may come back, as in a restart."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    # Ctrl-C ends this at once, although a server that stands still keeps a thread waiting.
    threads = ReadThreads("aioengine-top")
    clock = asyncio.get_running_loop().time
    before, now = None, await threads.run(see)
    seen, error = clock(), None
    screen = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    with screen or nullcontext():
        while True:
            shown = frame(now, before, console.height if screen else None)
            if error is not None:
                shown = Group(Text(f"{error}; this is {clock() - seen:.0f} s old:", style="bold red"), shown)
            if screen is None:
                console.print(shown, "")
            else:
                screen.update(shown, refresh=True)
            await asyncio.sleep(every)
            try:
                before, now, error = now, await threads.run(see), None
                seen = clock()
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
            why = "a key with the scope admin is needed: --key, or AIOENGINE_KEY"
        elif error.code in (429, 503):
            why = _reason(error)
        raise ConfigError(f"{url}: {why}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # what urllib has put into an error of its own
        raise ConfigError(f"{url}: no aioengine server answers there: {reason or repr(error)}") from error
    if not isinstance(found, dict) or not found.keys() >= {"stats", "requests", "uptime"}:
        raise ConfigError(f"{url}: no aioengine server of this version answers there")
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    """Return what the server says: that it is starting, say."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return str(error)


def frame(now: dict[str, Any], before: dict[str, Any] | None, height: int | None = None) -> Group:
    """Draw the server's state; rates are counted from ``before``, the previous answer.

    ``height`` is that of the screen, in lines; None: there is no screen.
    """
    from rich.console import Group
    from rich.text import Text

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
    tables = [_slots(slots, most_slots), Text(), _requests(requests, most_requests)]
    return Group(*map(Text, lines), Text(), *tables)


def _rates(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Return the rates since ``before``; nothing if that was another process."""
    if before is None or now["uptime"] <= before["uptime"]:
        return ""
    seconds = now["uptime"] - before["uptime"]
    rates = [(name, (now["stats"][of] - before["stats"][of]) / seconds) for name, of in _COUNTED]
    return "   ".join(f"{rate:.1f} {name}" for name, rate in rates)


def _slots(slots: list[dict[str, Any]], most: int) -> Any:
    """Return a table of the slots; if there are more than ``most``, of those in which most requests run."""
    table = _table("slot", "state", "adapter", "running", "pinned")
    shown = slots
    if len(slots) > most:
        busiest = sorted(slots, key=lambda slot: (slot["running"], slot["adapter"] is not None), reverse=True)
        shown = busiest[:most]
    for slot in shown:
        adapter = "" if slot["adapter"] is None else f"{slot['adapter']} (v{slot['version']})"
        pinned = "pinned" if slot["pinned"] else ""
        table.add_row(str(slot["index"]), slot["state"].lower(), adapter, str(slot["running"]), pinned)
    return _and_more(table, len(slots) - len(shown))


def _requests(requests: list[dict[str, Any]], most: int) -> Any:
    table = _table("seconds", "request", "route", "tenant", "adapter", "prompt", "output")
    for one in requests[:most]:
        names = [one.get(name) for name in ("request_id", "route", "tenant", "adapter")]
        tokens = [one.get("prompt_tokens"), one.get("output_tokens", 0)]
        table.add_row(f"{one['seconds']:.1f}", *("" if v is None else str(v) for v in (*names, *tokens)))
    return _and_more(table, len(requests) - most)


def _and_more(table: Any, number: int) -> Any:
    if number > 0:
        table.add_row("", f"and {number} more")
    return table


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    return table
