"""Tables: drawn for people at a terminal, plain lines for files and pipes."""

from __future__ import annotations

import os

from rich.box import HEAVY_HEAD, Box
from rich.console import Console

_PLAIN_WIDTH = 160


def output_console() -> Console:
    """Return a console on standard output; if it is no terminal, it is wide enough for a row on one line."""
    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=_PLAIN_WIDTH)


def box_for(console: Console) -> Box | None:
    """Return the frame of a table; no frame if the output is no terminal, for grep and awk."""
    return HEAVY_HEAD if console.is_terminal else None
