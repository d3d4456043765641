"""SIGHUP: reads the configuration again, and applies the changes that are possible while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import msgspec

from aioengine.adapters.read_threads import ReadThreads
from aioengine.cli.config.file import fleet_table, server_table
from aioengine.cli.flags import EngineFlags, check_folders
from aioengine.config import WAITING_BOUNDS, EngineConfig
from aioengine.errors import AioEngineError, ConfigError

if TYPE_CHECKING:
    from aioengine.engine import AsyncEngine
    from aioengine.server.app import ServerApp
    from aioengine.server.settings import ServerSettings
    from aioengine.server.transport.tls import Certificate, Loaded

T = TypeVar("T")

logger = logging.getLogger("aioengine.server")

READ_SECONDS = 30.0
"""Files that take longer to read are given up: their disk may hang."""
SERVER_DEFAULTS = {"max_waiting": 1024, "max_waiting_tokens": 2**20, "policy": "fair"}
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


def server_config(flags: EngineFlags) -> EngineConfig:
    """Return the configuration of a server: where the file and the flags say nothing, waiting requests have
    bounds, and tenants equal shares. Raises ConfigError."""
    values, source = flags.settings()
    return EngineConfig.from_dict({**SERVER_DEFAULTS, **values}, source=source)


class _Read(NamedTuple):
    """Present content of the file, after its checks."""

    config: EngineConfig
    server: Mapping[str, Any]
    flags: ServerFlags
    adapters: Mapping[str, str]
    fleet: Mapping[str, Any] | None
    tls: Loaded | None


class Reloader:
    """Compares the present content of the file with the earlier one.

    Either all reloadable changes are applied or, if a part of the file is wrong or an adapter cannot be read,
    none. Flags and variables override the file as they did at the start.
    """

    def __init__(
        self, flags: EngineFlags, server_flags: ServerFlags, certificate: Certificate | None = None
    ) -> None:
        self._engine_flags = flags
        self._flags = server_flags
        self._certificate = certificate
        self._server = self._server_table()
        self._fleet = fleet_table(flags.config)
        self._adapters = flags.adapters()
        self.good = True
        """Whether the server runs with what was read last."""

    async def reload(self, engine: AsyncEngine, app: ServerApp) -> None:
        """Apply the changes. Log which were applied, which need a restart, and what is wrong."""
        before = engine.config
        self.good = False
        try:
            found = await _read_in_time(self._read)
            settings = found.flags.settings()
            adapters = _AdapterChanges.between(self._adapters, found.adapters)
            config = found.config
            async with contextlib.AsyncExitStack() as undo:
                await adapters.begin(engine, found.adapters, undo)
                if config.policy != before.policy:
                    engine.change_policy(str(config.policy))
                undo.pop_all()
        except AioEngineError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        self.good = True
        # Nothing can fail from here on.
        engine.change_limits(**{name: getattr(config, name) for name in WAITING_BOUNDS})
        app.change(settings)
        changed = [
            *(f"{n}={getattr(config, n)}" for n in RELOADABLE if getattr(config, n) != getattr(before, n)),
            *(
                f"[server] {name}={getattr(found.flags, name)}"
                for name in RELOADABLE_SERVER
                if getattr(found.flags, name) != getattr(self._flags, name)
            ),
            *await adapters.finish(engine),
        ]
        if self._certificate is not None and found.tls is not None and self._certificate.use(found.tls):
            changed.append("the TLS certificate")
        kept = [name for name in _differing(config, before) if name not in RELOADABLE]
        kept += [
            f"[server] {name}"
            for name in sorted(found.server.keys() | self._server.keys())
            if name not in RELOADABLE_SERVER and found.server.get(name) != self._server.get(name)
        ]
        kept += ["[fleet]"] if found.fleet != self._fleet else []
        # Fields that need a restart are compared with the start, so the log names them until the restart.
        self._flags, self._adapters = found.flags, dict(found.adapters)
        self._server = {
            **{name: value for name, value in self._server.items() if name not in RELOADABLE_SERVER},
            **{name: value for name, value in found.server.items() if name in RELOADABLE_SERVER},
        }
        logger.info("read the configuration again; changed: %s", ", ".join(changed) or "nothing")
        if kept:
            logger.warning("these changes in the configuration need a restart: %s", ", ".join(kept))

    async def reload_certificate(self) -> None:
        """Read the TLS certificate again, and log the result. For a fleet, which can reload nothing else."""
        if self._certificate is None:
            return
        self.good = False
        try:
            context = await _read_in_time(self._certificate.renewed)
        except ConfigError as error:
            logger.error("the TLS certificate stays as it was: %s", error)
            return
        self.good = True
        new = self._certificate.use(context)
        logger.info("read the TLS certificate again; it is %s", "a new one" if new else "the same")

    def _read(self) -> _Read:
        config, server = server_config(self._engine_flags), self._server_table()
        adapters = self._engine_flags.adapters()
        check_folders(adapters)
        flags = self._merged(server)
        for name in flags.served_model_name or (config.model_name,):
            if name in adapters:
                raise ConfigError(f"[adapters]: {name!r} is the base model's name in requests; use another")
        fleet = fleet_table(self._engine_flags.config)
        tls = None if self._certificate is None else self._certificate.renewed()
        return _Read(config, server, flags, adapters, fleet, tls)

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

    def _server_table(self) -> Mapping[str, Any]:
        config = self._engine_flags.config
        return {} if config is None else server_table(str(config))


async def _read_in_time(read: Callable[[], T]) -> T:
    """Return ``read()``, from a thread that can be abandoned. Raises ConfigError if it takes too long."""
    reading = ReadThreads("aioengine-reload").start(read)
    await asyncio.wait({reading}, timeout=READ_SECONDS)
    if not reading.done():
        reading.cancel()
        raise ConfigError(f"its files could not be read within {READ_SECONDS:g} s; does their disk hang?")
    return reading.result()


class _AdapterChanges(NamedTuple):
    """Names of configured adapters, by the change that they need."""

    new: Set[str]
    moved: Set[str]
    gone: Set[str]

    @classmethod
    def between(cls, before: Mapping[str, str], now: Mapping[str, str]) -> Self:
        moved = {name for name, path in now.items() if before.get(name, path) != path}
        return cls(now.keys() - before.keys(), moved, before.keys() - now.keys())

    async def begin(
        self, engine: AsyncEngine, paths: Mapping[str, str], undo: contextlib.AsyncExitStack
    ) -> None:
        """Make the changes that can fail; ``undo`` gets callbacks that undo them. Raises AdapterLoadError and
        other errors of adapters."""
        for name in sorted(self.moved):
            await engine.prepare_adapter(name, paths[name])
            undo.callback(engine.discard_adapter, name)
        for name in sorted(self.new):
            engine.register_adapter(name, paths[name])
            undo.push_async_callback(engine.unload_adapter, name)

    async def finish(self, engine: AsyncEngine) -> list[str]:
        """Make the other changes. Returns descriptions of all changes."""
        for name in self.moved:
            engine.commit_adapter(name)
        for name in self.gone:
            try:
                await engine.unload_adapter(name)
            except AioEngineError as error:  # pinned, or unloaded over HTTP
                logger.warning("adapter %r is no longer configured, and stays: %s", name, error)
        done = {"registered": self.new, "replaced": self.moved, "unloaded": self.gone}
        return [f"{what} {', '.join(sorted(names))}" for what, names in done.items() if names]


def _differing(one: EngineConfig, other: EngineConfig) -> list[str]:
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    if "lora" in names and one.lora is not None and other.lora is not None:
        names.remove("lora")
        mine, theirs = one.lora, other.lora
        names += [f"lora.{n}" for n in mine.__struct_fields__ if getattr(mine, n) != getattr(theirs, n)]
    return names
