"""Tables: drawn for people at a terminal, plain lines for files and pipes."""

from __future__ import annotations

import os

from rich.box import HEAVY_HEAD, Box
from rich.console import Console

_PLAIN_WIDTH = 160


def output_console() -> Console:
    """Standard output; wide enough for a row to be a line where it is no terminal."""
    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=_PLAIN_WIDTH)


def box_for(console: Console) -> Box | None:
    """The frame of a table: none where it would get in the way of grep and awk."""
    return HEAVY_HEAD if console.is_terminal else None
