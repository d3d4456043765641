"""Sources of flags that are not on the command line: the environment, then the file's ``[server]``.

``cli/flags.py`` reads the engine's parts of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict, Env

from aioengine.checks import nearest, read_toml
from aioengine.config import refuse_removed
from aioengine.errors import ConfigError
from aioengine.server.settings import refuse_unknown_fields

PREFIX = "AIOENGINE_"
_READ_ELSEWHERE = (
    *("API_KEYS", "ADMIN_KEYS", "DEBUG", "LOG_LEVEL"),
    *("KERNELS", "PREBUILD_KERNELS", "CPU_LEVEL", "CPU_SANITIZE"),
)
"""Variables that no flag of the command has: keys, what every command takes, and how kernels are chosen and
built."""

Source = Callable[[App, tuple[str, ...], ArgumentCollection], None]

ParseAgain = Annotated[Callable[[], dict[str, object]] | None, Parameter(parse=False)]
"""A parameter of a command that ``main`` fills: parses the command line again, with what the environment and
the file say then, and returns the command's arguments."""
LogLevel = Annotated[str | None, Parameter(parse=False)]
"""A parameter of a command that ``main`` fills: ``--log-level``."""


def sources(unknown: list[str]) -> tuple[Source, Source]:
    """Return where a command takes flags from that are not given: the environment, then the file. Parsing
    adds to ``unknown`` what to tell about variables that no flag has. It raises ConfigError if ``[server]``
    is no table, or has a field that is no flag of ``aioengine serve``."""

    def variables(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        Env(PREFIX, command=False)(app, commands, arguments)
        flags = (name for argument in arguments if argument.parse for name in argument.names)
        known = sorted(PREFIX + name for name in (*map(_variable, flags), *_READ_ELSEWHERE))
        for name, value in sorted(os.environ.items()):
            if name.startswith(PREFIX):
                refuse_removed({name.removeprefix(PREFIX).lower(): value}, f"{name}: ")
                if name not in known:
                    near = nearest(name, known)
                    unknown.append(f"{name}: no flag has this variable{near}; it has no effect")

    return variables, _server_table


def _variable(flag: str) -> str:
    return flag.strip("-").upper().replace("-", "_").replace(".", "_")


def _server_table(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    (config,) = (argument for argument in arguments if "--config" in argument.names)
    if not config.tokens:
        return
    file = config.tokens[-1].value
    table = read_toml(file).get("server", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: server={table!r}: must be a table [server]")
    refuse_unknown_fields(table, file)
    table = {name.replace("_", "-"): value for name, value in table.items()}
    for name in reversed(commands):  # cyclopts wants it below the names of the commands
        table = {name: table}
    Dict(table, source=f"[server] of {file}")(app, commands, arguments)
