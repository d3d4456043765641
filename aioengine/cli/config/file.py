"""The tables ``[server]``, ``[fleet]`` and ``[adapters]`` of a configuration file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from aioengine.errors import ConfigError


def server_table(file: str) -> dict[str, Any]:
    """Return the table ``[server]``, unchecked. Raises ConfigError if ``server`` is no table.

    It is empty if the file cannot be read: the engine's part of the file is read later, with an error.
    """
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("server", {})
    except (OSError, ValueError):
        return {}
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: server={table!r}: must be a table [server]")
    return table


def fleet_table(file: Path | None) -> dict[str, Any] | None:
    """Return the table ``[fleet]``, unchecked; None if there is none. Raises ConfigError if it is no table.

    It is None if the file cannot be read: the engine's part of the file is read later, with an error.
    """
    if file is None:
        return None
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("fleet")
    except (OSError, ValueError):
        return None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{file}: fleet={table!r}: must be a table [fleet]")
    return table


def adapters_table(file: Path | None) -> dict[str, str]:
    """Return the adapters of the table ``[adapters]``: name -> path. Raises ConfigError if a path is no text.

    It is empty if the file cannot be read: the engine's part of the file is read later, with an error.
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
