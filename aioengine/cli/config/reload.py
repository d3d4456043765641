"""SIGHUP: reads the configuration again, and applies the changes that are possible while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import msgspec

from aioengine.cli.config.file import server_table
from aioengine.cli.flags import EngineFlags, check_folders
from aioengine.config import WAITING_BOUNDS, EngineConfig
from aioengine.errors import AioEngineError, ConfigError

if TYPE_CHECKING:
    from aioengine.engine import AsyncEngine
    from aioengine.server.app import ServerApp
    from aioengine.server.settings import ServerSettings

logger = logging.getLogger("aioengine.server")

DEFAULT_BOUNDS = {"max_waiting": 1024, "max_waiting_tokens": 2**20}
"""Bounds of a server on requests that wait, where the configuration has none."""
RELOADABLE = (*WAITING_BOUNDS, "policy")
"""Fields of the engine's configuration that can be reloaded."""
RELOADABLE_SERVER = (
    "served_model_name",
    "max_body_bytes",
    "max_choices",
    "default_max_tokens",
    "open_objects",
    "any_whitespace",
    "lenient_schemas",
    "request_timeout",
    "read_timeout",
    "send_timeout",
    "stuck_step_seconds",
)
"""Fields of the table ``[server]`` that can be reloaded. The keys file is read again by itself, whenever it
changes."""


class ServerFlags(Protocol):
    """The flags of ``aioengine serve``: a dataclass with all reloadable fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def served_model_name(self) -> list[str] | None: ...
    def settings(self) -> ServerSettings: ...


def bounded(config: EngineConfig) -> EngineConfig:
    """Give a server's configuration the default bounds on waiting requests where it has none."""
    missing = {name: most for name, most in DEFAULT_BOUNDS.items() if getattr(config, name) is None}
    return msgspec.structs.replace(config, **missing)


class _Read(NamedTuple):
    """Present content of the file, after its checks."""

    config: EngineConfig
    server: Mapping[str, Any]
    flags: ServerFlags
    adapters: Mapping[str, str]


class Reloader:
    """Compares the present content of the file with the earlier one.

    Either all reloadable changes are applied or, if a part of the file is wrong or an adapter cannot be read,
    none. Flags and variables override the file as they did at the start.
    """

    def __init__(self, flags: EngineFlags, server_flags: ServerFlags) -> None:
        self._engine_flags = flags
        self._flags = server_flags
        self._server = self._server_table()
        self._adapters = flags.adapters()

    async def reload(self, engine: AsyncEngine, app: ServerApp) -> None:
        """Apply the changes. Log which were applied, which need a restart, and what is wrong."""
        try:
            found = await asyncio.to_thread(self._read)
            settings = found.flags.settings()
            moved = await self._prepared(engine, found.adapters)
        except AioEngineError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        changed: list[str] = []
        before = engine.config
        config = bounded(found.config)
        if config.policy != before.policy:
            try:
                engine.change_policy(str(config.policy))
            except AioEngineError as error:
                for name in moved:
                    engine.discard_adapter(name)
                logger.error("the configuration stays as it was: %s", error)
                return
        engine.change_limits(**{name: getattr(config, name) for name in WAITING_BOUNDS})
        changed += [
            f"{name}={getattr(config, name)}"
            for name in RELOADABLE
            if getattr(config, name) != getattr(before, name)
        ]
        app.change(settings)
        changed += [
            f"[server] {name}={getattr(found.flags, name)}"
            for name in RELOADABLE_SERVER
            if getattr(found.flags, name) != getattr(self._flags, name)
        ]
        changed += await self._adapted(engine, found.adapters, moved)
        kept = [name for name in _differing(config, before) if name not in RELOADABLE]
        kept += [
            f"[server] {name}"
            for name in sorted(found.server.keys() | self._server.keys())
            if name not in RELOADABLE_SERVER and found.server.get(name) != self._server.get(name)
        ]
        # Fields that need a restart are compared with the start, so the log names them until the restart.
        self._flags, self._adapters = found.flags, dict(found.adapters)
        self._server = {
            **{name: value for name, value in self._server.items() if name not in RELOADABLE_SERVER},
            **{name: value for name, value in found.server.items() if name in RELOADABLE_SERVER},
        }
        logger.info("read the configuration again; changed: %s", ", ".join(changed) or "nothing")
        if kept:
            logger.warning("these changes in the configuration need a restart: %s", ", ".join(kept))

    def _read(self) -> _Read:
        config, server = self._engine_flags.engine_config(), self._server_table()
        adapters = self._engine_flags.adapters()
        check_folders(adapters)
        flags = self._merged(server)
        for name in flags.served_model_name or (config.model_name,):
            if name in adapters:
                raise ConfigError(f"[adapters]: {name!r} is the base model's name in requests; use another")
        return _Read(config, server, flags, adapters)

    def _merged(self, server: Mapping[str, Any]) -> ServerFlags:
        """Return the flags with the file's present values, except where a flag or variable overrides them.
        Raises ConfigError."""
        kind = type(self._flags)
        defaults = {field.name: field.default for field in dataclasses.fields(self._flags)}
        new: dict[str, Any] = {}
        for name in RELOADABLE_SERVER:
            if getattr(self._flags, name) == self._server.get(name, defaults[name]):
                new[name] = server.get(name, defaults[name])
        try:
            checked = msgspec.convert({k: v for k, v in new.items() if v is not None}, kind)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self._engine_flags.config}, table server: {error}") from error
        return dataclasses.replace(self._flags, **{name: getattr(checked, name) for name in new})

    async def _prepared(self, engine: AsyncEngine, adapters: Mapping[str, str]) -> list[str]:
        """Read the adapters whose path has changed. If one cannot be read, all of them are dropped. Raises
        AdapterLoadError and other errors of adapters."""
        moved = [n for n, path in adapters.items() if n in self._adapters and self._adapters[n] != path]
        for index, name in enumerate(moved):
            try:
                await engine.prepare_adapter(name, adapters[name])
            except AioEngineError:
                for other in moved[:index]:
                    engine.discard_adapter(other)
                raise
        return moved

    async def _adapted(self, engine: AsyncEngine, adapters: Mapping[str, str], moved: list[str]) -> list[str]:
        """Register, replace and unload adapters in the engine. Returns descriptions of the changes."""
        for name in moved:
            engine.commit_adapter(name)
        new, gone = adapters.keys() - self._adapters.keys(), self._adapters.keys() - adapters.keys()
        for name in new:
            engine.register_adapter(name, adapters[name])
        for name in gone:
            try:
                await engine.unload_adapter(name)
            except AioEngineError as error:  # pinned, or unloaded over HTTP
                logger.warning("adapter %r is no longer configured, and stays: %s", name, error)
        done = {"registered": new, "replaced": moved, "unloaded": gone}
        return [f"{what} {', '.join(sorted(names))}" for what, names in done.items() if names]

    def _server_table(self) -> Mapping[str, Any]:
        config = self._engine_flags.config
        return {} if config is None else server_table(str(config))


def _differing(one: EngineConfig, other: EngineConfig) -> list[str]:
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    if "lora" in names and one.lora is not None and other.lora is not None:
        names.remove("lora")
        mine, theirs = one.lora, other.lora
        names += [f"lora.{n}" for n in mine.__struct_fields__ if getattr(mine, n) != getattr(theirs, n)]
    return names
