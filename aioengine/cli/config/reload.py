"""SIGHUP: reads the configuration again, and applies the changes that are possible while requests run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from aioengine.adapters.read_threads import start_read
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


RELOADABLE = (
    *(*WAITING_BOUNDS, "policy"),
    *("served_model_name", "max_body_bytes", "max_choices", "default_max_tokens"),
    *("open_objects", "any_whitespace", "lenient_schemas"),
    *("request_timeout", "read_timeout", "stuck_step_seconds"),
)
"""What can change while a server runs, beside its adapters and its certificate: fields of the engine's
configuration, and of ``[server]``. (The keys file is read again by itself, whenever it changes.)"""


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

    async def reload(self, engine: AsyncEngine | None, app: ServerApp) -> None:
        """Apply the changes. Log which were applied, which need a restart, and what is wrong. Without an
        engine, which is a fleet, only the certificate is read again."""
        self.good = False
        try:
            is_renewed = self._certificate is not None and await _read_in_time(self._certificate.renew)
            changed = [] if engine is None else await self._apply(engine, app)
        except AioEngineError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        self.good = True
        if is_renewed:
            changed.append("the TLS certificate")
        logger.info("read the configuration again; changed: %s", ", ".join(changed) or "nothing")
        # Compared with the start, so that the log names them until the restart.
        kept = [name for name in _differing(self._started, self._before) if not _reloadable(name)]
        if engine is None:
            logger.warning("of a fleet, only the TLS certificate is read again: restart to apply the rest")
        elif kept:
            logger.warning("these changes in the configuration need a restart: %s", ", ".join(kept))

    async def _apply(self, engine: AsyncEngine, app: ServerApp) -> list[str]:
        """Read the configuration, and apply it. Returns what has changed. Raises AioEngineError, and has
        changed nothing then."""
        before, now = self._before, await _read_in_time(self._read)
        old, paths = before.adapters, now.adapters
        new, gone = paths.keys() - old.keys(), old.keys() - paths.keys()
        moved = {name for name in paths.keys() & old.keys() if old[name] != paths[name]}
        async with contextlib.AsyncExitStack() as undo:
            for name in sorted(new):
                engine.register_adapter(name, paths[name])
                undo.push_async_callback(engine.unload_adapter, name)
            for name in sorted(moved):
                await engine.prepare_adapter(name, paths[name])
                undo.callback(engine.discard_adapter, name)
            changes = {name: getattr(now.config, name) for name in (*WAITING_BOUNDS, "policy")}
            engine.change_settings(
                **{name: value for name, value in changes.items() if value != getattr(engine.config, name)}
            )
            undo.pop_all()
        # Nothing can fail from here on.
        self._before = now
        app.change(now.settings)
        for name in moved:
            engine.commit_adapter(name)
        for name in gone:
            try:
                await engine.unload_adapter(name)
            except AioEngineError as error:  # pinned, or unloaded over HTTP
                logger.warning("adapter %r is no longer configured, and stays: %s", name, error)
        changed = [f"{name}={value}" for name, value in _differing(before, now).items() if _reloadable(name)]
        done = {"registered": new, "replaced": moved, "unloaded": gone}
        return changed + [f"{what} {', '.join(sorted(names))}" for what, names in done.items() if names]


async def _read_in_time(read: Callable[[], T]) -> T:
    """Return ``read()``, from a thread that can be abandoned. Raises ConfigError if it takes too long."""
    reading = start_read("aioengine-reload", read)
    await asyncio.wait({reading}, timeout=READ_SECONDS)
    if not reading.done():
        reading.cancel()
        raise ConfigError(f"its files could not be read within {READ_SECONDS:g} s; does their disk hang?")
    return reading.result()


def _reloadable(setting: str) -> bool:
    return setting.removeprefix("[server] ") in RELOADABLE


def _differing(one: Checked, other: Checked) -> dict[str, Any]:
    """Return the settings of ``other`` that differ from those of ``one``, by name."""
    before, now = _settings(one), _settings(other)
    return {name: value for name, value in now.items() if before.get(name) != value}


def _settings(checked: Checked) -> dict[str, Any]:
    """Return all settings by name, those of adapters each for itself."""
    config, fleet = checked.config, checked.replicas
    lora = {} if config.lora is None else msgspec.structs.asdict(config.lora)
    return {
        **msgspec.structs.asdict(msgspec.structs.replace(config, lora=None)),
        **{f"lora.{name}": value for name, value in lora.items()},
        **{f"[server] {name}": value for name, value in vars(checked.flags).items()},
        "[fleet]": None if fleet is None else {**msgspec.structs.asdict(fleet), "engine": None},
    }
