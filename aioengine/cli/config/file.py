"""The tables ``[server]`` and ``[adapters]`` of a configuration file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from aioengine.errors import ConfigError


def server_table(file: str) -> dict[str, Any]:
    """The table as it stands. Raises ConfigError if ``server`` is something else.

    Empty also if the file cannot be read: that is said where the engine's part is read.
    """
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("server", {})
    except (OSError, ValueError):
        return {}
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: server={table!r}: must be a table [server]")
    return table


def adapters_table(file: Path | None) -> dict[str, str]:
    """Name -> path of the adapters that are there from the start. Raises ConfigError if one is no text.

    Empty also if the file cannot be read: that is said where the engine's part is read.
    """
    if file is None:
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("adapters", {})
    except (OSError, ValueError):
        return {}
    if not isinstance(table, dict) or not all(isinstance(path, str) for path in table.values()):
        raise ConfigError(f'{file}: adapters={table!r}: must be a table [adapters] with lines name = "path"')
    return table
