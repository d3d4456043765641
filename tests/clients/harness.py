"""What the clients' checks have in common: each is a function, and its outcome a line of JSON.

A check passes if it returns. ``AIOENGINE_URL`` is the server's address.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version

URL = os.environ["AIOENGINE_URL"]
BASE_URL = f"{URL}/v1"
MODEL, ADAPTER = "smollm2-135m", "sql"
KEY = "none"
USER = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

_CHECKS: list[tuple[str, str, Callable[[], None]]] = []


def check(package: str, name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Adds a check of a package."""

    def add(function: Callable[[], None]) -> Callable[[], None]:
        _CHECKS.append((package, name, function))
        return function

    return add


def main() -> None:
    """Runs the checks one after the other and tells how they went."""
    for package, name, function in _CHECKS:
        began, error = time.monotonic(), None
        try:
            function()
        except Exception as raised:
            traceback.print_exc()
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
        seconds = round(time.monotonic() - began, 1)
        row = {
            "client": package,
            "version": version(package),
            "check": name,
            "error": error,
            "seconds": seconds,
        }
        print(json.dumps(row), flush=True)
