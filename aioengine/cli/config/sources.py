"""Sources of flags that are not on the command line: the environment, then the file's ``[server]``.

``cli/flags.py`` reads the engine's parts of the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict, Env

from aioengine.checks import nearest
from aioengine.cli.config.file import server_table
from aioengine.errors import ConfigError
from aioengine.server.table import refuse_unknown_fields

PREFIX = "AIOENGINE_"
_CONFIGURED = (("serve",), ("config", "check"), ("config", "show"))
"""Commands that take the configuration of a server."""
_NO_FLAGS = {
    PREFIX + name
    for name in (
        "API_KEYS",
        "ADMIN_KEYS",
        "KEY",
        "KERNELS",
        "TRITON_TABLE",
        "PREBUILD_KERNELS",
        "CPU_LEVEL",
        "CPU_SANITIZE",
    )
}
"""Variables that are read elsewhere: keys, and how kernels are chosen and built."""
_SERVICE_LINKS = ("tcp://", "udp://", "sctp://")

Unknown = Annotated[list[str] | None, Parameter(parse=False)]
"""What is to be told about variables that no flag has; who tells it removes it."""


class _Variables:
    """The environment as a source of flags. A mistyped variable would have no effect without a word."""

    def __init__(self, unknown: list[str]) -> None:
        self._unknown = unknown

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        Env(PREFIX, command=False)(app, commands, arguments)
        flags = (argument for argument in arguments if argument.parse)
        known = {_variable(name) for flag in flags for name in flag.names} | _NO_FLAGS
        given = sorted(name for name in os.environ if name.startswith(PREFIX))
        self._unknown += [
            f"{name}: no flag has this variable{nearest(name, sorted(known))}; it has no effect"
            for name in given
            if name not in known
        ]
        used = (token for argument in arguments for token in argument.tokens)
        for token in used:
            if token.keyword == f"{PREFIX}PORT" and token.value.startswith(_SERVICE_LINKS):
                raise ConfigError(
                    f"{PREFIX}PORT={token.value!r}: Kubernetes makes this variable of a Service called "
                    "'aioengine'; set enableServiceLinks: false in the pod, call the Service otherwise, or "
                    "give --port"
                )


class _File:
    """The table ``[server]`` of a configuration file as a source of flags. It is read after the variables, so
    that mistyped ones are known even if the file is wrong."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        table = _flags(self._file)
        for name in reversed(commands):  # cyclopts wants it below the names of the commands
            table = {name: table}
        Dict(table, source=f"[server] of {self._file}")(app, commands, arguments)


def _variable(flag: str) -> str:
    return PREFIX + flag.strip("-").upper().replace("-", "_").replace(".", "_")


def use_sources(app: App, tokens: Sequence[str], unknown: list[str]) -> None:
    """Let the command that ``tokens`` name take its flags from the environment and the file, too.

    A flag overrides its variable, and the variable overrides the file. Parsing adds to ``unknown`` what to
    tell about variables that no flag has. It raises ConfigError if ``[server]`` is no table, or has a field
    that is no flag of ``aioengine serve``.
    """
    path = next((names for names in _CONFIGURED if tuple(tokens[: len(names)]) == names), None)
    if path is None:
        return
    command = app
    for name in path:
        command = command[name]
    file = _config_file(tokens[len(path) :])
    sources = [_Variables(unknown), *([] if file is None else [_File(file)])]
    command.config = tuple(sources)


def _config_file(tokens: Sequence[str]) -> str | None:
    for index, token in enumerate(tokens):
        if token.startswith("--config="):
            return token.partition("=")[2]
        if token == "--config" and index + 1 < len(tokens):
            return tokens[index + 1]
    return os.environ.get(f"{PREFIX}CONFIG") or None


def _flags(file: str) -> dict[str, Any]:
    """Return the table ``[server]``, by the names of flags."""
    table = server_table(file)
    refuse_unknown_fields(table, file)
    return {name.replace("_", "-"): value for name, value in table.items()}
