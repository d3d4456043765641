"""``aioengine top``: shows a running server live in the terminal."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from aioengine import __version__
from aioengine.cli.common import CommonFlags
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

KEY_VARIABLE = "AIOENGINE_KEY"
SHOWN_REQUESTS = 15
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
    from rich.live import Live

    from aioengine.cli.tables import output_console

    key = key or os.environ.get(KEY_VARIABLE)
    console = output_console()
    before, now = None, look(url, key)
    if once:
        console.print(frame(now, None))
        return 0
    with Live(frame(now, None), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            before, now = now, look(url, key)
            live.update(frame(now, before), refresh=True)


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
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        why = "a key with the scope admin is needed: --key, or AIOENGINE_KEY"
        raise ConfigError(f"{url}: {why if error.code in (401, 403) else error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)  # what urllib has put into an error of its own
        raise ConfigError(f"{url}: no aioengine server answers there: {reason}") from error


def frame(now: dict[str, Any], before: dict[str, Any] | None) -> Group:
    """Draw the server's state; rates are counted from ``before``, the previous answer."""
    from rich.console import Group
    from rich.text import Text

    stats = now["stats"]
    used = stats["kv_blocks"] - stats["kv_blocks_free"]
    limit = stats["max_waiting"]
    lines = [
        f"{now['model']}: {now['state']}   {_rates(now, before)}",
        f"running {stats['running']} of {stats['max_running']}   waiting {stats['waiting']}"
        f"{'' if limit is None else f' of {limit}'} ({stats['waiting_for_adapter']} for an adapter, "
        f"{stats['waiting_preempted']} preempted)   step {now['step_age']:.2f} s",
        f"KV {used / max(1, stats['kv_blocks']):.0%} of {stats['kv_blocks']} blocks   "
        f"adapters {stats['adapters']}, {stats['cpu_adapters']} of {stats['cpu_capacity']} in memory",
    ]
    return Group(*map(Text, lines), Text(), _slots(stats["slots"]), Text(), _requests(now["requests"]))


def _rates(now: dict[str, Any], before: dict[str, Any] | None) -> str:
    if before is None:
        return ""
    seconds = max(1e-3, now["time"] - before["time"])
    rates = [(name, (now["stats"][of] - before["stats"][of]) / seconds) for name, of in _COUNTED]
    return "   ".join(f"{rate:.1f} {name}" for name, rate in rates)


def _slots(slots: list[dict[str, Any]]) -> Any:
    table = _table("slot", "state", "adapter", "running", "pinned")
    for slot in slots:
        adapter = "" if slot["adapter"] is None else f"{slot['adapter']} (v{slot['version']})"
        pinned = "pinned" if slot["pinned"] else ""
        table.add_row(str(slot["index"]), slot["state"].lower(), adapter, str(slot["running"]), pinned)
    return table


def _requests(requests: list[dict[str, Any]]) -> Any:
    table = _table("seconds", "request", "route", "tenant", "adapter", "prompt", "output")
    for one in requests[:SHOWN_REQUESTS]:
        names = [one.get(name) for name in ("request_id", "route", "tenant", "adapter")]
        tokens = [one.get("prompt_tokens"), one.get("output_tokens", 0)]
        table.add_row(f"{one['seconds']:.1f}", *("" if v is None else str(v) for v in (*names, *tokens)))
    if len(requests) > SHOWN_REQUESTS:
        table.add_row("", f"and {len(requests) - SHOWN_REQUESTS} more")
    return table


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    return table
