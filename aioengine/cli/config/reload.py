"""SIGHUP: reads the configuration again, and applies the changes that are possible while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import msgspec

from aioengine.adapters.read_threads import ReadThreads
from aioengine.config import WAITING_BOUNDS
from aioengine.errors import AioEngineError, ConfigError

if TYPE_CHECKING:
    from aioengine.cli.config.checked import Checked
    from aioengine.engine import AsyncEngine
    from aioengine.server.app import ServerApp

T = TypeVar("T")

logger = logging.getLogger("aioengine.server")

READ_SECONDS = 30.0
"""Files that take longer to read are given up: their disk may hang."""


class Reloadable(msgspec.Struct, frozen=True, kw_only=True):
    """What can change while a server runs, beside its adapters and its certificate: fields of the engine's
    configuration, and of ``[server]``. (The keys file is read again by itself, whenever it changes.)"""

    max_waiting: int | None
    max_waiting_per_tenant: int | None
    max_waiting_per_adapter: int | None
    max_waiting_tokens: int | None
    max_waiting_tokens_per_tenant: int | None
    policy: str | dict[str, Any]

    served_model_name: list[str] | None
    max_body_bytes: int | None
    max_choices: int
    default_max_tokens: int | None
    open_objects: bool
    any_whitespace: bool
    lenient_schemas: bool
    request_timeout: float | None
    read_timeout: float
    send_timeout: float
    stuck_step_seconds: float


class Reloader:
    """Compares the present configuration with the earlier one.

    Either all reloadable changes are applied or, if a part of the file is wrong or an adapter cannot be read,
    none. Flags and variables override the file as they did at the start.

    Args:
        started: The configuration that the server has started with.
        read: Returns the present one. Blocks. Raises ConfigError.
    """

    def __init__(self, started: Checked, read: Callable[[], Checked]) -> None:
        self._started = started
        self._before = started
        self._read = read
        self._certificate = started.listen.tls
        self.good = True
        """Whether the server runs with what was read last."""

    async def reload(self, engine: AsyncEngine, app: ServerApp) -> None:
        """Apply the changes. Log which were applied, which need a restart, and what is wrong."""
        before = self._before
        self.good = False
        try:
            now = await _read_in_time(self._read)
            tls = None if self._certificate is None else await _read_in_time(self._certificate.renewed)
            adapters = _AdapterChanges.between(before.adapters, now.adapters)
            async with contextlib.AsyncExitStack() as undo:
                await adapters.begin(engine, now.adapters, undo)
                if now.config.policy != engine.config.policy:
                    engine.change_policy(str(now.config.policy))
                undo.pop_all()
        except AioEngineError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        self.good = True
        # Nothing can fail from here on.
        self._before = now
        engine.change_limits(**{name: getattr(now.config, name) for name in WAITING_BOUNDS})
        app.change(now.settings)
        changed = [
            f"{name}={value}"
            for name, value in _differing(before, now).items()
            if name.removeprefix("[server] ") in Reloadable.__struct_fields__
        ]
        changed += await adapters.finish(engine)
        if self._certificate is not None and tls is not None and self._certificate.use(tls):
            changed.append("the TLS certificate")
        # Compared with the start, so that the log names them until the restart.
        kept = [
            name
            for name in _differing(self._started, now)
            if name.removeprefix("[server] ") not in Reloadable.__struct_fields__
        ]
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


async def _read_in_time(read: Callable[[], T]) -> T:
    """Return ``read()``, from a thread that can be abandoned. Raises ConfigError if it takes too long."""
    reading = ReadThreads("aioengine-reload").start(read)
    await asyncio.wait({reading}, timeout=READ_SECONDS)
    if not reading.done():
        reading.cancel()
        raise ConfigError(f"its files could not be read within {READ_SECONDS:g} s; does their disk hang?")
    return reading.result()


def _differing(one: Checked, other: Checked) -> dict[str, Any]:
    """Return the settings of ``other`` that differ from those of ``one``, by name."""
    before, now = _settings(one), _settings(other)
    return {name: value for name, value in now.items() if before.get(name) != value}


def _settings(checked: Checked) -> dict[str, Any]:
    """Return all settings by name. Of a field with a struct, there are the struct's fields."""
    found = _fields(checked.config)
    if (lora := found.pop("lora")) is not None:
        found |= _fields(lora, "lora.")
    found |= {f"[server] {name}": value for name, value in vars(checked.flags).items()}
    fleet = None if checked.replicas is None else _fields(checked.replicas)
    return {**found, "[fleet]": fleet and {**fleet, "engine": None}}


def _fields(struct: msgspec.Struct, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": getattr(struct, name) for name in struct.__struct_fields__}


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
            await engine.versions.prepare(name, paths[name])
            undo.callback(engine.versions.discard, name)
        for name in sorted(self.new):
            engine.register_adapter(name, paths[name])
            undo.push_async_callback(engine.unload_adapter, name)

    async def finish(self, engine: AsyncEngine) -> list[str]:
        """Make the other changes. Returns descriptions of all changes."""
        for name in self.moved:
            engine.versions.commit(name)
        for name in self.gone:
            try:
                await engine.unload_adapter(name)
            except AioEngineError as error:  # pinned, or unloaded over HTTP
                logger.warning("adapter %r is no longer configured, and stays: %s", name, error)
        done = {"registered": self.new, "replaced": self.moved, "unloaded": self.gone}
        return [f"{what} {', '.join(sorted(names))}" for what, names in done.items() if names]
