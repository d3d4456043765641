"""The tables ``[server]``, ``[fleet]`` and ``[adapters]`` of a configuration file.

They are empty if the file cannot be read: the engine's part of the file is read later, with an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aioengine.checks import read_toml
from aioengine.errors import ConfigError


def server_table(file: str) -> dict[str, Any]:
    """Return the table ``[server]``, unchecked. Raises ConfigError if ``server`` is no table."""
    return _table(file, "server") or {}


def fleet_table(file: Path | None) -> dict[str, Any] | None:
    """Return the table ``[fleet]``, unchecked; None without one. Raises ConfigError if it is no table."""
    return _table(file, "fleet")


def adapters_table(file: Path | None) -> dict[str, str]:
    """Return the table ``[adapters]``: name -> path. Raises ConfigError if a path is no text."""
    table = _table(file, "adapters") or {}
    if not all(isinstance(path, str) for path in table.values()):
        raise ConfigError(f'{file}: adapters={table!r}: must be a table [adapters] with lines name = "path"')
    return table


def _table(file: str | Path | None, name: str) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        table = read_toml(file).get(name)
    except ConfigError:
        return None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{file}: {name}={table!r}: must be a table [{name}]")
    return table
